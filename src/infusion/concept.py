"""A concept: one residual per cross-attention layer, and the one small file that holds it."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from infusion.errors import InfusionError
from infusion.prompts import NAME

FORMAT = "infusion-1"


@dataclass(frozen=True)
class Concept:
    """What was learned of one subject.

    name: how prompts call it, `<name>`. word: the class word that it stands for ("dog").
    residuals: path of the cross-attention module in the UNet -> vector of that layer's value length
    (heads x head_dim). settings: how it was learned (numbers and short words only).
    """

    name: str
    word: str
    residuals: dict[str, Tensor]
    settings: dict[str, int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise InfusionError(
                f"{self.name!r} is no concept name; use letters, digits, - and _, beginning with a letter, such as 'milo'."
            )
        if not self.word.strip():
            raise InfusionError("A concept needs its class word, such as 'dog'.")
        for path, residual in self.residuals.items():
            if residual.ndim != 1:
                raise InfusionError(f"The residual of {path} has shape {tuple(residual.shape)}; it must be a vector.")
            if not bool(torch.isfinite(residual).all()):
                raise InfusionError(f"The residual of {path} is not finite; learn with a lower learning rate.")

    @property
    def count(self) -> int:
        """Number of learned values."""
        return sum(r.numel() for r in self.residuals.values())

    def save(self, path: str | Path) -> Path:
        """Write the concept to `path` (.safetensors), whole or not at all. Returns the path.

        The same concept always gives the same bytes. Raises InfusionError where it cannot be written.
        """
        path = Path(path)
        metadata = {
            "format": FORMAT,
            "name": self.name,
            "word": self.word,
            "settings": json.dumps(self.settings, sort_keys=True),
        }
        tensors = {k: v.detach().float().cpu().contiguous() for k, v in sorted(self.residuals.items())}
        _write_atomically(path, _canonical(to_bytes(tensors, metadata)))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Concept:
        """Read a concept. Raises InfusionError for what is missing, unreadable, or no concept."""
        path = Path(path)
        if not path.is_file():
            raise InfusionError(
                f"There is no concept file {str(path)!r}; give the path of a .safetensors file that `infusion train` wrote."
            )
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                residuals = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise InfusionError(
                f"{str(path)!r} is damaged or no safetensors file ({error}); get a fresh copy of it."
            ) from None
        if metadata.get("format") != FORMAT:
            raise InfusionError(
                f"{str(path)!r} is no Infusion concept of format {FORMAT} (it says {metadata.get('format')!r}); "
                "LoRA files and embeddings are loaded with diffusers' own load_lora_weights and load_textual_inversion."
            )
        try:
            settings = json.loads(metadata.get("settings", "{}"))
            return cls(metadata["name"], metadata["word"], residuals, settings)
        except (KeyError, json.JSONDecodeError) as error:
            raise InfusionError(f"{str(path)!r} lacks part of its header ({error}); get a fresh copy of it.") from None


def _canonical(content: bytes) -> bytes:
    """The same safetensors file with its header's keys sorted: safetensors itself writes metadata in random order."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[start:]


def _write_atomically(path: Path, content: bytes) -> None:
    """Temp file in the same folder, flushed to disk, then renamed over `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temp, 0o644)
            os.replace(temp, path)
        except BaseException:
            os.unlink(temp)
            raise
    except OSError as error:
        raise InfusionError(
            f"{str(path)!r} cannot be written ({error.strerror}); choose a folder that you may write to."
        ) from None
