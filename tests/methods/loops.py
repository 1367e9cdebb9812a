"""Every method at its smallest, and what the loops written out share."""

from __future__ import annotations

import copy
from functools import partial

from infusion.methods.custom_diffusion import CustomDiffusionConfig, custom_diffusion
from infusion.methods.dreambooth import DreamBoothConfig, dreambooth
from infusion.methods.infusion import infusion
from infusion.methods.key_value import KeyValueConfig, key_value
from infusion.methods.lora import LoraConfig, dreambooth_lora
from infusion.methods.perfusion import PerfusionConfig, perfusion
from infusion.methods.textual_inversion import TextualInversionConfig, textual_inversion
from infusion.training import LearnConfig

SMALL = {
    "infusion": partial(infusion, config=LearnConfig(3, 2)),
    "key-value": partial(key_value, config=KeyValueConfig(3, 2)),
    "textual-inversion": partial(textual_inversion, config=TextualInversionConfig(3, 2, 0.05)),
    "dreambooth": partial(dreambooth, config=DreamBoothConfig(3, 2, 1e-3)),
    "dreambooth-lora": partial(dreambooth_lora, config=LoraConfig(3, 2, 1e-2, rank=2)),
    "custom-diffusion": partial(custom_diffusion, config=CustomDiffusionConfig(3, 2, 1e-2)),
    "perfusion": partial(perfusion, config=PerfusionConfig(3, 2)),
}


def mse(unet, draw, states=None):
    states = draw.kwargs["encoder_hidden_states"] if states is None else states
    return (unet(draw.noisy, draw.timesteps, states).sample - draw.target).pow(2).mean()


def with_row(pipe):
    """Tokenizer and text encoder with a token `<milo>` begun as "dog", the way diffusers' example does it."""
    tokenizer, text = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.text_encoder)
    tokenizer.add_tokens("<milo>")
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = text.get_input_embeddings().weight
    row = tokenizer.convert_tokens_to_ids("<milo>")
    table.data[row] = table.data[tokenizer.convert_tokens_to_ids("dog</w>")]
    return tokenizer, text, table, row
