"""docs/benchmark.md from records. No figure of a table is typed in; a page's reading is its author's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from infusion.bench.figures import (
    Record,
    after_seconds,
    beside,
    counted,
    curves,
    matched,
    median_seconds,
    pooled,
    row_label,
    wanted,
)
from infusion.bench.plots import plot, sheets
from infusion.bench.selection import in_order, refuse_mixtures, whole_subjects
from infusion.files import write_whole
from infusion.methods import METHODS
from infusion.metrics.estimate import Estimate, rate

SHORT = (
    ("fidelity", "subject fidelity", "%"),
    ("likeness", "likeness", ""),
    ("kind", "class", "%"),
    ("text_beside_base", "text beside the base", "pp"),
    ("leak_background", "background leak", "pp"),
    ("leak_position", "position leak", "pp"),
    ("pull_position", "place pull", "pp"),
    ("pull_facing", "facing pull", "pp"),
    ("forgetting", "LFD, other prompts", "e"),
)
EVERY = (
    ("fidelity", "subject fidelity", "%"),
    ("fidelity_told", "where told", "%"),
    ("told", "told", "%"),
    ("likeness", "likeness", ""),
    ("missing", "no subject", "%"),
    ("kind", "class", "%"),
    ("text", "text followed", "%"),
    ("text_beside_base", "beside the base", "pp"),
    ("text_told_beside_base", "the same, where told", "pp"),
    ("leak_background", "background leak", "pp"),
    ("leak_style", "style leak", "pp"),
    ("leak_position", "position leak", "pp"),
    ("pull_position", "place pull", "pp"),
    ("pull_facing", "facing pull", "pp"),
    ("forgetting", "LFD, other prompts", "e"),
    ("forgetting_class_word", "LFD, class word", "e"),
    ("prior_likeness_above", "PRES above base", ""),
    ("nearer_than_base", "nearer to a photo", ""),
    ("w2", "W2² to base", ""),
    ("variety", "variety beside the base's", "%"),
)
BESIDE = (
    ("fidelity", "subject fidelity", "pp"),
    ("fidelity_told", "where told", "pp"),
    ("likeness", "likeness", ""),
    ("kind", "class", "pp"),
    ("text", "text followed", "pp"),
    ("text_told", "where told", "pp"),
    ("leak_background", "background leak", "pp"),
    ("leak_style", "style leak", "pp"),
    ("leak_position", "position leak", "pp"),
    ("pull_position", "place pull", "pp"),
    ("pull_facing", "facing pull", "pp"),
    ("variety", "variety", "pp"),
    ("forgetting", "LFD, other prompts", "e"),
)
IN_TIME = (
    ("fidelity", "subject fidelity", "%"),
    ("kind", "class", "%"),
    ("text_beside_base", "text beside the base", "pp"),
    ("pull_position", "place pull", "pp"),
)
PARTS = (("color1", "first colour"), ("color2", "second colour"), ("pattern", "pattern"), ("accessory", "accessory"))
SEARCHED = 8
_FACING = "Facing pull: the same for the way in which the photos' subject faces, which no prompt asks for. "
_VARIETY = "Variety: mean distance among pictures of one prompt. "


def write_benchmark(
    records: Sequence[Record],
    docs: Path,
    name: str = "benchmark",
    reading: str = "",
    pictures: bool = True,
    whole: bool = True,
) -> Path:
    """`name`.md in `docs`, with its plot and contact sheets or, without `pictures`, tables alone; `reading` is what its author
    makes of it, in Markdown. whole: of subjects that every method learned alone. Returns the page's path."""
    docs.mkdir(parents=True, exist_ok=True)
    refuse_mixtures(records)
    kept = in_order(whole_subjects(records) if whole else records)
    found, shown = curves(kept), None
    if pictures:
        plot(found, docs / f"{name}.png")
        shown = sheets(kept, docs, name)
    path = docs / f"{name}.md"
    return write_whole(path, page(kept, found, shown, name, reading, len(records) - len(kept)))


def page(
    records: Sequence[Record],
    found: dict,
    pictures: Sequence[tuple[str, str]] | None,
    name: str = "benchmark",
    reading: str = "",
    left_out: int = 0,
) -> str:
    """The page in Markdown. pictures: contact sheets, (what it shows, file name), beside the plot `name`.png; None for tables alone.
    left_out: jobs of subjects that not every method has learned yet."""
    job = records[0]["job"]
    subjects = {(r["job"]["subjects_seed"], r["job"]["subject"]) for r in records}
    places = [wanted(request)["position"] for request in records[0]["requests"]]
    hours = sum(r["seconds"] for r in records) / 3600
    ours = _ours(records)
    facing = any("facing" in r["trained"] for r in records)
    jobs = "1 job" if left_out == 1 else f"{left_out} jobs"
    waiting = (
        f"; {jobs} of subjects that not every method has learned yet {'is' if left_out == 1 else 'are'} left out"
        if left_out
        else ""
    )
    lines = [
        f"# {name.replace('-', ' ').capitalize()}",
        "",
        f"{len(records)} jobs on {len(subjects)} subjects of the world's {job['split']} split, base `{records[0]['base'][:12]}`; {hours:.1f} hours of one worker in all{waiting}. "
        f"Every subject is learned from four photos that show it in one background, style and position{', facing one way' if facing else ''}; every prompt asks for another background, most for another style or position. "
        "What a picture shows is read by the judge (`docs/world.md`). Same hands made world, judge, base and methods: the figures hold for this world.",
        "",
        "Built by `infusion bench report`; run by `infusion bench run`. Intervals are Student's over subjects, 95 %; n is the number of subjects; of one there is no interval. Another figure without one is the same for every subject. "
        f"The noise of a prompt's picture is the same for every subject, so they hold for these prompts and noises; where a prompt leaves the place open, that is {places.count(None)} of {len(places)}.",
        "",
        *([reading.strip(), ""] if reading else []),
        "## At the last point",
        "",
        *_table(found, SHORT),
        "",
        "Subject fidelity: mean share of right first colour, second colour, pattern and accessory; what the judge cannot tell is wrong. Likeness: cosine of the judge's embedding to the photos' subject, where a subject is found. "
        "Text: background, style and place as asked, minus the base's own on the same prompts and seeds. "
        "Leak: how often the photos' background or position comes back where another was asked for, above the base's rate on the same prompts and seeds. Place pull: how often their position comes back where the prompt leaves it open, above the base's rate too. "
        + (_FACING if facing else "")
        + "LFD: latent Fisher divergence, eps form. "
        "class-word and described learn nothing: the floor and what words alone can do.",
        "",
        *(line for label in ours for line in _beside(found, label)),
        "## The subject, attribute by attribute",
        "",
        *_table(found, tuple((name, label, "%") for name, label in PARTS)),
        "",
        "## Every figure",
        "",
        *_table(found, EVERY),
        "",
        'What the judge cannot tell does not count where it says "where told"; "told" is how much it tells, of other pictures for every method; a picture in which no subject is found is told, and wrong. '
        "W2²: exact optimal transport between the pictures and the base's of the same prompts and seeds, in the first 16 principal components of the two sets' latents; grows with what is learned, so compare it at equal fidelity. "
        + (_VARIETY if any(p.get("variety") for r in records for p in r["points"]) else "")
        + "PRES: likeness of pictures of the plain class word to the subject. Nearer to a photo: how much smaller the pixel distance to the nearest photo is than the base's.",
        "",
        "## Cost",
        "",
        "Median seconds over subjects: other work on the machine stretched some. Memory: the most that a job's process held, the base, pictures and measures included, of the records that say it.",
        "",
        *_costs(records, found),
        "",
        *(line for label in ours[:1] for line in _at_equal_seconds(found, label)),
        "## As learning goes on",
        "",
        *(
            [
                f"![trade-offs]({name}.png)",
                "",
                "One curve a row, one dot a number of samples seen; dashed: drawn at part of its strength.",
                "",
            ]
            if pictures is not None
            else []
        ),
        *_samples(found),
        "",
    ]
    for label, file in pictures or ():
        lines += [f"## Pictures: {label}", "", f"![{label}]({file})", ""]
    return "\n".join(lines)


def _table(found: dict, columns: Sequence[tuple[str, str, str]]) -> list[str]:
    """A row for each method at its last point; columns that no record has are left out."""
    ends = {label: by_samples[max(by_samples)] for label, by_samples in found.items()}
    columns = [c for c in columns if any(pooled(last, c[0]) for last in ends.values())]
    rows = [f"| method | {' | '.join(label for _, label, _ in columns)} | n |", "|---" * (len(columns) + 2) + "|"]
    for label, last in ends.items():
        cells = [_cell(pooled(last, name), unit, *counted(last, name), of=len(last)) for name, _, unit in columns]
        rows.append(f"| {label} | {' | '.join(cells)} | {len(last)} |")
    return rows


def _ours(records: Sequence[Record]) -> list[str]:
    """The rows that are Infusion in two streams, to be set beside the others; none where there are more than SEARCHED, which is a search among
    settings and claims nothing."""
    labels = {
        row_label(r, point): None
        for r in records
        if r["job"]["method"] == "infusion" and r["job"]["settings"].get("two_streams", True)
        for point in r["points"]
    }
    return list(labels) if len(labels) <= SEARCHED else []


def _beside(found: dict, label: str) -> list[str]:
    """The label minus each other on the same subjects, prompts and seeds."""
    others = beside(found, label)
    earlier = {n: s for n, s in matched(found, label).items() if s < max(found[n])}
    others |= {f"{n}, {earlier[n]:,} samples": figures for n, figures in beside(found, label, earlier).items()}
    columns = [c for c in BESIDE if any(c[0] in figures for figures in others.values())]
    count = sum(
        figures[name].n > 1 and figures[name].low < figures[name].high
        for figures in others.values()
        for name, _, _ in columns
        if name in figures
    )
    lines = [
        f"## {label} beside the others",
        "",
        f"The figure of {label} minus the other's on the same subjects, prompts and seeds, at the last point of both and, where another point of the other's has a fidelity nearer to that of {label}, at that one too; \"where told\", leaks and pull rest on what can be told in each. "
        f"Of {count} comparisons that have an interval one in twenty would leave out 0 by chance.",
        "",
        f"| {label} minus | {' | '.join(title for _, title, _ in columns)} | n |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for other, figures in others.items():
        of = figures["fidelity"].n
        cells = [_cell(figures.get(name), unit, of=of) for name, _, unit in columns]
        lines.append(f"| {other} | {' | '.join(cells)} | {of} |")
    return [*lines, ""]


def _cell(e: Estimate | None, unit: str, pictures: int = 0, hits: int = 0, of: int = 0) -> str:
    """pictures: how many a leak was looked for in, hits: how many of these and of the base's have it. Where none has, subjects do not differ
    and say nothing of how sure that is; Wilson's upper end does, as if all pictures were independent. of: subjects in the row; a figure of fewer
    says so."""
    if e is None:
        return ""
    if pictures and not hits:
        return f"0 of {pictures} [0, {100 * rate(torch.zeros(pictures)).high:.1f}]"
    scale, shape = {"%": (100, ".1f"), "pp": (100, "+.1f"), "e": (1, ".2g")}.get(unit, (1, ".3g"))
    value, low, high = (f"{scale * x:{shape}}" for x in (e.value, e.low, e.high))
    fewer = f" (n = {e.n})" if of and e.n != of else ""
    return (f"{value} [{low}, {high}]" if e.n > 1 and low != high else value) + fewer


def _at_equal_seconds(found: dict, label: str) -> list[str]:
    """What every row has reached after as many seconds as the quickest takes to its end, with `label` minus each in fidelity."""
    ends = {name: median_seconds(by_samples[max(by_samples)]) for name, by_samples in found.items() if max(by_samples)}
    seconds = min(ends.values())
    then = after_seconds(found, seconds)
    others = beside(then, label)
    rows = [
        f"| method | samples by then | {' | '.join(title for _, title, _ in IN_TIME)} | {label} minus it, fidelity | seconds to the end |",
        "|---" * (len(IN_TIME) + 4) + "|",
    ]
    for name, by_samples in then.items():
        ((samples, figures),) = by_samples.items()
        cells = [_cell(pooled(figures, column), unit) for column, _, unit in IN_TIME]
        difference = _cell(others.get(name, {}).get("fidelity"), "pp")
        rows.append(f"| {name} | {samples:,} | {' | '.join(cells)} | {difference} | {ends[name]:.0f} |")
    return [
        "## At equal seconds",
        "",
        f"After {seconds:.0f} seconds of learning, as many as the quickest row takes to its end; straight between the points before and after, by each row's median seconds over subjects, since other work on the machine stretched some. Rows whose first point comes later are left out.",
        "",
        *rows,
        "",
    ]


def _costs(records: Sequence[Record], found: dict) -> list[str]:
    threads = sorted({r["threads"] for r in records})
    rows = [
        f"| method | samples | seconds to learn, {'/'.join(map(str, threads))} thread(s) | peak memory, MiB | bytes in fp16 | settings |",
        "|---|---|---|---|---|---|",
    ]
    settings = {row_label(r, point): _own_settings(r["job"]) for r in records for point in r["points"]}
    for label, by_samples in found.items():
        samples = max(by_samples)
        seconds, size = median_seconds(by_samples[samples]), pooled(by_samples[samples], "bytes")
        peak = pooled(by_samples[samples], "peak_bytes")
        assert size is not None
        if samples:
            told = ", ".join(f"{k} {v}" for k, v in settings[label].items()) or "defaults"
            memory = f"{peak.value / 2**20:,.0f} (n = {peak.n})" if peak else ""
            rows.append(f"| {label} | {samples:,} | {seconds:.0f} | {memory} | {size.value:,.0f} | {told} |")
    return rows


def _own_settings(job: Mapping[str, Any]) -> dict[str, Any]:
    """What a job's method was given beside its defaults."""
    method = METHODS.get(job["method"])
    defaults = {f.name: f.default for f in fields(method[1])} if method else {}
    plain = json.loads(json.dumps(defaults))
    settings = job["settings"]
    if job["method"] == "infusion":  # a record without it learned at all timesteps
        settings = {"max_timestep": 1000, **settings}
    given = {k: v for k, v in settings.items() if k not in plain or plain[k] != v}
    return given | ({"prior": job["prior"]} if job["prior"] else {})


def _samples(found: dict) -> list[str]:
    """Fidelity by samples seen, and where 95 % of the last is reached first."""
    points = sorted({s for by in found.values() for s in by if s})
    rows = [
        f"| subject fidelity after | {' | '.join(f'{p:,} samples' for p in points)} | 95 % of the last at |",
        "|---" * (len(points) + 2) + "|",
    ]
    for label, by_samples in found.items():
        values = {s: e.value for s, rows_ in by_samples.items() if s and (e := pooled(rows_, "fidelity"))}
        if values:
            reached = next(s for s in sorted(values) if values[s] >= 0.95 * values[max(values)])
            cells = [f"{100 * values[p]:.1f} %" if p in values else "" for p in points]
            rows.append(f"| {label} | {' | '.join(cells)} | {reached:,} |")
    return rows
