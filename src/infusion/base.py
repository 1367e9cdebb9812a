"""Get a base model: the embedded one, a hub id, a diffusers folder, or a single checkpoint file."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from infusion.errors import InfusionError
from infusion.families import FAMILIES, Config, family_of, write_configuration
from infusion.offloading import check_offload
from infusion.offloading import offload as keep_offloaded
from infusion.streams import require_unet

EMBEDDED = "embedded"
PREDICTIONS = ("epsilon", "v_prediction")


def load_base(
    base: str | Path = EMBEDDED,
    device: str | None = None,
    dtype: str | torch.dtype = torch.float32,
    prediction: str | None = None,
    offload: bool = False,
) -> DiffusionPipeline:
    """A stock diffusers pipeline, ready for `learn` and `attach`.

    base: "embedded" (the project's own small world), a diffusers folder, a .safetensors checkpoint in the
    community's single-file layout, or a hub id. device: "cpu", "cuda", "mps"; None takes the best there is.
    dtype: a torch dtype or its name. prediction: "epsilon" or "v_prediction", what the UNet predicts, where a checkpoint does not say it or
    says it wrongly. offload: keep the parts on the CPU, so that the device holds one at a time, while it works.

    Raises InfusionError for a base that cannot be found or read, or has no cross-attention UNet.
    """
    if prediction not in (None, *PREDICTIONS):
        raise InfusionError(f"prediction is {prediction!r}; use one of {', '.join(PREDICTIONS)}.")
    device = device or best_device()
    dtype = _dtype(dtype)
    try:
        torch.device(device)
    except RuntimeError:
        raise InfusionError(f"{device!r} is no device; use cpu, cuda, cuda:1 or mps.") from None
    if offload:
        check_offload(device)
    pipe = _load_embedded() if str(base) == EMBEDDED else _load_other(str(base), dtype, prediction)
    require_unet(pipe)
    if prediction:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    try:
        if pipe.unet.dtype != dtype:
            pipe = pipe.to(dtype)
        if offload:
            torch.empty(0, device=device)  # an unusable one is told now, not when the first part is moved there
            keep_offloaded(pipe, device)
        else:
            pipe = pipe.to(device)
    except torch.OutOfMemoryError:  # a RuntimeError, but the device is there; cli.py says what helps
        raise
    except (RuntimeError, AssertionError) as error:
        raise InfusionError(
            f"The device {device!r} is not usable here ({str(error).splitlines()[0]}); use --device cpu."
        ) from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _load_embedded() -> DiffusionPipeline:
    from infusion.world.release import load_pipeline

    try:
        return load_pipeline()
    except FileNotFoundError:
        raise InfusionError(
            "The embedded base's weights are missing from this installation; install the package again."
        ) from None


def _load_other(base: str, dtype: torch.dtype, prediction: str | None) -> DiffusionPipeline:
    path = Path(base)
    try:
        if path.is_file():
            return _load_single_file(path, dtype, prediction)
        if path.is_dir() and not (path / "model_index.json").exists():
            raise InfusionError(
                f"{base!r} holds no diffusers pipeline (no model_index.json); give its top folder, or a .safetensors checkpoint."
            )
        if not path.exists() and (path.suffix == ".safetensors" or base.startswith(("/", ".", "~"))):
            raise InfusionError(
                f"There is no file or folder {base!r}; give a .safetensors checkpoint, a diffusers folder, a hub id, or 'embedded'."
            )
        _check_index(base)
        return _pretrained(base, dtype)
    except InfusionError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SingleFileComponentError) as error:
        of_hub = isinstance(error.__cause__, HfHubHTTPError | OfflineModeIsEnabled)  # tells more than what hides it
        reason = _first_line(error.__cause__ if of_hub else error)
        raise InfusionError(
            f"The base {base!r} cannot be loaded ({reason}); give a hub id, a diffusers folder, a .safetensors checkpoint, or 'embedded'."
        ) from None


def _check_index(base: str) -> None:
    """Raise InfusionError for a pipeline without a Stable Diffusion's UNet by its index alone, before anything large is downloaded or read."""
    name, folder = DiffusionPipeline.config_name, Path(base)
    try:
        index = json.loads((folder / name if folder.is_dir() else Path(hf_hub_download(base, name))).read_text("utf-8"))
    except (OSError, ValueError):  # whatever it is, loading tells more of it
        return
    _, network = index.get("unet") or (None, None)
    if network != UNet2DConditionModel.__name__:
        draws = f"draws with a {network}" if network else "has no UNet"
    elif "vae" not in index:
        draws = "has no Stable Diffusion's autoencoder"
    else:
        return
    raise InfusionError(
        f"The base {base!r} is a {index.get('_class_name')}, which {draws}; Infusion works with Stable Diffusion 1.x, 2.x and SDXL, not yet with transformer bases or other kinds."
    )


def _pretrained(base: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a folder or a hub id. Of a folder, weights of a variant where there are no others; of a hub id, those in fp16 where they
    are at hand and `dtype` holds no more, or where there are no others. Raises what diffusers raises."""
    options: dict[str, Any] = {"torch_dtype": dtype, "safety_checker": None, "use_safetensors": True}
    if Path(base).is_dir():
        return DiffusionPipeline.from_pretrained(base, variant=_only_variant(Path(base)), **options)
    errors = {}
    for variant in (None, "fp16") if dtype == torch.float32 else ("fp16", None):
        try:
            return DiffusionPipeline.from_pretrained(base, variant=variant, **options)
        except (OSError, ValueError) as error:
            errors[variant] = error
    raise errors[None]


def _only_variant(folder: Path) -> str | None:
    """ "fp16" or "bf16" where a part of the pipeline has no weights but of that variant; None where all have others."""
    for part in sorted(p for p in folder.iterdir() if p.is_dir()):
        kinds = {m[1] for p in part.glob("*.safetensors") if (m := _WEIGHTS.fullmatch(p.name))}
        if kinds and None not in kinds:
            return "fp16" if "fp16" in kinds else min(kinds)
    return None


# model.safetensors and model.fp16.safetensors, in pieces as model.fp16-00001-of-00002.safetensors and model-00001-of-00002.fp16.safetensors
_WEIGHTS = re.compile(r"[^.]+(?:\.(fp16|bf16)(?:-\d+-of-\d+)?)?\.safetensors")


def _first_line(error: BaseException | None) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _load_single_file(path: Path, dtype: torch.dtype, prediction: str | None) -> DiffusionPipeline:
    """A checkpoint in the original layout. Offline: configuration and tokenizers come with us. What is not told of it follows from
    `prediction`, where that is given."""
    if path.suffix != ".safetensors":
        raise InfusionError(f"{str(path)!r} is no .safetensors file; checkpoints that need pickle are not opened.")
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise InfusionError(f"{str(path)!r} is damaged or no safetensors file ({error}); get a fresh copy.") from None
    family = family_of(shapes)
    if family is None:
        raise InfusionError(
            f"{str(path)!r} is no Stable Diffusion 1.x, 2.x or XL checkpoint in the original layout; "
            "other bases are given as a diffusers folder or a hub id."
        )
    if any(name.startswith("edm_") for name in shapes):
        raise InfusionError(
            f"{str(path)!r} is an EDM checkpoint, whose noise is not Stable Diffusion's; concepts are not learned on such, nor drawn."
        )
    components = dict(FAMILIES[family])
    predicts = prediction or _predicts(family, path, metadata, "v_pred" in shapes)
    components["scheduler"] = {**components["scheduler"], "prediction_type": predicts}
    if (
        "ztsnr" in shapes and predicts == "v_prediction"
    ):  # beside "v_pred": learned down to no signal at all (arXiv 2305.08891)
        components["scheduler"] |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    side = metadata.get("modelspec.resolution", "").partition("x")[0]
    if family == "stable-diffusion-v2" and (side == "512" or (predicts == "epsilon" and not side)):
        components["unet"] = {**components["unet"], "sample_size": 64}
    return from_checkpoint(path, components, dtype)


def _predicts(family: str, path: Path, metadata: dict[str, str], marked: bool) -> str:
    """What a checkpoint's UNet predicts: as its modelspec says; velocity where it is `marked`, as fine-tunes of XL are by a tensor "v_pred";
    else as its family does. Stable Diffusion 2.x has both with the same shapes: of 512 pixels noise, of 768 velocity, told by
    modelspec or by the name, as in v2-1_512-ema-pruned.safetensors."""
    told, pixels = (metadata.get(f"modelspec.{key}", "").lower() for key in ("prediction_type", "resolution"))
    if told:
        return "epsilon" if told.startswith("eps") else "v_prediction"
    if family == "stable-diffusion-v2":
        return "epsilon" if (pixels.startswith("512") if pixels else "512" in path.stem) else "v_prediction"
    return "v_prediction" if marked else "epsilon"


def from_checkpoint(path: Path, components: dict[str, Config], dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a checkpoint in the original layout with the given component configurations."""
    kind = StableDiffusionXLPipeline if "text_encoder_2" in components else StableDiffusionPipeline
    with tempfile.TemporaryDirectory() as folder:
        config = write_configuration(components, Path(folder))
        return kind.from_single_file(str(path), config=str(config), local_files_only=True, torch_dtype=dtype)


def best_device() -> str:
    """The fastest there is on this machine: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    names = {
        "fp32": torch.float32,
        "float32": torch.float32,
        "fp16": torch.float16,
        "float16": torch.float16,
        "bf16": torch.bfloat16,
        "bfloat16": torch.bfloat16,
    }
    if dtype not in names:
        raise InfusionError(f"{dtype!r} is no dtype; use fp32, fp16 or bf16.")
    return names[dtype]
