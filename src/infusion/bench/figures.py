"""Figures of records: plain dicts in, numbers with intervals out.

A picture's attributes are right or wrong; a job's score is their mean; jobs of one subject are averaged; intervals are over
subjects (Student's), since pictures of one job share its training and jobs of one subject its photos.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from infusion.metrics import leaks
from infusion.metrics.estimate import Estimate, mean
from infusion.world.truth import ATTRIBUTES, SCENE_HEADS, TEXT

Record = Mapping[str, Any]
Figures = dict[str, float | None]
Measure = Callable[..., leaks.Leak]
BySubject = dict[Hashable, dict[Hashable, Figures]]  # subject -> job -> figures


def wanted(request: Mapping[str, Any]) -> dict[str, str | None]:
    """What a picture must show, from a record's request."""
    (subject,) = request["subjects"]
    return {"background": request["background"], "style": request["style"], **subject}


def paired_requests(record: Record, point: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each reading with its request; every request has as many pictures."""
    each = record["job"]["pictures"]
    return [(r, record["requests"][i // each]) for i, r in enumerate(point["readings"])]


def told(reading: Mapping[str, Any], name: str) -> bool:
    """Whether the judge says anything of it. A picture without a subject is told: it shows nothing of the subject's."""
    return reading[name] is not None or (name not in SCENE_HEADS and missing(reading))


def missing(reading: Mapping[str, Any]) -> bool:
    """Whether no subject was found: one that is found has a place, whatever else the judge can tell of it."""
    return reading["position"] is None


def share(record: Record, point: Mapping[str, Any], names: Sequence[str], told_only: bool = False) -> float | None:
    """Mean over `names` of the share of pictures that are right, among those that could be. What the judge cannot tell is
    wrong, or with `told_only` does not count. None where nothing counts."""
    rates = []
    for name in names:
        hits = [
            reading[name] == wanted(request)[name]
            for reading, request in paired_requests(record, point)
            if wanted(request)[name] is not None and (told(reading, name) or not told_only)
        ]
        if hits:
            rates.append(sum(hits) / len(hits))
    return sum(rates) / len(rates) if rates else None


def coverage(record: Record, point: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """Of what `share` counts, how much the judge tells."""
    heard = [
        told(reading, name)
        for name in names
        for reading, request in paired_requests(record, point)
        if wanted(request)[name] is not None
    ]
    return sum(heard) / len(heard) if heard else None


def leak(
    record: Record, point: Mapping[str, Any], floor: Mapping[str, Any], name: str, measure: Measure = leaks.leak
) -> leaks.Leak | None:
    """How often the photos' `name` shows where another was asked for or, with `leaks.pull` for `measure`, where that was left open, beside
    `floor`, the base's own point of the same prompts and seeds. Pictures that cannot be read in either do not count; None where none does."""
    asked = [wanted(request).get(name) for _, request in paired_requests(record, point)]
    ours, base = ([r[name] for r in p["readings"]] for p in (point, floor))
    try:
        return measure(ours, base, asked, record["trained"][name])
    except ValueError:
        return None


def point_figures(record: Record, point: Mapping[str, Any], floor: Mapping[str, Any] | None) -> Figures:
    """All figures of one point of a job; those beside the base need `floor`, the class word's point of the same subject."""
    readings = point["readings"]
    average = lambda key: _mean([r[key] for r in readings])  # noqa: E731
    figures: Figures = {
        "fidelity": share(record, point, ATTRIBUTES),
        "fidelity_told": share(record, point, ATTRIBUTES, told_only=True),
        "told": coverage(record, point, ATTRIBUTES),
        **{name: share(record, point, [name]) for name in (*ATTRIBUTES, "kind", *TEXT)},
        "likeness": _mean(_found(r["like_subject"] for r in readings)),
        "missing": sum(missing(r) for r in readings) / len(readings),
        "text": share(record, point, TEXT),
        "text_told": share(record, point, TEXT, told_only=True),
        "prior_likeness": _mean(_found(point["prior_likeness"])),
        "to_nearest_photo": average("to_nearest_photo"),
        "forgetting": point["forgetting"],
        "forgetting_class_word": point["forgetting_class_word"],
        "w2": point["w2"],
        "variety": point.get("variety"),
    }
    if floor is not None:
        for what, measure in (("leak", leaks.leak), ("pull", leaks.pull)):
            for name in record["trained"]:
                found = leak(record, point, floor, name, measure)
                figures[f"{what}_{name}"] = found.above.value if found else None
                figures[f"{what}_{name}_n"] = found.custom.n if found else None
                figures[f"{what}_{name}_hits"] = (
                    round((found.custom.value + found.base.value) * found.custom.n) if found else None
                )
        for name, told_only in (("text", False), ("text_told", True)):
            value, base_value = figures[name], share(record, floor, TEXT, told_only)
            if value is not None and base_value is not None:
                figures[f"{name}_beside_base"] = value - base_value
        nearest = _mean([r["to_nearest_photo"] for r in floor["readings"]])
        figures["nearer_than_base"] = _minus(nearest, average("to_nearest_photo"))
        figures["prior_likeness_above"] = _minus(figures["prior_likeness"], _mean(_found(floor["prior_likeness"])))
    return figures


def key(record: Record) -> tuple[Any, ...]:
    """What must agree for two jobs to share prompts, seeds and photos."""
    job = record["job"]
    return (
        job["split"], job["subjects_seed"], job["subject"], tuple(sorted(job["modality"].items(), key=str)), job["pictures"],
        job["denoising_steps"], record["base"],
    )  # fmt: skip


def subject(record: Record) -> Hashable:
    """Whose pictures they are."""
    job = record["job"]
    return job["split"], job["subjects_seed"], job["subject"]


def row_label(record: Record, point: Mapping[str, Any]) -> str:
    """The table's row that a point belongs to: the job's label, with the strength that it was drawn at where that is not 1."""
    strength = point.get("strength", 1)
    return record["job"]["label"] if strength == 1 else f"{record['job']['label']} at {strength:g}"


def curves(records: Iterable[Record]) -> dict[str, dict[int, BySubject]]:
    """`row_label` -> samples seen -> subject -> job -> its figures at that point, with seconds, bytes and the job's peak of memory. Jobs of one name share photos,
    prompts and seeds."""
    records = list(records)
    floors = {key(r): r["points"][0] for r in records if r["job"]["method"] == "class-word"}
    found: dict[str, dict[int, BySubject]] = {}
    for record in records:
        for point in record["points"]:
            by_samples = found.setdefault(row_label(record, point), {})
            figures = point_figures(record, point, floors.get(key(record)))
            figures |= {"seconds": point["seconds"], "bytes": point["bytes"], "peak_bytes": record.get("peak_bytes")}
            jobs = by_samples.setdefault(point["samples"], {}).setdefault(subject(record), {})
            jobs[key(record), record["job"]["seed"]] = figures
    return found


def beside(
    found: Mapping[str, Mapping[int, BySubject]], label: str, at: Mapping[str, int] | None = None
) -> dict[str, dict[str, Estimate]]:
    """From `curves`: other labels -> figure -> the mean difference of `label`, at its last point, minus the other, over the subjects of
    both; jobs are paired that share photos, prompts and seeds. at: samples seen by the others to compare with, by label; by default each
    one's last point."""
    points = {name: by_samples[max(by_samples)] for name, by_samples in found.items()}
    ours = points.get(label, {})
    if at is not None:
        points = {name: found[name][samples] for name, samples in at.items()}
    result: dict[str, dict[str, Estimate]] = {}
    for other, theirs in points.items():
        differences: BySubject = {
            whose: {
                job: {n: _minus(jobs[job][n], theirs[whose][job].get(n)) for n in jobs[job]}
                for job in jobs.keys() & theirs[whose].keys()
            }
            for whose, jobs in ours.items()
            if other != label and whose in theirs
        }
        names = {name for jobs in differences.values() for figures in jobs.values() for name in figures}
        if estimates := {name: e for name in sorted(names) if (e := pooled(differences, name))}:
            result[other] = estimates
    return result


def matched(found: Mapping[str, Mapping[int, BySubject]], label: str) -> dict[str, int]:
    """From `curves`: other labels -> the samples seen at which their fidelity is nearest to that of `label` at its last point, over the
    subjects of both; of equally near ones the fewest. What overfits should be compared at equal fidelity, not at equal time."""
    nearest: dict[str, int] = {}
    for other, by_samples in found.items():
        gaps = {s: e["fidelity"] for s in sorted(by_samples) if (e := beside(found, label, {other: s}).get(other))}
        if gaps:
            nearest[other] = min(gaps, key=lambda s: abs(gaps[s].value))
    return nearest


def median_seconds(rows: BySubject) -> float:
    """Seconds of learning behind a point, median over its jobs: other work on the machine stretches some of them."""
    return median(float(figures["seconds"] or 0) for jobs in rows.values() for figures in jobs.values())


def after_seconds(found: Mapping[str, Mapping[int, BySubject]], seconds: float) -> dict[str, dict[int, BySubject]]:
    """From `curves`: the rows that learn as they are after that many seconds, on the straight line between their points before and after, by
    `median_seconds`; under the samples seen by then. Rows with their first point later are left out; those that end before keep their last."""
    result: dict[str, dict[int, BySubject]] = {}
    for label, by_samples in found.items():
        times = {s: median_seconds(by_samples[s]) for s in sorted(by_samples) if s}
        before = max((s for s, t in times.items() if t <= seconds), default=None)
        if before is None:
            continue
        after = min((s for s, t in times.items() if t > seconds), default=before)
        way = (seconds - times[before]) / (times[after] - times[before]) if after != before else 0.0
        result[label] = {
            round(before + way * (after - before)): {
                whose: {
                    job: {n: _between(figures[n], by_samples[after][whose][job].get(n), way) for n in figures}
                    for job, figures in jobs.items()
                    if job in by_samples[after].get(whose, {})
                }
                for whose, jobs in by_samples[before].items()
            }
        }
    return result


def pooled(rows: BySubject, name: str) -> Estimate | None:
    """Mean of a figure over subjects, each the mean of its jobs; None where no job has it."""
    values = [
        sum(known) / len(known)
        for jobs in rows.values()
        if (known := [v for job in jobs.values() if (v := job.get(name)) is not None])
    ]
    return mean(torch.tensor(values, dtype=torch.float64)) if values else None


def counted(rows: BySubject, name: str) -> tuple[int, int]:
    """Behind a leak's figure, over all subjects and jobs: pictures, and how many of them and of the base's leak."""
    jobs = [job for jobs in rows.values() for job in jobs.values()]
    return sum(int(j.get(f"{name}_n") or 0) for j in jobs), sum(int(j.get(f"{name}_hits") or 0) for j in jobs)


def _found(cosines: Iterable[float]) -> list[float]:
    """The cosines of pictures that show a subject: 0 stands for one that does not (`judged.likeness`)."""
    return [value for value in cosines if value != 0]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _between(a: float | None, b: float | None, way: float) -> float | None:
    return None if a is None or b is None else a + way * (b - a)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
