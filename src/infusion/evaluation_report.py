"""The page and the JSON of an evaluation: the verdict, the pictures that show it, figures, curves of the training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infusion.evaluation import Evaluation, Figures
from infusion.files import write_whole
from infusion.report.curve import line_chart
from infusion.report.page import Grid, Page, Row, write_page


def write_report(
    evaluation: Evaluation, folder: Path, base: str, adapter: str, checkups: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """report.html and figures.json in `folder`; returns the page's path. checkups: those of the training, if it had any
    (`steering.Checkup` as dicts), drawn as curves."""
    f, e = evaluation.figures, evaluation
    one = range(0, len(e.base), e.config.seeds)
    first = [
        Row("Base model", "the class word", [e.base[i].image for i in one]),
        Row(f"With {e.subject}", "the same prompts and seeds", [e.custom[i].image for i in one]),
        Row("Nearest photo", "of those learned from", [e.lesson.pictures[e.nearest[i]] for i in one]),
    ]
    page = Page(
        title=f"How {e.subject} fits",
        lead=" ".join(e.verdict),
        grids=[
            Grid("The photos", "What was learned from.", [], [Row("Photos", "", list(e.lesson.pictures))]),
            Grid(
                "Beside the base",
                "One seed of each prompt.",
                [p.replace("{}", e.subject) for p in e.config.prompts],
                first,
                f"With {e.subject}",
            ),
        ],
        facts=[
            ("Forgetting: latent Fisher divergence, eps form", str(f.forgetting.eps)),
            ("The same, score form", str(f.forgetting.score)),
            ("The same on the class word alone, eps form", str(f.generic.eps)),
            ("Distance to the base's pictures of the class, W2^2: mean term", str(f.w2_mean)),
            ("The same: covariance term", str(f.w2_covariance)),
            ("The same, exact optimal transport", str(f.w2_exact)),
            ("Background like the photos'", str(f.background) if f.background else "the photos show none"),
            ("The same, above the base's", str(f.background_above) if f.background_above else "the photos show none"),
            ("Nearest photo, whole picture", str(f.nearest_photo)),
            ("The same, above the base's", str(f.nearest_photo_above)),
            ("Variety within a prompt; the base's", f"{f.variety}; {f.variety_base}"),
            ("Pictures by each", str(f.pictures)),
            ("Features", "the autoencoder's latents, centred on the base's pictures"),
            *_feature_facts(f),
            *(("Left out, for want of weights", told) for told in e.left_out),
            ("Base; adapter", f"{base}; {adapter}"),
            ("Made by", ", ".join(f"{what} {which}" for what, which in e.made_by.items())),
            ("Seconds", ", ".join(f"{stage} {took:.1f}" for stage, took in e.seconds.items())),
        ],
        charts=_curves(checkups),
    )
    path = write_page(page, folder / "report.html")
    record = {
        "base": base,
        "adapter": adapter,
        "subject": e.subject,
        "made_by": e.made_by,
        "verdict": e.verdict,
        "figures": asdict(f),
        "settings": asdict(e.config),
        "left_out": e.left_out,
        "seconds": {stage: round(took, 2) for stage, took in e.seconds.items()},
        "checkups": list(checkups),
    }
    write_whole(folder / "figures.json", json.dumps(_bounded(record), indent=1, allow_nan=False) + "\n")
    return path


def _bounded(value: Any) -> Any:
    """The same with null for the ends of an unbounded interval, which JSON has no number for."""
    if isinstance(value, Mapping):
        return {k: _bounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_bounded(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _feature_facts(f: Figures) -> list[tuple[str, str]]:
    facts = []
    for name, x in f.features.items():
        facts += [(f"{name}: like the photos", str(x.subject)), ("The same, above the base's", str(x.subject_above))]
        if x.text and x.text_above:
            facts += [(f"{name}: like the prompt", str(x.text)), ("The same, above the base's", str(x.text_above))]
        facts += [
            (f"{name}: diversity of one prompt's pictures (DIV); the base's", f"{x.diversity}; {x.diversity_base}"),
            (f"{name}: the plain class word's pictures like the photos (PRES)", str(x.preservation)),
            ("The same, above the base's", str(x.preservation_above)),
        ]
    if f.lpips:
        facts += [
            (
                "LPIPS: diversity of one prompt's pictures (DIV); the base's",
                f"{f.lpips.diversity}; {f.lpips.diversity_base}",
            ),
            ("The same, above the base's", str(f.lpips.diversity_above)),
            ("LPIPS: distance to the nearest photo", str(f.lpips.nearest_photo)),
            ("The same, above the base's", str(f.lpips.nearest_photo_above)),
        ]
    if j := f.judged:
        for label, value, above in (
            ("like the photos' subject, where one is found", j.likeness, j.likeness_above),
            ("the subject's colours, pattern and accessory", j.attributes, j.attributes_above),
            ("background, style and place as asked", j.text, j.text_above),
            ("variety of the subject within a prompt", j.variety, j.variety_above),
            ("the plain class word's pictures like the photos' subject (PRES)", j.preservation, j.preservation_above),
        ):
            if value and above:
                facts += [(f"Judge: {label}", str(value)), ("The same, above the base's", str(above))]
        facts += [
            (
                f"Judge: the photos' {name} where {prompt}, above the base's",
                f"{found.above}; {found.custom} by the adapter, {found.base} by the base; {found.unread} not read",
            )
            for prompt, each in (("another was asked for", j.leaks), ("that was left open", j.pulls))
            for name, found in each.items()
        ]
    return facts


def _curves(checkups: Sequence[Mapping[str, Any]]) -> list[str]:
    if not checkups:
        return []
    steps = [c["step"] for c in checkups]
    return [
        line_chart("Loss of the step's batch", steps, [c["loss"] for c in checkups]),
        *(
            line_chart(
                f"Repeats of the photos' {name} above the base's",
                steps,
                [100 * c["repeats"][name]["above"] for c in checkups],
                " pt",
                10,
            )
            for name in checkups[0]["repeats"]
        ),
        *_pull_curve(steps, [c.get("pull") for c in checkups]),
        line_chart("Forgetting: divergence on other prompts", steps, [c["forgetting"] for c in checkups]),
        line_chart("Variety beside the base's", steps, [100 * c["variety"] for c in checkups], " %"),
    ]


def _pull_curve(steps: Sequence[int], pulls: Sequence[Mapping[str, Any] | None]) -> list[str]:
    above = [100 * pull["above"] for pull in pulls if pull]
    return [line_chart("Pull to the photos' position above the base's", steps, above, " pt")] if all(pulls) else []
