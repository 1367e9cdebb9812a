"""Subject fidelity, text alignment, diversity, prior preservation and copying, in any feature space.

Feature space and pictures are the caller's: CLIP or DINO (cosine), LPIPS or a judge's embedding. One sample is one
generated picture, so that intervals count pictures and not pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infusion.metrics.estimate import Estimate, bootstrap


def resemblance(generated: Tensor, photos: Tensor) -> Tensor:
    """Each picture's mean cosine with the photos of the subject: (n, d), (k, d) -> (n,) float64."""
    return cosines(generated, photos).mean(1)


def agreement(generated: Tensor, texts: Tensor) -> Tensor:
    """Each picture's cosine with its own prompt: (n, d), (n, d) -> (n,) float64. Raises ValueError where there is not one text
    per picture."""
    if generated.shape != texts.shape:
        raise ValueError(f"{len(generated)} pictures but {len(texts)} texts; give each picture its own prompt.")
    return F.cosine_similarity(generated.cpu().double(), texts.cpu().double())


def fidelity(generated: Tensor, photos: Tensor) -> Estimate:
    """Subject fidelity: mean pairwise cosine between generated pictures (n, d) and photos of the subject (k, d); CLIP-I
    and DINO of DreamBooth (arXiv 2208.12242, section 4.1)."""
    return bootstrap(resemblance(generated, photos))


def alignment(generated: Tensor, texts: Tensor) -> Estimate:
    """Text alignment: mean cosine between each picture (n, d) and its own prompt (n, d), the concept replaced by its
    class word; CLIP-T of DreamBooth. Raises ValueError where there is not one text per picture."""
    return bootstrap(agreement(generated, texts))


def preservation(generic: Tensor, photos: Tensor) -> Estimate:
    """PRES: mean pairwise cosine between generated pictures of the *class* and the subject's photos; higher is worse,
    the class has become the subject (DreamBooth, section 4.3)."""
    return fidelity(generic, photos)


def background_likeness(pictures: Tensor, photos: Tensor, outside: Tensor, mirrored: bool) -> Tensor:
    """Each picture's largest cosine with a photo outside the subject: (n, c, h, w), (k, c, h, w) -> (n,) float64. outside (h, w): where the
    photos do not show it. mirrored: the second half of the photos are the first half's mirror images, in which that lies mirrored too."""
    parts = [(photos, outside)] if not mirrored else zip(photos.chunk(2), (outside, outside.flip(-1)), strict=True)
    like = [cosines(pictures[:, :, where].flatten(1), some[:, :, where].flatten(1)) for some, where in parts]
    return torch.cat(like, 1).amax(1)


def diversity(groups: Tensor) -> Estimate:
    """DIV: mean pairwise distance (1 - cosine) among pictures of one prompt, (prompts, pictures, d); one sample is a
    prompt (DreamBooth, section 4.3, there with LPIPS). Raises ValueError for fewer than two pictures a prompt."""
    p, k = groups.shape[:2]
    if k < 2:
        raise ValueError(f"Diversity needs at least 2 pictures a prompt; there is {k}.")
    unit = F.normalize(groups.cpu().double(), dim=-1)
    total = (unit @ unit.transpose(1, 2)).sum(dim=(1, 2)) - torch.ones(p, dtype=torch.float64) * k
    return bootstrap(1 - total / (k * (k - 1)))


def spread(groups: Tensor) -> Tensor:
    """Mean pairwise Euclidean distance among the pictures of each prompt, (prompts, pictures, d) -> (prompts,) float64 on the
    CPU. Unlike the cosine it does not fall when all pictures move together, as they do when a subject is learned.
    Raises ValueError for fewer than two pictures a prompt."""
    if groups.shape[1] < 2:
        raise ValueError(f"Spread needs at least 2 pictures a prompt; there is {groups.shape[1]}.")
    return torch.stack([torch.pdist(group).mean() for group in groups.cpu().double()])


def nearest(generated: Tensor, photos: Tensor) -> tuple[Tensor, Tensor]:
    """For each generated picture (n, d) the index (n,) of the nearest photo (k, d) and their cosine (n,): what a
    viewer should see beside it to judge copying."""
    best = cosines(generated, photos).max(1)
    return best.indices, best.values


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """All pairwise cosines (n, m) in float64. Raises ValueError for other widths or an empty set."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(
            f"Sets of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared; give (n, d) and (m, d)."
        )
    return F.normalize(a.cpu().double(), dim=-1) @ F.normalize(b.cpu().double(), dim=-1).T


def centroids(masks: Tensor) -> Tensor:
    """Where soft masks (n, h, w), largest value 1, lie: (n, 2) in [0, 1], down and across. What is below half of the largest value does
    not count: faint heat everywhere would draw all of them to the centre."""
    weight = (masks - masks.amax(dim=(1, 2), keepdim=True) / 2).clamp_min(0)
    total = weight.sum(dim=(1, 2)).clamp_min(1e-12)
    down, across = (
        (torch.arange(side, device=masks.device, dtype=masks.dtype) + 0.5) / side for side in masks.shape[1:]
    )
    return torch.stack([(weight.sum(2) @ down) / total, (weight.sum(1) @ across) / total], dim=1)
