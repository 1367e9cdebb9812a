"""What the judge adds to an evaluation on the embedded base: the truth about subject, prompt and leaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infusion.metrics.estimate import Estimate, bootstrap, paired
from infusion.metrics.leaks import Leak, leak, pull
from infusion.metrics.similarity import spread
from infusion.world.judge import Judge, Reading
from infusion.world.questions import asked_in, meant, shown
from infusion.world.truth import ATTRIBUTES, COLORED, TEXT


@dataclass(frozen=True)
class JudgedFigures:
    """likeness: cosine of the judge's embedding to the photos' subject, where a subject is found in both a picture and the base's; None where
    none is. attributes: mean share of the subject's colours (where the style asked for shows any), pattern and
    accessory, as the judge reads them from the photos, that a picture shows too. text: share of background, style and position asked for that are
    there. Each with the paired difference to the base. leaks: how often the photos' own comes back where another was asked
    for; pulls: where that was left open; only what most photos share is looked for. variety: mean Euclidean distance among the embeddings of one
    prompt's subjects, a sample a prompt. preservation (PRES): likeness of the plain class word's pictures to the photos' subject; higher is worse."""

    likeness: Estimate | None
    likeness_above: Estimate | None
    attributes: Estimate | None
    attributes_above: Estimate | None
    text: Estimate | None
    text_above: Estimate | None
    leaks: dict[str, Leak]
    pulls: dict[str, Leak]
    variety: Estimate | None
    variety_above: Estimate | None
    preservation: Estimate | None
    preservation_above: Estimate | None


def judged_figures(
    judge: Judge,
    custom: Sequence[Image.Image],
    base: Sequence[Image.Image],
    photos: Sequence[Image.Image],
    prompts: Sequence[str],
    classes: tuple[Sequence[Image.Image], Sequence[Image.Image]],
    each: int,
    kind: str | None = None,
) -> JudgedFigures:
    """Figures of pictures (n) beside the base's (n) of the same prompts (n), `each` pictures of a prompt in a row, and seeds. classes: pictures
    of the plain class word by either, of the same seeds. kind: the subject's class, by which it is told from another in a picture of two."""
    ours, theirs, real, *of_class = (judge.read(stacked(part)) for part in (custom, base, photos, *classes))
    truth = photo_embedding(real, kind)

    def alike(part: Sequence[Reading]) -> list[float | None]:
        return [likeness(r, truth, kind) or None for r in part]  # 0: no subject

    common = {name: _common([shown(r, kind)[name] for r in real]) for name in (*ATTRIBUTES, *TEXT, "facing")}
    asked = [asked_in(p) for p in prompts]
    visible = [
        {n: common[n] for n in ATTRIBUTES if "color" not in n or a.get("style") in (None, *COLORED)} for a in asked
    ]
    right = [[_share(shown(r, kind), v) for r, v in zip(part, visible, strict=True)] for part in (ours, theirs)]
    follows = [[_share(shown(r, kind), a) for r, a in zip(part, asked, strict=True)] for part in (ours, theirs)]
    leaks: dict[str, Leak] = {}
    pulls: dict[str, Leak] = {}
    for name in (*TEXT, "facing"):  # no prompt's words ask for a facing
        shows = [[shown(r, kind)[name] for r in part] for part in (ours, theirs)]
        for found, measure in ((leaks, leak), (pulls, pull)):
            if common[name]:
                with suppress(ValueError):  # no prompt is of that kind, or no picture of those could be read
                    found[name] = measure(*shows, [a.get(name) for a in asked], common[name])
    return JudgedFigures(
        *_both([alike(part) for part in (ours, theirs)]),
        *_both(right),
        *_both(follows),
        leaks,
        pulls,
        *_both([_varieties(part, each, kind) for part in (ours, theirs)]),
        *_both([alike(part) for part in of_class]),
    )


def _both(shares: Sequence[Sequence[float | None]]) -> tuple[Estimate | None, Estimate | None]:
    kept = [(a, b) for a, b in zip(*shares, strict=True) if a is not None and b is not None]
    if not kept:
        return None, None
    ours, theirs = (torch.tensor(part, dtype=torch.float64) for part in zip(*kept, strict=True))
    return bootstrap(ours), paired(ours, theirs)


def _share(told: dict[str, str | None], wanted: dict[str, str | None]) -> float | None:
    hits = [told[name] == value for name, value in wanted.items() if value is not None]
    return sum(hits) / len(hits) if hits else None


def _varieties(readings: Sequence[Reading], each: int, kind: str | None) -> list[float | None]:
    """For every prompt how far apart its pictures' subjects are; None where fewer than two are found."""
    found = [
        [s.embedding for r in readings[i : i + each] if (s := meant(r, kind))] for i in range(0, len(readings), each)
    ]
    return [float(spread(torch.stack(part)[None])) if len(part) > 1 else None for part in found]


def _common(values: Sequence[str | None]) -> str | None:
    """What more than half of the photos show."""
    value, count = Counter(values).most_common(1)[0]
    return value if count > len(values) / 2 else None


def photo_embedding(photos: Sequence[Reading], kind: str | None = None) -> Tensor | None:
    """The mean embedding over its photos of the subject that is `meant`, of unit length; None where no photo shows one."""
    found = [subject.embedding for r in photos if (subject := meant(r, kind))]
    return torch.nn.functional.normalize(torch.stack(found).mean(0), dim=0) if found else None


def likeness(reading: Reading, truth: Tensor | None, kind: str | None = None) -> float:
    """Cosine of the subject that is `meant` to the photos' subject; 0 where either is missing."""
    subject = meant(reading, kind)
    return 0.0 if subject is None or truth is None else float(subject.embedding @ truth)


def stacked(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as the judge takes them: (n, h, w, 3) uint8."""
    return torch.stack([torch.from_numpy(np.array(p.convert("RGB"))) for p in pictures])
