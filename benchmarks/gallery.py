"""Pictures of the world and of the base: python benchmarks/gallery.py

Writes into docs/: world.png (scenes as the world draws them), base.png (64 pictures of combinations that training never saw,
by the embedded base), maps.png (the class word's attention maps beside the true masks) and autoencoder.png (fine lines through the autoencoder).
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import infusion
from infusion.generation import generate
from infusion.lesson import encode_pictures
from infusion.sheets import contact_sheet
from infusion.world.autoencoder import autoencoded
from infusion.world.captions import caption
from infusion.world.dataset import encode_caption
from infusion.world.grounding import mean_heat, recorded_maps
from infusion.world.models import pixels_to_tensor
from infusion.world.scenes import Scene, held_out, never_seen, random_scene, render
from infusion.world.truth import COLORED
from infusion.world.vocabulary import BACKGROUND_PHRASES, BACKGROUNDS, CLASSES, COLORS, STYLE_PREFIXES, STYLES


def scenes_sheet(path: Path, count: int = 48) -> None:
    """Scenes as the world draws them."""
    rng = np.random.default_rng(1)
    pictures = [Image.fromarray(render(random_scene(rng)).pixels) for _ in range(count)]
    contact_sheet([pictures[i : i + 12] for i in range(0, count, 12)], cell=96).save(path)


def unseen_prompts(count: int, seed: int = 5) -> list[str]:
    """Short prompts of combinations that training never saw, half of them photos."""
    rng = np.random.default_rng(seed)
    prompts: list[str] = []
    while len(prompts) < count:
        kind, background = str(rng.choice(CLASSES)), str(rng.choice(BACKGROUNDS))
        style = str(rng.choice(STYLES, p=(0.5, 0.125, 0.125, 0.125, 0.125)))
        color = str(rng.choice(list(COLORS))) if style in COLORED and rng.random() < 0.5 else None
        if never_seen(kind, color, background, style):
            words = f"{color} {kind}" if color else kind
            article = "an" if words[0] in "aeiou" else "a"
            prompts.append(f"{STYLE_PREFIXES[style][0]} {article} {words} {BACKGROUND_PHRASES[background][0]}")
    return prompts


def base_sheet(pipe, path: Path, count: int = 64) -> list[str]:
    """Pictures of combinations never seen in training; returns the prompts."""
    prompts = unseen_prompts(count)
    pictures = [p.image for p in generate(pipe, prompts, list(range(count)), steps=25)]
    per_row = 8
    sheets = [
        contact_sheet([pictures[i : i + per_row]], column_labels=prompts[i : i + per_row], cell=128)
        for i in range(0, count, per_row)
    ]
    labelled = Image.new("RGB", (sheets[0].width, sum(s.height for s in sheets)), "white")
    y = 0
    for sheet in sheets:
        labelled.paste(sheet, (0, y))
        y += sheet.height
    labelled.save(path)
    return prompts


@torch.no_grad()
def maps_sheet(pipe, path: Path, count: int = 12) -> None:
    """Scenes, true masks of their first subject and the class word's map at the middle timestep."""
    rng = np.random.default_rng(2_000)
    scenes = [s for s in (random_scene(rng) for _ in range(400)) if held_out(s)][:count]
    drawn = [render(s) for s in scenes]
    pictures = [Image.fromarray(d.pixels) for d in drawn]
    clean = encode_pictures(pipe, pictures)
    encoded = [encode_caption(caption(s, rng)) for s in scenes]
    ids = torch.from_numpy(np.stack([e[0] for e in encoded]).astype(np.int64))
    words = torch.from_numpy(np.stack([e[1] for e in encoded]))
    alpha = pipe.scheduler.alphas_cumprod[500]
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * torch.randn(
        clean.shape, generator=torch.Generator().manual_seed(0)
    )
    with recorded_maps(pipe.unet) as records:
        pipe.unet(noisy, 500, pipe.text_encoder(ids).last_hidden_state)
        heat = mean_heat(records, words, 16)
    rows = [pictures, [_grey(torch.from_numpy(d.masks[0])) for d in drawn], [_grey(h[0] / h[0].max()) for h in heat]]
    contact_sheet(rows, ("scene", "true mask", "word's map"), cell=96).save(path)


def coded_sheet(pipe, path: Path, count: int = 12) -> None:
    """Scenes with thin lines and small marks, sketches and patterns among them, and below each what the autoencoder makes of it."""
    rng = np.random.default_rng(3_000)
    fine = (s for _ in range(400) if fine_drawn(s := random_scene(rng)))
    drawn = torch.stack([torch.from_numpy(render(scene).pixels) for scene in islice(fine, count)])
    coded = ((autoencoded(pipe.vae, pixels_to_tensor(drawn)) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    rows = [[Image.fromarray(pixels.numpy()) for pixels in part] for part in (drawn, coded)]
    contact_sheet(rows, ("drawn", "there and back"), cell=128).save(path)


def fine_drawn(scene: Scene) -> bool:
    """Whether it is a sketch, or shows a subject with a pattern in colours."""
    return scene.style == "sketch" or (
        scene.style in COLORED and any(p.subject.pattern != "plain" for p in scene.subjects)
    )


def _grey(map_: torch.Tensor) -> Image.Image:
    return Image.fromarray((map_.clamp(0, 1) * 255).byte().numpy()).resize((64, 64), Image.Resampling.NEAREST)


def main(docs: Path = Path("docs")) -> None:
    """All sheets."""
    docs.mkdir(exist_ok=True)
    scenes_sheet(docs / "world.png")
    pipe = infusion.load_base(device="cpu")
    base_sheet(pipe, docs / "base.png")
    maps_sheet(pipe, docs / "maps.png")
    coded_sheet(pipe, docs / "autoencoder.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    main(parser.parse_args().docs)
