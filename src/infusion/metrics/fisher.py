"""Latent Fisher divergence: how far a customization moves a model on prompts that do not name its concept.

    LFD = E_c E_t E_{z_t ~ base(.|c)} || s_base(z_t, t, c) - s_custom(z_t, t, c) ||^2,   s = -eps / sigma_t

(Infusion, arXiv 2404.14007; the time grid and the weighting are ours.) The score form weighs small t by 1 / sigma_t^2;
the eps form weighs all t alike. Both are means per latent dimension. A model compared with itself has 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from infusion.metrics.estimate import Estimate, bootstrap

PredictionType = Literal["epsilon", "v_prediction"]
# A denoiser takes noisy latents (b, c, h, w), timesteps (b,) and the prompt of all rows.
Denoiser = Callable[[Tensor, Tensor, str], Tensor]

TIMESTEPS = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)


@dataclass(frozen=True)
class FisherDivergence:
    """Both forms, pooled over prompts and for each prompt; the samples are pictures, each averaged over the time grid."""

    score: Estimate
    eps: Estimate
    score_by_prompt: dict[str, Estimate]
    eps_by_prompt: dict[str, Estimate]


def latent_fisher_divergence(
    base: Denoiser,
    custom: Denoiser,
    latents: Mapping[str, Tensor],
    alphas_cumprod: Tensor,
    prediction_types: tuple[PredictionType, PredictionType] = ("epsilon", "epsilon"),
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int = 0,
    batch: int = 16,
) -> FisherDivergence:
    """Divergence between two denoisers on the same noisy latents.

    latents: prompt -> clean latents (n, c, h, w) drawn by the base model for it. alphas_cumprod (T,): the noise
    schedule, the same for both. prediction_types: of the base and of the customized model. Noise comes from `seed` and
    the prompt's place, the same for every method that is measured.
    Raises ValueError for no prompts, no latents, timesteps outside the schedule or unknown prediction types.
    """
    by_base, by_custom = (
        predicted_noise(model, latents, alphas_cumprod, kind, timesteps, seed, batch)
        for model, kind in zip((base, custom), prediction_types, strict=True)
    )
    return divergence(by_base, by_custom, alphas_cumprod, timesteps)


@torch.no_grad()
def predicted_noise(
    model: Denoiser,
    latents: Mapping[str, Tensor],
    alphas_cumprod: Tensor,
    prediction_type: PredictionType = "epsilon",
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int = 0,
    batch: int = 16,
) -> dict[str, Tensor]:
    """What a denoiser predicts, as noise: prompt -> (t, n, c, h, w) on the CPU. Arguments as of `latent_fisher_divergence`."""
    _check(latents, alphas_cumprod, prediction_type, timesteps)
    found = {}
    for place, (prompt, clean) in enumerate(latents.items()):
        per_t = []
        for t in timesteps:
            generator = torch.Generator().manual_seed(hash_seed(seed, place, t))
            wide = clean.to(torch.promote_types(clean.dtype, torch.float32))  # half types round small noise levels away
            noise = torch.randn(clean.shape, generator=generator).to(wide)
            a = alphas_cumprod[t].to(wide)
            parts = (a.sqrt() * wide + (1 - a).sqrt() * noise).to(clean.dtype).split(batch)
            rows = (torch.full((len(part),), t, device=part.device) for part in parts)
            eps = [to_eps(model(x, r, prompt), x, a, prediction_type) for x, r in zip(parts, rows, strict=True)]
            per_t.append(torch.cat(eps).cpu())
        found[prompt] = torch.stack(per_t)
    return found


def divergence(
    base: Mapping[str, Tensor],
    custom: Mapping[str, Tensor],
    alphas_cumprod: Tensor,
    timesteps: Sequence[int] = TIMESTEPS,
) -> FisherDivergence:
    """The divergence of two models' `predicted_noise`, for those that cannot be had at the same time."""
    weight = 1 / (1 - alphas_cumprod[list(timesteps)].cpu().double())
    score, eps = {}, {}
    for prompt, by_base in base.items():
        moved = (by_base.double() - custom[prompt].double()).square().flatten(2).mean(2).T  # (n, t)
        score[prompt], eps[prompt] = (moved * weight).mean(1), moved.mean(1)
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


def _check(latents: Mapping[str, Tensor], alphas: Tensor, kind: str, timesteps: Sequence[int]) -> None:
    if not latents or any(len(x) == 0 for x in latents.values()):
        raise ValueError("There are no latents to compare on; give at least one prompt with at least one sample.")
    if not timesteps or not all(0 <= t < len(alphas) for t in timesteps):
        raise ValueError(f"timesteps are {tuple(timesteps)}; each must lie in the schedule's 0 to {len(alphas) - 1}.")
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"A prediction type is {kind!r}; use 'epsilon' or 'v_prediction'.")
