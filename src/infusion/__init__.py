"""Infusion: teach a text-to-image diffusion model one new thing without making it forget, and repeating less of the photos.

pipe = infusion.load_base()
milo = infusion.learn(pipe, "photos/milo", word="dog", name="milo")
with infusion.attach(pipe, milo):
    pipe("a sketch of a <milo> in the snow").images[0]
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infusion.base import load_base
    from infusion.concept import Concept
    from infusion.errors import InfusionError, InfusionWarning
    from infusion.pipelines import Attachment, attach, encode
    from infusion.training import LearnConfig, LearnState, learn, learning, learning_together

__all__ = [
    "Attachment",
    "Concept",
    "InfusionError",
    "InfusionWarning",
    "LearnConfig",
    "LearnState",
    "attach",
    "encode",
    "learn",
    "learning",
    "learning_together",
    "load_base",
]

# Names are imported at first use, so that `infusion --help` need not wait for torch.
_HOME = {
    "Attachment": "pipelines",
    "attach": "pipelines",
    "encode": "pipelines",
    "load_base": "base",
    "Concept": "concept",
    "InfusionError": "errors",
    "InfusionWarning": "errors",
    "LearnConfig": "training",
    "LearnState": "training",
    "learn": "training",
    "learning": "training",
    "learning_together": "training",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.metadata.version("infusion")
    if name not in _HOME:
        raise AttributeError(f"module 'infusion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"infusion.{_HOME[name]}"), name)
