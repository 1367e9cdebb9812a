"""Steer a training by the figures of its overfitting: look every so often, stop when two looks in a row find that it repeats its
photos, keep the best.

    for now in steered(pipe, infusion(pipe, lesson), lesson, SteerConfig(every=50)):
        print(now.state.step, now.checkup)
    now.kept.adapter, now.stopped

Works for every method of `infusion.methods`, on any base. A picture repeats the photos' background when, outside the subject, it is
more like a photo than nine in ten of the base's own pictures of the same prompts and seeds are; it repeats their position when its subject,
as the base's attention finds it, stands where a photo's does and not at the side that was asked for. Where prompts leave the place open, how
often it stands there is told as the pull; it stops nothing.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from infusion.concept import beside
from infusion.config import check_prompts, hold_types
from infusion.errors import InfusionError
from infusion.evaluation import OTHERS, PROMPTS, forgetting, unrelated
from infusion.files import write_whole
from infusion.generation import Progress, default_batch, generate, of_each
from infusion.lesson import Lesson, attention_masks, encode_pictures
from infusion.methods.interface import Adapter, MethodState, rebuilt
from infusion.metrics.estimate import Estimate, rate
from infusion.metrics.similarity import background_likeness, centroids, spread
from infusion.offloading import take_back
from infusion.schedulers import FEW, few_steps, multistep
from infusion.streams import require_unet

CHECKUPS = ".checkups.json"  # how the file ends that holds them, beside the adapter's
QUANTILE = 0.9  # of the base's own likeness to the photos; above it lies a repeat
OTHER_SEEDS = 500  # added for every other look; `of_each` leaves room for that many pictures of a prompt
NEAR = 1 / 6  # of the picture's side: subjects nearer to each other than this stand at the same place
POSITIONED = (
    "a photo of {} on the left",
    "a photo of {} on the right",
    "{} on the left in the snow",
    "{} on the right in the city",
    "a sketch of {} on the left",
    "a sketch of {} on the right",
)


@dataclass(frozen=True)
class SteerConfig:
    """every: steps between checkups, 0 for none; the last step is always looked at. limit: by how much the rate of repeats may exceed the
    base's own. prompts ask for backgrounds, `positioned` for positions that the photos do not show, `seeds` pictures of each."""

    every: int = 50
    stop: bool = True
    limit: float = 0.10
    prompts: tuple[str, ...] = PROMPTS
    positioned: tuple[str, ...] = POSITIONED
    seeds: int = 2
    steps: int = 20
    guidance_scale: float = 6.0
    seed: int = 0

    def __post_init__(self) -> None:
        hold_types(self)
        for field, least in (("every", 0), ("seeds", 2), ("steps", 1)):
            if getattr(self, field) < least:
                raise InfusionError(f"{field} is {getattr(self, field)}; it must be at least {least}.")
        if not self.prompts or not self.positioned:
            raise InfusionError("prompts and positioned must hold at least one prompt each.")
        check_prompts((*self.prompts, *self.positioned))
        if not 0 <= self.limit < 1:
            raise InfusionError(f"limit is {self.limit}; it must lie between 0 and 1, usually 0.1.")


@dataclass(frozen=True)
class Repeats:
    """rate: share of pictures that repeat the photos' background or position; `above` the base's own rate."""

    rate: Estimate
    above: float


@dataclass(frozen=True)
class Checkup:
    """One look. repeats: of "background", where the photos show one beside the subject, and "position". forgetting: latent Fisher divergence, eps form, on prompts that name
    neither the subject nor its class. variety: mean distance among pictures of one prompt, as a share of the base's. pull: of the photos'
    position where prompts ask for no side; None where all do."""

    step: int
    loss: float
    repeats: dict[str, Repeats]
    forgetting: float
    variety: float
    pull: Repeats | None = None


@dataclass(frozen=True)
class Steered:
    """A step of the training: its state, the checkup if there was one, the last state within the limit (a copy that later steps
    leave alone), and why training stopped, if it did."""

    state: MethodState
    checkup: Checkup | None
    best: MethodState | None
    stopped: str | None

    @property
    def kept(self) -> MethodState:
        """What to keep if training ended here: the last state within the limit after a stop, the last of all else."""
        return self.best if self.stopped and self.best else self.state


def steered(
    pipe: DiffusionPipeline,
    states: Iterator[MethodState],
    lesson: Lesson,
    config: SteerConfig | None = None,
    progress: Progress | None = None,
) -> Iterator[Steered]:
    """The method's states with checkups among them; ends at the second checkup in a row that finds the same repeated beyond the limit, if
    `config.stop`: one of some twenty pictures each is beyond it by chance too often. Where the last step's is the first to find it, the
    last step is looked at twice."""
    config, told = config or SteerConfig(), progress or (lambda *_: None)
    watch = _Watch(pipe, lesson, config, told) if config.every else None
    best: MethodState | None = None
    before: set[str] = set()
    try:
        for state in states:
            checkup = stopped = None
            if watch and (state.step % config.every == 0 or state.step == state.steps):
                checkup = watch.look(state)
                beyond = _beyond(checkup, config)
                if not beyond:
                    best = MethodState(state.step, state.steps, state.loss, copy.deepcopy(state.adapter))
                elif config.stop:
                    if not beyond & before and state.step == state.steps:  # no later look will tell
                        before, checkup = beyond, watch.look(state)
                        beyond = _beyond(checkup, config)
                    if again := beyond & before:
                        stopped = _reason(checkup, max(again, key=lambda n: checkup.repeats[n].above), best, config)
                before = beyond
            yield Steered(state, checkup, best, stopped)
            if stopped:
                return
    finally:  # the pipeline is as before also where a look failed
        if close := getattr(states, "close", None):
            close()


def _beyond(checkup: Checkup, config: SteerConfig) -> set[str]:
    return {name for name, found in checkup.repeats.items() if found.above > config.limit}


def _reason(checkup: Checkup, name: str, best: MethodState | None, config: SteerConfig) -> str:
    kept = f"step {best.step} is kept" if best else "no step before it was within the limit"
    found = checkup.repeats[name]
    return (
        f"Stopped at step {checkup.step}: {found.rate.value:.0%} of the pictures repeat the photos' {name}, "
        f"{100 * found.above:.0f} points above the base's own rate (limit {100 * config.limit:.0f}); {kept}."
    )


def repeats_place(shown: Tensor, photos: Tensor, asked: Sequence[int]) -> Tensor:
    """Which subjects (n,) stand where one does in a photo although they were asked for elsewhere.

    shown (n, 2), photos (m, 2): places as shares of height and width. asked: -1 for the left, 1 for the right, 0 for neither; who stands on
    the side asked for repeats nothing, though photos of that side (or, mirrored, of the other) be among those learned from.
    """
    obeys = torch.tensor(asked).to(shown) * (shown[:, 1] - 0.5) > NEAR
    return (torch.cdist(shown, photos).amin(1) < NEAR) & ~obeys


def _side(prompt: str) -> int:
    words = re.findall(r"\w+", prompt.lower())
    return ("right" in words) - ("left" in words)


@dataclass(frozen=True)
class _Reference:
    """The base's own pictures of one set of seeds: their centre, the likeness above which a picture repeats the photos' background (0 where
    that is not looked at), the base's own rates of repeats, how far its pictures of one prompt lie apart, and its rate of the pull."""

    seed: int
    centre: Tensor
    level: float
    rates: dict[str, float]
    spread: float
    pull: float


class _Watch:
    """The base's own pictures and how like the photos they are, drawn once, and how an adapter does beside them. Looks take turns between two
    sets of seeds, so that two in a row are not wrong for the same pictures' sake."""

    def __init__(self, pipe: DiffusionPipeline, lesson: Lesson, config: SteerConfig, told: Progress) -> None:
        if few_steps(pipe) and config.steps > FEW:
            raise InfusionError(
                f"A look draws {config.steps} steps, this base was distilled to {FEW} at most; train without looks, or give SteerConfig its steps and guidance_scale."
            )
        self.pipe = rebuilt(pipe, scheduler=multistep(pipe))
        self.config, self.lesson, self.told = config, lesson, told
        found = lesson if lesson.masked else replace(lesson, masks=attention_masks(lesson, require_unet(pipe)))
        self.outside = found.outside()
        self.places = self._places(lesson.latents)
        self.references = [self._reference(config.seed), self._reference(config.seed + OTHER_SEEDS)]
        self.looks = 0
        others = unrelated(OTHERS, lesson.word)
        seeds = [config.seed + i for i in range(2 * len(others))]
        pictures = generate(self.pipe, others * 2, seeds, config.steps, config.guidance_scale)
        latents = encode_pictures(pipe, [p.image for p in pictures])
        self.others = {o: latents[i :: len(others)] for i, o in enumerate(others)}
        take_back(self.pipe)

    def look(self, state: MethodState) -> Checkup:
        adapter: Adapter = state.adapter
        base = self.references[self.looks % len(self.references)]
        self.looks += 1
        with adapter.attached(self.pipe) as custom:
            drawn = self._drawn(custom, adapter.subject, base.seed, f"Looking at step {state.step}")
        repeats = {}
        for name, hits in self._hits(*drawn, base.centre, base.level).items():
            found = rate(hits)
            repeats[name] = Repeats(found, found.value - base.rates[name])
        some = default_batch(self.pipe)
        divergence = forgetting(self.pipe, adapter, [self.others], self.config.seed, batch=some)[0].eps.value
        variety, pulled = self._spread(drawn[0]) / base.spread, self._pulled(drawn[0])
        pull = Repeats(rate(pulled), float(pulled.double().mean()) - base.pull) if len(pulled) else None
        take_back(self.pipe)
        return Checkup(state.step, state.loss, repeats, divergence, variety, pull)

    def _reference(self, seed: int) -> _Reference:
        anywhere, positioned = self._drawn(self.pipe, f"a {self.lesson.word}", seed, "Drawing with the base")
        centre = anywhere.mean(0, keepdim=True).cpu().double()
        level = 0.0 if self.outside is None else float(self._likeness(anywhere, centre).quantile(QUANTILE))
        hits = self._hits(anywhere, positioned, centre, level)
        rates = {name: float(hit.double().mean()) for name, hit in hits.items()}
        pulled = self._pulled(anywhere)
        pull = float(pulled.double().mean()) if len(pulled) else 0.0
        return _Reference(seed, centre, level, rates, self._spread(anywhere), pull)

    def _drawn(self, pipe: DiffusionPipeline, subject: str, seed: int, label: str) -> tuple[Tensor, Tensor]:
        """Latents of the pictures of the prompts and of the positioned prompts, `seeds` of each."""
        c = self.config
        texts, seeds = of_each([p.replace("{}", subject) for p in (*c.prompts, *c.positioned)], c.seeds, seed)
        pictures = generate(pipe, texts, seeds, c.steps, c.guidance_scale, on_step=lambda a, b: self.told(label, a, b))
        latents = encode_pictures(self.pipe, [p.image for p in pictures])
        n = len(c.prompts) * c.seeds
        return latents[:n], latents[n:]

    def _hits(self, anywhere: Tensor, positioned: Tensor, centre: Tensor, level: float) -> dict[str, Tensor]:
        """Which pictures repeat a photo, in what they must not: each (n,) bool."""
        asked = [_side(prompt) for prompt in self.config.positioned for _ in range(self.config.seeds)]
        position = {"position": repeats_place(self._places(positioned), self.places, asked)}
        return position if self.outside is None else {"background": self._likeness(anywhere, centre) > level} | position

    def _pulled(self, anywhere: Tensor) -> Tensor:
        """Of the pictures whose prompts leave the place open, which stand where a photo does: (n,) bool."""
        asked = torch.tensor([_side(prompt) for prompt in self.config.prompts for _ in range(self.config.seeds)])
        left_open = anywhere[(asked == 0).to(anywhere.device)]
        if not len(left_open):
            return torch.zeros(0, dtype=torch.bool)
        return repeats_place(self._places(left_open), self.places, [0] * len(left_open))

    def _likeness(self, latents: Tensor, centre: Tensor) -> Tensor:
        """How like the nearest photo each picture is outside the subject."""
        photos, shown = (x.cpu().double() - centre for x in (self.lesson.latents, latents))
        return background_likeness(shown, photos, self.outside, self.lesson.flipped)

    def _places(self, latents: Tensor) -> Tensor:
        """Where the subject stands in each picture, by the untouched base's attention: (n, 2), shares of height and width."""
        drawn = replace(self.lesson, latents=latents, masks=torch.zeros_like(latents[:, 0]), sizes=None)
        return centroids(attention_masks(drawn, require_unet(self.pipe))).cpu().double()

    def _spread(self, latents: Tensor) -> float:
        return float(spread(latents.cpu().double().flatten(1).unflatten(0, (-1, self.config.seeds))).mean())


def write_checkups(adapter: Path, checkups: Sequence[Mapping[str, Any]]) -> Path | None:
    """Keep a training's checkups beside its file, where `infusion evaluate` finds them: milo.checkups.json. Without any, those of an earlier
    training of that name are removed."""
    path = beside(adapter, CHECKUPS)
    if not checkups:
        path.unlink(missing_ok=True)
        return None
    return write_whole(path, json.dumps(list(checkups), indent=1, allow_nan=False) + "\n")


def read_checkups(adapter: Path) -> list[dict[str, Any]]:
    """The checkups beside an adapter's file; none where there are none. Raises InfusionError for a damaged file."""
    if adapter.is_dir():
        return []
    path = beside(adapter, CHECKUPS)
    if not path.exists():
        return []
    try:
        checkups = json.loads(path.read_text())
        if not all(c.keys() >= {"step", "loss", "repeats", "forgetting", "variety"} for c in checkups):
            raise ValueError
    except (OSError, ValueError, TypeError, AttributeError):
        raise InfusionError(
            f"{str(path)!r} cannot be read or is damaged; move it away, the curves are left out then."
        ) from None
    return checkups
