"""Textual Inversion against diffusers' example, and where a new word cannot be."""

from __future__ import annotations

import pytest
import torch

from infusion.errors import InfusionError
from infusion.methods.tokens import NewWord
from tests.methods.loops import SMALL, mse, with_row


def test_textual_inversion_equals_diffusers_loop(pipe, lesson):
    tokenizer, text, table, row = with_row(pipe)
    kept = table.detach().clone()
    ids = tokenizer([t.format("<milo>") for t in lesson.templates], padding="max_length", return_tensors="pt")[
        "input_ids"
    ]
    optimizer = torch.optim.AdamW([table], 0.05, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    others = torch.arange(len(table)) != row
    for _ in range(3):
        draw = lesson.draw(2, generator)
        optimizer.zero_grad()
        mse(pipe.unet, draw, text(ids[draw.captions])[0]).backward()
        optimizer.step()
        table.data[others] = kept[others]  # the example restores all other rows after every step
    *_, state = SMALL["textual-inversion"](pipe, lesson)
    assert torch.allclose(state.adapter.embedding[0], table.detach()[row], atol=1e-5)
    assert (table.detach()[row] - kept[row]).abs().max() > 0.01


def test_a_new_word_is_refused_where_it_cannot_be(pipe):
    word = NewWord(pipe, "milo", "dog")
    stock = pipe.encode_prompt("a dog", "cpu", 1, False)[0]  # the word begins as "dog"
    assert torch.allclose(word.states(word.token_ids(["a <milo>"])), stock, atol=1e-6)
    with pytest.raises(InfusionError, match="cut off"):
        word.token_ids(["a " * 60 + "<milo>"])
    with pytest.raises(InfusionError, match="known to the tokenizer already"):
        NewWord(word.pipe, "milo", "dog")
