"""Pictures of the benchmark's page: trade-off curves, and contact sheets of what the records kept."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from infusion.bench.figures import Record, key, pooled, row_label
from infusion.errors import InfusionError
from infusion.sheets import contact_sheet

PLOTS = (
    ("leak_background", "background leak above the base's"),
    ("leak_position", "position leak above the base's"),
    ("pull_position", "place pull above the base's, where the prompt leaves it open"),
    ("pull_facing", "pull to the photos' facing above the base's"),
    ("forgetting", "latent Fisher divergence, other prompts"),
    ("text", "text followed"),
    ("seconds", "seconds to learn"),
)


def plot(found: dict, path: Path) -> None:
    """Fidelity against leak, pull, divergence, text and time, as far as the records have them: one colour a method, dashed where it is drawn at
    part of its strength."""
    try:
        import matplotlib
    except ImportError:
        raise InfusionError("The benchmark's plots need matplotlib; pip install matplotlib.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    every = [point for by_samples in found.values() for point in by_samples.values()]
    told = [(name, label) for name, label in PLOTS if any(pooled(point, name) for point in every)]
    columns = math.ceil(len(told) / 2)
    figure, grid = plt.subplots(2, columns, figsize=(2 + 5 * columns, 8.4), constrained_layout=True, squeeze=False)
    axes = grid.flatten()
    for empty in axes[len(told) :]:
        empty.set_axis_off()
    methods = list(dict.fromkeys(row.partition(" at ")[0] for row in found))  # as `row_label` names them
    colors = plt.get_cmap("tab10" if len(methods) <= 10 else "tab20")
    for axis, (name, label) in zip(axes, told, strict=False):
        for row, by_samples in found.items():
            points = [(pooled(by_samples[s], name), pooled(by_samples[s], "fidelity")) for s in sorted(by_samples)]
            xy = [(x.value, y.value) for x, y in points if x and y]
            if xy:
                method, _, part = row.partition(" at ")
                line, color = "o--" if part else "o-", colors(methods.index(method))
                axis.plot(*zip(*xy, strict=True), line, ms=4, lw=1.3, color=color, label=row)
        axis.set(xlabel=label, ylabel="subject fidelity")
        axis.grid(alpha=0.3)
        if name == "forgetting":
            axis.set_xscale("symlog", linthresh=1e-4)
    lines = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(lines.values()), list(lines), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def sheets(records: Sequence[Record], docs: Path, page: str = "benchmark") -> list[tuple[str, str]]:
    """One contact sheet for each subject with kept strips: (what it shows, file name)."""
    made = []
    shown = [r for r in records if _last_strips(r)]
    for place, same in enumerate(sorted({str(key(r)) for r in shown})):  # photos, prompts and seeds are of one key
        rows = [r for r in shown if str(key(r)) == same]
        strips = [shown for r in rows for shown in _last_strips(r)]
        prompts = [q["prompt"].format("...") for q in rows[0]["requests"]]
        name = f"{page}-{place:03d}.jpg"
        contact_sheet([_cut(s) for _, s in strips], [label for label, _ in strips], prompts, cell=96).save(
            docs / name, quality=85
        )
        s, t = rows[0]["subject"], rows[0]["trained"]
        facing = [f"facing {t['facing']}"] if "facing" in t else []
        accessory = "" if s["accessory"] == "none" else f" with a {s['accessory']}"
        made.append(
            (
                f"a {s['pattern']} {s['color1']} and {s['color2']} {s['kind']}{accessory}, photographed: {', '.join((t['background'], t['position'], *facing))}",
                name,
            )
        )
    return made


def _last_strips(record: Record) -> list[tuple[str, str]]:
    """(row, strip) of what the record kept of its last step, one a strength."""
    last = record["points"][-1]["step"]
    return [(row_label(record, p), p["strip"]) for p in record["points"] if p["step"] == last and p.get("strip")]


def _cut(strip: str) -> list[Image.Image]:
    sheet = Image.open(io.BytesIO(base64.b64decode(strip)))
    side = sheet.height
    return [sheet.crop((x, 0, x + side, side)) for x in range(0, sheet.width, side)]
