"""The embedded base's tokenizer: CLIP's byte-level BPE with a vocabulary of the world's own words.

Every word that captions use is one token (a class of two words is two tokens); any other text
still encodes, as bytes. Known words can be listed, so that a caller can tell a user's word apart.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from infusion.world import vocabulary as v

MAX_LENGTH = 32  # tokens a prompt, begin and end included
START, END = "<|startoftext|>", "<|endoftext|>"


def world_words() -> list[str]:
    """Every word that a caption can hold, sorted."""
    phrases = chain(
        chain.from_iterable(v.CLASS_WORDS.values()),
        chain.from_iterable(v.BACKGROUND_PHRASES.values()),
        chain.from_iterable(v.STYLE_PREFIXES.values()),
        chain.from_iterable(v.STYLE_SUFFIXES.values()),
        chain.from_iterable(v.POSITION_PHRASES.values()),
        chain.from_iterable(v.ACCESSORY_PHRASES.values()),
        chain.from_iterable(v.PATTERN_WORDS.values()),
        v.COLORS,
        ("a an the and next to",),
    )
    return sorted({word.strip(",") for phrase in phrases for word in phrase.split()})


def class_words() -> dict[str, str]:
    """Each word that names a class of the world, synonyms included, and its class."""
    return {word: kind for kind, words in v.CLASS_WORDS.items() for word in words}


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which every word of the world is one token."""
    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [s + "</w>" for s in symbols]
    merges: list[tuple[str, str]] = []
    for word in world_words():
        parts = [*word[:-1], word[-1] + "</w>"]
        # Each word is built from its end backwards: "d o g</w>" -> "d og</w>" -> "dog</w>". Every step
        # holds "</w>", so no word's merges can tear another word apart.
        while len(parts) > 1:
            pair = (parts[-2], parts[-1])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            parts[-2:] = ["".join(pair)]
    vocab = {token: i for i, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH, pad_token=END)


def span_positions(offsets: np.ndarray, span: tuple[int, int]) -> list[int]:
    """Token positions whose text lies in the character span (start, end)."""
    start, end = span
    return [i for i, (a, b) in enumerate(offsets) if b > a and a < end and b > start]
