"""The separation term against a loop, and the table of what each word means."""

from __future__ import annotations

import pytest
import torch

from infusion.world.separation import KINDS, meanings, separation_loss
from infusion.world.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_meanings_of_words(tokenizer):
    table = meanings(tokenizer)
    kinds = list(KINDS)

    def meaning(word: str) -> tuple[str, int] | None:
        kind, m = table[tokenizer(word, add_special_tokens=False)["input_ids"][0]].tolist()
        return None if kind < 0 else (kinds[kind], m)

    assert meaning("dog") == meaning("puppy") == ("class", 0)
    assert meaning("teddy") == meaning("bear") == ("class", 4)
    assert meaning("red") == ("color", 0)  # though a scarf may be red
    assert meaning("scarf") == ("accessory", 1)
    assert meaning("meadow") == ("background", 7)
    assert meaning("grass") == meaning("meadow")
    assert all(meaning(word) is None for word in ("a", "on", "the", "art", "with", "xyzzy"))
    assert table[tokenizer.eos_token_id].tolist() == [-1, -1]


def test_the_loss_equals_a_loop(tokenizer):
    captions = ("a red dog next to a puppy", "a blue cat", "the spotted teddy bear")
    ids = tokenizer(list(captions), padding="max_length", return_tensors="pt")["input_ids"]
    states = torch.randn(*ids.shape, 6, generator=torch.Generator().manual_seed(0))
    table = meanings(tokenizer)
    words = [(*table[ids[b, i]].tolist(), states[b, i]) for b in range(3) for i in range(ids.shape[1])]
    per_kind = {}
    for kind, meaning, state in words:
        for other_kind, other_meaning, other in words:
            if kind >= 0 and kind == other_kind and meaning != other_meaning:
                cosine = float(torch.cosine_similarity(state, other, dim=0))
                per_kind.setdefault(kind, []).append(max(0.0, cosine) ** 2)
    assert len(per_kind) == 2  # classes and colours; one pattern alone has no pair
    expected = sum(sum(x) / len(x) for x in per_kind.values()) / 2
    assert float(separation_loss(states, ids, table)) == pytest.approx(expected, rel=1e-5)


def test_it_falls_when_words_part_and_is_zero_without_any(tokenizer):
    ids = tokenizer(["a dog", "a cat"], padding="max_length", return_tensors="pt")["input_ids"]
    table = meanings(tokenizer)
    same = torch.ones(*ids.shape, 4)
    apart = same.clone()
    apart[1, 2] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert float(separation_loss(same, ids, table)) == pytest.approx(1)
    assert float(separation_loss(apart, ids, table)) == 0
    assert float(separation_loss(same[:1], ids[:1], table)) == 0
