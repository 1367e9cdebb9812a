"""Fidelity, alignment, diversity, preservation, copying and leaks against loops."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from infusion.metrics.leaks import leak, pull
from infusion.metrics.similarity import alignment, centroids, diversity, fidelity, nearest, preservation, spread


def rows(n: int, seed: int, d: int = 6) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


def test_fidelity_is_the_mean_over_all_pairs():
    generated, photos = rows(7, 0), rows(3, 1)
    loop = sum(cosine(g, p) for g in generated for p in photos) / 21
    assert fidelity(generated, photos).value == pytest.approx(loop, abs=1e-6)
    assert fidelity(generated, photos).n == 7
    assert preservation(generated, photos) == fidelity(generated, photos)


def test_alignment_compares_each_picture_with_its_own_prompt():
    pictures, texts = rows(5, 2), rows(5, 3)
    assert alignment(pictures, texts).value == pytest.approx(
        sum(cosine(a, b) for a, b in zip(pictures, texts, strict=True)) / 5, abs=1e-6
    )
    with pytest.raises(ValueError, match="5 pictures but 4 texts"):
        alignment(pictures, texts[:4])


def test_diversity_is_the_mean_distance_of_pairs_of_one_prompt():
    groups = torch.stack([rows(4, seed) for seed in (4, 5, 6)])
    loop = [sum(1 - cosine(a, b) for a, b in combinations(g, 2)) / 6 for g in groups]
    assert diversity(groups).value == pytest.approx(sum(loop) / 3, abs=1e-6)
    assert diversity(groups[:, :1].expand(3, 4, 6)).value == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        diversity(groups[:, :1])


def test_the_spread_does_not_fall_when_all_pictures_move_together():
    groups = torch.stack([rows(4, seed) for seed in (4, 5, 6)])
    loop = [sum(float((a - b).norm()) for a, b in combinations(g, 2)) / 6 for g in groups]
    assert spread(groups).tolist() == pytest.approx(loop, rel=1e-6)
    moved = groups + 5 * rows(1, 9)
    assert torch.allclose(spread(moved), spread(groups), atol=1e-5)
    assert diversity(moved).value < 0.9 * diversity(groups).value  # a cosine's does
    with pytest.raises(ValueError, match="at least 2 pictures"):
        spread(groups[:, :1])


def test_the_nearest_photo_is_found():
    photos = rows(4, 7)
    index, similarity = nearest(torch.stack([photos[2] * 3, photos[0] + 0.01]), photos)
    assert index.tolist() == [2, 0]
    assert similarity[0] == pytest.approx(1)


def test_a_leak_counts_only_prompts_that_asked_for_something_else():
    asked = ["beach", "snow", "meadow", None, "city", "city"]
    custom = ["meadow", "snow", "meadow", "meadow", None, "meadow"]
    base = ["beach", "snow", "meadow", "beach", "city", "meadow"]
    found = leak(custom, base, asked, trained="meadow")
    assert (found.custom.value, found.base.value) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert found.above.value == pytest.approx(1 / 3)
    assert (found.custom.n, found.unread) == (3, 1)
    with pytest.raises(ValueError, match="other than 'city'"):
        leak(["city"], ["city"], ["city"], "city")
    with pytest.raises(ValueError, match="1, 2 and 1 entries"):
        leak(["city"], ["city", "x"], ["beach"], "city")


def test_a_pull_counts_only_prompts_that_left_it_open():
    asked = [None, "meadow", None, None, "beach", None]
    custom = ["meadow", "meadow", "snow", "meadow", "meadow", None]
    base = ["meadow", "snow", "snow", "snow", "beach", "meadow"]
    found = pull(custom, base, asked, trained="meadow")
    assert (found.custom.value, found.base.value) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert found.above.value == pytest.approx(1 / 3)
    assert (found.custom.n, found.unread) == (3, 1)
    with pytest.raises(ValueError, match="left open where 'city'"):
        pull(["city"], ["city"], ["city"], "city")


def test_centroids_follow_the_heat_and_not_its_faint_rest():
    masks = torch.full((2, 4, 8), 0.3)
    masks[0, 1, 6] = 1.0
    masks[1, 3, :2] = torch.tensor([1.0, 0.75])
    assert torch.allclose(centroids(masks), torch.tensor([[1.5 / 4, 6.5 / 8], [3.5 / 4, (0.5 * 2 + 1.5) / 3 / 8]]))
