"""Prompts with concepts: "<milo> on the beach" -> plain text, and where each concept's word lies.

`<name>` or `<name:0.7>` is replaced by the concept's class word before tokenization; the token
positions of that word are found by character offsets, never by counting words. Knows tokenizers
and names; nothing about models.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from infusion.errors import InfusionError

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
LORAS = ("lora", "lyco")  # <lora:file:0.8>, as other programs load one from a prompt
TAG = re.compile(r"<(?P<name>[A-Za-z][A-Za-z0-9_-]*)(?::(?P<strength>[^<>]*))?>")
WEIGHTED = re.compile(r"\([^()]*[^()\d\s]\s*:\s*(?P<weight>\d*\.?\d+)\s*\)")  # (a dog:1.3), as others weight words


@dataclass(frozen=True)
class Mention:
    """One `<name:strength>` in a prompt: the tokens (positions in the encoded sequence) of its class word."""

    name: str
    strength: float
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Parsed:
    """`text` is what the base model reads; `mentions` in order of appearance."""

    text: str
    mentions: tuple[Mention, ...]


def parse(
    prompt: str,
    words: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    convert: Callable[[str], str] = str,
) -> Parsed:
    """Replace each `<name>` by its class word and find the word's tokens.

    words: concept name -> class word. convert: what the pipeline does to text before it tokenizes
    (textual inversion's multi-token embeddings), so that positions count its tokens too.
    A `<...>` that is a token of the tokenizer itself (textual inversion) is left alone.

    Raises InfusionError for an unknown name, a strength that is no number, or a word that the
    token limit cuts off.
    """
    pieces, spans = [], []  # converted text so far, and (name, strength, start, end) in it
    plain, last, length = "", 0, 0
    for tag in TAG.finditer(prompt):
        name = tag["name"]
        if name not in words:
            if tag[0] in tokenizer.get_vocab():
                continue
            raise InfusionError(unknown(name, words))
        before = prompt[last : tag.start()]
        plain += before + words[name]
        pieces += [convert(before) if before else "", words[name]]
        length += len(pieces[-2])
        spans.append((name, _strength(tag[0], tag["strength"]), length, length + len(words[name])))
        length += len(words[name])
        last = tag.end()
    if not spans:
        return Parsed(prompt, ())
    pieces.append(convert(prompt[last:]) if prompt[last:] else "")
    plain += prompt[last:]
    return Parsed(plain, _locate("".join(pieces), spans, tokenizer))


def refuse_in_negative(negative_prompt: str, words: Mapping[str, str]) -> None:
    """Raises InfusionError if a known `<name>` stands in a negative prompt, where it has no meaning."""
    for tag in _known(negative_prompt, words):
        word = words[tag["name"]]
        raise InfusionError(
            f"{tag[0]} stands in the negative prompt, where concepts have no effect; write {word!r} there instead."
        )


def slips(prompt: str, words: Mapping[str, str]) -> list[str]:
    """What to tell of a prompt that is read, but hardly as meant: a known `<name>` without a space beside it, which makes one word of
    two, or one that is weighted as other programs do, a sentence for each."""
    return [*_glued(prompt, words), *_weighted(prompt, words)]


def _glued(prompt: str, words: Mapping[str, str]) -> list[str]:
    plain, last, spans = "", 0, []
    for tag in _known(prompt, words):
        plain += prompt[last : tag.start()]
        spans.append((len(plain), len(plain) + len(words[tag["name"]])))
        plain += words[tag["name"]]
        last = tag.end()
    plain += prompt[last:]
    glued = [(a, b) for a, b in spans if plain[max(a - 1, 0) : a].isalnum() or plain[b : b + 1].isalnum()]
    if not glued:
        return []
    a, b = glued[0]
    read = plain[plain.rfind(" ", 0, a) + 1 : b] + plain[b:].partition(" ")[0]
    return [
        f"The prompt {prompt!r} has a concept without a space beside it, so the base reads {read!r}; put a space there."
    ]


def _weighted(prompt: str, words: Mapping[str, str]) -> list[str]:
    found = [(w, tag["name"]) for w in WEIGHTED.finditer(prompt) for tag in _known(w[0], words)]
    if not found:
        return []
    weighted, name = found[0]
    return [
        f"The prompt {prompt!r} holds {weighted[0]!r}, another program's way to weight words, which the base reads as it is written; "
        f"write <{name}:{weighted['weight']}>."
    ]


def _known(text: str, words: Mapping[str, str]) -> list[re.Match[str]]:
    return [tag for tag in TAG.finditer(text) if tag["name"] in words]


def _locate(
    text: str, spans: list[tuple[str, float, int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[Mention, ...]:
    encoded = tokenizer(text, return_offsets_mapping=True)
    limit = tokenizer.model_max_length
    mentions = []
    for name, strength, start, end in spans:
        positions = tuple(i for i, (a, b) in enumerate(encoded["offset_mapping"]) if b > a and a < end and b > start)
        # The last place of a full sequence belongs to the end token.
        if not positions or positions[-1] >= limit - 1:
            raise InfusionError(
                f"The prompt is longer than {limit} tokens and <{name}> is cut off; move <{name}> forward or shorten the prompt."
            )
        mentions.append(Mention(name, strength, positions))
    return tuple(mentions)


def _strength(tag: str, text: str | None) -> float:
    if text is None:
        return 1.0
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise InfusionError(f"{tag}: {text!r} is no strength; write a number such as {tag.split(':')[0]}:0.7>.")
    return value


def unknown(name: str, words: Mapping[str, str]) -> str:
    """What to say of `<name>`, which is not among the concepts `words`."""
    if name.lower() in LORAS:
        return f"<{name}:...> is another program's way to load a LoRA; load it with diffusers' load_lora_weights, and leave it out of the prompt."
    if not words:
        return f"<{name}> is unknown: no concept is attached; attach one, or write a plain word."
    known = ", ".join(f"<{n}>" for n in words)
    near = difflib.get_close_matches(name, words, n=1)
    hint = f" Did you mean <{near[0]}>?" if near else ""
    return f"<{name}> is unknown; the concepts at hand are {known}.{hint}"
