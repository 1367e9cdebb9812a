"""Figures against counts by hand."""

from __future__ import annotations

import pytest

from infusion.bench.figures import after_seconds, beside, coverage, curves, leak, matched, point_figures, pooled, share
from tests.bench.records import FLOOR, LEAKY, record


def test_shares_count_what_is_asked_and_untold_is_wrong():
    point = LEAKY["points"][0]
    assert share(LEAKY, point, ["color1"]) == 1  # asked of the photo alone: a sketch has no colours
    assert share(LEAKY, point, ["color2"]) == 0
    assert share(LEAKY, point, ["pattern"]) == 0.5
    assert share(LEAKY, point, ["color1", "color2", "pattern", "accessory"]) == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert share(LEAKY, point, ["position"]) == 0
    assert share(LEAKY, point, ["color2", "pattern"], told_only=True) == 0.5  # of the second colour nothing is told
    only_sketch = {**LEAKY, "requests": [LEAKY["requests"][1]] * 2}
    assert share(only_sketch, point, ["color1"]) is None


def test_pictures_of_one_prompt_follow_each_other():
    """Two a prompt: the first two are of snow, the others a sketch of the city."""
    two = record("infusion", [{}, {"background": "beach"}, {"background": "city"}, {"background": "city"}])
    two["job"]["pictures"] = 2
    assert share(two, two["points"][0], ["background"]) == 0.75


def test_a_picture_without_a_subject_is_told():
    nothing = dict.fromkeys(("kind", "color1", "color2", "pattern", "accessory", "position"))
    blind = record("x", [nothing, {"pattern": None}])
    point = blind["points"][0]
    assert share(blind, point, ["pattern"], told_only=True) == 0
    assert coverage(blind, point, ["pattern"]) == 0.5
    assert coverage(blind, point, ["color1", "pattern"]) == pytest.approx(2 / 3)  # a sketch has no colours to tell


def test_a_subject_whose_class_cannot_be_told_is_there():
    unsure = record("x", [{"kind": None, "pattern": None}, {}])
    point = unsure["points"][0]
    assert share(unsure, point, ["pattern"], told_only=True) == 1
    assert coverage(unsure, point, ["pattern"]) == 0.5
    assert point_figures(unsure, point, None)["missing"] == 0


def test_pictures_without_a_subject_have_no_likeness():
    nothing = {"position": None, "kind": None, "like_subject": 0.0}
    half = record("x", [nothing, {"like_subject": 0.6}], prior_likeness=[0.0, 0.4])
    f = point_figures(half, half["points"][0], FLOOR["points"][0])
    assert (f["likeness"], f["missing"]) == (0.6, 0.5)
    assert f["prior_likeness_above"] == pytest.approx(0.4 - 0.2)
    none = record("x", [nothing, nothing], prior_likeness=[0.0, 0.0])
    f = point_figures(none, none["points"][0], FLOOR["points"][0])
    assert (f["likeness"], f["missing"], f["prior_likeness_above"]) == (None, 1, None)


def test_leaks_are_above_the_base():
    floor = FLOOR["points"][0]
    rates = lambda r, name: (f := leak(r, r["points"][0], floor, name)) and (f.custom.value, f.base.value, f.unread)  # noqa: E731
    assert rates(LEAKY, "background") == (1, 0, 0)
    assert rates(LEAKY, "style") == (1, 0, 0)  # only the sketch was asked for another style
    assert rates(LEAKY, "position") == (1, 0, 0)
    assert rates(record("x", [{"background": None}, {"background": "beach"}]), "background") == (1, 0, 1)
    assert rates(record("x", [{"background": None}, {"background": None}]), "background") is None


def test_pulls_are_above_the_base():
    centre = record("x", [{"position": "center"}, {"position": "center"}])
    f = point_figures(centre, centre["points"][0], FLOOR["points"][0])
    assert (f["leak_position"], f["leak_position_n"]) == (1, 1)  # the first was asked for the left
    assert (f["pull_position"], f["pull_position_n"], f["pull_position_hits"]) == (1, 1, 1)  # the second for no place


def test_what_no_prompt_asks_for_can_pull():
    floor, facing = (record("x", [{"facing": way}, {"facing": "right"}]) for way in ("right", "left"))
    facing["trained"]["facing"] = "left"
    f = point_figures(facing, facing["points"][0], floor["points"][0])
    assert (f["pull_facing"], f["pull_facing_n"]) == (0.5, 2)
    assert f["leak_facing"] is None
    assert "pull_facing" not in point_figures(LEAKY, LEAKY["points"][0], FLOOR["points"][0])


def test_figures_of_a_point():
    f = point_figures(LEAKY, LEAKY["points"][0], FLOOR["points"][0])
    assert f["text"] == pytest.approx((0 + 0.5 + 0) / 3)
    assert f["text_beside_base"] == pytest.approx(1 / 6 - 1)
    assert f["leak_background"] == 1
    assert (f["pull_position"], f["pull_position_n"]) == (0, 1)  # the sketch's place is open, and stays the base's
    assert f["pull_background"] is None  # every prompt names one
    assert f["nearer_than_base"] == pytest.approx(0.2 - 0.1)
    assert f["prior_likeness_above"] == pytest.approx(0.4 - 0.2)
    assert "leak_background" not in point_figures(LEAKY, LEAKY["points"][0], None)


def test_jobs_meet_the_floor_of_their_own_subject():
    other = record("class-word", [{"background": "beach"}, {}], subject=1, samples=0, step=0)
    same = record("dreambooth", [{"background": "beach"}, {"background": "beach"}], subject=1)
    found = curves([FLOOR, other, LEAKY, same])
    leaks = [job["leak_background"] for jobs in found["dreambooth"][80].values() for job in jobs.values()]
    assert leaks == [1, 0.5]
    estimate = pooled(found["dreambooth"][80], "leak_background")
    assert (estimate.value, estimate.n) == (0.75, 2)
    assert pooled(found["dreambooth"][80], "nothing") is None
    half = 12.706 * 0.25  # Student's 97.5 % quantile with one degree of freedom, times the standard error
    assert (estimate.low, estimate.high) == (pytest.approx(0.75 - half, abs=1e-3), pytest.approx(0.75 + half, abs=1e-3))


def test_jobs_of_one_subject_count_as_one():
    again = record("dreambooth", [{}, {}])
    again["job"]["seed"] = 1
    found = curves([FLOOR, LEAKY, again])
    estimate = pooled(found["dreambooth"][80], "leak_background")
    assert (estimate.value, estimate.n) == (0.5, 1)


def test_methods_are_compared_on_what_they_share():
    floor = record("class-word", [{"background": "beach"}, {}], subject=1, samples=0, step=0)
    other = record("dreambooth", [{"background": "beach"}, {}], subject=1)
    alone = record("dreambooth", [{}, {}], subject=2)
    ours = [record("infusion", [{}, {}]), record("infusion", [{}, {"background": "beach"}], subject=1)]
    found = beside(curves([FLOOR, floor, LEAKY, other, alone, *ours]), "infusion")
    assert found.keys() == {"class-word", "dreambooth"}
    difference = found["dreambooth"]["leak_background"]
    assert (difference.value, difference.n) == (pytest.approx(-0.5), 2)  # 0 - 1 and 0.5 - 0.5
    assert beside(curves([FLOOR, LEAKY]), "infusion") == {}


def test_an_overfitted_method_is_compared_where_it_was_as_faithful():
    wrong = {"color1": "green", "color2": "green"}
    early, late = record("dreambooth", [wrong, {}], samples=40), record("dreambooth", [{}, {}])
    early["points"] += late["points"]
    ours = record("infusion", [wrong, {}])
    found = curves([FLOOR, early, ours, record("lora", [{}, {"pattern": "plain"}])])
    assert matched(found, "infusion") == {"class-word": 0, "dreambooth": 40, "lora": 80}
    assert beside(found, "infusion", {"dreambooth": 40})["dreambooth"]["fidelity"].value == 0
    assert beside(found, "infusion")["dreambooth"]["fidelity"].value == pytest.approx(-0.5)


def test_rows_are_compared_after_equal_seconds():
    """Two points at 2 and 6 seconds; a job that other work stretched does not move the median of three."""
    wrong = {"color1": "green", "color2": "green"}

    def two_points(label, subject, late_seconds):
        early = record(label, [wrong, {}], subject=subject, samples=40, seconds=2.0)
        early["points"] += record(label, [{}, {}], subject=subject, seconds=late_seconds)["points"]
        return early

    jobs = [two_points("lora", i, t) for i, t in enumerate((6.0, 6.0, 60.0))]
    slow = [record("dreambooth", [{}, {}], subject=i, seconds=7.0) for i in range(3)]
    quick = [record("infusion", [wrong, {}], subject=i, seconds=3.0) for i in range(3)]
    found = curves([FLOOR, *jobs, *slow, *quick])
    then = after_seconds(found, 3.0)
    assert {name: [*by_samples] for name, by_samples in then.items()} == {"lora": [50], "infusion": [80]}
    assert pooled(then["lora"][50], "fidelity").value == pytest.approx(0.5 + 0.25 * 0.5)
    assert beside(then, "infusion")["lora"]["fidelity"].value == pytest.approx(-0.125)
    assert after_seconds(found, 1.0) == {}
    assert [*after_seconds(found, 100.0)["dreambooth"]] == [80]
