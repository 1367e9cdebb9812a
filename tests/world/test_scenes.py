"""The world: determinism, truth, shares, captions, tokenizer, data set."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest

from infusion.world import vocabulary as v
from infusion.world.captions import caption
from infusion.world.dataset import build_dataset, encode_caption, load_dataset, training_scene
from infusion.world.scenes import (
    SIDE,
    Placed,
    Scene,
    few_modalities,
    held_out,
    random_scene,
    render,
    with_subject,
)
from infusion.world.subjects import Subject, draw_subject, random_subject
from infusion.world.tokenizer import MAX_LENGTH, build_tokenizer, class_words, world_words

DOG = Subject("dog", "red", "blue", "spotted", "hat", (0.5, 0.5, 0.5, 0.5))


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


def test_the_same_scene_gives_the_same_pixels():
    for scene in scenes(5):
        a, b = render(scene), render(scene)
        assert np.array_equal(a.pixels, b.pixels)
        assert np.array_equal(a.masks, b.masks)
    assert scenes(5) == scenes(5)
    assert scenes(5) != scenes(5, seed=1)


def test_every_class_background_and_style_can_be_drawn():
    for kind in v.CLASSES:
        for accessory in v.ACCESSORIES:
            drawn = draw_subject(Subject(kind, "red", "blue", "checkered", accessory, (0.0, 1.0, 0.0, 1.0)))
            alpha = np.asarray(drawn.getchannel("A"))
            assert 0.15 < (alpha > 127).mean() < 0.9
            assert (alpha[:, 0] > 127).mean() < 0.3  # nothing is cut off along a whole edge
    for background in v.BACKGROUNDS:
        for style in v.STYLES:
            pixels = render(Scene((Placed(DOG, 0.5),), background, style)).pixels
            assert pixels.shape == (SIDE, SIDE, 3)
            assert pixels.std() > 5


def test_the_mask_is_where_the_subject_changes_the_picture():
    scene = Scene((Placed(DOG, 0.3),), "beach", seed=4)
    drawn = render(scene)
    other = render(with_subject(scene, 0, color1="green", pattern="plain"))
    changed = np.abs(drawn.pixels.astype(int) - other.pixels).max(-1) > 3
    assert changed.sum() > 100
    assert (drawn.masks[0][changed] > 0).all()
    x0, y0, x1, y1 = drawn.boxes[0]
    ys, xs = np.nonzero(drawn.masks[0] > 0.5)
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x0, y0, x1, y1)


def test_a_subject_in_front_takes_from_the_mask_behind():
    cat = Subject("cat", "green", "pink", "plain", "none", (0.5,) * 4)
    alone = render(Scene((Placed(DOG, 0.5),), "snow"))
    behind = render(Scene((Placed(DOG, 0.5), Placed(cat, 0.55)), "snow"))
    assert behind.masks[0].sum() < 0.8 * alone.masks[0].sum()
    assert (behind.masks.sum(0) < 1.001).all()


def test_individuals_of_one_class_differ():
    rng = np.random.default_rng(0)
    drawn = {draw_subject(random_subject(rng, "dog")).tobytes() for _ in range(200)}
    assert len(drawn) == 200
    plain = [draw_subject(Subject("dog", "red", "blue", "plain", "none", (s, 0.5, 0.5, 0.5))) for s in (0.0, 1.0)]
    assert plain[0].tobytes() != plain[1].tobytes()


def test_shares_of_the_world():
    drawn = scenes(3000)
    counts = Counter(len(s.subjects) for s in drawn)
    assert abs(counts[1] / 3000 - 0.64) < 0.04
    assert set(Counter(s.background for s in drawn)) == set(v.BACKGROUNDS)
    assert set(Counter(p.position for s in drawn for p in s.subjects)) == set(v.POSITIONS)
    assert 0.05 < sum(held_out(s) for s in drawn) / 3000 < 0.3


def test_training_never_sees_held_out_combinations():
    assert not any(held_out(training_scene(0, i)[0]) for i in range(500))


def test_few_modalities_confine_a_subject():
    drawn = few_modalities(DOG, 6, seed=1, background="city", style="sepia", position="left")
    assert {s.background for s in drawn} == {"city"}
    assert {s.style for s in drawn} == {"sepia"}
    assert {s.subjects[0].position for s in drawn} == {"left"}
    assert {s.subjects[0].subject for s in drawn} == {DOG}
    assert len({render(s).pixels.tobytes() for s in drawn}) == 6
    assert {s.subjects[0].mirror for s in drawn} == {True, False}
    one_way = few_modalities(DOG, 6, seed=1, background="city", style="sepia", position="left", facing="left")
    assert all(s.subjects[0].mirror for s in one_way)
    turned = [replace(a, subjects=(replace(a.subjects[0], mirror=True),)) for a in drawn]
    assert one_way == turned


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "zebra", "'zebra' is no class"),
        ("color1", "mauve", "is no colour"),
        ("pattern", "paisley", "is no pattern"),
        ("accessory", "cane", "is no accessory"),
        ("shape", (2.0,) * 4, "numbers in"),
    ],
)
def test_what_the_world_does_not_have(field, value, message):
    with pytest.raises(ValueError, match=message):
        Subject(**{**DOG.__dict__, field: value})
    with pytest.raises(ValueError, match="no background"):
        render(Scene((), "moonbase"))
    with pytest.raises(ValueError, match="no style"):
        render(Scene((), "snow", "cubist"))


def test_captions_tell_the_truth_and_vary():
    rng = np.random.default_rng(3)
    texts = set()
    for scene in scenes(300, seed=2):
        words = caption(scene, rng)
        texts.add(words.text)
        for placed, span in zip(scene.subjects, words.spans, strict=True):
            assert span is not None
            assert words.text[span[0] : span[1]] in v.CLASS_WORDS[placed.subject.kind]
        named = {c for c in v.COLORS if f" {c} " in f" {words.text} "}
        accessory_colors = {"hat": {"black"}, "scarf": {"red"}, "star": {"yellow"}, "none": set()}
        allowed = {c for p in scene.subjects for c in (p.subject.color1, p.subject.color2)}
        for p in scene.subjects:
            allowed |= accessory_colors[p.subject.accessory]
        allowed |= {"green"} if scene.background == "meadow" else set()
        assert named <= allowed, words.text
        assert not any(f"a {vowel}" in words.text for vowel in ("orange", "automobile"))
    assert len(texts) > 280


def test_every_word_of_the_world_is_one_token():
    tokenizer = build_tokenizer()
    for word in world_words():
        assert len(tokenizer(word)["input_ids"]) == 3, word
    assert tokenizer.model_max_length == MAX_LENGTH
    assert len(tokenizer("a zebra, naïve 漢字")["input_ids"]) > 8  # byte level: nothing is unknown
    assert set(class_words().values()) == set(v.CLASSES)


def test_class_words_are_found_among_the_tokens():
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(5)
    for scene in scenes(100, seed=8):
        words = caption(scene, rng)
        ids, indicator = encode_caption(words)
        whole = len(tokenizer(words.text)["input_ids"]) <= MAX_LENGTH
        for i, placed in enumerate(scene.subjects):
            found = tokenizer.decode(ids[indicator[i]]).strip()
            said = whole and words.spans[i] is not None
            assert found in v.CLASS_WORDS[placed.subject.kind] or not (said or found)


def test_a_data_set_is_the_same_from_any_number_of_processes(tmp_path):
    for workers in (1, 2):
        assert list(build_dataset(tmp_path / str(workers), 300, seed=3, workers=workers))[-1] == 300
    one, two = (load_dataset(tmp_path / str(w)) for w in (1, 2))
    for field in fields(one):
        assert np.array_equal(getattr(one, field.name), getattr(two, field.name)), field.name
    assert one.words.any(-1).sum() >= 300
