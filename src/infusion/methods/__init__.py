"""The methods that Infusion is compared with, one file each, behind the interface of `interface.py`.

METHODS names them: each takes (pipe, lesson) and its own configuration; those that preserve a prior also `prior`, Perfusion a
`corpus` of captions.
"""

from __future__ import annotations

from infusion.methods.custom_diffusion import custom_diffusion
from infusion.methods.dreambooth import dreambooth
from infusion.methods.lora import dreambooth_lora
from infusion.methods.perfusion import perfusion
from infusion.methods.textual_inversion import textual_inversion

METHODS = {
    "textual-inversion": textual_inversion,
    "dreambooth": dreambooth,
    "dreambooth-lora": dreambooth_lora,
    "custom-diffusion": custom_diffusion,
    "perfusion": perfusion,
}
