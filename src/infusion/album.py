"""Pictures that a base drew, kept for the next evaluation: the same base, prompts, seeds and settings give the same pictures."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase

from infusion.errors import InfusionWarning
from infusion.generation import Picture
from infusion.streams import execution_device, require_unet

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by a value's bytes


def default_album() -> Path:
    """Where the command line keeps them: infusion/pictures in the user's cache folder. It may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infusion" / "pictures"


def kept(
    album: Path | None,
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, object],
    draw: Callable[[], list[Picture]],
) -> list[Picture]:
    """The pictures of these prompts and seeds from the folder `album`, or by `draw`, and kept there then. settings: whatever else decides
    what they look like. Without an album, or where the weights are elsewhere (offloaded), they are drawn. Warns where they cannot be kept.
    """
    weights = fingerprint(pipe) if album else ""
    if not album or not weights:
        return draw()
    decides = [
        weights, list(prompts), list(seeds), dict(settings), _settings_of(pipe.scheduler), type(pipe).__name__,
        str(require_unet(pipe).dtype), execution_device(pipe).type, torch.__version__, diffusers.__version__,
    ]  # fmt: skip
    folder = album / hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:32]
    try:
        images = [_opened(folder / f"{i}.png") for i in range(len(prompts))]
        return [Picture(*made) for made in zip(images, prompts, seeds, strict=True)]
    except (OSError, SyntaxError, ValueError):  # not there, or damaged
        pictures = draw()
    try:
        _keep([p.image for p in pictures], folder)
    except OSError as error:
        warnings.warn(
            f"The base's pictures cannot be kept in {str(folder)!r} ({error.strerror}); they will be drawn again.",
            InfusionWarning,
            stacklevel=2,
        )
    return pictures


def fingerprint(pipe: DiffusionPipeline) -> str:
    """A digest of what the pipeline is made of beside its scheduler: configurations, vocabularies, and all weights, by exact sums of their
    bits, which take no longer than reading them does; "" where they are not at hand."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, PreTrainedTokenizerBase):
            digest.update(json.dumps([name, part.get_vocab(), part.special_tokens_map], sort_keys=True).encode())
        if isinstance(part, nn.Module):
            digest.update(json.dumps([name, _settings_of(part)], sort_keys=True, default=str).encode())
            for key, value in part.state_dict().items():
                if value.device.type == "meta":
                    return ""
                total = value.detach().contiguous().view(_INTEGERS[value.element_size()]).sum(dtype=torch.int64)
                digest.update(f"{name}.{key} {tuple(value.shape)} {int(total)}\n".encode())
    return digest.hexdigest()


def _settings_of(part: Any) -> dict[str, Any]:
    """A component's kind and configuration without private keys, of which one is a set's list, in another order in every process."""
    config = part.config if isinstance(part.config, Mapping) else part.config.to_dict()
    return {"kind": type(part).__name__} | {k: v for k, v in config.items() if not k.startswith("_")}


def _opened(path: Path) -> Image.Image:
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
        return image.copy()


def _keep(images: Sequence[Image.Image], folder: Path) -> None:
    """All of them or none, whoever else keeps the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".drawn-"))
    try:
        for i, image in enumerate(images):
            image.save(temporary / f"{i}.png")
        shutil.rmtree(folder, ignore_errors=True)  # what is damaged
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else somebody has just kept the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
