"""A word of one's own: a new token whose embedding alone is learned, on a copy of tokenizer and text encoder."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from infusion.errors import InfusionError
from infusion.methods.interface import rebuilt


class NewWord:
    """A token `<name>` in a copy of the pipeline's text encoder, begun as the class word's embedding.

    `embedding` (1, d) is the only thing that learns; it stands in for its row of the embedding matrix at every call.
    """

    def __init__(self, pipe: DiffusionPipeline, name: str, like: str) -> None:
        if hasattr(pipe, "text_encoder_2"):
            raise InfusionError(
                f"{type(pipe).__name__} has two text encoders; methods with a word of their own know bases with one."
            )
        tokenizer, text_encoder = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.text_encoder)
        self.token = f"<{name}>"
        if tokenizer.add_tokens(self.token) != 1:
            raise InfusionError(f"{self.token!r} is known to the tokenizer already; choose another name.")
        self.id = tokenizer.convert_tokens_to_ids(self.token)
        table = text_encoder.get_input_embeddings().weight.detach()
        begin = table[tokenizer(like, add_special_tokens=False)["input_ids"]].mean(0, keepdim=True)
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        text_encoder.requires_grad_(False).eval()
        self.embedding = nn.Parameter(begin.float().clone())
        self.pipe = rebuilt(pipe, tokenizer=tokenizer, text_encoder=text_encoder)
        text_encoder.get_input_embeddings().register_forward_hook(self._place)

    def _place(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        here = (args[0] == self.id).unsqueeze(-1)
        return torch.where(here, self.embedding.to(output.dtype), output)

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Captions (k, m) padded to the tokenizer's length. Raises InfusionError for one that loses the word."""
        ids = self.pipe.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.pipe.tokenizer.model_max_length,
            return_tensors="pt",
        )["input_ids"]
        if lost := [c for c, row in zip(captions, ids, strict=True) if self.id not in row]:
            raise InfusionError(f"{self.token} is cut off in {lost[0]!r}; shorten the caption.")
        return ids.to(self.pipe.text_encoder.device)

    def states(self, ids: Tensor) -> Tensor:
        """Text states (b, m, d) of token ids, with gradient to the embedding."""
        return self.pipe.text_encoder(ids)[0]
