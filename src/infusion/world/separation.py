"""Words that mean different things of one kind keep different text states.

Trained from scratch by denoising alone, the text encoder puts all classes on one axis, from wide to tall: dog and car,
bird and fish, cat and teddy bear become the same word to the UNet, which then cannot learn their shapes
(docs/log.md). Real bases begin with a text encoder that tells words apart already; this term stands for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer

from infusion.world import vocabulary as v

# kind -> meaning -> phrases that name it
KINDS: dict[str, Mapping[str, Iterable[str]]] = {
    "class": v.CLASS_WORDS,
    "color": {color: (color,) for color in v.COLORS},
    "pattern": v.PATTERN_WORDS,
    "accessory": v.ACCESSORY_PHRASES,
    "background": v.BACKGROUND_PHRASES,
    "style": {style: (*v.STYLE_PREFIXES[style], *v.STYLE_SUFFIXES[style]) for style in v.STYLES},
    "position": v.POSITION_PHRASES,
}


def meanings(tokenizer: CLIPTokenizer) -> Tensor:
    """For every token of the vocabulary its kind and its meaning within it, (vocab, 2) int64; -1 where a token has
    none or more than one, as "a" and "on". A word that is a whole phrase ("red") means that also within others ("a red scarf")."""
    named: dict[int, set[tuple[int, int]]] = {}
    whole: dict[int, set[tuple[int, int]]] = {}
    for k, kind in enumerate(KINDS.values()):
        for m, phrases in enumerate(kind.values()):
            for phrase in phrases:
                tokens = tokenizer(phrase, add_special_tokens=False)["input_ids"]
                for token in tokens:
                    (whole if len(tokens) == 1 else named).setdefault(token, set()).add((k, m))
    table = torch.full((len(tokenizer), 2), -1)
    for token, found in {**named, **whole}.items():
        if len(found) == 1:
            table[token] = torch.tensor(next(iter(found)))
    return table


def separation_loss(states: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """Mean over kinds of the mean of max(0, cosine)^2 over all pairs of words in the batch that are of that kind and
    differ in meaning. states (b, m, d); ids (b, m); table from `meanings`."""
    kind, meaning = table[ids].flatten(0, 1).unbind(-1)
    total = counted = states.new_zeros((), dtype=torch.float32)
    for k in range(len(KINDS)):
        here = kind == k
        unit = F.normalize(states.flatten(0, 1)[here].float(), dim=-1)
        differs = meaning[here][:, None] != meaning[here][None]
        pairs = differs.sum()
        total = total + ((unit @ unit.T).clamp_min(0).square() * differs).sum() / pairs.clamp_min(1)
        counted = counted + (pairs > 0)
    return total / counted.clamp_min(1)
