"""How often the training photos' background, style, position or pose comes back, above the base model's own rate on the same prompts and
seeds: where the prompt asked for another (`leak`), and where it left that open (`pull`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from infusion.metrics.estimate import Estimate, paired_rates, rate


@dataclass(frozen=True)
class Leak:
    """`custom` and `base` rates, and `above`, the paired difference; `unread` pictures could not be read and do not count."""

    custom: Estimate
    base: Estimate
    above: Estimate
    unread: int


def leak(custom: Sequence[str | None], base: Sequence[str | None], asked: Sequence[str | None], trained: str) -> Leak:
    """Leak of one attribute: it comes back although the prompt asked for another.

    custom, base: what each picture shows, read by a judge or known by truth; None where it cannot be told. asked: what its
    prompt asked for, None where it left that open; only prompts that asked for something other than `trained`
    count. All three share prompts and seeds, in one order. Raises ValueError where no picture counts.
    """
    elsewhere = [i for i, a in enumerate(_each(custom, base, asked)) if a is not None and a != trained]
    return _comes_back(custom, base, elsewhere, trained, f"asked for anything other than {trained!r}")


def pull(custom: Sequence[str | None], base: Sequence[str | None], asked: Sequence[str | None], trained: str) -> Leak:
    """Pull of one attribute: it comes back where the prompt left it open, so that pictures vary less than the base's. Arguments and
    errors as for `leak`; only prompts that asked for nothing count."""
    left_open = [i for i, a in enumerate(_each(custom, base, asked)) if a is None]
    return _comes_back(custom, base, left_open, trained, f"left open where {trained!r} may come back")


def _each(
    custom: Sequence[str | None], base: Sequence[str | None], asked: Sequence[str | None]
) -> Sequence[str | None]:
    if not len(custom) == len(base) == len(asked):
        raise ValueError(
            f"There are {len(custom)}, {len(base)} and {len(asked)} entries; give one per picture in each."
        )
    return asked


def _comes_back(
    custom: Sequence[str | None], base: Sequence[str | None], prompted: Sequence[int], trained: str, how: str
) -> Leak:
    counted = [i for i in prompted if custom[i] is not None and base[i] is not None]
    if not counted:
        raise ValueError(f"No readable picture was {how}; add prompts that are.")
    hits = [torch.tensor([read[i] == trained for i in counted]) for read in (custom, base)]
    return Leak(rate(hits[0]), rate(hits[1]), paired_rates(*hits), len(prompted) - len(counted))
