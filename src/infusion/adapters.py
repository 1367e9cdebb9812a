"""Any customization as an adapter: a concept file, a LoRA, a textual-inversion embedding, a fine-tuned pipeline folder.

What kind a file is, is read from the file; nothing is unpickled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from infusion.base import load_base
from infusion.concept import Concept
from infusion.errors import InfusionError
from infusion.methods.interface import Adapter, rebuilt
from infusion.pipelines import attach
from infusion.streams import require_unet


def load_adapter(path: str | Path, word: str, subject: str | None = None) -> Adapter:
    """The adapter in a file or folder. word: the subject's class word. subject: how prompts call it; by default <name> for a
    concept, the token for an embedding, "a WORD" for a LoRA or a pipeline.

    Raises InfusionError for what is missing, damaged, or none of the four kinds.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "model_index.json").exists():
            raise InfusionError(
                f"{str(path)!r} holds no diffusers pipeline (model_index.json is missing); give the folder that has it, or a file."
            )
        return PipelineFolder(subject or f"a {word}", path)
    if not path.exists():
        raise InfusionError(
            f"There is no file {str(path)!r}; give a concept, a LoRA, an embedding or a pipeline folder."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata, shapes = file.metadata() or {}, {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InfusionError(
            f"{str(path)!r} is no safetensors file ({error}); convert it, or give the original."
        ) from None
    if any(key.startswith("infusion.") for key in metadata):
        concept = Concept.load(path)
        return ConceptAdapter(subject or f"<{concept.name}>", concept)
    if any("lora" in key for key in shapes):
        return LoraFile(subject or f"a {word}", path)
    if len(shapes) == 1 and 1 <= len(next(iter(shapes.values()))) <= 2:
        token = next(iter(shapes))
        return EmbeddingFile(subject or (token if token != "emb_params" else f"<{path.stem}>"), path)
    raise InfusionError(
        f"{str(path)!r} is neither a concept nor a LoRA nor an embedding ({len(shapes)} tensors such as {next(iter(shapes), 'none')!r}); "
        "give one of these, or a pipeline folder."
    )


@dataclass(frozen=True)
class ConceptAdapter:
    """An Infusion concept."""

    subject: str
    concept: Concept

    def tensors(self) -> Mapping[str, Tensor]:
        """The residuals."""
        return self.concept.residuals

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """The pipeline itself with the concept attached."""
        with attach(pipe, self.concept):
            yield pipe


@dataclass(frozen=True)
class LoraFile:
    """A LoRA in any format that diffusers loads."""

    subject: str
    path: Path

    def tensors(self) -> Mapping[str, Tensor]:
        """All of the file's."""
        return load_file(self.path)

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """The pipeline itself with the LoRA loaded. Raises InfusionError where it does not fit."""
        try:
            pipe.load_lora_weights(self.path.parent, weight_name=self.path.name, adapter_name="evaluated")
        except (RuntimeError, ValueError, KeyError) as error:
            pipe.unload_lora_weights()
            raise _misfit(self.path, error) from None
        try:
            yield pipe
        finally:
            pipe.unload_lora_weights()


@dataclass(frozen=True)
class EmbeddingFile:
    """A textual-inversion embedding; `subject` is its token."""

    subject: str
    path: Path

    def tensors(self) -> Mapping[str, Tensor]:
        """The embedding."""
        return load_file(self.path)

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """A pipeline with a tokenizer and a text encoder of its own. Raises InfusionError for another width."""
        parts = {name: copy.deepcopy(getattr(pipe, name)) for name in ("tokenizer", "text_encoder")}
        custom = rebuilt(pipe, **parts)
        embedding = next(iter(self.tensors().values()))
        try:
            custom.load_textual_inversion({self.subject: embedding}, token=self.subject)
        except (RuntimeError, ValueError) as error:
            raise _misfit(self.path, error) from None
        yield custom


@dataclass(frozen=True)
class PipelineFolder:
    """A whole fine-tuned pipeline."""

    subject: str
    path: Path

    def tensors(self) -> Mapping[str, Tensor]:
        """The UNet's weights."""
        return require_unet(load_base(self.path, "cpu")).state_dict()

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """The folder's pipeline with the base's scheduler. Raises InfusionError for pictures of another size."""
        custom = load_base(self.path, str(pipe._execution_device), pipe.unet.dtype)
        sides = [p.unet.config["sample_size"] * p.vae_scale_factor for p in (pipe, custom)]
        if sides[0] != sides[1] or custom.unet.config["in_channels"] != pipe.unet.config["in_channels"]:
            raise InfusionError(
                f"{str(self.path)!r} draws {sides[1]} pixels a side, the base {sides[0]}; give the base that it was tuned from."
            )
        yield rebuilt(custom, scheduler=pipe.scheduler)


def _misfit(path: Path, error: Exception) -> InfusionError:
    return InfusionError(
        f"{str(path)!r} does not fit this base ({str(error).splitlines()[0][:160]}); give the base that it was made for."
    )
