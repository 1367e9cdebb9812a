"""The page holds what the figures say."""

from __future__ import annotations

import base64
import io

from PIL import Image

from infusion.bench.figures import curves, pooled
from infusion.bench.tables import write_benchmark
from tests.bench.records import FLOOR, LEAKY, record


def test_strengths_are_rows_of_their_own(tmp_path):
    both = record("infusion", [{}, {}])
    weaker = both["points"][0] | {"strength": 0.5, "strip": None, "forgetting": 0.25}
    both["points"] = [both["points"][0] | {"strength": 1.0}, weaker]
    found = curves([FLOOR, both])
    assert [*found] == ["class-word", "infusion", "infusion at 0.5"]
    assert pooled(found["infusion at 0.5"][80], "forgetting").value == 0.25
    text = write_benchmark([FLOOR, both], tmp_path, pictures=False).read_text()
    assert "## infusion at 0.5 beside the others" in text
    assert "| infusion at 0.5 | 80 |" in text
    searched = both | {"points": [weaker | {"strength": i / 10} for i in range(1, 10)]}
    text = write_benchmark([FLOOR, searched], tmp_path, pictures=False).read_text()
    assert "| infusion at 0.9 |" in text
    assert "beside the others" not in text


def test_a_difference_of_one_subject_has_no_interval_and_is_not_counted(tmp_path):
    ours, other = record("infusion", [{}, {"background": "city"}]), LEAKY
    text = write_benchmark([FLOOR, ours, other], tmp_path, pictures=False).read_text()
    assert "Of 0 comparisons that have an interval" in text


def test_the_page(tmp_path):
    picture = Image.new("RGB", (16, 8), "red")
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    strip = base64.b64encode(buffer.getvalue()).decode()
    early = record("lora", [{}, {"background": "city", "style": "sketch"}], samples=40)
    early["points"] += LEAKY["points"]
    records = [FLOOR, LEAKY, early, record("infusion", [{}, {"background": "city", "style": "sketch"}], strip=strip)]
    path = write_benchmark(records, tmp_path, "trial-run", "## What we claim\n")
    text = path.read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "| infusion | 80 |" in text
    assert text.startswith("# Trial run\n")
    assert text.index("## What we claim") < text.index("## At the last point")
    assert "4 jobs on 1 subjects" in text
    assert "| lora, 40 samples | +0.0 |" in text
    assert "After 3 seconds of learning" in text
    assert "100.0 | 0.8 |" in next(line for line in text.splitlines() if line.startswith("| infusion | 100"))
    assert "dreambooth" in rows
    assert (tmp_path / "trial-run.png").stat().st_size > 10_000
    write_benchmark(records, tmp_path, "tables", pictures=False)
    assert sorted(p.name for p in tmp_path.glob("tables*")) == ["tables.md"]
    assert "](" not in (tmp_path / "tables.md").read_text()
    assert Image.open(tmp_path / "trial-run-000.jpg").width > 90


def test_photos_that_face_one_way_say_so(tmp_path):
    floor, ours = (
        record(label, [{"facing": way}] * 2) for label, way in (("class-word", "right"), ("infusion", "left"))
    )
    plain = write_benchmark([floor, ours], tmp_path).read_text()
    with Image.open(tmp_path / "benchmark.png") as drawn:
        usual = drawn.width
    assert "facing" not in plain
    for r in (floor, ours):
        r["trained"]["facing"] = "left"
    text = write_benchmark([floor, ours], tmp_path).read_text()
    with Image.open(tmp_path / "benchmark.png") as drawn:
        assert drawn.width > 1.2 * usual  # one panel more, in a column of its own
    assert "style and position, facing one way; every" in text
    assert "Facing pull:" in text
    assert "| facing pull |" in text
