"""Names in prompts: replaced text and token positions."""

from __future__ import annotations

import pytest

from infusion.errors import InfusionError
from infusion.families import clip_tokenizer
from infusion.prompts import parse, refuse_in_negative, slips
from infusion.world.tokenizer import build_tokenizer

WORDS = {"milo": "dog", "ted": "teddy bear", "axo": "axolotl"}


@pytest.fixture(scope="module", params=[build_tokenizer, clip_tokenizer], ids=["world", "clip"])
def tokenizer(request):
    return request.param()


def words_at(tokenizer, parsed, mention) -> str:
    ids = tokenizer(parsed.text)["input_ids"]
    return tokenizer.decode([ids[p] for p in mention.positions]).strip()


@pytest.mark.parametrize(
    ("prompt", "text", "found"),
    [
        ("a photo of <milo> on the beach", "a photo of dog on the beach", ["dog"]),
        ("<milo> on the beach", "dog on the beach", ["dog"]),
        ("<milo>, in the snow", "dog, in the snow", ["dog"]),
        ("<milo>'s red ball", "dog's red ball", ["dog"]),
        ("a (<milo>) here", "a (dog) here", ["dog"]),
        ("A PHOTO OF THE <milo>!", "A PHOTO OF THE dog!", ["dog"]),
        ("a <ted> in a room", "a teddy bear in a room", ["teddy bear"]),
        ("an <axo> in space", "an axolotl in space", ["axolotl"]),
        ("<milo> and <milo> and a dog", "dog and dog and a dog", ["dog", "dog"]),
        ("<milo> next to a <ted>, and another dog", "dog next to a teddy bear, and another dog", ["dog", "teddy bear"]),
        ("a dog without concept", "a dog without concept", []),
        ("1 < 2 and 3 > 2 <3", "1 < 2 and 3 > 2 <3", []),
    ],
)
def test_text_and_positions(tokenizer, prompt, text, found):
    parsed = parse(prompt, WORDS, tokenizer)
    assert parsed.text == text
    assert [words_at(tokenizer, parsed, m) for m in parsed.mentions] == found


def test_a_word_in_pieces_keeps_all_of_them():
    tokenizer = clip_tokenizer()
    ids = tokenizer("a photo of axolotl, here")["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    (mention,) = parse("a photo of <axo>, here", WORDS, tokenizer).mentions
    assert len(mention.positions) > 1
    assert "".join(pieces[p] for p in mention.positions) == "axolotl</w>"
    assert mention.positions[0] == 4


def test_repeated_words_keep_their_own_places(tokenizer):
    parsed = parse("a dog and <milo> and a dog", WORDS, tokenizer)
    assert [m.positions for m in parsed.mentions] == [(4,)]


@pytest.mark.parametrize(
    ("tag", "strength"), [("<milo>", 1.0), ("<milo:0.7>", 0.7), ("<milo:-2>", -2.0), ("<milo:1e-3>", 1e-3)]
)
def test_strength(tokenizer, tag, strength):
    assert parse(f"a {tag} here", WORDS, tokenizer).mentions[0].strength == strength


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <mil0>", "<mil0> is unknown; the concepts at hand are <milo>, <ted>, <axo>. Did you mean <milo>"),
        ("a dog <lora:milo:0.8>", "load it with diffusers' load_lora_weights"),
        ("a <milo:strong>", "'strong' is no strength"),
        ("a <milo:nan>", "is no strength"),
        ("a <milo:>", "is no strength"),
        ("{long}<milo>", "<milo> is cut off"),
        ("the {long}<milo>", "<milo> is cut off"),
    ],
)
def test_errors_name_the_remedy(tokenizer, prompt, message):
    with pytest.raises(InfusionError, match=message.replace("(", "\\(")):
        parse(prompt.replace("{long}", "the " * (tokenizer.model_max_length - 2)), WORDS, tokenizer)


def test_the_last_free_place_still_counts(tokenizer):
    last = tokenizer.model_max_length - 2  # before the end's own token
    parsed = parse("the " * (last - 1) + "<milo>", WORDS, tokenizer)
    assert parsed.mentions[0].positions == (last,)


def test_a_word_cut_in_its_middle_is_an_error(tokenizer):
    with pytest.raises(InfusionError, match="cut off"):
        parse("the " * (tokenizer.model_max_length - 3) + "<ted>", WORDS, tokenizer)


def test_tokens_of_the_tokenizer_are_no_concepts():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens("<cat-toy>")
    parsed = parse("a <cat-toy> and <milo>", WORDS, tokenizer)
    assert parsed.text == "a <cat-toy> and dog"
    assert len(parsed.mentions) == 1


def test_conversion_shifts_positions(tokenizer):
    convert = lambda text: text.replace("star", "star star star")  # noqa: E731 - as multi-token embeddings do
    parsed = parse("a star and <milo>", WORDS, tokenizer, convert)
    assert parsed.text == "a star and dog"
    assert parsed.mentions[0].positions == (6,)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("here is a<milo> on the beach", "'adog'"),
        ("<milo:0.7>2 balls", "'dog2'"),
        ("many <milo>s", "'dogs'"),
        ("<milo><ted>, here", "'dogteddy'"),
        ("a cat, <ted>2", "'teddy bear2'"),
        ("a (<milo>:1.3) here", "'(<milo>:1.3)', another program's"),
        ("(a cat and <axo:0.5> : .8)", "write <axo:.8>."),
    ],
)
def test_slips_are_told(prompt, told):
    (sentence,) = slips(prompt, WORDS)
    assert repr(prompt) in sentence
    assert told in sentence


@pytest.mark.parametrize(
    "prompt",
    [
        "<milo>, <ted>'s and (<axo:1.3>)",
        "a <milo>-shaped hole, pre-<milo>_2",
        "(a cat:1.3) beside <milo>",
        "(<milo>)(cat:2)",
        "(<milo> at 12:30)",
        "a<unknown> and (<unknown>:1.3)",
        "a dog",
    ],
)
def test_other_prompts_are_no_slips(prompt):
    assert slips(prompt, WORDS) == []


def test_both_slips_in_one_prompt():
    assert [s.partition(";")[2] for s in slips("a<milo> and (<milo>:2), b<ted>", WORDS)] == [
        " put a space there.",
        " write <milo:2>.",
    ]


def test_negative_prompts_have_no_concepts():
    refuse_in_negative("blurry, a dog", WORDS)
    with pytest.raises(InfusionError, match="write 'dog' there"):
        refuse_in_negative("blurry <milo:0.5>", WORDS)
