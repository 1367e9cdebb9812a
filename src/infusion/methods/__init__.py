"""Infusion and the methods that it is compared with, one file each, behind the interface of `interface.py`.

METHODS names them, each with its configuration's class: a method takes (pipe, lesson, config); those that preserve a prior
also `prior`, Perfusion a `corpus` of captions. Those of STRENGTH can be drawn at part of what they learned (their adapters' `strength`).
"""

from __future__ import annotations

from infusion.methods.custom_diffusion import CustomDiffusionConfig, custom_diffusion
from infusion.methods.dreambooth import DreamBoothConfig, dreambooth
from infusion.methods.infusion import infusion
from infusion.methods.key_value import KeyValueConfig, key_value
from infusion.methods.lora import LoraConfig, dreambooth_lora
from infusion.methods.perfusion import PerfusionConfig, perfusion
from infusion.methods.textual_inversion import TextualInversionConfig, textual_inversion
from infusion.training import LearnConfig

METHODS = {
    "infusion": (infusion, LearnConfig),
    "key-value": (key_value, KeyValueConfig),
    "textual-inversion": (textual_inversion, TextualInversionConfig),
    "dreambooth": (dreambooth, DreamBoothConfig),
    "dreambooth-lora": (dreambooth_lora, LoraConfig),
    "custom-diffusion": (custom_diffusion, CustomDiffusionConfig),
    "perfusion": (perfusion, PerfusionConfig),
}
STRENGTH = ("infusion", "dreambooth", "dreambooth-lora", "custom-diffusion")  # Perfusion has its drawing_beta
