"""Pictures that were drawn for an evaluation, kept for the next one, or for the same where it was interrupted: the same pipeline, prompts, seeds
and settings give the same pictures."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase

from infusion.errors import InfusionError, InfusionWarning
from infusion.files import write_picture
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
    draw: Callable[[list[str], list[int]], Iterable[list[Picture]]],
) -> list[Picture]:
    """The pictures of these prompts and seeds: each from the folder `album` or, of those that are not there, by `draw`, batch by batch, and
    kept there as they come, so that what is drawn when all ends is not lost. settings: whatever else decides what they look like. Without an album, or where
    the weights are not at hand, all are drawn. Warns where they cannot be kept.
    """
    weights = fingerprint(pipe) if album else ""
    if not album or not weights:
        return [picture for part in draw(list(prompts), list(seeds)) for picture in part]
    decides = [
        weights, dict(settings), _settings_of(pipe.scheduler), type(pipe).__name__, _plain(pipe.config),
        str(require_unet(pipe).dtype), execution_device(pipe).type, torch.__version__, diffusers.__version__,
    ]  # fmt: skip
    folder = album / _digest(json.dumps(decides, sort_keys=True, default=str))
    asked = list(zip(prompts, seeds, strict=True))
    paths = {(prompt, seed): folder / f"{_digest(prompt)}-{seed}.png" for prompt, seed in asked}
    found = {key: Picture(image, *key) for key, path in paths.items() if (image := _opened(path))}
    missing = [key for key in paths if key not in found]
    keeping = True
    for part in draw([p for p, _ in missing], [s for _, s in missing]) if missing else ():
        for picture in part:
            key = (picture.prompt, picture.seed)
            found[key] = picture
            keeping = keeping and _keep(picture.image, paths[key])
    return [found[key] for key in asked]


def fingerprint(pipe: DiffusionPipeline) -> str:
    """A digest of what the pipeline is made of beside its scheduler: configurations, vocabularies, and all weights, by exact sums of their
    bits, which take no longer than reading them does, and LoRAs' strengths; "" where weights are not at hand."""
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
            for key, layer in part.named_modules():
                scaling = getattr(layer, "scaling", None)
                if isinstance(scaling, Mapping):  # a LoRA's: how much of it counts, and whether it does
                    switches = [scaling, layer.active_adapters, layer.disable_adapters]
                    digest.update(json.dumps([name, key, switches], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _settings_of(part: Any) -> dict[str, Any]:
    """A component's kind and configuration without private keys, of which one is a set's list, in another order in every process."""
    config = part.config if isinstance(part.config, Mapping) else part.config.to_dict()
    return {"kind": type(part).__name__} | {k: v for k, v in config.items() if not k.startswith("_")}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A pipeline's own switches, among what its configuration says of components."""
    return {k: v for k, v in config.items() if v is None or isinstance(v, bool | int | float)}


def _opened(path: Path) -> Image.Image | None:
    """The picture; None where there is none, or a damaged one."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError):
        return None


def _keep(image: Image.Image, path: Path) -> bool:
    """Whether it could be kept; warns where not."""
    try:
        write_picture(path, image)
    except InfusionError as error:
        warnings.warn(f"Pictures are not kept and will be drawn again: {error}", InfusionWarning, stacklevel=2)
        return False
    return True


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
