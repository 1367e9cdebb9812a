"""A subject made ready for learning: latents, masks and text states, each computed once.

Every method learns from the same `Lesson`, so that methods are compared on equal data.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from infusion.errors import InfusionError, InfusionWarning
from infusion.photos import Photo, mask_to_tensor, square, to_tensor
from infusion.prompts import Mention, parse
from infusion.streams import Plan, Streams, execution_device, picture_side, require_unet

# The authors' captions are short and name nothing but the class.
TEMPLATES = (
    "a photo of a {}",
    "the photo of a {}",
    "image of a {}",
    "a picture of a {}",
    "a {}",
    "the {}",
    "{}",
)
_TAG = "<subject>"
SETTLED = 2.74  # by trials on the embedded base, docs/log.md


@dataclass(frozen=True)
class Texts:
    """Captions encoded: states (k, m, d), the mentions of the concept in each, and what else the UNet
    wants to know (SDXL's pooled states and sizes), first axis k."""

    states: Tensor
    mentions: tuple[tuple[Mention, ...], ...]
    extra: dict[str, Tensor]


@dataclass(frozen=True)
class Draw:
    """One training batch: what the UNet sees, what it should say, and where that counts.

    noisy, target (b, c, g, g); timesteps (b,); mask (b, 1, g, g) in [0, 1]; captions (b,), the place of each row's
    caption among the lesson's; kwargs hold their text states.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    mask: Tensor
    captions: Tensor
    plan: Plan
    kwargs: dict[str, Any]


_BY_ROW = ("noisy", "target", "timesteps", "mask", "captions", "kwargs")  # a draw's fields beside its plan


def joined(draws: Sequence[Draw]) -> Draw:
    """Batches of several lessons as one, rows in their order; `captions` stay those of each lesson."""
    first, *others = draws
    if not others:
        return first

    def rows(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: rows([v[key] for v in values]) for key in values[0]}
        return torch.cat(list(values))

    return Draw(
        plan=Plan(tuple(row for d in draws for row in d.plan.rows), rows([d.plan.states for d in draws])),
        **{field: rows([getattr(d, field) for d in draws]) for field in _BY_ROW},
    )


def parted(draw: Draw, size: int) -> Iterator[Draw]:
    """A batch's rows in order, at most `size` at a time."""

    def some(value: Any, rows: slice) -> Any:
        return {key: some(v, rows) for key, v in value.items()} if isinstance(value, dict) else value[rows]

    for start in range(0, len(draw.noisy), size):
        rows = slice(start, start + size)
        plan = Plan(draw.plan.rows[rows], draw.plan.states[rows])
        yield Draw(plan=plan, **{field: some(getattr(draw, field), rows) for field in _BY_ROW})


@dataclass(frozen=True)
class Lesson:
    """Photos of one subject as a diffusion model's training data.

    pictures: the squared photos. latents (n, c, g, g) of the photos, then of their mirror images where wanted,
    scaled as the UNet expects them. masks (n, g, g) in [0, 1] in the same order. templates: the captions, "{}" for the subject.
    sizes: what SDXL is told of each, (n, 6) as `size_condition` gives it; None tells it the base's own size of all, and others nothing.
    """

    name: str
    word: str
    pictures: tuple[Image.Image, ...]
    latents: Tensor
    masks: Tensor
    templates: tuple[str, ...]
    texts: Texts
    noise: DDPMScheduler
    sizes: Tensor | None = None

    @property
    def flipped(self) -> bool:
        """Whether mirror images are learned from too."""
        return len(self.latents) > len(self.pictures)

    @property
    def masked(self) -> bool:
        """Whether anything is left out of the loss."""
        return bool((self.masks < 1).any())

    def outside(self) -> Tensor | None:
        """Where no photo, as it is, shows its subject, (g, g) bool on the CPU; None where that is less than 15 % of the picture."""
        found = (self.masks[: len(self.pictures)].amax(0) < 0.3).cpu()
        return found if found.double().mean() > 0.15 else None

    @property
    def settled(self) -> int:
        """The timestep below which a drawing's layout is settled, where noise is `SETTLED` times the picture on 16 x 16 latents; larger latents
        settle under more noise, in proportion to their side (arXiv 2301.11093)."""
        alphas = self.noise.alphas_cumprod
        noise = ((1 - alphas) / alphas).sqrt()
        return int((noise < SETTLED * self.latents.shape[-1] / 16).sum())

    def draw(self, count: int, generator: torch.Generator, max_timestep: int | None = None) -> Draw:
        """A batch of `count`: photo, caption, timestep (below `max_timestep`) and noise drawn from `generator` (on the CPU,
        so that every device sees the same numbers)."""
        photo = torch.randint(len(self.latents), (count,), generator=generator)
        text = torch.randint(len(self.texts.states), (count,), generator=generator)
        every = self.noise.config["num_train_timesteps"]
        limit = min(max_timestep or every, every)
        timesteps = torch.randint(limit, (count,), generator=generator)
        noise = torch.randn((count, *self.latents.shape[1:]), generator=generator)
        return self.batch(photo, text, timesteps, noise)

    def batch(self, photo: Tensor, text: Tensor, timesteps: Tensor, noise: Tensor) -> Draw:
        """The batch of the given photos, captions, timesteps and noise."""
        device, dtype = self.latents.device, self.latents.dtype
        photo, text_rows, timesteps = photo.to(device), text.to(device), timesteps.to(device)
        clean, noise = self.latents[photo].float(), noise.to(device)  # in bf16 small noise levels round to none
        velocity = self.noise.config["prediction_type"] == "v_prediction"
        target = self.noise.get_velocity(clean, noise, timesteps) if velocity else noise
        states = self.texts.states[text_rows]
        extra = {k: v[text_rows] for k, v in self.texts.extra.items()}
        if self.sizes is not None:
            extra["time_ids"] = self.sizes[photo]
        return Draw(
            noisy=self.noise.add_noise(clean, noise, timesteps).to(dtype),
            target=target,
            timesteps=timesteps,
            mask=self.masks[photo][:, None],
            captions=text_rows,
            plan=Plan(tuple(self.texts.mentions[i] for i in text.tolist()), states),
            kwargs={"encoder_hidden_states": states, **({"added_cond_kwargs": extra} if extra else {})},
        )


def prepare_lesson(
    pipe: DiffusionPipeline,
    photos: Sequence[Photo],
    word: str,
    name: str,
    templates: Sequence[str] = TEMPLATES,
    flip: bool = True,
    masked: bool = True,
) -> Lesson:
    """Encode photos and captions, and give every photo its mask: its own, or found by the base's attention.

    flip: learn from mirror images too (False for asymmetric subjects). masked=False counts the whole picture.
    Raises InfusionError for a scheduler whose prediction type is neither epsilon nor v.
    """
    unet = require_unet(pipe)
    takes, latent = unet.config["in_channels"], pipe.vae.config["latent_channels"]
    if takes != latent:
        raise InfusionError(
            f"This base's UNet takes {takes} channels, its latents have {latent}; learn on a text-to-image base, not on one for inpainting."
        )
    if pipe.tokenizer is None:
        raise InfusionError("This base has no tokenizer of its own; learn on a text-to-image base, not on a refiner.")
    check_noise(pipe)
    noise = DDPMScheduler.from_config(pipe.scheduler.config)
    if noise.config["prediction_type"] not in ("epsilon", "v_prediction"):
        raise InfusionError(
            f"The scheduler predicts {noise.config['prediction_type']!r}; learning knows 'epsilon' and 'v_prediction'."
        )
    side = picture_side(pipe)
    for photo in photos:
        if min(photo.image.size) < side:
            warnings.warn(
                f"{repr(photo.name) if photo.name else 'A photo'} is {photo.image.width}x{photo.image.height}, smaller than the base's {side} pixels a side; it is enlarged, and its blur is learned too.",
                InfusionWarning,
                stacklevel=2,
            )
    pictures = tuple(square(p.image, side) for p in photos)
    mirrored = [p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in pictures] if flip else []
    latents = encode_pictures(pipe, [*pictures, *mirrored])
    texts = encode_texts(pipe, [t.format(_TAG) for t in templates], {"subject": word}, name)
    masks = torch.ones_like(latents[:, 0])
    sizes = None
    if (
        ids := texts.extra.get("time_ids")
    ) is not None:  # a photo's mirror image is cropped as it is: around the centre
        sizes = ids.new_tensor([size_condition(p.image.size, side) for p in photos] * (2 if flip else 1))
    lesson = Lesson(name, word, pictures, latents, masks, tuple(templates), texts, noise, sizes)
    return replace(lesson, masks=_masks(lesson, unet, photos)) if masked else lesson


def size_condition(size: tuple[int, int], side: int) -> tuple[int, ...]:
    """What SDXL's UNet is told of a photo of that width and height that was scaled and cropped to `side` by its centre: the photo's own
    height and width, the crop's top and left in the scaled photo, the square's height and width (arXiv 2307.01952, 2.2). So that neither
    the blur of small photos nor cut-off subjects are taken for the subject's own."""
    width, height = size
    top, left = (round((length * side / min(size) - side) / 2) for length in (height, width))
    return height, width, top, left, side, side


def mask_overlays(lesson: Lesson) -> list[Image.Image]:
    """The photos with what lies outside their masks darkened, for a look at what counts as the subject."""
    n = len(lesson.pictures)
    return [_overlay(p, m) for p, m in zip(lesson.pictures, lesson.masks[:n], strict=True)]


def _overlay(picture: Image.Image, mask: Tensor) -> Image.Image:
    grey = Image.fromarray((mask.cpu() * 255).byte().numpy()).resize(picture.size, Image.Resampling.BILINEAR)
    return Image.composite(picture, Image.eval(picture, lambda v: v // 5), grey)


def check_noise(pipe: DiffusionPipeline) -> None:
    """Raise InfusionError for a base whose noise or latents are not Stable Diffusion's. To be asked before its scheduler is replaced."""
    if "beta_schedule" not in pipe.scheduler.config or pipe.vae.config.get("latents_mean") is not None:
        raise InfusionError(
            f"This base draws with {type(pipe.scheduler).__name__} and its autoencoder's own scale; Infusion knows Stable Diffusion's noise, not EDM's or a flow's."
        )


def _masks(lesson: Lesson, unet: nn.Module, photos: Sequence[Photo]) -> Tensor:
    """Masks of all latents: the photos' own, else the base's; a picture and its mirror image share one."""
    n, side = len(photos), lesson.latents.shape[-1]
    masks = lesson.masks[:n].clone()
    if any(p.mask is None for p in photos):
        found = attention_masks(lesson, unet)
        masks = (found[:n] + found[n:].flip(-1)) / 2 if lesson.flipped else found
        masks = masks / masks.amax(dim=(1, 2), keepdim=True).clamp_min(1e-6)
    for i, photo in enumerate(photos):
        if photo.mask is not None:
            masks[i] = mask_to_tensor(photo.mask, side)
            if not masks[i].any():
                raise InfusionError(
                    f"The mask of {repr(photo.name) if photo.name else f'photo {i + 1}'} shows nothing of the subject in the photo's centre square, which is what is learned; crop the photo around the subject."
                )
    return torch.cat([masks, masks.flip(-1)]) if lesson.flipped else masks


def encode_texts(pipe: DiffusionPipeline, prompts: Sequence[str], words: dict[str, str], name: str) -> Texts:
    """Encode prompts once with the pipeline's own text encoders; mentions are given the concept's `name`."""
    device = execution_device(pipe)
    parsed = [parse(p, words, pipe.tokenizer) for p in prompts]
    with torch.no_grad():
        encoded = type(pipe).encode_prompt(
            pipe, [p.text for p in parsed], device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    extra = added_conditions(pipe, encoded)
    mentions = tuple(tuple(Mention(name, m.strength, m.positions) for m in p.mentions) for p in parsed)
    return Texts(encoded[0], mentions, extra)


def added_conditions(pipe: DiffusionPipeline, encoded: Sequence[Tensor]) -> dict[str, Tensor]:
    """What SDXL's UNet wants beside the text states of `encode_prompt`: pooled states and the picture's size, one row
    per prompt; nothing for other families."""
    if not hasattr(pipe, "text_encoder_2") or len(encoded) != 4:
        return {}
    states, pooled = encoded[0], encoded[2]
    side = picture_side(pipe)
    ids = torch.tensor([[side, side, 0, 0, side, side]] * len(states), device=states.device, dtype=states.dtype)
    return {"text_embeds": pooled, "time_ids": ids}


@torch.no_grad()
def encode_pictures(pipe: DiffusionPipeline, pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> latents scaled as the UNet expects them (the posterior's mode)."""
    vae, dtype, device = pipe.vae, pipe.vae.dtype, execution_device(pipe)
    width, height = pictures[0].size
    batch = max(1, min(8, 8 * 512**2 // (width * height)))  # the memory grows with the pictures' area
    upcast = dtype == torch.float16 and vae.config.force_upcast  # SDXL's overflows in fp16
    try:
        if upcast:
            vae.to(torch.float32)
        parts = [
            _latents(vae.encode(to_tensor(pictures[i : i + batch]).to(device, vae.dtype)))
            for i in range(0, len(pictures), batch)
        ]
    finally:
        if upcast:
            vae.to(dtype)
    return (torch.cat(parts) * vae.config.scaling_factor).to(device, require_unet(pipe).dtype)


def _latents(encoded: Any) -> Tensor:
    """What an autoencoder makes of pictures; a tiny one gives no distribution."""
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents


@torch.no_grad()
def attention_masks(
    lesson: Lesson,
    unet: nn.Module,
    timesteps: Sequence[int] = (300, 450, 600),
    seed: int = 0,
    batch: int | None = None,
) -> Tensor:
    """Soft masks of the subject, found by the base's own attention to the class word: (n, g, g), largest value 1.

    Averaged over timesteps, captions, heads and the layers of 8x8 to 32x32, which show objects best. batch: pictures at a time, by
    default as many as take the memory of 16 at Stable Diffusion 1.5's size.
    """
    batch = batch or max(1, min(16, 16 * 64**2 // lesson.latents[0, 0].numel()))

    def heat(part: slice) -> Tensor:
        sizes = None if lesson.sizes is None else lesson.sizes[part]
        some = replace(lesson, latents=lesson.latents[part], masks=lesson.masks[part], sizes=sizes)
        passes = foundational_passes(some, unet, timesteps, seed)
        return torch.stack([word_maps(recorded, plan, some.masks.shape[-1]) for recorded, plan in passes]).sum(0)

    total = torch.cat([heat(slice(i, i + batch)) for i in range(0, len(lesson.latents), batch)])
    return total / total.amax(dim=(1, 2), keepdim=True).clamp_min(1e-6)


@torch.no_grad()
def foundational_passes(
    lesson: Lesson, unet: nn.Module, timesteps: Sequence[int] = (300, 450, 600), seed: int = 0
) -> Iterator[tuple[dict[str, tuple[Tensor, Tensor]], Plan]]:
    """One pass of the untouched base over all latents at each timestep, captions in turn. Yields, per
    pass, each layer's output and the word's heat (`Streams.recorded`) and the plan that says where the word stands."""
    n = len(lesson.latents)
    generator = torch.Generator().manual_seed(seed)
    streams = Streams(unet)
    try:
        for i, t in enumerate(timesteps):
            noise = torch.randn(lesson.latents.shape, generator=generator)
            draw = lesson.batch(
                torch.arange(n), torch.full((n,), i % len(lesson.texts.states)), torch.full((n,), t), noise
            )
            with streams.calls(draw.plan, "record"):
                unet(draw.noisy, draw.timesteps, **draw.kwargs)
            yield streams.recorded, draw.plan
    finally:
        streams.remove()


def word_maps(recorded: dict[str, tuple[Tensor, Tensor]], plan: Plan, side: int) -> Tensor:
    """Recorded heat of each row's mentions, mean over heads and layers of 8x8 to 32x32: (b, side, side)."""
    heats = layer_heats(recorded, plan)
    fit = [h for h in heats.values() if 8 <= h.shape[-1] <= 32] or list(heats.values())  # tiny bases have none
    return torch.stack([F.interpolate(h[:, None], (side, side), mode="bilinear")[:, 0] for h in fit]).mean(0)


def layer_heats(recorded: dict[str, tuple[Tensor, Tensor]], plan: Plan) -> dict[str, Tensor]:
    """Recorded heat of each row's mentions by layer, mean over heads, in the layer's own resolution: (b, g, g)."""
    rows = torch.tensor([row for row, mentions in enumerate(plan.rows) for _ in mentions], device=plan.states.device)
    heats = {}
    for path, (_, heat) in recorded.items():
        grid = int(heat.shape[-1] ** 0.5)
        per_row = heat.new_zeros(len(plan.rows), heat.shape[-1]).index_add(0, rows, heat.mean(1))
        heats[path] = per_row.unflatten(-1, (grid, grid))
    return heats
