"""Run one job: learn the subject, draw its prompts at every point, let the judge read, measure what was forgotten."""

from __future__ import annotations

import base64
import ctypes
import io
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

import infusion
from infusion.base import load_base
from infusion.bench.grid import Job
from infusion.bench.subjects import Case, case, requests
from infusion.errors import InfusionError
from infusion.evaluation import forgetting, predictions
from infusion.generation import generate
from infusion.judged import likeness, photo_embedding, stacked
from infusion.lesson import Lesson, encode_pictures, prepare_lesson
from infusion.methods import METHODS
from infusion.methods.dreambooth import prior_lesson
from infusion.methods.infusion import ConceptAdapter
from infusion.methods.interface import Adapter, MethodState, stored_bytes
from infusion.metrics.similarity import spread
from infusion.metrics.wasserstein import empirical_w2, principal
from infusion.world.captions import caption
from infusion.world.judge import Judge, judge_digest, load_judge
from infusion.world.questions import shown
from infusion.world.release import read_index
from infusion.world.requests import Request
from infusion.world.scenes import random_scene
from infusion.world.vocabulary import BACKGROUND_PHRASES, BACKGROUNDS

PICTURES_SEED = 5_000
LIBRARIES = ("torch", "diffusers", "transformers", "peft")
STRIPS = 2  # subjects whose pictures are kept in the record, one of each prompt
READING = 2  # one more whenever the same pictures would be read or measured differently: such records are not mixed
OTHERS = ("cat", "car", "house", "bird", "mug")  # prompts that name neither the subject nor its class


@dataclass(frozen=True)
class Words:
    """Nothing learned: the base under a description."""

    subject: str

    def tensors(self) -> Mapping[str, Tensor]:
        """None."""
        return {}

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """The pipeline itself."""
        yield pipe


def run_job(job: Job, threads: int = 1) -> dict[str, Any]:
    """The job's record: its settings, versions, and for each point, a step drawn at one of the strengths, what every picture shows and what
    was measured."""
    torch.set_num_threads(threads)
    forget_peak()
    start = time.monotonic()
    pipe, judge = _base(), load_judge()
    chosen = case(job.split, job.subjects_seed, job.subject, **job.modality)
    if chosen.facing and judge.facing is None:
        raise InfusionError(
            "The judge's head for the facing is missing or another judge's; train it with infusion.world.facing_training."
        )
    lesson = prepare_lesson(
        pipe,
        chosen.photos(),
        chosen.subject.kind,
        "subject",
        # a mirror image stands at another place, and faces the other way
        flip=job.settings.get("flip", True) and chosen.position == "center" and chosen.facing is None,
        masked=job.settings.get("masked", True),
    )
    asked, truth = requests(chosen, job.split), photo_embedding(judge.read(stacked(lesson.pictures)))
    points, settings, learning, last = [], None, 0.0, time.monotonic()
    for state in states(job, pipe, lesson, chosen):
        learning += time.monotonic() - last
        for strength in job.strengths if state.step in job.points or state.steps == 0 else ():
            adapter = state.adapter if strength == 1 else replace(state.adapter, strength=strength)
            points.append(
                {
                    "step": state.step,
                    "strength": strength,
                    "samples": state.step * job.batch,
                    "seconds": round(learning, 2),
                    "loss": state.loss,
                    "bytes": stored_bytes(adapter),
                    **measure(pipe, judge, adapter, job, lesson, asked, truth, state.step),
                }
            )
        settings, last = _concept_settings(state.adapter), time.monotonic()
    return {
        "job": asdict(job),
        "subject": asdict(chosen.subject),
        "trained": chosen.trained,
        "requests": [asdict(r) for r in asked],
        "points": points,
        "seconds": round(time.monotonic() - start, 1),
        "threads": threads,
        "peak_bytes": peak_memory(),
        "concept_settings": settings,
        "versions": {
            "infusion": infusion.__version__,
            "commit": _commit(),
            "python": platform.python_version(),
            **{library: version(library) for library in LIBRARIES if find_spec(library)},
            "machine": platform.machine(),
        },
        "base": read_index()["sha256"],
        "judge": judge_digest(),
        "reading": READING,
    }


def states(job: Job, pipe: DiffusionPipeline, lesson: Lesson, chosen: Case) -> Iterator[MethodState]:
    """The method's states; a single one without steps where nothing is learned."""
    if job.method == "class-word":
        yield MethodState(0, 0, 0.0, Words(f"a {lesson.word}"))
    elif job.method == "described":
        yield MethodState(0, 0, 0.0, Words(chosen.described()))
    else:
        learn, config = METHODS[job.method]
        extra: dict[str, Any] = dict(job.settings)
        own = {f.name: extra.pop(f.name) for f in fields(config) if f.name in extra}
        settings = config(**own, steps=job.points[-1], batch=job.batch, seed=job.seed)
        if job.prior:
            extra["prior"] = prior_lesson(pipe, lesson, job.prior, job.denoising_steps)
        if job.method == "perfusion":
            extra["corpus"] = _corpus()
        yield from learn(pipe, lesson, settings, **extra)


def measure(
    pipe: DiffusionPipeline,
    judge: Judge,
    adapter: Adapter,
    job: Job,
    lesson: Lesson,
    asked: list[Request],
    truth: Tensor | None,
    step: int,
) -> dict[str, Any]:
    """Readings of every picture with how far it is from the photos, and the divergences of the adapter as it is now.
    truth: the subject's embedding by its photos."""
    texts = [r.prompt.format(adapter.subject) for r in asked for _ in range(job.pictures)]
    seeds = [PICTURES_SEED + i for i in range(len(texts))]
    word = lesson.word
    plain = [f"a photo of a {word} {_where(b)}" for b in BACKGROUNDS]
    with adapter.attached(pipe) as custom:
        drawn = _drawn(custom, texts, seeds, job.denoising_steps)
        of_class = _drawn(custom, plain, [PICTURES_SEED + i for i in range(len(plain))], job.denoising_steps)
    base = _base_pictures(tuple(r.prompt.format(f"a {word}") for r in asked), job.pictures, job.denoising_steps)
    photos = torch.stack([_pixels(p) for p in lesson.pictures])
    readings = [
        shown(reading)
        | {"like_subject": round(likeness(reading, truth), 4), "to_nearest_photo": to_nearest(picture, photos)}
        for reading, picture in zip(judge.read(stacked(drawn)), drawn, strict=True)
    ]
    groups, by_base = _groups(word, job.denoising_steps), _by_base(word, job.denoising_steps, job.seed)
    other, generic = forgetting(pipe, adapter, groups, job.seed, by_base)
    latents = [encode_pictures(pipe, part).cpu().double().flatten(1) for part in (drawn, base)]
    return {
        "strip": strip(drawn[:: job.pictures]) if job.subject < STRIPS and step in (0, job.points[-1]) else None,
        "readings": readings,
        "prior_likeness": [round(likeness(reading, truth), 4) for reading in judge.read(stacked(of_class))],
        "forgetting": other.eps.value,
        "forgetting_score": other.score.value,
        "forgetting_class_word": generic.eps.value,
        "w2": empirical_w2(*principal(*latents, dimensions=16)),
        "variety": _variety(latents, job.pictures),
    }


def strip(pictures: Sequence[Image.Image]) -> str:
    """The pictures side by side as a JPEG in base64."""
    side = pictures[0].width
    sheet = Image.new("RGB", (side * len(pictures), side))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (side * i, 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=92)
    return base64.b64encode(buffer.getvalue()).decode()


def to_nearest(picture: Image.Image, photos: Tensor) -> float:
    """Root mean square distance of pixels, in [0, 1], to the nearest photo or its mirror image; photos (n, h, w, 3)."""
    both = torch.cat([photos, photos.flip(2)])
    return round(float((_pixels(picture) - both).square().flatten(1).mean(1).sqrt().min()), 4)


def _concept_settings(adapter: Any) -> dict[str, Any] | None:
    """What a concept was learned by, the defaults that depend on the lesson among it; None for other methods, whose defaults depend on nothing."""
    return dict(adapter.concept.settings) if isinstance(adapter, ConceptAdapter) else None


def peak_memory() -> int | None:
    """The most memory that this process has held since `forget_peak`, in bytes; None where that cannot be told, which is everywhere but on Linux."""
    try:
        said = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in said.splitlines() if line.startswith("VmHWM:")), None)


def forget_peak() -> None:
    """Begin this process's peak of memory anew, so that it is a job's own and not that of all its worker's. What malloc kept of what was freed
    goes back first: with the Makefile's settings it keeps all."""
    with suppress(OSError, AttributeError, TypeError):  # not every C library has it, and Windows finds none by None
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@cache
def _commit() -> str | None:
    """The source's commit, "+" where files differ from it; None where git is not there or does not keep this file: another project's
    checkout may lie around an installed package."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False).stdout.strip()

    try:
        kept = git("ls-files", Path(__file__).name)
        return git("describe", "--always", "--dirty=+", "--abbrev=12") or None if kept else None
    except OSError:
        return None


@cache
def _base() -> DiffusionPipeline:
    return load_base(device="cpu")


@cache
def _base_pictures(prompts: tuple[str, ...], pictures: int, steps: int) -> list[Image.Image]:
    texts = [p for p in prompts for _ in range(pictures)]
    return _drawn(_base(), texts, [PICTURES_SEED + i for i in range(len(texts))], steps)


@cache
def _corpus(count: int = 2000) -> tuple[str, ...]:
    rng = np.random.default_rng(4)
    return tuple(caption(random_scene(rng), rng).text for _ in range(count))


@cache
def _groups(word: str, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Latents that the base drew, by prompt: of other classes, and of the class itself."""

    def drawn(prompt: str, place: int) -> Tensor:
        seeds = [PICTURES_SEED + 4 * place + i for i in range(4)]
        return encode_pictures(_base(), _drawn(_base(), [prompt] * 4, seeds, steps))

    others = [kind for kind in OTHERS if kind != word][:4]
    prompts = [f"a photo of a {k} {_where(b)}" for k, b in zip(others, BACKGROUNDS[::2], strict=True)]
    own = f"a photo of a {word} {_where('city')}"
    return {p: drawn(p, i) for i, p in enumerate(prompts)}, {own: drawn(own, len(prompts))}


@cache
def _by_base(word: str, steps: int, seed: int) -> list[dict[str, Tensor]]:
    return predictions(_base(), _groups(word, steps), seed)


def _variety(latents: Sequence[Tensor], pictures: int) -> float | None:
    """Mean distance among pictures (n, d) of one prompt, `pictures` in a row, as a share of the base's; latents: ours and the base's."""
    if pictures < 2:
        return None
    ours, base = (float(spread(part.unflatten(0, (-1, pictures))).mean()) for part in latents)
    return ours / base


def _where(background: str) -> str:
    return BACKGROUND_PHRASES[background][0]


def _drawn(pipe: DiffusionPipeline, texts: list[str], seeds: list[int], steps: int) -> list[Image.Image]:
    return [p.image for p in generate(pipe, texts, seeds, steps)]


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)
