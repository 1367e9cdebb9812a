"""The facing's head: a mirror image answers the opposite, truth that is true, saved equals loaded, training that learns and resumes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from infusion.world.facing import FACINGS, FIGURES, FILE, ONE_SIDED, Facing, FacingHead
from infusion.world.facing_training import (
    FacingConfig,
    Sides,
    draw_scenes,
    examine_facing,
    facing_figures,
    shows_side,
    train_facing,
)
from infusion.world.judge import GRID, SHIPPED, Judge, JudgeNetwork, digest_of, load_judge
from infusion.world.judge_figures import facing_section
from infusion.world.models import pixels_to_tensor
from infusion.world.questions import shown
from infusion.world.scenes import Placed, Scene, few_modalities, render
from infusion.world.subjects import Subject
from infusion.world.vocabulary import CLASSES

MILO = Subject("dog", "purple", "yellow", "spotted", "none", (0.5, 0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge(JudgeNetwork(), facing=Facing(FacingHead().eval()))


def test_a_mirror_image_answers_the_opposite(judge):
    pictures = torch.rand(3, 3, 64, 64) * 2 - 1
    logits = judge.facing.logits(judge.fine, pictures).detach()
    assert logits.shape == (3, GRID, GRID)
    turned = judge.facing.logits(judge.fine, pictures.flip(-1))
    torch.testing.assert_close(turned, -logits.flip(-1), atol=1e-5, rtol=1e-4)
    assert float(logits.abs().max()) > 1e-3


def test_only_what_has_a_side_and_is_sure_is_told():
    facing = Facing(FacingHead(), threshold=0.9)
    assert facing.name("dog", torch.tensor(3.0)) == "left"
    assert facing.name("dog", torch.tensor(-3.0)) == "right"
    assert facing.name("dog", torch.tensor(2.0)) is facing.name("dog", torch.tensor(-2.0)) is None  # 0.88
    assert facing.name("robot", torch.tensor(9.0)) is facing.name(None, torch.tensor(9.0)) is None
    assert set(ONE_SIDED) < set(CLASSES)


def test_a_judge_reads_it_at_each_subject(judge):
    torch.nn.init.constant_(judge.network.heat.bias, 3.0)  # sees subjects everywhere
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    sure = Judge(judge.network, facing=replace(judge.facing, threshold=0.5))
    said = [s for reading in sure.read(pixels) for s in reading.subjects]
    assert said
    assert all((s.facing in FACINGS) == (s.kind in ONE_SIDED) for s in said)
    left = judge.facing.logits(judge.fine, pixels_to_tensor(pixels)).detach()
    first = next(s for s in sure.read(pixels)[0].subjects)
    cell = left[0, int(first.y * GRID), int(first.x * GRID)]
    assert first.facing == judge.facing.name(first.kind, cell)
    without = Judge(judge.network).read(pixels)
    assert all(s.facing is None for reading in without for s in reading.subjects)


def test_saved_equals_loaded_and_belongs_to_one_judge(judge, tmp_path):
    path = judge.save(tmp_path / "judge.safetensors")
    facing = replace(judge.facing, threshold=0.75)
    facing.save(tmp_path / FILE, digest_of(path))
    loaded = Judge.load(path).facing
    assert loaded is not None
    assert loaded.threshold == 0.75
    pairs = zip(loaded.head.parameters(), judge.facing.head.parameters(), strict=True)
    assert all(torch.equal(a, b.half().float()) for a, b in pairs)
    assert Facing.load(tmp_path / FILE, "another judge's digest") is None
    assert Facing.load(tmp_path / "none.safetensors", digest_of(path)) is None


def test_truth_of_scenes():
    rows = draw_scenes(7, 0, 40)
    again = draw_scenes(7, 30, 10)
    assert np.array_equal(rows["pixels"][30:], again["pixels"])
    told = ~np.isnan(rows["centre"]).any(-1)
    assert 20 < told.sum() < 80
    assert {CLASSES[k] for k in rows["kind"][told]} <= set(ONE_SIDED)
    assert 0.25 < rows["left"][told].mean() < 0.75


def test_a_side_that_does_not_show_is_not_asked():
    milo = Placed(MILO, x=0.5, size=0.5)
    assert shows_side(render(Scene((milo,), "beach")), 0)
    hidden = (replace(milo, y=0.8, size=0.2), replace(milo, subject=replace(MILO, kind="house"), size=0.7))
    assert not shows_side(render(Scene(hidden, "beach")), 0)
    bear = replace(milo, subject=replace(MILO, kind="teddy bear", pattern="plain"))
    assert not shows_side(render(Scene((bear,), "beach")), 0)


def test_training_learns_and_resumes(judge, tmp_path, monkeypatch):
    ticks = iter(range(1000))  # a clock of one second a look
    monkeypatch.setattr("infusion.world.runs.time.monotonic", lambda: next(ticks))
    data = draw_scenes(7, 0, 64)
    config = FacingConfig(minutes=0.5, batch=8, warmup=1, save_every=4, decay=0.2)
    facing = Facing(FacingHead())
    before = examine_facing(judge, facing, data)
    steps = [step for step, *_ in train_facing(facing, judge, data, None, tmp_path, config, Accelerator(cpu=True))]
    loss = lambda s: float(torch.nn.functional.binary_cross_entropy_with_logits(s.logits, s.left.float()))  # noqa: E731
    assert loss(examine_facing(judge, facing, data)) < loss(before)
    longer = replace(config, minutes=0.6)
    more = [step for step, *_ in train_facing(Facing(FacingHead()), judge, data, None, tmp_path, longer, Accelerator(cpu=True))]  # fmt: skip
    assert more[0] == steps[-1] + 1


def test_figures_count_by_class_and_where_told():
    dog, cat = CLASSES.index("dog"), CLASSES.index("cat")
    sides = Sides(torch.tensor([4.0, -4.0, 0.1, 4.0]), torch.tensor([True, True, True, True]), torch.tensor([dog, dog, cat, cat]))  # fmt: skip
    found = facing_figures(sides, sides, threshold=0.9)
    assert (found["clean"]["value"], found["clean"]["n"]) == (0.75, 4)
    assert (found["dog"]["value"], found["cat"]["value"]) == (0.5, 1)
    assert (found["believed"]["value"], found["told"]["n"]) == (0.75, 3)
    assert found["told"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    assert "bird" not in found


def test_a_batch_without_a_side_moves_nothing(judge, tmp_path):
    data = draw_scenes(7, 0, 4) | {"centre": np.full((4, 3, 2), np.nan, np.float32)}
    facing = Facing(FacingHead())
    config = FacingConfig(minutes=0.01, batch=2)
    losses = {loss for *_, loss in train_facing(facing, judge, data, None, tmp_path, config, Accelerator(cpu=True))}
    assert losses == {0.0}
    assert all(bool(p.isfinite().all()) for p in facing.head.parameters())


def test_the_shipped_head_tells_facings():
    """On scenes that neither its training nor its figures drew; its card tells what those were."""
    shipped = load_judge()
    assert shipped.facing is not None
    sides = examine_facing(shipped, shipped.facing, draw_scenes(20261201, 0, 100))
    assert len(sides.left) > 60
    assert float(sides.correct.double().mean()) >= 0.95
    section = facing_section(SHIPPED.parent / FIGURES)
    assert section in (SHIPPED.parent / "README.md").read_text()
    figures = json.loads((SHIPPED.parent / FIGURES).read_text())["figures"]
    assert f"{figures['clean']['value']:.1%}" in section
    assert facing_section(SHIPPED.parent / "none.json") == ""


@pytest.mark.parametrize("facing", FACINGS)
def test_photos_that_face_one_way_are_read_so(facing):
    photos = [render(s).pixels for s in few_modalities(MILO, 4, seed=1, background="city", facing=facing)]
    readings = load_judge().read(torch.from_numpy(np.stack(photos)))
    assert {shown(r)["facing"] for r in readings} == {facing}
