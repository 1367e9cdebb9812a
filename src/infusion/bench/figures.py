"""Figures of records: plain dicts in, numbers with intervals out.

A picture's attributes are right or wrong; a job's score is their mean; intervals resample jobs, since pictures of one job
share its training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from infusion.metrics.estimate import Estimate, bootstrap
from infusion.world.truth import ATTRIBUTES

Record = Mapping[str, Any]
TEXT = ("background", "style", "position")


def wanted(request: Mapping[str, Any]) -> dict[str, str | None]:
    """What a picture must show, from a record's request."""
    (subject,) = request["subjects"]
    return {"background": request["background"], "style": request["style"], **subject}


def paired_requests(record: Record, point: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each reading with its request; every request has as many pictures."""
    each = record["job"]["pictures"]
    return [(r, record["requests"][i // each]) for i, r in enumerate(point["readings"])]


def share(record: Record, point: Mapping[str, Any], names: Sequence[str], told_only: bool = False) -> float | None:
    """Mean over `names` of the share of pictures that are right, among those that could be. What the judge cannot tell is
    wrong, or with `told_only` does not count. None where nothing counts."""
    rates = []
    for name in names:
        hits = [
            reading[name] == wanted(request)[name]
            for reading, request in paired_requests(record, point)
            if wanted(request)[name] is not None and not (told_only and reading[name] is None)
        ]
        if hits:
            rates.append(sum(hits) / len(hits))
    return sum(rates) / len(rates) if rates else None


def leak(record: Record, point: Mapping[str, Any], floor: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """How often the photos' `name` shows where another was asked for: here, and in `floor`, the base's own point of
    the same prompts and seeds. Pictures that cannot be read in either do not count."""
    trained = record["trained"][name]
    pairs = [
        (ours[name] == trained, base[name] == trained)
        for (ours, request), base in zip(paired_requests(record, point), floor["readings"], strict=True)
        if wanted(request)[name] not in (None, trained) and ours[name] is not None and base[name] is not None
    ]
    return (sum(a for a, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs)) if pairs else None


def point_figures(record: Record, point: Mapping[str, Any], floor: Mapping[str, Any] | None) -> dict[str, float | None]:
    """All figures of one point of a job; those beside the base need `floor`, the class word's point of the same subject."""
    readings = point["readings"]
    mean = lambda key: sum(r[key] for r in readings) / len(readings)  # noqa: E731
    figures = {
        "fidelity": share(record, point, ATTRIBUTES),
        "fidelity_told": share(record, point, ATTRIBUTES, told_only=True),
        **{name: share(record, point, [name]) for name in (*ATTRIBUTES, "kind", *TEXT)},
        "likeness": mean("like_subject"),
        "text": share(record, point, TEXT),
        "text_told": share(record, point, TEXT, told_only=True),
        "prior_likeness": sum(point["prior_likeness"]) / len(point["prior_likeness"]),
        "to_nearest_photo": mean("to_nearest_photo"),
        "forgetting": point["forgetting"],
        "forgetting_class_word": point["forgetting_class_word"],
        "w2": point["w2"],
    }
    if floor is not None:
        for name in TEXT:
            leaked = leak(record, point, floor, name)
            figures[f"leak_{name}"] = leaked[0] - leaked[1] if leaked else None
        for name, told_only in (("text", False), ("text_told", True)):
            value, base_value = figures[name], share(record, floor, TEXT, told_only)
            if value is not None and base_value is not None:
                figures[f"{name}_beside_base"] = value - base_value
        nearest = sum(r["to_nearest_photo"] for r in floor["readings"]) / len(floor["readings"])
        figures["nearer_than_base"] = nearest - figures["to_nearest_photo"]
        figures["prior_likeness_above"] = figures["prior_likeness"] - sum(floor["prior_likeness"]) / len(
            floor["prior_likeness"]
        )
    return figures


def key(record: Record) -> tuple[Any, ...]:
    """What must agree for two jobs to share prompts, seeds and photos."""
    job = record["job"]
    return (
        job["split"], job["subjects_seed"], job["subject"], tuple(sorted(job["modality"].items(), key=str)), job["pictures"],
        job["denoising_steps"], record["base"],
    )  # fmt: skip


def curves(records: Iterable[Record]) -> dict[str, dict[int, list[dict[str, float | None]]]]:
    """label -> samples seen -> the figures of each job at that point, with seconds and bytes."""
    records = list(records)
    floors = {key(r): r["points"][0] for r in records if r["job"]["method"] == "class-word"}
    found: dict[str, dict[int, list[dict[str, float | None]]]] = {}
    for record in records:
        for point in record["points"]:
            figures = point_figures(record, point, floors.get(key(record)))
            figures |= {"seconds": point["seconds"], "bytes": point["bytes"]}
            found.setdefault(record["job"]["label"], {}).setdefault(point["samples"], []).append(figures)
    return found


def beside(records: Iterable[Record], label: str) -> dict[str, dict[str, Estimate]]:
    """Other labels -> figure -> the mean difference of `label` minus the other at either's last point, over the jobs
    of both that share photos, prompts and seeds; the interval resamples those pairs."""
    records = list(records)
    floors = {key(r): r["points"][0] for r in records if r["job"]["method"] == "class-word"}
    last: dict[str, dict[Any, dict[str, float | None]]] = {}
    for r in records:
        figures = point_figures(r, r["points"][-1], floors.get(key(r)))
        last.setdefault(r["job"]["label"], {})[(key(r), r["job"]["seed"])] = figures
    ours = last.get(label, {})
    found: dict[str, dict[str, Estimate]] = {}
    for other, theirs in last.items():
        pairs = [(ours[k], theirs[k]) for k in ours.keys() & theirs.keys()] if other != label else []
        for name in pairs[0][0] if pairs else ():
            both = [(a, b) for x, y in pairs if (a := x.get(name)) is not None and (b := y.get(name)) is not None]
            if both:
                differences = torch.tensor([a - b for a, b in both], dtype=torch.float64)
                found.setdefault(other, {})[name] = bootstrap(differences)
    return found


def pooled(rows: Sequence[Mapping[str, float | None]], name: str) -> Estimate | None:
    """Mean of a figure over jobs with the interval of resampled jobs; None where no job has it."""
    values = [v for row in rows if (v := row.get(name)) is not None]
    return bootstrap(torch.tensor(values, dtype=torch.float64)) if values else None
