"""The idea on one screen: cross-attention in two streams.

Axes: b rows of the batch, h heads, n pixels of the layer, m text tokens, d channels a head.

The foundational stream is the untouched base model. In every cross-attention layer the customized
stream takes the foundational stream's output and adds, where the base model's own map of the
concept's word lies, a learned vector:

    A    = softmax(Q_foundational K^T / sqrt(d))               maps, from the foundational stream only
    O_f  = A V                                                 foundational output
    O_c  = A (V + 1_P r^T)  =  O_f + (sum_{p in P} A[:, p]) r^T    customized output

(Infusion, arXiv 2404.14007.) P are the token positions of the concept's word, r the layer's
residual. *Where* stays the base model's, *what* is learned. Pure functions; no modules, no state.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_maps(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """A = softmax(Q K^T scale): (b, h, n, d), (b, h, m, d) -> (b, h, n, m), in float32."""
    scores = (query.float() * scale) @ key.float().transpose(-1, -2)  # overflows in fp16 on Stable Diffusion 2.1
    return scores.softmax(dim=-1)


def word_heat(maps: Tensor, word: Tensor) -> Tensor:
    """How strongly each pixel looks at a word: sum_{p in P} A[:, p].

    maps (b, h, n, m); word (b, m), the weight of each token: 1 on the word's tokens, 0 elsewhere,
    or a strength. Returns (b, h, n).
    """
    return torch.einsum("bhnm,bm->bhn", maps, word.to(maps.dtype))


def residual_output(heat: Tensor, residual: Tensor) -> Tensor:
    """What a residual adds to the attention output: heat (b, h, n), residual (b, h * d) -> (b, n, h * d)."""
    b, h, n = heat.shape
    per_head = residual.unflatten(-1, (h, -1))  # (b, h, d)
    return torch.einsum("bhn,bhd->bnhd", heat.to(residual.dtype), per_head).reshape(b, n, -1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, n, h * d) -> (b, h, n, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
