"""Leak rates: how often the training photos' background, style, position or pose comes back where the prompt asked for
another, above the base model's own rate on the same prompts and seeds."""

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
    """Leak of one attribute.

    custom, base: what each picture shows, read by a judge or known by truth; None where it cannot be told. asked: what its
    prompt asked for, None where it left that open; only prompts that asked for something other than `trained`
    count. All three share prompts and seeds, in one order. Raises ValueError where no picture counts.
    """
    if not len(custom) == len(base) == len(asked):
        raise ValueError(
            f"There are {len(custom)}, {len(base)} and {len(asked)} entries; give one per picture in each."
        )
    elsewhere = [i for i, a in enumerate(asked) if a is not None and a != trained]
    counted = [i for i in elsewhere if custom[i] is not None and base[i] is not None]
    if not counted:
        raise ValueError(f"No readable picture was asked for anything other than {trained!r}; add prompts that are.")
    hits = [torch.tensor([read[i] == trained for i in counted]) for read in (custom, base)]
    return Leak(rate(hits[0]), rate(hits[1]), paired_rates(*hits), len(elsewhere) - len(counted))
