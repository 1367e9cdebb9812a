"""The main job from end to end, on the embedded base: photos -> concept -> pictures -> report.

Draws a subject that the base never saw in few modalities, as users' photos are, learns it with
Infusion and, for comparison, with a full fine-tune on as many samples, and draws both in scenes that
the photos do not show.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from infusion.base import load_base
from infusion.concept import Concept
from infusion.errors import InfusionError
from infusion.generation import Picture, Progress, generate, save_pictures
from infusion.judged import stacked
from infusion.lesson import Lesson, mask_overlays, prepare_lesson
from infusion.methods.dreambooth import DreamBoothConfig, dreambooth
from infusion.methods.interface import MethodState, rebuilt
from infusion.photos import load_photos
from infusion.pipelines import attach
from infusion.report.page import Grid, Page, Row, write_page
from infusion.training import LearnConfig, LearnState, learning
from infusion.world.judge import shipped_judge
from infusion.world.questions import in_words
from infusion.world.scenes import few_modalities, render
from infusion.world.subjects import Subject

# Milo: in colours that no prompt names; photographed in the meadow, in the centre.
MILO = Subject("dog", "purple", "yellow", "spotted", "none", (0.55, 0.7, 0.5, 0.35))
NAME = "milo"
PHOTOS_BACKGROUND = "meadow"
MARK = ".infusion-demo"  # in a folder that the demo may write over

PROMPTS = (
    "a photo of {} on the beach",
    "a photo of {} in the snow",
    "a photo of {} in space",
    "a photo of {} in the city",
    "a sketch of {} in the forest",
    "a sepia photo of {} in the desert",
    "a neon picture of {} in the city",
    "{} on the left in the snow",
    "{} on the right in a room",
    "{} next to a car in the desert",
    "a photo of a cat on the beach",
    "a photo of a car in the snow",
)

State = TypeVar("State", LearnState, MethodState)


@dataclass(frozen=True)
class Compared:
    """The same prompts and seeds by each method, in the order of `PROMPTS`; what each learned and the seconds it took."""

    lesson: Lesson
    concept: Concept
    alone: Concept | None
    tuned: DiffusionPipeline
    base: list[Picture]
    infusion: list[Picture]
    single: list[Picture] | None
    finetune: list[Picture]
    seconds: dict[str, float]
    concept_path: Path


def draw_photos(
    subject: Subject, folder: Path, count: int = 4, background: str = PHOTOS_BACKGROUND, seed: int = 1
) -> Path:
    """The subject's photos, all in one background, style and place, as PNGs in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(few_modalities(subject, count, seed, background)):
        Image.fromarray(render(scene).pixels).save(folder / f"{i + 1}.png")
    return folder


def compare(
    pipe: DiffusionPipeline,
    photos: Path,
    word: str,
    name: str,
    concept_path: Path,
    progress: Progress,
    prompts: Sequence[str] = PROMPTS,
    seed: int = 0,
    config: LearnConfig | None = None,
    single: bool = False,
) -> Compared:
    """Learn the subject with each method and draw the same prompts and seeds with all of them."""
    config = config or LearnConfig(seed=seed)
    seconds: dict[str, float] = {}
    lesson = prepare_lesson(pipe, load_photos(photos), word, name)

    def finished(label: str, states: Iterator[State]) -> State:
        """The last state of a training, timed and told."""
        start, state = time.monotonic(), None
        for state in states:
            progress(label, state.step, state.steps)
        seconds[label] = time.monotonic() - start
        assert state is not None
        return state

    def drawn(label: str, pipe: DiffusionPipeline, subject: str) -> list[Picture]:
        # Prompts that do not name the subject are drawn apart: other rows in a batch change a picture by kernel tolerance.
        numbers = range(len(prompts))
        pictures: dict[int, Picture] = {}
        for named in (True, False):
            part = [i for i in numbers if ("{}" in prompts[i]) == named]
            texts, seeds = [prompts[i].format(subject) for i in part], [1000 * (seed + 1) + i for i in part]
            told = label if named else f"{label}, other prompts"
            done = generate(pipe, texts, seeds, on_step=lambda a, b, told=told: progress(told, a, b))
            pictures |= dict(zip(part, done, strict=True))
        return [pictures[i] for i in numbers]

    plain, called = f"a {word}", f"a <{name}>"  # the same text for the base, so that only the residuals differ
    concept = finished(f"Learning <{name}> with Infusion", learning(pipe, lesson, word, name, config)).concept
    concept.save(concept_path)
    base = drawn("Drawing with the base model", pipe, plain)
    with attach(pipe, concept):
        infusion = drawn(f"Drawing <{name}>", pipe, called)
    singles = alone = None
    if single:
        alone_config = replace(config, two_streams=False)
        alone = finished("Learning in a single stream", learning(pipe, lesson, word, name, alone_config)).concept
        with attach(pipe, alone, two_streams=False):
            singles = drawn("Drawing in a single stream", pipe, called)
    tuning = dreambooth(pipe, lesson, DreamBoothConfig(config.steps, config.batch, seed=config.seed))
    tuned = finished("Fine-tuning a full copy, for comparison", tuning)
    copy = rebuilt(pipe, unet=tuned.adapter.unet.eval())
    finetune = drawn("Drawing with the fine-tuned copy", copy, plain)
    return Compared(lesson, concept, alone, copy, base, infusion, singles, finetune, seconds, concept_path)


def run(folder: Path, progress: Progress, config: LearnConfig | None = None) -> Path:
    """The demo: everything into `folder`; returns the path of its report.html."""
    start = time.monotonic()
    _claim(folder)
    photos = draw_photos(MILO, folder / "photos")
    pipe = load_base()
    config = config or LearnConfig()
    result = compare(pipe, photos, MILO.kind, NAME, folder / f"{NAME}.safetensors", progress, config=config)
    for label, pictures in (("base", result.base), ("infusion", result.infusion), ("finetune", result.finetune)):
        save_pictures(
            pictures, _emptied(folder / label), {"method": label, "concept": NAME if label == "infusion" else ""}
        )
    return write_page(_page(result, config, time.monotonic() - start), folder / "report.html")


def _page(result: Compared, config: LearnConfig, seconds: float) -> Page:
    samples = config.steps * config.batch
    read = _captions()
    learned, *_, tuned = result.seconds.values()  # in the order of training: Infusion first, the fine-tune last
    size = result.concept_path.stat().st_size
    return Page(
        title="Milo, learned from four pictures",
        lead=f"A small text-to-image model was shown one {MILO.kind} in one place. Below: what it can draw of it afterwards, "
        "with Infusion and with an ordinary fine-tune.",
        grids=[
            Grid(
                "The photos, and the masks used",
                f"All four show the subject in the {PHOTOS_BACKGROUND}, in the centre. The masks come from the base model's own attention "
                f'to the word "{result.lesson.word}"; nobody drew them.',
                [],
                [
                    Row("Photos", "what was learned from", list(result.lesson.pictures)),
                    Row("Masks", "what counts as the subject", mask_overlays(result.lesson)),
                ],
            ),
            Grid(
                "Same prompts, same seeds",
                "Every column is one prompt and one seed. The last two prompts do not name the subject at all. "
                "Under each picture: what the judge, a small network that knows this world, reads from it; what it is not sure of it leaves out.",
                [p.format(f"a <{NAME}>") for p in PROMPTS],
                [
                    Row(
                        "Base model",
                        f'the plain word "a {MILO.kind}": some {MILO.kind}, not Milo',
                        [p.image for p in result.base],
                        read(result.base),
                    ),
                    Row(
                        "Infusion",
                        f"{size:,} bytes, {learned:.0f} s; base untouched",
                        [p.image for p in result.infusion],
                        read(result.infusion),
                    ),
                    Row(
                        "Full fine-tune",
                        f"a whole copy of the network, {tuned:.0f} s, same {samples:,} samples",
                        [p.image for p in result.finetune],
                        read(result.finetune),
                    ),
                ],
                highlight="Infusion",
            ),
        ],
        closing=[
            "Overfitting to the photos: does the meadow, the centre or the photo style come back where the prompt asked for another? "
            "Compare each column with the base model's picture of the same seed.",
            "Forgetting: the last two columns never mention Milo. With Infusion they are the base model's pictures, bit for bit; "
            "after the fine-tune they are not.",
            "Limits: where the base model draws a poor dog, Milo is a poor dog in Milo's colours. Infusion takes places and outlines from the base model.",
        ],
        facts=[
            ("Samples seen by each method", f"{samples:,} ({config.steps} steps of {config.batch})"),
            ("Seconds to learn, Infusion", f"{learned:.1f}"),
            ("Seconds to learn, full fine-tune", f"{tuned:.1f}"),
            ("Concept file", f"{size:,} bytes, {result.concept_path.name}"),
            ("Whole run", f"{seconds:.0f} s on {torch.get_num_threads()} CPU threads, torch {torch.__version__}"),
        ],
    )


def _captions() -> Callable[[Sequence[Picture]], list[str]]:
    """What the judge reads from pictures; nothing where its weights are missing."""
    judge = shipped_judge()
    if judge is None:
        return lambda pictures: []
    return lambda pictures: [in_words(r) for r in judge.read(stacked([p.image for p in pictures]))]


def _claim(folder: Path) -> None:
    """Mark a folder as the demo's. Raises InfusionError for one that holds something else, since pictures in it would be replaced."""
    if folder.exists() and not (folder / MARK).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InfusionError(f"{str(folder)!r} is not empty; give -o a new folder, or one of an earlier demo.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def _emptied(folder: Path) -> Path:
    """The folder without the pictures of an earlier demo."""
    for old in folder.glob("*.png"):
        old.unlink()
    return folder
