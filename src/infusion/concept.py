"""A concept: one residual per cross-attention layer, and the one small file that holds it.

The file is a safetensors file with one packed tensor; `docs/format.md` describes it. Reading checks
everything before anything is believed: sizes, header, hash, and that the file is exactly what writing
its content would give.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infusion.errors import InfusionError
from infusion.files import write_whole
from infusion.packing import LARGEST, SCHEMES, in_order, on_grid, pack, packed_size, unpack
from infusion.prompts import NAME

FORMAT = "1"
MAX_FILE = 4 * 2**20  # SDXL in fp32 takes a tenth of it
MAX_HEADER = 32 * 2**10
MAX_SETTINGS = 2**10
_ZEROS = "0" * 64
_LAYER = re.compile(
    r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2"
)
_SHORT = re.compile(r"([dum])(?:(\d+)\.)?(\d+)\.(\d+)")
_SIDES = {"d": "down_blocks", "u": "up_blocks", "m": "mid_block"}

_PATH = re.compile(r"[A-Za-z0-9_.]{1,200}")
_LABEL = re.compile(r"[A-Za-z0-9_.-]{0,64}")
MAX_WORD = 80  # bytes of the class word in the file, where a letter beyond ASCII takes 6 or 12

Setting = int | float | str | bool


@dataclass(frozen=True)
class BaseInfo:
    """The base that a concept was learned on, as far as known: its family in modelspec's words
    ("stable-diffusion-v1"), the side of its pictures in pixels, and a hash of its attention weights."""

    family: str = "unknown"
    side: int = 0
    weights: str = ""


@dataclass(frozen=True, eq=False)
class Concept:
    """What was learned of one subject. To compare two, compare their `to_bytes`.

    name: how prompts call it, `<name>`. word: the class word that it stands for ("dog").
    residuals: path of the cross-attention module in the UNet -> vector of that layer's value length
    (heads x head_dim). settings: how it was learned (numbers and short words only: the file is shared); of these "max_timestep" says
    how it is drawn, too.
    """

    name: str
    word: str
    residuals: dict[str, Tensor]
    settings: dict[str, Setting] = field(default_factory=dict)
    base: BaseInfo = field(default_factory=BaseInfo)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or len(self.name) > 64:
            raise InfusionError(
                f"{self.name!r} is no concept name; use up to 64 letters, digits, - and _, beginning with a letter, such as 'milo'."
            )
        if (
            not self.word.strip()
            or not self.word.isprintable()
            or len(self.word) > 64
            or len(json.dumps(self.word)) > MAX_WORD
        ):
            raise InfusionError(
                f"{self.word!r} is no class word; a concept needs one of up to 64 letters, such as 'dog', a few of them beyond ASCII."
            )
        for key, value in self.settings.items():
            plain = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
            plain = plain or (isinstance(value, str) and value.isprintable())
            if not isinstance(key, str) or not key.isprintable() or not plain:
                raise InfusionError(
                    f"The setting {key!r} is {value!r}; settings are finite numbers, short words and flags."
                )
        if type(limit := self.settings.get("max_timestep", 1)) is not int or limit < 1:
            raise InfusionError(f"max_timestep is {limit!r}; it must be a whole number of at least 1.")
        if len(json.dumps(self.settings)) > MAX_SETTINGS:
            raise InfusionError(
                f"The settings take more than {MAX_SETTINGS:,} bytes; keep how it was learned, no texts."
            )
        if bad := [v for v in (self.base.family, self.base.weights) if not _LABEL.fullmatch(v)]:
            raise InfusionError(
                f"The base is described by {bad[0][:80]!r}; family and weights are letters, digits, dots, - and _."
            )
        for path, residual in self.residuals.items():
            if not _PATH.fullmatch(path):
                raise InfusionError(
                    f"{path[:80]!r} is no path of a layer; such a path has letters, digits, dots and _."
                )
            if residual.ndim != 1 or residual.numel() == 0:
                raise InfusionError(f"The residual of {path} has shape {tuple(residual.shape)}; it must be a vector.")
            if not bool(torch.isfinite(residual).all()):
                raise InfusionError(f"The residual of {path} is not finite; learn with a lower learning rate.")
            if float(residual.abs().max()) > LARGEST:
                raise InfusionError(f"The residual of {path} exceeds {LARGEST:g}; learn with a lower learning rate.")

    @property
    def max_timestep(self) -> int | None:
        """The timestep below which it was learned and is drawn; None for all."""
        limit = self.settings.get("max_timestep")
        return None if limit is None else int(limit)

    @property
    def count(self) -> int:
        """Number of learned values."""
        return sum(r.numel() for r in self.residuals.values())

    def to_bytes(self, scheme: str = "q6") -> bytes:
        """The file's bytes: always the same for the same concept. scheme: "q6", "fp16" or "fp32"."""
        if scheme not in SCHEMES:
            raise InfusionError(f"{scheme!r} is no scheme; use one of {', '.join(SCHEMES)}.")
        paths = in_order(self.residuals)
        flat = torch.cat([self.residuals[p].detach().float().cpu() for p in paths]) if paths else torch.zeros(0)
        payload = pack(flat.numpy(), scheme)
        metadata = {
            "infusion.base": self.base.weights,
            "infusion.format": FORMAT,
            "infusion.layers": _abbreviate([(p, self.residuals[p].numel()) for p in paths]),
            "infusion.name": self.name,
            "infusion.scheme": scheme,
            "infusion.settings": json.dumps(self.settings, sort_keys=True, separators=(",", ":")),
            "infusion.sha256": _ZEROS,
            "infusion.word": self.word,
            "modelspec.architecture": f"{self.base.family}/infusion",
            "modelspec.implementation": "infusion",
            "modelspec.resolution": f"{self.base.side}x{self.base.side}",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.title": self.name,
        }
        entry = {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}
        header = json.dumps(
            {"__metadata__": metadata, "residuals": entry}, sort_keys=True, separators=(",", ":")
        ).encode()
        header += b" " * (-len(header) % 8)
        content = len(header).to_bytes(8, "little") + header + payload
        digest = hashlib.sha256(content).hexdigest()
        return content.replace(f'"infusion.sha256":"{_ZEROS}"'.encode(), f'"infusion.sha256":"{digest}"'.encode(), 1)

    @classmethod
    def from_bytes(cls, content: bytes, source: str = "the file") -> Concept:
        """Read a concept from a file's bytes; `source` names it in errors. Raises InfusionError."""
        metadata, payload = _checked(content, source)
        layers = _expand(metadata["infusion.layers"], source)
        scheme = metadata["infusion.scheme"]
        count = sum(length for _, length in layers)
        if scheme not in SCHEMES or len(payload) != packed_size(count, scheme):
            raise InfusionError(
                f"{source} contradicts itself: {count} values of scheme {scheme!r} do not fill {len(payload)} bytes; get a fresh copy."
            )
        parts = torch.from_numpy(unpack(payload, count, scheme)).split([n for _, n in layers])
        family = metadata["modelspec.architecture"].removesuffix("/infusion")
        side = metadata["modelspec.resolution"].partition("x")[0]
        try:
            concept = cls(
                metadata["infusion.name"],
                metadata["infusion.word"],
                {path: part.clone() for (path, _), part in zip(layers, parts, strict=True)},
                _settings(metadata["infusion.settings"], source),
                BaseInfo(family, int(side) if side.isdecimal() and len(side) < 6 else 0, metadata["infusion.base"]),
            )
        except InfusionError as error:
            raise InfusionError(f"{source} holds what no concept may: {error}") from None
        if concept.to_bytes(scheme) != content:
            raise InfusionError(
                f"{source} is not as Infusion writes it (its header or padding was changed); get a fresh copy."
            )
        return concept

    def save(self, path: str | Path, scheme: str | None = None) -> Path:
        """Write the concept to `path`, whole or not at all, and return the path.

        scheme: by default the smallest that loses nothing, which for a concept as it is learned by default is "q6".
        Raises InfusionError where nothing can be written, and where something other than a concept is.
        """
        refuse_others(Path(path))
        write_whole(Path(path), self.to_bytes(scheme or self._lossless()))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Concept:
        """Read a concept file. Raises InfusionError for what is missing, damaged, or no concept."""
        path = Path(path)
        try:
            if not path.is_file():
                raise InfusionError(
                    f"There is no concept file {str(path)!r}; give the path of a .safetensors file that `infusion train` wrote."
                )
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                content = file.read(min(size, MAX_FILE) + 1)  # read() sets its argument's bytes aside at once
        except OSError as error:
            raise InfusionError(f"{str(path)!r} cannot be read ({error.strerror}); check its permissions.") from None
        return cls.from_bytes(content, repr(str(path)))

    def _lossless(self) -> str:
        """The smallest scheme that holds the values as they are."""
        exact = on_grid(self.residuals, "fp32")
        held = ((scheme, on_grid(self.residuals, scheme)) for scheme in SCHEMES)
        return next(scheme for scheme, values in held if all(torch.equal(values[p], exact[p]) for p in exact))

    def on_grid(self, scheme: str = "q6") -> Concept:
        """The concept as a file of `scheme` holds it."""
        return Concept(self.name, self.word, on_grid(self.residuals, scheme), self.settings, self.base)


def beside(path: Path, ending: str) -> Path:
    """What lies beside a concept's or another adapter's file: milo.safetensors -> milo.masks.png. Only that ending is taken off, since milo.v1
    and milo.v2 are two."""
    return path.with_name(path.name.removesuffix(".safetensors") + ending)


def refuse_others(path: Path) -> None:
    """Raise InfusionError where a file lies at `path` that is no concept: writing one would lose it."""
    if not path.is_file():
        return
    try:
        Concept.load(path)
    except InfusionError as error:
        raise InfusionError(
            f"{str(path)!r} would be overwritten and is no concept ({str(error).rstrip('.')}); choose another name, or remove it."
        ) from None


def _checked(content: bytes, source: str) -> tuple[dict[str, str], bytes]:
    """Metadata and payload of a file whose sizes, header and hash are right."""
    # A header of 640 bytes begins with a pickle's magic too; what begins like a header is none.
    if content[8:9] != b"{" and (content[:2] == b"PK" or (content[:1] == b"\x80" and content[1:2] in _PROTOCOLS)):
        raise InfusionError(
            f"{source} is a pickle or zip archive, which can run code when opened; concepts are .safetensors files."
        )
    if _LORA.search(content[8:MAX_HEADER]) and b'"infusion.format"' not in content[8:MAX_HEADER]:
        raise InfusionError(f"{source} is a LoRA, not an Infusion concept; diffusers loads it with load_lora_weights.")
    if len(content) > MAX_FILE:
        raise InfusionError(
            f"{source} is larger than {MAX_FILE:,} bytes; no concept is. Checkpoints are given with --base."
        )
    if len(content) < 16:
        raise InfusionError(f"{source} is too short to be a concept; get a fresh copy.")
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= min(MAX_HEADER, len(content) - 8):
        raise InfusionError(
            f"{source} is damaged or no safetensors file (its header would have {length:,} bytes); get a fresh copy."
        )
    header = _parsed(content[8 : 8 + length], source)
    metadata = header.get("__metadata__")
    metadata = metadata if isinstance(metadata, dict) else {}
    if not all(isinstance(v, str) for v in metadata.values()):
        raise InfusionError(f"{source} is damaged (metadata that is no text); get a fresh copy.")
    if "infusion.format" not in metadata:
        raise InfusionError(
            f"{source} is a safetensors file of another kind, not an Infusion concept; diffusers loads embeddings with load_textual_inversion."
        )
    if metadata["infusion.format"] != FORMAT:
        raise InfusionError(
            f"{source} has format {metadata['infusion.format']!r}, this version reads {FORMAT}; upgrade infusion."
        )
    digest = metadata.get("infusion.sha256", "")
    blank = content.replace(f'"infusion.sha256":"{digest}"'.encode(), f'"infusion.sha256":"{_ZEROS}"'.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != digest:
        raise InfusionError(f"{source} is damaged (its checksum does not fit); get a fresh copy.")
    if set(header) != {"__metadata__", "residuals"} or not metadata.keys() >= _KEYS:
        raise InfusionError(f"{source} lacks part of its header; get a fresh copy.")
    return metadata, content[8 + length :]


_PROTOCOLS = {bytes([n]) for n in range(2, 6)}  # of pickle; 0 and 1 are text without a magic number
_LORA = re.compile(rb'lora[^"]{0,100}":\s*\{\s*"dtype"|"ss_[a-z_]+"\s*:', re.IGNORECASE)
_KEYS = {
    "infusion.base", "infusion.layers", "infusion.name", "infusion.scheme", "infusion.settings", "infusion.word",
    "modelspec.architecture", "modelspec.resolution",
}  # fmt: skip


def _parsed(header: bytes, source: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        parsed = json.loads(header.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise InfusionError(
            f"{source} is damaged or no safetensors file (its header is unreadable); get a fresh copy."
        ) from None
    if not isinstance(parsed, dict):
        raise InfusionError(f"{source} is damaged or no safetensors file (its header is no object); get a fresh copy.")
    return parsed


def _settings(text: str, source: str) -> dict[str, Setting]:
    settings = _parsed(text.encode(), source)
    if not all(isinstance(v, int | float | str) for v in settings.values()):
        raise InfusionError(f"{source} is damaged (its settings are no plain values); get a fresh copy.")
    return settings  # `Concept` has its own say on what a setting may be


def _abbreviate(layers: list[tuple[str, int]]) -> str:
    """Paths and lengths in short: "d0.1.0:320" is down_blocks.0.attentions.1.transformer_blocks.0.attn2 with 320 values."""
    parts = []
    for path, length in layers:
        m = _LAYER.fullmatch(path)
        short = f"{m[1][0]}{m[2] + '.' if m[2] else ''}{m[3]}.{m[4]}" if m else path
        parts.append(f"{short}:{length}")
    return " ".join(parts)


def _expand(text: str, source: str) -> list[tuple[str, int]]:
    layers = []
    for part in text.split():
        short, _, length = part.rpartition(":")
        if not length.isdecimal() or len(length) > 6 or not short:
            raise InfusionError(f"{source} is damaged (layer {part[:40]!r}); get a fresh copy.")
        m = _SHORT.fullmatch(short)
        block = f".{m[2]}" if m and m[2] else ""
        path = f"{_SIDES[m[1]]}{block}.attentions.{m[3]}.transformer_blocks.{m[4]}.attn2" if m else short
        layers.append((path, int(length)))
    if len(dict(layers)) != len(layers):
        raise InfusionError(f"{source} is damaged (a layer twice); get a fresh copy.")
    return layers


def summary(concept: Concept, size: int | None = None) -> Mapping[str, Any]:
    """What `infusion inspect` shows: plain values."""
    shown: dict[str, Any] = {
        "name": concept.name,
        "word": concept.word,
        "values": concept.count,
        "layers": {p: {"values": r.numel(), "norm": round(float(r.norm()), 4)} for p, r in concept.residuals.items()},
        "base": {
            "family": concept.base.family,
            "side": concept.base.side,
            "weights": concept.base.weights or "unknown",
        },
        "settings": dict(concept.settings),
    }
    return shown if size is None else {**shown, "bytes": size}
