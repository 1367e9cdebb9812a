"""The judge in small: truth that is true, losses against loops, saved equals loaded, training that learns and resumes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from infusion.world.judge import (
    EMBEDDING,
    FOUND,
    GRID,
    Judge,
    JudgeNetwork,
    Maps,
    SubjectReading,
    beliefs,
    centre,
    evidence,
    judge_digest,
    look,
    peaks,
)
from infusion.world.judge_figures import (
    auc,
    believed_from,
    calibrate,
    examine,
    examine_told,
    judge_card,
    resemblance,
    same_pairs,
    stranger_pairs,
    training_of,
    twin_pairs,
)
from infusion.world.judge_figures import main as judge_figures
from infusion.world.judge_lessons import Labels, corrupt, heat_targets, labels_of, mirrored, warp
from infusion.world.judge_training import JudgeConfig, judge_losses, train_judge, twin_loss
from infusion.world.models import build_autoencoder, pixels_to_tensor
from infusion.world.scenes import Placed, Scene, render
from infusion.world.subjects import Subject
from infusion.world.truth import COLORED, NONE, SCENE_HEADS, SHARES, SUBJECT_HEADS, visible
from infusion.world.twins import CHANGES, VIEWS, _draw, build_families, family, load_families, tellable, truth
from infusion.world.vocabulary import CLASSES, STYLES

MILO = Subject("dog", "purple", "yellow", "spotted", "none", (0.5, 0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for _ in build_families(folder, 12, seed=3, workers=2):
        pass
    return load_families(folder)


def test_a_family_is_an_individual_and_its_twin():
    changes = set()
    for index in range(30):
        scenes, change = family(5, index)
        a, b, c, d = (scene.subjects[0].subject for scene in scenes)
        assert a == b
        assert c == d
        differing = [
            f for f in ("kind", "color1", "color2", "pattern", "accessory", "shape") if getattr(a, f) != getattr(c, f)
        ]
        assert differing == [change]
        assert c.color1 != c.color2
        changes.add(change)
    assert changes == set(CHANGES)
    assert family(5, 7) == family(5, 7) != family(6, 7)


def test_truth_of_a_picture(data):
    scene = Scene((Placed(MILO, x=0.25, y=0.9, size=0.5),), "beach", "photo", 1)
    told = truth(render(scene))
    assert told["subject"][0].tolist() == list(visible(MILO, "photo").values())
    assert told["subject"][1:].tolist() == [[NONE] * 5] * 2
    assert told["centre"][0, 0] == pytest.approx(4, abs=0.6)
    assert np.isnan(told["centre"][1:]).all()
    scenes, _ = family(3, 4)
    drawn = render(scenes[2])
    assert np.array_equal(data.pixels[4 * VIEWS + 2], drawn.pixels)
    assert len(data) == 48


def test_what_a_style_does_not_show_is_not_asked():
    assert visible(MILO, "sketch")["color1"] == visible(MILO, "sepia")["color2"] == NONE
    assert visible(MILO, "sketch")["pattern"] == 1
    same_grey = Subject("dog", "orange", "pink", "striped", "none", MILO.shape)
    grey = Subject("dog", "red", "purple", "striped", "none", MILO.shape)
    assert visible(grey, "sepia")["pattern"] == NONE
    assert visible(grey, "photo")["pattern"] != NONE
    assert visible(replace(grey, pattern="plain"), "sepia")["pattern"] == NONE  # looks the same
    assert visible(same_grey, "photo")["color1"] != NONE


def test_tellable_is_what_changes_the_picture():
    shown = {
        (style, head): tellable(scene, 0, head, render(scene).pixels)
        for style in STYLES
        for scene in [Scene((Placed(MILO, x=0.5, size=0.5),), "beach", style, 1)]
        for head in ("color1", "pattern", "accessory")
    }
    assert shown["photo", "color1"]
    assert shown["photo", "pattern"]
    assert shown["photo", "accessory"]
    assert not shown["sketch", "color1"]
    assert not shown["sepia", "color1"]
    hidden = Scene((Placed(MILO, x=0.5, size=0.4), Placed(replace(MILO, color1="red"), x=0.5, size=0.7)), "beach")
    assert not tellable(hidden, 0, "pattern", render(hidden).pixels)
    assert tellable(hidden, 1, "pattern", render(hidden).pixels)


def test_strict_families_keep_only_what_shows():
    plain, strict = (_draw(3, 3, 1, strict)["subject"] for strict in (False, True))
    kept = strict != NONE
    assert np.array_equal(strict[kept], plain[kept])
    assert int(kept.sum()) == int((plain != NONE).sum()) - 2  # one pattern and one accessory lie behind another subject


def test_peaks_and_centres():
    truth_ = torch.tensor([[[3.3, 8.6], [11.5, 4.5], [float("nan")] * 2]])
    heat = heat_targets(truth_)
    assert heat.shape == (1, GRID, GRID)
    assert float(heat[0, 4, 11]) == float(heat[0, 8, 3]) == 1
    assert int((heat == 1).sum()) == 2
    logits = torch.logit(heat[0].clamp(1e-4, 1 - 1e-4))
    found = peaks(logits)
    assert [(y, x) for y, x, _ in found] == [(4, 11), (8, 3)]
    assert all(height >= FOUND for *_, height in found)
    x, y = centre(logits, 8, 3)
    assert (x * GRID, y * GRID) == (pytest.approx(3.3, abs=0.15), pytest.approx(8.6, abs=0.15))
    assert peaks(torch.full((GRID, GRID), -5.0)) == []


def labels(styles: list[str], changes: list[str]) -> Labels:
    n = len(styles)
    scene = torch.zeros(n, len(SCENE_HEADS), dtype=torch.long)
    scene[:, 1] = torch.tensor([STYLES.index(s) for s in styles])
    subject = torch.zeros(n, 3, 5, dtype=torch.long)
    for i, style in enumerate(styles):
        subject[i, :, 1:3] = 0 if style in COLORED else NONE
    return Labels(
        subject,
        scene,
        torch.full((n, 3, 2), 8.0),
        torch.tensor([CHANGES.index(c) for c in changes]),
    )


def test_the_twin_loss_equals_a_loop():
    e = torch.nn.functional.normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    styles = ["photo", "sketch", "photo", "neon", "photo", "photo", "sepia", "photo"]
    told = labels(styles, ["color1"] * 4 + ["shape"] * 4)
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 7])  # picture 6 shows no first subject
    total, counted = 0.0, 0
    for a, i in enumerate(rows.tolist()):
        partners = [b for b, j in enumerate(rows.tolist()) if j != i and j // 2 == i // 2]
        if not partners:
            continue
        rivals = []
        for b, j in enumerate(rows.tolist()):
            alike = (
                j // 4 == i // 4
                and j // 2 != i // 2
                and i // 4 == 0
                and not (styles[i] in COLORED and styles[j] in COLORED)
            )
            if b != a and not alike:
                rivals.append(b)
        scores = torch.stack([e[a] @ e[b] / 0.1 for b in rivals])
        total -= float(e[a] @ e[partners[0]] / 0.1 - scores.logsumexp(0))
        counted += 1
    assert counted == 6
    assert float(twin_loss(e[: len(rows)], told, rows, 0.1)) == pytest.approx(total / counted, rel=1e-4)


def test_pairs_of_one_individual_and_of_twins():
    told = labels(["photo", "photo", "photo", "sketch"] + ["photo"] * 4, ["color1"] * 4 + ["shape"] * 4)
    told.centre[6, 0] = float("nan")  # hidden behind another
    assert same_pairs(told).tolist() == [[0, 1], [4, 5], [2, 3]]
    assert twin_pairs(told).tolist() == [[0, 2], [1, 2]]  # a sketch shows no colour
    assert sorted(twin_pairs(told, of_shape=True).tolist()) == [[4, 7], [5, 7]]
    assert auc(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])) == 0.75
    assert auc(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -5.0])) == 0.75  # a tie counts half


def test_evidence_is_the_ratio_of_likelihoods_where_heads_differ():
    """Against Bayes' rule written out: chance of two readings from one subject over that from two that the world drew."""
    g = torch.Generator().manual_seed(0)
    a, b = ({n: torch.rand(len(s), generator=g).softmax(0) for n, s in SHARES.items()} for _ in range(2))
    expected = 0.0
    for name, shares in SHARES.items():
        likelihoods = [
            (pa / s, pb / s, s) for pa, pb, s in zip(a[name].tolist(), b[name].tolist(), shares, strict=True)
        ]
        one = sum(s * la * lb for la, lb, s in likelihoods)
        two = sum(s * la for la, _, s in likelihoods) * sum(s * lb for _, lb, s in likelihoods)
        expected += min(0.0, float(np.log(one / two)))
    assert expected < 0
    assert float(evidence(a, b)) == pytest.approx(expected, rel=1e-4)
    nothing = {n: torch.tensor(s) for n, s in SHARES.items()}
    assert float(evidence(a, nothing)) == pytest.approx(0, abs=1e-5)
    stacked = {n: torch.stack([a[n], b[n], nothing[n]]) for n in SHARES}
    unit = torch.nn.functional.normalize(torch.randn(3, 4, generator=g), dim=1)
    scores = resemblance({**stacked, "embedding": unit}, torch.tensor([[0, 1], [0, 2]]), 5.0)
    assert scores.tolist() == pytest.approx(
        [expected + 5 * float(unit[0] @ unit[1]), 5 * float(unit[0] @ unit[2])], abs=1e-4
    )


def test_colours_that_a_style_hides_are_not_believed():
    maps = Maps(
        heat=torch.zeros(2, GRID, GRID),
        subject={n: torch.randn(2, len(v), GRID, GRID) for n, v in SUBJECT_HEADS.items()},
        scene={"style": torch.tensor([[9.0, 0, 0, 0, 0], [0, 9.0, 0, 0, 0]]), "background": torch.zeros(2, 8)},
        embedding=torch.zeros(2, 4, GRID, GRID),
    )
    photo, sketch = (
        {n: p[i] for n, p in beliefs(maps, torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])).items()}
        for i in (0, 1)
    )
    for name in SUBJECT_HEADS:
        for i, (told, y, x) in enumerate(((photo, 2, 4), (sketch, 3, 5))):
            hidden = i == 1 and name.startswith("color")
            expected = torch.tensor(SHARES[name]) if hidden else maps.subject[name][i, :, y, x].softmax(0)
            assert torch.allclose(told[name], expected)


def test_same_adds_the_embedding_to_the_evidence():
    def seen(color: int, embedding: list[float]) -> SubjectReading:
        believed = {n: torch.eye(len(s))[color if n == "color1" else 0] for n, s in SHARES.items()}
        return SubjectReading("dog", *4 * [None], 0.5, 0.5, 1.0, torch.tensor(embedding), believed)

    a, b, other = seen(0, [1.0, 0.0]), seen(0, [0.0, 1.0]), seen(1, [1.0, 0.0])
    agreed = float(evidence(a.beliefs, b.beliefs))
    assert (agreed, float(evidence(a.beliefs, other.beliefs))) == (0, pytest.approx(np.log(1e-3)))
    heads = Judge(JudgeNetwork(), {"same": agreed - 1, "embedding": 0.0})
    assert (heads.same(a, b), heads.same(a, other)) == (True, False)
    both = Judge(JudgeNetwork(), {"same": agreed + 1, "embedding": 4.0})
    assert (both.same(a, b), both.same(a, a)) == (False, True)


def test_strangers_are_of_one_class_and_of_other_families():
    told = labels(["photo"] * 7 + ["sketch"], ["shape"] * 8)
    told.subject[4:, 0, 0] = torch.tensor([0, 1, 0, 0])  # the second family: one of another class, one without colours
    assert sorted(stranger_pairs(told).tolist()) == [[a, b] for a in range(4) for b in (4, 6)]


def test_believed_from_is_the_lowest_probability_that_is_right_often_enough():
    p = torch.tensor([0.9, 0.5, 0.8, 0.7, 0.6])
    right = torch.tensor([True, False, True, False, True])
    assert believed_from(p, right, 1.0) == pytest.approx(0.8)
    assert believed_from(p, right, 0.7) == pytest.approx(0.6)
    assert believed_from(p, right, 0.5) == pytest.approx(0.5)
    assert believed_from(p, ~torch.ones(5, dtype=torch.bool), 0.9) > 1


def test_corruption_touches_only_its_share():
    pictures = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(0)
    out = corrupt(pictures, None, np.random.default_rng(0), share=0.6)
    changed = (out != pictures).flatten(1).any(1).float().mean()
    assert 0.5 < float(changed) < 0.66  # 1 - 0.7 x 0.6: without an autoencoder its third stays as it is
    assert float(out.abs().max()) <= 1
    assert torch.equal(corrupt(pictures, None, np.random.default_rng(0), 0.0), pictures)


def test_mirrored_pictures_keep_their_truth(data):
    rows = np.arange(len(data))
    pictures, told = torch.from_numpy(data.pixels[rows]).permute(0, 3, 1, 2).float(), labels_of(data, rows)
    out, turned = mirrored(pictures, told, np.random.default_rng(0))
    flipped = torch.tensor([torch.equal(a.flip(-1), b) for a, b in zip(pictures, out, strict=True)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(pictures, out, strict=True)])
    assert bool((flipped ^ same).all())
    assert 0 < int(flipped.sum()) < len(rows)
    x, y = told.centre.unbind(-1)
    assert torch.equal(turned.centre[..., 1].nan_to_num(-1), y.nan_to_num(-1))
    assert torch.equal(turned.centre[flipped][..., 0].nan_to_num(-1), (GRID - x[flipped]).nan_to_num(-1))
    assert torch.equal(turned.centre[same][..., 0].nan_to_num(-1), x[same].nan_to_num(-1))
    assert torch.equal(turned.subject, told.subject)


def test_a_warp_moves_pixels_a_little():
    ramp = torch.linspace(-1, 1, 64).expand(5, 3, 64, 64)
    moved = (warp(ramp, np.random.default_rng(0)) - ramp)[..., 8:-8] / (2 / 63)  # in pixels
    assert 0.4 < float(moved.std()) < 2
    assert float(moved.diff(dim=-1).abs().max()) < 1  # smooth: no fold
    assert torch.equal(warp(ramp, np.random.default_rng(1)), warp(ramp, np.random.default_rng(1)))


def test_perfect_maps_have_no_loss_left_and_read_right(data):
    rows = np.arange(len(data))
    told = labels_of(data, rows)
    n = len(rows)
    subject = {name: torch.zeros(n, len(v), GRID, GRID) for name, v in SUBJECT_HEADS.items()}
    for b in range(n):
        for s in range(3):
            if told.centre[b, s].isnan().any():
                continue
            x, y = told.centre[b, s].long().clamp(0, GRID - 1).tolist()
            for k, name in enumerate(SUBJECT_HEADS):
                if told.subject[b, s, k] != NONE:
                    subject[name][b, told.subject[b, s, k], y, x] = 30.0
    scene = {
        name: 30.0 * torch.nn.functional.one_hot(told.scene[:, k], len(v)).float()
        for k, (name, v) in enumerate(SCENE_HEADS.items())
    }
    heat = torch.logit(heat_targets(told.centre).clamp(1e-6, 1 - 1e-6))
    maps = Maps(heat, subject, scene, torch.nn.functional.normalize(torch.ones(n, EMBEDDING, GRID, GRID), dim=1))
    losses = judge_losses(maps, told, JudgeConfig())
    assert all(float(losses[name]) < 0.05 for name in (*SUBJECT_HEADS, *SCENE_HEADS))

    padded = torch.nn.functional.pad(
        pixels_to_tensor(torch.from_numpy(np.array(data.pixels))), (0, 0, 1, 1), mode="replicate"
    )
    upright = [padded[:, :, row : row + 64] for row in range(3)]  # the views of `look`

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pictures: torch.Tensor) -> Maps:
            turned = any(torch.equal(pictures.flip(-1), view) for view in upright)
            assert turned or any(torch.equal(pictures, view) for view in upright)
            there = {name: v.flip(-1) if turned else v for name, v in maps.subject.items()}
            return Maps(maps.heat.flip(-1) if turned else maps.heat, there, maps.scene, maps.embedding)

    readings = Judge(Oracle(), {"kind": 0.9}).read(torch.from_numpy(np.array(data.pixels)))
    for b, reading in enumerate(readings):
        assert reading.background == list(SCENE_HEADS["background"])[told.scene[b, 0]]
        assert all((s.color1 is None) == (reading.style in ("sketch", "sepia")) for s in reading.subjects)
        kinds = sorted(CLASSES[k] for k in told.subject[b, :, 0].tolist() if k != NONE)
        close = told.centre[b][~told.centre[b].isnan().any(-1)]
        if len(close) < 2 or float(torch.pdist(close).min()) > 3:  # nearer ones share a peak
            assert sorted(s.kind or "?" for s in reading.subjects) == kinds


def test_a_mirrored_picture_is_read_as_mirrored():
    torch.manual_seed(0)
    network, pictures = JudgeNetwork().eval(), torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        seen, turned = look(network, pictures), look(network, pictures.flip(-1))
        down = torch.cat([pictures[:, :, :1], pictures[:, :, :-1]], 2)
        up = torch.cat([pictures[:, :, 1:], pictures[:, :, -1:]], 2)
        each = [network(view) for p in (pictures, down, up) for view in (p, p.flip(-1))]
    assert torch.allclose(seen.heat, turned.heat.flip(-1), atol=1e-6)
    assert torch.allclose(seen.subject["pattern"], turned.subject["pattern"].flip(-1), atol=1e-6)
    assert torch.allclose(seen.embedding, turned.embedding.flip(-1), atol=1e-6)
    styles = torch.stack([maps.scene["style"] for maps in each])
    assert torch.allclose(seen.scene["style"], styles.mean(0), atol=1e-6)
    assert float(styles.std(0).min()) > 1e-5  # no view says what another does
    hats = torch.stack(
        [maps.subject["accessory"].flip(-1) if k % 2 else maps.subject["accessory"] for k, maps in enumerate(each)]
    )
    assert torch.allclose(seen.subject["accessory"], hats.mean(0), atol=1e-6)


def test_the_judge_says_when_it_cannot_tell_and_loads_as_saved(tmp_path):
    torch.manual_seed(0)
    judge = Judge(JudgeNetwork(), {"background": 0.99, "style": 0.0, "same": 0.2})
    pixels = torch.randint(0, 255, (3, 64, 64, 3), dtype=torch.uint8)
    readings = judge.read(pixels)
    assert [r.background for r in readings] == [None] * 3
    assert all(r.style in STYLES for r in readings)
    path = judge.save(tmp_path / "judge.safetensors")
    assert path.stat().st_size < 10_000_000
    again = Judge.load(path)
    assert again.thresholds == judge.thresholds
    assert [r.style for r in again.read(pixels)] == [r.style for r in readings]


def test_training_learns_and_resumes(data, tmp_path):
    config = JudgeConfig(minutes=60, families=3, warmup=1, save_every=2)

    def run(folder, stop):
        torch.manual_seed(0)
        seen, shown = [], []
        network = JudgeNetwork()
        network.register_forward_pre_hook(lambda module, args: shown.append(args[0].clone()))
        for step, _, losses in train_judge(network, data, None, folder, config, Accelerator(cpu=True)):
            seen.append((step, sum(losses.values()), shown.pop()))
            if step == stop:
                return seen
        return seen

    straight = run(tmp_path, 9)
    assert straight[-1][1] < straight[0][1]
    again = tmp_path / "again"
    again.mkdir()
    run(again, 3)  # stops one step after its checkpoint
    resumed = run(again, 4)
    assert [step for step, _, _ in resumed] == [3, 4]
    assert resumed[0][1] == pytest.approx(straight[2][1], rel=1e-3)
    for before, after in zip(straight[2:4], resumed, strict=True):  # noise and all
        assert torch.equal(before[2], after[2])
    thresholds = calibrate(JudgeNetwork(), data, None)
    assert set(thresholds) == {*SUBJECT_HEADS, *SCENE_HEADS, "same", "embedding"}
    figures = examine(JudgeNetwork(), data, 5.0)
    counts = {"same_auc", "cosine_auc", "proportions_auc", "stranger_auc", "pictures", "twins"}
    shares = {*SUBJECT_HEADS, *SCENE_HEADS, "found", "real", "position"}
    assert set(figures) == {*shares, *(f"{name}_{of}" for name in shares for of in ("low", "high", "n")), *counts}
    assert figures["style_n"] == len(data)
    assert figures["style_low"] <= figures["style"] <= figures["style_high"]
    assert figures["pictures"] == len(data)
    sure = Judge(JudgeNetwork(), dict.fromkeys(thresholds, 0.0) | {"kind": 1.01})
    told = examine_told(sure, data, build_autoencoder().eval())
    assert (told["pattern_told"], told["kind_told"]) == (1, 0)
    log = [
        {
            "stage": "start",
            "drawn": 3,
            "families": 2,
            "corrupted": 0.6,
            "learning_rate": 0.1,
            "minutes": 5.0,
            "hardware": "an abacus",
        },
        {"stage": "judge", "step": 10, "seconds": 60},
    ]
    training = training_of(log)
    earlier = {**training, "pictures": 1000, "minutes": 7}
    assert (training["pictures"], training["minutes"]) == (80, 1)
    path = sure.save(tmp_path / "j.safetensors")
    card = judge_card([earlier, training], {"clean": figures, "autoencoded": figures, "told": told}, path)
    clean = f"{figures['pattern']:.1%} [{figures['pattern_low']:.1%}, {figures['pattern_high']:.1%}]"
    both = f"{clean} of {figures['pattern_n']:,} | {figures['pattern']:.1%}"
    assert f"| pattern | {both} | {told['pattern']:.1%} of 100.0% |" in card
    assert "1,080 pictures seen" in card
    assert "8 min beside" in card
    assert "1 min on an abacus" in card


def test_the_shipped_judge_is_examined_by_one_command(tmp_path, monkeypatch):
    monkeypatch.setattr("infusion.world.judge_figures.build_families", partial(build_families, workers=1))
    for seed in ("5", "6"):
        arguments = ["judge_figures", "--folder", str(tmp_path), "--families", "2", "--seed", seed]
        monkeypatch.setattr(sys, "argv", arguments)
        judge_figures()
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures["clean"]["pictures"] == 2 * VIEWS
        assert judge_digest() in (tmp_path / "README.md").read_text()
    five, six = (load_families(tmp_path / f"families-{seed}").pixels for seed in (5, 6))
    assert not np.array_equal(five, six)
