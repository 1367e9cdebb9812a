"""Latent Fisher divergence: how far a customization moves a model on prompts that do not name its concept.

    LFD = E_c E_t E_{z_t ~ base(.|c)} || s_base(z_t, t, c) - s_custom(z_t, t, c) ||^2,   s = -eps / sigma_t

(Infusion, arXiv 2404.14007; the time grid and the weighting are ours.) The score form weighs small t by 1 / sigma_t^2;
the eps form weighs all t alike. Both are means per latent dimension. A model compared with itself has 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from infusion.metrics.estimate import Estimate, bootstrap

PredictionType = Literal["epsilon", "v_prediction"]
# A denoiser takes noisy latents (b, c, h, w), timesteps (b,) and the prompt of all rows.
Denoiser = Callable[[Tensor, Tensor, str], Tensor]
Latents = Tensor | Iterable[Tensor]

_NO_LATENTS = "There are no latents to compare on; give at least one prompt with at least one sample."
TIMESTEPS = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)


@dataclass(frozen=True)
class FisherDivergence:
    """Both forms, pooled over prompts and for each prompt; the samples are pictures, each averaged over the time grid."""

    score: Estimate
    eps: Estimate
    score_by_prompt: dict[str, Estimate]
    eps_by_prompt: dict[str, Estimate]


@torch.no_grad()
def latent_fisher_divergence(
    base: Denoiser,
    custom: Denoiser,
    latents: Mapping[str, Latents],
    alphas_cumprod: Tensor,
    prediction_types: tuple[PredictionType, PredictionType] = ("epsilon", "epsilon"),
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int = 0,
    batch: int = 16,
) -> FisherDivergence:
    """Divergence between two denoisers on the same noisy latents; what is kept of a picture is one number a timestep.

    latents: prompt -> clean latents (n, c, h, w) drawn by the base model for it, or an iterable of such, as they stream by. alphas_cumprod (T,):
    the noise schedule, the same for both. prediction_types: of the base and of the customized model. Noise comes from `seed` and
    the prompt's place, the same for every method that is measured and whatever the batch.
    Raises ValueError for no prompts, no latents, timesteps outside the schedule or unknown prediction types.
    """
    _check(latents, alphas_cumprod, timesteps, *prediction_types)
    moved: dict[str, list[Tensor]] = {}
    for prompt, noised in _noised(latents, alphas_cumprod, timesteps, seed, batch):
        by_both = (
            [
                _predicted(model, kind, *one, prompt)
                for model, kind in zip((base, custom), prediction_types, strict=True)
            ]
            for one in noised
        )
        per_t = [_moved(*both) for both in by_both]
        moved.setdefault(prompt, []).append(torch.stack(per_t, 1))
    return _divergence({prompt: torch.cat(parts) for prompt, parts in moved.items()}, alphas_cumprod, timesteps)


@torch.no_grad()
def predicted_noise(
    model: Denoiser,
    latents: Mapping[str, Latents],
    alphas_cumprod: Tensor,
    prediction_type: PredictionType = "epsilon",
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int = 0,
    batch: int = 16,
) -> dict[str, Tensor]:
    """What a denoiser predicts, as noise: prompt -> (t, n, c, h, w) on the CPU. Arguments as of `latent_fisher_divergence`."""
    _check(latents, alphas_cumprod, timesteps, prediction_type)
    found: dict[str, list[Tensor]] = {}
    for prompt, noised in _noised(latents, alphas_cumprod, timesteps, seed, batch):
        eps = [_predicted(model, prediction_type, *one, prompt).cpu() for one in noised]
        found.setdefault(prompt, []).append(torch.stack(eps))
    return {prompt: torch.cat(parts, 1) for prompt, parts in found.items()}


def divergence(
    base: Mapping[str, Tensor],
    custom: Mapping[str, Tensor],
    alphas_cumprod: Tensor,
    timesteps: Sequence[int] = TIMESTEPS,
) -> FisherDivergence:
    """The divergence of two models' `predicted_noise`, for those that cannot be had at the same time."""
    moved = {
        prompt: torch.stack([_moved(*both) for both in zip(by_base, custom[prompt], strict=True)], 1)
        for prompt, by_base in base.items()
    }
    return _divergence(moved, alphas_cumprod, timesteps)


def _noised(
    latents: Mapping[str, Latents], alphas_cumprod: Tensor, timesteps: Sequence[int], seed: int, batch: int
) -> Iterator[tuple[str, Iterator[tuple[Tensor, int, Tensor]]]]:
    """Batch by batch: the prompt, and for each timestep the noisy latents, the timestep and its alpha. Every timestep has noise of its own,
    drawn picture by picture."""
    for place, (prompt, given) in enumerate(latents.items()):
        generators = [torch.Generator().manual_seed(hash_seed(seed, place, t)) for t in timesteps]
        seen = 0
        for some in [given] if isinstance(given, Tensor) else given:
            for clean in some.split(batch) if len(some) else ():
                seen += len(clean)
                yield prompt, _noisy(clean, alphas_cumprod, timesteps, generators)
        if not seen:
            raise ValueError(f"There are no latents for the prompt {prompt!r}; give at least one sample of each.")


def _noisy(
    clean: Tensor, alphas_cumprod: Tensor, timesteps: Sequence[int], generators: Sequence[torch.Generator]
) -> Iterator[tuple[Tensor, int, Tensor]]:
    wide = clean.to(torch.promote_types(clean.dtype, torch.float32))  # half types round small noise levels away
    for t, generator in zip(timesteps, generators, strict=True):
        noise = torch.stack([torch.randn(clean.shape[1:], generator=generator) for _ in clean]).to(wide)
        a = alphas_cumprod[t].to(wide)
        yield (a.sqrt() * wide + (1 - a).sqrt() * noise).to(clean.dtype), t, a


def _predicted(
    model: Denoiser, prediction_type: PredictionType, noisy: Tensor, t: int, alpha: Tensor, prompt: str
) -> Tensor:
    rows = torch.full((len(noisy),), t, device=noisy.device)
    return to_eps(model(noisy, rows, prompt), noisy, alpha, prediction_type)


def _moved(base: Tensor, custom: Tensor) -> Tensor:
    """How far each picture's predicted noise moved: (n, c, h, w) twice -> (n,) float64 on the CPU."""
    return (base.cpu().double() - custom.cpu().double()).square().flatten(1).mean(1)


def _divergence(moved: Mapping[str, Tensor], alphas_cumprod: Tensor, timesteps: Sequence[int]) -> FisherDivergence:
    """From prompt -> how far each picture moved at each timestep (n, t)."""
    if not moved or not all(len(x) for x in moved.values()):
        raise ValueError(_NO_LATENTS)
    weight = 1 / (1 - alphas_cumprod[list(timesteps)].cpu().double())
    score = {prompt: (x * weight).mean(1) for prompt, x in moved.items()}
    eps = {prompt: x.mean(1) for prompt, x in moved.items()}
    return FisherDivergence(
        score=bootstrap(torch.cat(list(score.values()))),
        eps=bootstrap(torch.cat(list(eps.values()))),
        score_by_prompt={p: bootstrap(s) for p, s in score.items()},
        eps_by_prompt={p: bootstrap(e) for p, e in eps.items()},
    )


def to_eps(prediction: Tensor, noisy: Tensor, alpha: Tensor, prediction_type: PredictionType) -> Tensor:
    """A prediction as noise: v = sqrt(alpha) eps - sqrt(1 - alpha) x0, so eps = sqrt(alpha) v + sqrt(1 - alpha) z_t
    (Salimans and Ho, arXiv 2202.00512, appendix D)."""
    return prediction if prediction_type == "epsilon" else alpha.sqrt() * prediction + (1 - alpha).sqrt() * noisy


def hash_seed(seed: int, place: int, timestep: int) -> int:
    """One seed for each (seed, prompt's place, timestep), distinct in any usual range; never beyond what torch takes."""
    return ((seed * 1_000_003 + place) * 10_007 + timestep) % 2**63


def _check(latents: Mapping[str, Latents], alphas: Tensor, timesteps: Sequence[int], *kinds: str) -> None:
    if not latents or any(isinstance(x, Tensor) and len(x) == 0 for x in latents.values()):
        raise ValueError(_NO_LATENTS)
    if not timesteps or not all(0 <= t < len(alphas) for t in timesteps):
        raise ValueError(f"timesteps are {tuple(timesteps)}; each must lie in the schedule's 0 to {len(alphas) - 1}.")
    if bad := [kind for kind in kinds if kind not in ("epsilon", "v_prediction")]:
        raise ValueError(f"A prediction type is {bad[0]!r}; use 'epsilon' or 'v_prediction'.")
