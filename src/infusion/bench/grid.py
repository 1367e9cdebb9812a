"""What the benchmark runs: a grid of methods, subjects, modalities and seeds, from a small file."""

from __future__ import annotations

import hashlib
import inspect
import json
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from infusion.errors import InfusionError
from infusion.methods import METHODS, STRENGTH
from infusion.world.facing import FACINGS
from infusion.world.vocabulary import BACKGROUNDS, POSITIONS, STYLES

DEFAULTS = Path(__file__).parent / "defaults.toml"
REFERENCES = ("class-word", "described")  # the base itself, nothing learned
_OURS = ("method", "prior", "strengths")  # keys of a method's table that are not its configuration's


class Modality(BaseModel):
    """What all photos of a subject have in common. Without a background it is the subject's own, by its number; without a facing they face
    either way."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    background: str | None = None
    style: str = "photo"
    position: str = "center"
    facing: str | None = None

    @field_validator("background", "style", "position", "facing")
    @classmethod
    def _of_the_world(cls, value: str | None, info: ValidationInfo) -> str | None:
        known = {"background": BACKGROUNDS, "style": STYLES, "position": POSITIONS, "facing": FACINGS}
        if value is not None and value not in (names := known[info.field_name or ""]):
            raise ValueError(f"use one of {', '.join(names)}")
        return value

    @property
    def label(self) -> str:
        """A name for files: "photo-center", "beach-sketch-left", "photo-center-facing_left"."""
        facing = f"facing {self.facing}" if self.facing else None
        return "-".join(v.replace(" ", "_") for v in (self.background, self.style, self.position, facing) if v)

    @property
    def settings(self) -> dict[str, Any]:
        """As jobs and records have it: without a facing where there is none."""
        return self.model_dump(exclude=None if self.facing else {"facing"})


class Grid(BaseModel):
    """The benchmark's settings; `defaults.toml` explains each. subjects: how many, or which by their numbers. methods: label -> settings of
    the method's configuration, with `method` where the label is not the method's name, `prior`, the number of pictures of the class that it preserves, and `strengths`, at
    each of which what was learned is drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    split: Literal["dev", "test"]
    subjects_seed: int = Field(ge=0)
    subjects: tuple[int, ...]
    seeds: tuple[int, ...] = Field(min_length=1)
    points: tuple[int, ...] = Field(min_length=1)
    batch: int = Field(ge=1)
    pictures: int = Field(ge=1)
    denoising_steps: int = Field(ge=1)
    modalities: tuple[Modality, ...] = Field(min_length=1)
    methods: dict[str, dict[str, Any]] = Field(min_length=1)

    @field_validator("subjects", mode="before")
    @classmethod
    def _numbered(cls, subjects: Any) -> tuple[int, ...]:
        numbers = range(subjects) if type(subjects) is int else subjects
        whole = isinstance(numbers, range | list | tuple) and all(type(n) is int and n >= 0 for n in numbers)
        if not whole or not numbers or len(set(numbers)) < len(numbers):
            raise ValueError("give how many, from 1 on, or the numbers of different ones from 0 on, as in [0, 3]")
        return tuple(numbers)

    @field_validator("points")
    @classmethod
    def _rising(cls, points: tuple[int, ...]) -> tuple[int, ...]:
        if list(points) != sorted(set(points)) or points[0] < 1:
            raise ValueError("give steps that rise from 1 on, as in [50, 125]")
        return points

    @field_validator("seeds", "modalities")
    @classmethod
    def _different(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if twice := [v for v in values if values.count(v) > 1]:
            raise ValueError(f"{twice[0]!r} is there twice; give each once")
        return values

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for label, settings in methods.items():
            if {"/", "\\"} & set(label):
                raise ValueError(f"{label!r} would be part of file names; leave slashes out")
            name = settings.get("method", label)
            if name in REFERENCES:
                if given := settings.keys() - {"method"}:
                    raise ValueError(f"{label} learns nothing and has no setting {sorted(given)[0]!r}; take it out")
                continue
            if name not in METHODS:
                raise ValueError(f"{name!r} is no method; use one of {', '.join((*REFERENCES, *METHODS))}")
            learn, config = METHODS[name]
            taken = inspect.signature(learn).parameters.keys()
            if "prior" in settings and "prior" not in taken:
                raise ValueError(f"{label} preserves no prior; take prior out")
            if type(prior := settings.get("prior", 0)) is not int or prior < 0:
                raise ValueError(f"{label}: prior is {prior!r}; give a whole number of pictures, 0 for none")
            if type(limit := settings.get("max_timestep", 1)) is not int or limit < 1:
                raise ValueError(f"{label}: max_timestep is {limit!r}; give a whole number of at least 1")
            _check_strengths(label, settings.get("strengths", (1.0,)), name in STRENGTH)
            known = {f.name for f in fields(config)} - {"steps", "batch", "seed"} | ({"max_timestep"} & taken)
            if bad := settings.keys() - known - {*_OURS}:
                raise ValueError(f"{label} has no setting {sorted(bad)[0]!r}; use one of {', '.join(sorted(known))}")
        return methods


def _check_strengths(label: str, strengths: Any, drawable: bool) -> None:
    """Raise ValueError unless they are different numbers above 0, and all 1 for a method that draws at its whole strength only."""
    numbers = isinstance(strengths, list | tuple) and all(type(s) in (int, float) and s > 0 for s in strengths)
    if not numbers or not strengths or len(set(strengths)) < len(strengths):
        raise ValueError(f"{label}: strengths is {strengths!r}; give different numbers above 0, as in [1.0, 0.5]")
    if not drawable and tuple(strengths) != (1,):
        raise ValueError(f"{label} is drawn at its whole strength only; take strengths out")


@dataclass(frozen=True)
class Job:
    """One method on one subject: everything that decides its result, nothing about when or where it runs. settings: all of the
    method's configuration, defaults too, so that a job of other defaults is another job; what follows from the photos alone (Infusion's rate
    and limit where none is given) stands in the record's `concept_settings`."""

    label: str
    method: str
    settings: dict[str, Any]
    prior: int
    strengths: tuple[float, ...]
    split: str
    subjects_seed: int
    subject: int
    modality: dict[str, Any]
    seed: int
    points: tuple[int, ...]
    batch: int
    pictures: int
    denoising_steps: int

    @property
    def name(self) -> str:
        """Its file's name without the ending; two jobs of different settings differ in it."""
        decides = (
            self.method, self.settings, self.prior, self.strengths, self.points, self.batch, self.pictures, self.denoising_steps,
        )  # fmt: skip
        text = json.dumps(decides, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        place = Modality(**self.modality).label
        return f"{self.label}-{self.split}{self.subjects_seed}-{self.subject:03d}-{place}-{self.seed}-{digest}"


def load_grid(path: Path | None = None, overrides: dict[str, Any] | None = None) -> Grid:
    """The defaults, then the file's keys, then `overrides` ("methods.infusion.learning_rate": 0.03).

    A file's [methods] replace the default's as a whole. Raises InfusionError for what cannot be read or is not known.
    """
    settings = tomllib.loads(DEFAULTS.read_text())
    try:
        if path is not None:
            settings |= tomllib.loads(path.read_text())
        for key, value in (overrides or {}).items():
            *parents, last = _parts(key, settings)
            place = settings
            for parent in parents:
                place = place.setdefault(parent, {}) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                raise InfusionError(
                    f"{key!r} is no setting: {'.'.join(parents)!r} has no keys; see bench/defaults.toml."
                )
            place[last] = value
        return Grid(**settings)
    except OSError as error:
        raise InfusionError(f"{str(path)!r} cannot be read ({error.strerror}); give a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InfusionError(f"{str(path)!r} is not TOML ({error}); see bench/defaults.toml.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = (Modality if where.startswith("modalities.") else Grid).model_fields
            raise InfusionError(
                f"There is no setting {where!r}; use one of {', '.join(known)}, of which bench/defaults.toml tells more."
            ) from None
        given = "" if isinstance(first["input"], dict) else f" is {first['input']!r}"
        said = first["msg"].removeprefix("Value error, ")
        raise InfusionError(
            f"The benchmark's setting {where!r}{given}: {said}. bench/defaults.toml shows all of them."
        ) from None


def _parts(key: str, settings: dict[str, Any]) -> list[str]:
    """ "methods.infusion 0.06.strengths" as its parts: the labels of methods may hold dots."""
    for label in sorted(settings.get("methods", {}), key=len, reverse=True):
        if key.startswith(f"methods.{label}."):
            return ["methods", label, *key.removeprefix(f"methods.{label}.").split(".")]
    return key.split(".")


def _resolved(settings: dict[str, Any], method: str) -> dict[str, Any]:
    """The method's whole configuration with these settings, as JSON has it; what the grid decides for all methods left out."""
    given = {k: v for k, v in settings.items() if k not in _OURS}
    if method in REFERENCES:
        return given
    _, config = METHODS[method]
    own = {f.name for f in fields(config)}
    whole = asdict(config(**{k: v for k, v in given.items() if k in own}))
    left = {k: v for k, v in given.items() if k not in own}
    return json.loads(json.dumps({k: v for k, v in whole.items() if k not in ("steps", "batch", "seed")} | left))


def jobs(grid: Grid, only: tuple[str, ...] = ()) -> list[Job]:
    """All jobs of the grid, subject by subject, so that an interrupted run holds whole subjects. only: labels of methods."""
    if unknown := set(only) - grid.methods.keys():
        raise InfusionError(f"The grid has no method {sorted(unknown)[0]!r}; it has {', '.join(grid.methods)}.")
    chosen = {label: s for label, s in grid.methods.items() if not only or label in only}
    return [
        Job(
            label,
            settings.get("method", label),
            _resolved(settings, settings.get("method", label)),
            settings.get("prior", 0),
            tuple(map(float, settings.get("strengths", (1.0,)))),
            grid.split,
            grid.subjects_seed,
            subject,
            modality.settings,
            seed,
            grid.points,
            grid.batch,
            grid.pictures,
            grid.denoising_steps,
        )
        for subject in grid.subjects
        for modality in grid.modalities
        for seed in grid.seeds
        for label, settings in chosen.items()
    ]
