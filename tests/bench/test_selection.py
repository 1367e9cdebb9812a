"""A page's records: no mixtures, whole subjects, one order."""

from __future__ import annotations

import pytest

from infusion.bench.selection import in_order, whole_subjects
from infusion.bench.tables import write_benchmark
from infusion.errors import InfusionError
from tests.bench.records import FLOOR, LEAKY, record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "other"}, "more than one base"),
        ({"judge": "other"}, "more than one judge"),
        ({"job": {**LEAKY["job"], "label": "other", "pictures": 4}}, "more than one number of pictures a prompt"),
        ({"job": {**LEAKY["job"], "settings": {"learning_rate": 1.0}}}, "'dreambooth' are of more than one setting"),
    ],
)
def test_mixtures_are_refused(tmp_path, change, message):
    first = {**LEAKY, "judge": "abc"}
    with pytest.raises(InfusionError, match=message):
        write_benchmark([FLOOR, first, {**first, **change}], tmp_path, pictures=False)


def test_a_method_does_not_win_by_subjects_that_others_have_yet_to_learn(tmp_path):
    other_floor = record("class-word", [{}, {}], subject=1, samples=0, step=0)
    records = [FLOOR, LEAKY, other_floor]
    assert whole_subjects(records) == [FLOOR, LEAKY]
    again = {**LEAKY, "job": {**LEAKY["job"], "seed": 1}}
    assert whole_subjects([*records, record("dreambooth", [{}, {}], subject=1), again]) == [FLOOR, LEAKY, again]
    assert whole_subjects([LEAKY, other_floor]) == [LEAKY, other_floor]  # none is whole: all there is
    text = write_benchmark(records, tmp_path, pictures=False).read_text()
    assert "2 jobs on 1 subjects" in text
    assert "; 1 job of subjects that not every method has learned yet is left out. " in text
    assert "3 jobs on 2 subjects" in write_benchmark(records, tmp_path, pictures=False, whole=False).read_text()
    assert "left out" not in write_benchmark([FLOOR, LEAKY], tmp_path, pictures=False).read_text()


def test_the_base_comes_first_and_then_infusion():
    labels = ("perfusion", "described", "infusion", "class-word", "single-stream")
    records = [record(label, [{}, {}], method={"single-stream": "infusion"}.get(label)) for label in labels]
    assert [r["job"]["label"] for r in in_order(records)] == [
        "class-word", "described", "infusion", "single-stream", "perfusion",
    ]  # fmt: skip
