"""Any customization as an adapter: a concept file, a LoRA, a textual-inversion embedding, a fine-tuned pipeline folder.

What kind a file is, is read from the file; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from infusion.base import load_base
from infusion.concept import Concept
from infusion.errors import InfusionError
from infusion.methods.infusion import ConceptAdapter
from infusion.methods.interface import Adapter, rebuilt
from infusion.methods.lora import loaded_lora
from infusion.methods.textual_inversion import with_word
from infusion.offloading import offloaded
from infusion.schedulers import few_steps
from infusion.streams import execution_device, picture_side, require_unet

FOR_XL = ("clip_l", "clip_g")  # an SDXL embedding's tensors, in the order of its text encoders


def load_adapter(path: str | Path, word: str, subject: str | None = None, prediction: str | None = None) -> Adapter:
    """The adapter in a file or folder. word: the subject's class word. subject: how prompts call it; by default "a <name>"
    for a concept (or "a <name:0.5>"), "a " and its token for an embedding, "a WORD" for a LoRA or a pipeline. prediction: of a pipeline's
    folder, what its UNet predicts, as `load_base` was told of its base.

    Raises InfusionError for what is missing, damaged, none of the four kinds, or a concept of another class word.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "model_index.json").exists():
            raise InfusionError(
                f"{str(path)!r} holds no diffusers pipeline (model_index.json is missing); give the folder that has it, or a file."
            )
        return PipelineFolder(subject or f"a {word}", path, prediction)
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
        if concept.word.casefold() != word.casefold():  # base and concept would be given different texts
            raise InfusionError(
                f"<{concept.name}> was learned as a {concept.word!r}, the word given is {word!r}; give {concept.word!r}."
            )
        called = _naming(subject, f"<{concept.name}>", f"<{concept.name}:")
        as_learned = bool(concept.settings.get("two_streams", True))
        return ConceptAdapter(called, concept, as_learned)
    if any("lora" in key for key in shapes):
        return LoraFile(subject or f"a {word}", path)
    if (len(shapes) == 1 or shapes.keys() == set(FOR_XL)) and all(1 <= len(s) <= 2 for s in shapes.values()):
        token = next(iter(shapes))
        token = f"<{path.stem}>" if token in ("emb_params", *FOR_XL) else token
        return EmbeddingFile(_naming(subject, token), path, token)
    raise InfusionError(
        f"{str(path)!r} is neither a concept nor a LoRA nor an embedding ({len(shapes)} tensors such as {next(iter(shapes), 'none')!r}); "
        "give one of these, or a pipeline folder."
    )


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
        """The pipeline itself with the LoRA loaded, and no other in use. Raises InfusionError where it does not fit."""
        if find_spec("peft") is None:
            raise InfusionError(f"{str(self.path)!r} is a LoRA, which needs peft; pip install peft.")
        with loaded_lora(pipe, self.path.parent, weight_name=self.path.name) as error:
            if error is not None:
                raise _misfit(self.path, error) from None
            yield pipe


@dataclass(frozen=True)
class EmbeddingFile:
    """A textual-inversion embedding for `token`, or one for each of XL's two text encoders."""

    subject: str
    path: Path
    token: str

    def tensors(self) -> Mapping[str, Tensor]:
        """The embedding, or both."""
        return load_file(self.path)

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """A pipeline with tokenizers and text encoders of its own. Raises InfusionError for another width, and for a base that has more or fewer
        text encoders than it has embeddings: the others would read the token as letters."""
        found = self.tensors()
        encoders = 2 if getattr(pipe, "text_encoder_2", None) is not None else 1
        if len(found) != encoders:
            raise InfusionError(
                f"{str(self.path)!r} holds {len(found)} embedding(s), the base has {encoders} text encoder(s); give a file with "
                + ("both, clip_l and clip_g, as SDXL's have." if encoders == 2 else "one, of this base.")
            )
        try:
            custom = with_word(pipe, self.token, *(found[key] for key in (FOR_XL if encoders == 2 else found)))
        except (RuntimeError, ValueError) as error:
            raise _misfit(self.path, error) from None
        yield custom


@dataclass(frozen=True)
class PipelineFolder:
    """A whole fine-tuned pipeline."""

    subject: str
    path: Path
    prediction: str | None = None

    def tensors(self) -> Mapping[str, Tensor]:
        """The UNet's weights."""
        return require_unet(load_base(self.path, "cpu")).state_dict()

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """The folder's pipeline with the base's scheduler. Raises InfusionError for one that draws otherwise than the base: of another size,
        for one."""
        device, offload = str(execution_device(pipe)), offloaded(pipe) is not None
        custom = load_base(self.path, device, pipe.unet.dtype, self.prediction, offload)
        for what, here, there in zip(_MATCHING, _properties(pipe), _properties(custom), strict=True):
            if here != there:
                raise InfusionError(
                    f"{str(self.path)!r} differs from the base in {what} ({there}, the base {here}); give the base that it was tuned from."
                )
        yield rebuilt(custom, scheduler=pipe.scheduler)


_MATCHING = ("pixels a side", "latent channels", "width of its text states", "what its UNet predicts", "steps")


def _properties(pipe: DiffusionPipeline) -> tuple[object, ...]:
    unet = pipe.unet.config
    predicts, steps = pipe.scheduler.config.get("prediction_type"), "few, distilled" if few_steps(pipe) else "many"
    return picture_side(pipe), unet["in_channels"], unet["cross_attention_dim"], predicts, steps


def _naming(subject: str | None, token: str, *others: str) -> str:
    """What prompts call the subject; it must hold the token or another form of it, or nothing would be customized."""
    if subject is not None and not any(form in subject for form in (token, *others)):
        raise InfusionError(
            f"The subject {subject!r} does not hold {token!r}, by which this file is called; say 'a {token}', for example."
        )
    return subject or f"a {token}"


def _misfit(path: Path, error: Exception) -> InfusionError:
    return InfusionError(
        f"{str(path)!r} does not fit this base ({str(error).splitlines()[0][:160]}); give the base that it was made for."
    )
