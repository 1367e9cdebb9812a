"""Five subjects never seen, each from four photos in one place: python benchmarks/subjects.py

For each: base with the plain word, base with the subject described in words (what a prompt alone can do), Infusion in two
streams, in a single stream, and a full fine-tune; twelve prompts, the same seeds. Writes contact sheets
and the page docs/subjects.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

import infusion
from infusion.demo import PROMPTS, Compared, compare, draw_photos, mask_overlays
from infusion.diagnosis import layer_maps, validation_loss
from infusion.generation import generate
from infusion.lesson import Lesson, prepare_lesson
from infusion.photos import Photo
from infusion.sheets import contact_sheet
from infusion.world.scenes import Placed, Scene, few_modalities, held_out, render
from infusion.world.subjects import Subject

# name, subject, background of the photos
SUBJECTS = (
    ("milo", Subject("dog", "purple", "yellow", "spotted", "none", (0.55, 0.7, 0.5, 0.35)), "meadow"),
    ("tuna", Subject("fish", "orange", "blue", "striped", "hat", (0.9, 0.8, 0.6, 0.4)), "beach"),
    ("beetle", Subject("car", "green", "pink", "checkered", "none", (0.8, 0.6, 0.9, 0.3)), "city"),
    ("bolt", Subject("robot", "red", "white", "striped", "star", (0.7, 0.9, 0.5, 0.8)), "room"),
    ("brew", Subject("mug", "blue", "orange", "spotted", "scarf", (0.8, 0.3, 0.9, 0.2)), "snow"),
)


def described(subject: Subject) -> str:
    """The subject in the words that the base knows."""
    accessory = {"none": "", "hat": " with a hat", "scarf": " with a scarf", "star": " with a star"}[subject.accessory]
    return f"a {subject.pattern} {subject.color1} and {subject.color2} {subject.kind}{accessory}"


def run(folder: Path, name: str, subject: Subject, background: str, work: Path) -> dict:
    """Learn and draw one subject; its contact sheet goes to `folder`. Returns its figures."""
    pipe = infusion.load_base(device="cpu")
    photos = draw_photos(subject, work / name / "photos", background=background)
    result = compare(pipe, photos, subject.kind, name, work / name / f"{name}.safetensors", _quiet, single=True)
    in_words = generate(pipe, [p.format(described(subject)) for p in PROMPTS], [p.seed for p in result.base])
    rows = {
        "base": result.base,
        "base, described": in_words,
        "Infusion": result.infusion,
        "single stream": result.single or [],
        "full fine-tune": result.finetune,
    }
    sheet = contact_sheet(
        [[p.image for p in row] for row in rows.values()],
        list(rows),
        [p.format(f"a <{name}>") for p in PROMPTS],
        cell=96,
    )
    sheet.save(folder / f"{name}.png")
    photos_sheet = contact_sheet(
        [list(result.lesson.pictures), mask_overlays(result.lesson)], ("photos", "masks"), cell=96
    )
    photos_sheet.save(folder / f"{name}-photos.png")
    write_maps(layer_maps(pipe, result.lesson), result.lesson, folder / f"{name}-maps.png")
    return {
        "seconds": {k: round(v, 1) for k, v in result.seconds.items()},
        "threads": torch.get_num_threads(),
        "held_out": held_out(Scene((Placed(subject, 0.5),), background)),
        "norms": {p: round(float(r.norm()), 2) for p, r in result.concept.residuals.items()},
        "losses": losses(pipe, result, subject, background),
    }


def losses(pipe: StableDiffusionPipeline, result: Compared, subject: Subject, background: str) -> dict:
    """Validation loss inside the true masks, mean over timesteps, of each method: on the photos learned from, on fresh
    ones of the same place, and on fresh ones of other places."""
    elsewhere = [b for b in ("beach", "snow", "forest", "desert", "space", "meadow") if b != background][:4]
    places = ("left", "right", "center", "left")
    scenes = {
        "photos": few_modalities(subject, 4, seed=1, background=background),  # as draw_photos drew them
        "same place": few_modalities(subject, 4, seed=77, background=background),
        "other places": [
            few_modalities(subject, 1, seed=78 + i, background=b, position=p)[0]
            for i, (b, p) in enumerate(zip(elsewhere, places, strict=True))
        ],
    }
    lessons = {}
    for label, drawn in scenes.items():
        photos = [_with_mask(scene) for scene in drawn]
        lessons[label] = prepare_lesson(pipe, photos, subject.kind, result.lesson.name, flip=False)
    mean = lambda by_timestep: round(sum(by_timestep.values()) / len(by_timestep), 4)  # noqa: E731
    assert result.alone is not None
    return {
        label: {
            "base": mean(validation_loss(pipe, lesson)),
            "Infusion": mean(
                validation_loss(pipe, lesson, result.concept.residuals, True, result.concept.max_timestep)
            ),
            "single stream": mean(
                validation_loss(pipe, lesson, result.alone.residuals, False, result.alone.max_timestep)
            ),
            "full fine-tune": mean(validation_loss(result.tuned, lesson)),
        }
        for label, lesson in lessons.items()
    }


def write_maps(maps: dict[str, Tensor], lesson: Lesson, path: Path) -> None:
    """The first two photos, and each layer's map of the class word on them (white: the layer's largest value)."""
    labels = ["photo", *(f"{short(p)}, {m.shape[-1]}x{m.shape[-1]}, max {float(m.max()):.2f}" for p, m in maps.items())]
    rows = []
    for i in range(2):
        grey = [Image.fromarray((m[i] / m[i].max() * 255).byte().cpu().numpy()) for m in maps.values()]
        rows.append([lesson.pictures[i], *(g.resize((96, 96), Image.Resampling.NEAREST) for g in grey)])
    contact_sheet(rows, (), labels, cell=96).save(path)


def short(layer: str) -> str:
    """down_blocks.0.attentions.0.transformer_blocks.0.attn2 -> down 0.0"""
    parts = layer.split(".")
    return "mid" if parts[0] == "mid_block" else f"{parts[0].split('_')[0]} {parts[1]}.{parts[3]}"


def _with_mask(scene: Scene) -> Photo:
    drawn = render(scene)
    return Photo(Image.fromarray(drawn.pixels), Image.fromarray((drawn.masks[0] * 255).astype("uint8")))


def main(docs: Path = Path("docs"), work: Path = Path("outputs/subjects"), only: str | None = None) -> None:
    """All subjects, or the one named."""
    folder = docs / "subjects"
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    for name, subject, background in SUBJECTS:
        if only in (None, name):
            figures[name] = run(folder, name, subject, background, work)
            print(name, figures[name]["seconds"], flush=True)
    if only is None:
        (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_page(docs)


# What was seen in the sheets, in plain words; look at them again whenever they are drawn anew.
READING = """
What is said here is of Infusion at all timesteps at a rate of 0.02, as published: it was seen before concepts were limited to the timesteps where layouts are settled ([why](idea.md)).

**What carries over.** Colours, in patches of about the right size, into every background, mostly in the place that the base drew (not Milo on the beach and in space, Bolt on the beach, Beetle on the beach, in space and in the sketch, Tuna in sepia): Milo's purple and yellow, Tuna's blue and orange stripes, Bolt's red and white body with a white head, Brew's blue with orange and red where its scarf is. The composition
stays the base's: horizon, skyline and window hardly move. The cat and the car of the last two columns are the base's pictures, bit for bit.

**What does not.** Beetle's green and pink checks come as white, pink and dark: its colours are lost. Dots become stripes and patches; faces, Bolt's star and Brew's handle do not come. Residuals learned on photos tint sketches and sepia (Milo, Bolt, a little Brew). Milo on the beach, Beetle in the snow and Brew in the desert come out wider than what the base drew there. Next to a car, Beetle's
colours go into both.

**Single stream**: the same colours, but often in the centre, where the photos had the subject and the base has it at the side: Milo in the snow, the city, the sketch and neon, Bolt in the snow, the sketch and neon, Tuna and Brew on the beach, Brew in the sketch. Infusion stays at the side in all of these.

**The full fine-tune** has the sharpest subjects on the right background, and overfits in plain sight: subjects are pulled to the centre, suns, trees and skylines change or go, Beetle is everywhere the photos' car, and the cat and the car that nobody mentioned take the subject's colours and shape (a purple and yellow cat after Milo, a robot for a cat after Bolt, a cup for one after Brew, a pink car after Milo).

**In words** (second row) the base now comes nearer than Infusion to Beetle (green and pink) and to Tuna with its hat, and about as near to the others.

**The losses** below: on fresh photos in other places Infusion's is below the base's for all five, as the single stream's; the full fine-tune's is above the base's for two of the five, though on the photos themselves it is lowest by far.
"""


def write_page(docs: Path) -> Path:
    """docs/subjects.md from the sheets and figures in docs/subjects."""
    figures = json.loads((docs / "subjects" / "figures.json").read_text())
    parts = [
        "# Five subjects, each from four photos in one place",
        "None of these individuals occurs in the base's training. Every column is one prompt and one seed, the same for all rows; the last two "
        "prompts do not name the subject. 200 steps of 8 samples for every method. `python benchmarks/subjects.py` makes this page.",
        READING.strip(),
    ]
    for name, subject, background in SUBJECTS:
        seconds = ", ".join(f"{label.lower()} {value:.0f} s" for label, value in figures[name]["seconds"].items())
        parts += [
            f"## <{name}>, {described(subject)}; photos {background}",
            f"![photos and masks](subjects/{name}-photos.png)",
            f"![sheet](subjects/{name}.png)",
            f"Seconds with {figures[name]['threads']} CPU thread{'s'[: figures[name]['threads'] - 1]}: {seconds}.",
            "Maps of the class word on two of the photos, layer by layer, as the base sees them:",
            f"![maps](subjects/{name}-maps.png)",
        ]
    methods = list(next(iter(figures.values()))["losses"]["photos"])
    parts += [
        "## Loss on fixed validation draws",
        "The training loss inside the true masks at timesteps 100, 300, 500, 700 and 900 with fixed noise, mean. On the photos learned from; on fresh photos of the same place; on "
        "fresh photos in four other places. The base's own loss is the measure: what falls on the photos alone is repeating, what falls elsewhere too is learning.",
        "\n".join(
            ["| subject | pictures | " + " | ".join(methods) + " |", "|---" * (len(methods) + 2) + "|"]
            + [
                f"| {name} | {label} | " + " | ".join(f"{row[m]:.3f}" for m in methods) + " |"
                for name in figures
                for label, row in figures[name]["losses"].items()
            ]
        ),
    ]
    norms = {name: figures[name]["norms"] for name, *_ in SUBJECTS}
    layers = list(next(iter(norms.values())))
    parts += [
        "## Norms of the residuals per layer",
        "\n".join(
            ["| layer | " + " | ".join(norms) + " |", "|---" * (len(norms) + 1) + "|"]
            + [f"| `{layer}` | " + " | ".join(f"{n[layer]:.1f}" for n in norms.values()) + " |" for layer in layers]
        ),
    ]
    page = docs / "subjects.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


def _quiet(label: str, done: int, of: int) -> None:
    del label, done, of


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--work", type=Path, default=Path("outputs/subjects"))
    parser.add_argument("--only", help="name of one subject")
    options = parser.parse_args()
    main(options.docs, options.work, options.only)
