"""Which records a page is made of: comparable ones, of subjects that every method learned, in one order."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from infusion.bench.figures import Record, subject
from infusion.bench.grid import REFERENCES
from infusion.errors import InfusionError
from infusion.methods import METHODS


def in_order(records: Sequence[Record]) -> list[Record]:
    """The base itself first, then method by method, subject by subject."""
    places = {name: place for place, name in enumerate((*REFERENCES, *METHODS))}

    def place(record: Record) -> tuple[int, str, int]:
        job = record["job"]
        return places.get(job["method"], len(places)), job["label"], job["subject"]

    return sorted(records, key=place)


def whole_subjects(records: Sequence[Record]) -> list[Record]:
    """The records of subjects of which every job is there that any subject has; all records where no subject has them all.
    Subjects are easy or hard: a method must not win by the ones that the others have yet to learn."""
    found: dict[Hashable, set[tuple[Any, ...]]] = {}
    for record in records:
        job = record["job"]
        found.setdefault(subject(record), set()).add((job["label"], str(job["modality"]), job["seed"]))
    every = set().union(*found.values())
    whole = {whose for whose, jobs in found.items() if jobs == every}
    return [r for r in records if subject(r) in whole] if whole else list(records)


def refuse_mixtures(records: Sequence[Record]) -> None:
    """Records of different bases, judges or splits have nothing to say of each other, nor do different settings under one label."""
    for r in records:
        if missing := {"job", "base", "points"} - r.keys():
            raise InfusionError(
                f"There is a file of another kind among the records (it holds {', '.join(sorted(r)[:3]) or 'nothing'}, no {min(missing)!r}); move it away."
            )
    for what, of in (
        ("base", lambda r: r["base"]),
        ("judge", lambda r: r.get("judge")),
        ("reading", lambda r: r.get("reading")),
        ("split", lambda r: r["job"]["split"]),
        ("number of pictures a prompt", lambda r: r["job"]["pictures"]),
        ("number of denoising steps", lambda r: r["job"]["denoising_steps"]),
    ):
        values: set[Any] = {of(r) for r in records} - {None}
        if len(values) > 1:
            raise InfusionError(
                f"The records are of more than one {what} ({', '.join(sorted(map(str, values)))}); keep each in a folder of its own."
            )
    settings: dict[str, Any] = {}
    for r in records:
        job = r["job"]
        decides = [
            job.get(k)
            for k in ("method", "settings", "prior", "strengths", "points", "batch", "pictures", "denoising_steps")
        ]
        if settings.setdefault(job["label"], decides) != decides:
            raise InfusionError(
                f"The records of {job['label']!r} are of more than one setting ({settings[job['label']]}, {decides}); keep each in a folder of its own."
            )
