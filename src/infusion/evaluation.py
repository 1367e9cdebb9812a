"""Measure any customization against its base: does it forget, does it repeat its photos, does it still vary?

    evaluation = evaluate(pipe, load_adapter("milo.safetensors", "dog"), load_photos("photos/milo"), "dog")

Base and adapter draw the same prompts with the same seeds. Features are the autoencoder's latents, centred on the
base's pictures, so that no weights beside the base's own are needed; CLIP and DINO come in where their weights are given, the judge on the
embedded base; what is left out is named.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor

import infusion
from infusion.album import kept
from infusion.config import check_prompts, hold_types
from infusion.errors import InfusionError
from infusion.features import FeatureFigures, Features, Lpips, LpipsFigures, feature_figures, left_out, lpips_figures
from infusion.generation import Picture, Progress, default_batch, denoiser, drawing, of_each
from infusion.judged import JudgedFigures, judged_figures
from infusion.lesson import Lesson, encode_pictures, prepare_lesson
from infusion.methods.infusion import ConceptAdapter
from infusion.methods.interface import Adapter, rebuilt
from infusion.metrics.estimate import Estimate, bootstrap, jackknife, paired
from infusion.metrics.fisher import FisherDivergence, divergence, predicted_noise
from infusion.metrics.moments import Moments
from infusion.metrics.similarity import background_likeness, nearest, spread
from infusion.metrics.wasserstein import GaussianW2, empirical_w2, gaussian_w2, principal
from infusion.photos import Photo
from infusion.schedulers import multistep
from infusion.streams import execution_device, require_unet
from infusion.world.judge import Judge
from infusion.world.tokenizer import class_words

PROMPTS = (
    "a photo of {} on the beach",
    "a photo of {} in the snow",
    "a photo of {} in the city",
    "a photo of {} in the forest",
    "a photo of {} in a room",
    "a sketch of {} in the desert",
    "a sepia photo of {} in the meadow",
    "a photo of {} next to a car",
    "{} on the left in space",
    "{} on the right in the meadow",
)
OTHERS = (
    "a photo of a cat on the beach",
    "a photo of a car in the snow",
    "a house in the forest",
    "a sketch of a bird",
)


@dataclass(frozen=True)
class EvaluateConfig:
    """`seeds` pictures for each of `prompts`, by the base and by the adapter; a multistep solver needs few `steps`.
    others: prompts for what is forgotten; those that hold the subject's class word are left out. batch: pictures drawn at a time,
    by default as many as suit the base's size."""

    prompts: tuple[str, ...] = PROMPTS
    others: tuple[str, ...] = OTHERS
    seeds: int = 10
    other_seeds: int = 4
    steps: int = 20
    guidance_scale: float = 6.0
    seed: int = 0
    dimensions: int = 32
    batch: int | None = None

    def __post_init__(self) -> None:
        hold_types(self)
        for name in ("seeds", "other_seeds", "dimensions"):
            if getattr(self, name) < 2:
                raise InfusionError(
                    f"{name} is {getattr(self, name)}; it must be at least 2, or nothing can be said of variety."
                )
        if len(set(self.prompts)) < 2 or len(set(self.others)) < len(self.others) or not self.others:
            raise InfusionError("prompts must hold at least two, and others at least one, none of these twice.")
        check_prompts(self.prompts)


@dataclass(frozen=True)
class Figures:
    """What was measured, each with its interval. Similarities are cosines of centred latents; `above` is the paired
    difference to the base's pictures of the same prompts and seeds.

    forgetting: latent Fisher divergence on prompts that name neither the subject nor its class; generic: on a prompt of the class
    word alone; only methods that preserve a prior stay near 0. w2_mean, w2_covariance, w2_exact: squared distance (W2^2) to the base's pictures of the class in
    the principal components of both, Gaussian in its two terms and by optimal transport. background: similarity to the photos outside
    the subject, None where the photos show no background. nearest_photo: of the whole picture, the subject
    included. variety: mean Euclidean distance among pictures of one prompt. features: by feature space, and lpips, where weights were
    given. judged: on the embedded base.
    """

    forgetting: FisherDivergence
    generic: FisherDivergence
    w2_mean: Estimate
    w2_covariance: Estimate
    w2_exact: Estimate
    background: Estimate | None
    background_above: Estimate | None
    nearest_photo: Estimate
    nearest_photo_above: Estimate
    variety: Estimate
    variety_base: Estimate
    variety_above: Estimate
    pictures: int
    features: dict[str, FeatureFigures] = field(default_factory=dict)
    judged: JudgedFigures | None = None
    lpips: LpipsFigures | None = None


@dataclass(frozen=True)
class Evaluation:
    """Figures, a verdict in sentences, and the pictures behind them: by prompt, first seed first. seconds: where the time went, by stage.
    made_by: class word, scheduler, precision, versions and the like."""

    subject: str
    figures: Figures
    verdict: tuple[str, ...]
    base: list[Picture]
    custom: list[Picture]
    nearest: list[int]
    lesson: Lesson
    config: EvaluateConfig
    left_out: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    made_by: dict[str, str] = field(default_factory=dict)


def evaluate(
    pipe: DiffusionPipeline,
    adapter: Adapter,
    photos: Sequence[Photo],
    word: str,
    config: EvaluateConfig | None = None,
    progress: Progress | None = None,
    spaces: Sequence[Features] = (),
    judge: Judge | None = None,
    album: Path | None = None,
    lpips: Lpips | None = None,
    drawings: Path | None = None,
) -> Evaluation:
    """Measure `adapter` on its base `pipe` against the photos it was learned from. Leaves nothing on the pipeline.

    spaces: feature spaces beside the autoencoder's latents. judge: for the embedded base alone. album: a folder in which the base's own
    pictures are kept for the next evaluation of that class (`album.kept`). lpips: to measure by LPIPS too. drawings: the same for the pictures of an
    adapter that `load_adapter` loaded, so that an evaluation that was interrupted goes on.

    Raises InfusionError for an adapter of another base.
    """
    config, told = config or EvaluateConfig(), progress or (lambda *_: None)
    pipe = rebuilt(pipe, scheduler=multistep(pipe))
    texts, seeds = of_each(config.prompts, config.seeds, config.seed)
    others = unrelated(config.others, word)
    if not others:
        raise InfusionError(
            f"All of others name the class {word!r}; give prompts of other things, to see what is forgotten."
        )
    seconds: dict[str, float] = {}
    with _timed(seconds, "photos"):  # before any drawing, since one may be refused
        lesson = prepare_lesson(pipe, photos, word, "subject")

    def drawn(label: str, pipe: DiffusionPipeline, prompts: list[str], seeds: list[int]) -> Iterator[list[Picture]]:
        on_step = lambda a, b: told(label, a, b)  # noqa: E731
        return drawing(pipe, prompts, seeds, config.steps, config.guidance_scale, config.batch, on_step=on_step)

    def by_adapter(label: str, prompts: list[str], seeds: list[int]) -> list[Picture]:
        with adapter.attached(pipe) as custom:  # its pipeline, which may be a whole other base, is let go of here
            concept = {"concept": adapter.digest} if isinstance(adapter, ConceptAdapter) else {}
            return kept(drawings, custom, prompts, seeds, settings | concept, partial(drawn, label, custom))

    def by_base(label: str, prompts: list[str], seeds: list[int]) -> list[Picture]:
        return kept(album, pipe, prompts, seeds, settings, partial(drawn, label, pipe))

    settings = {name: getattr(config, name) for name in ("steps", "guidance_scale")}
    with _timed(seconds, "the adapter's pictures"):  # first: one of another base is refused before any work
        ours = by_adapter("Drawing with the adapter", [t.replace("{}", adapter.subject) for t in texts], seeds)
    plain = [t.replace("{}", f"a {word}") for t in texts]
    generic = f"a photo of a {word} in the city"
    other_texts = [p for p in (*others, generic) for _ in range(config.other_seeds)]
    with _timed(seconds, "the base's pictures"):
        base = by_base("Drawing with the base", plain, seeds)
        other_seeds = [config.seed + i for i in range(len(other_texts))]
        other = by_base("Drawing other prompts with the base", other_texts, other_seeds)
    with _timed(seconds, "the class word's pictures"):
        of_class = other[-config.other_seeds :] if spaces or judge else []
        asked = [p.prompt for p in of_class], [p.seed for p in of_class]
        again = by_adapter("Drawing the class", *asked) if of_class else []
        classes = [p.image for p in again], [p.image for p in of_class]
    told("Measuring", 0, 1)
    with _timed(seconds, "latents"):
        parts = encode_pictures(pipe, [p.image for p in other]).split(config.other_seeds)
        latents = dict(zip((*others, generic), parts, strict=True))
    with _timed(seconds, "forgetting"):
        groups = [{o: latents[o] for o in others}, {generic: latents[generic]}]
        forgotten = forgetting(pipe, adapter, groups, config.seed, batch=config.batch or default_batch(pipe))
    with _timed(seconds, "figures in latents"):
        figures, nearest_photos = _figures(pipe, lesson, base, ours, forgotten, config)
    pictures = [p.image for p in ours], [p.image for p in base], list(lesson.pictures)
    features = {}
    for space in spaces:
        with _timed(seconds, f"figures in {space.name}"):
            features[space.name] = feature_figures(space, *pictures, plain, classes, config.seeds)
    figures = replace(figures, features=features)
    if lpips:
        with _timed(seconds, "figures by LPIPS"):
            both = [*lesson.pictures, *map(ImageOps.mirror, lesson.pictures)]
            figures = replace(figures, lpips=lpips_figures(lpips, *pictures[:2], both, config.seeds))
    if judge:
        with _timed(seconds, "the judge"):
            kind = class_words().get(word.lower())
            figures = replace(figures, judged=judged_figures(judge, *pictures, plain, classes, config.seeds, kind))
    return Evaluation(
        adapter.subject,
        figures,
        verdict(figures),
        base,
        ours,
        nearest_photos,
        lesson,
        config,
        left_out(spaces, lpips),
        seconds,
        _made_by(pipe, word),
    )


def _made_by(pipe: DiffusionPipeline, word: str) -> dict[str, str]:
    """What a figure depends on beside base, adapter and settings, by name."""
    return {
        "class word": word,
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "precision": str(require_unet(pipe).dtype).removeprefix("torch."),
        "device": execution_device(pipe).type,
        "infusion": str(infusion.__version__),
        **{library: version(library) for library in ("torch", "diffusers", "transformers")},
    }


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add what the block takes to its stage's seconds."""
    start = time.monotonic()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - start


def verdict(f: Figures) -> tuple[str, ...]:
    """The figures in words, one sentence each."""
    lfd = f.forgetting.eps.value
    if lfd == 0:
        forgets = "It forgets nothing: on prompts that do not name it, every prediction is the base model's own."
    elif lfd < 1e-3:
        forgets = f"It hardly touches other prompts: predictions move by {lfd:.2%} of the noise's variance."
    else:
        forgets = f"It forgets: on prompts that do not name it, predictions move by {lfd:.2%} of the noise's variance."
    said = [forgets]
    if f.background is None or f.background_above is None:
        said.append("Whether it repeats its background cannot be told: the photos show the subject everywhere.")
    elif f.background_above.low > 0.02:
        said.append(
            f"It repeats its background: on the same prompts, similarity to the photos' is {f.background_above.value:+.3f} above the base's."
        )
    elif f.background_above.high <= 0.02:
        said.append(
            f"It keeps to the backgrounds it is asked for: similarity to the photos' background is {f.background_above.value:+.3f} beside the base's."
        )
    else:
        said.append(_untold("it repeats its background", f.background_above, 1, f.pictures))
    if f.judged:
        said += [
            f"By the judge the photos' {name} comes back where {prompt}: in {found.custom.value:.0%} of {found.custom.n} such pictures, in {found.base.value:.0%} of the base's "
            f"({100 * found.above.low:.0f} to {100 * found.above.high:.0f} points more)."
            for prompt, each in (("another was asked for", f.judged.leaks), ("that was left open", f.judged.pulls))
            for name, found in each.items()
            if found.above.low > 0
        ]
    scale = f.variety_base.value or 1.0
    loss = f.variety_above.value / scale
    if f.variety_above.high < 0 and loss < -0.05:
        said.append(f"Its pictures of one prompt vary less than the base's ({loss:+.0%}).")
    elif f.variety_above.low / scale > 0.05:
        said.append(f"Its pictures of one prompt vary more than the base's ({loss:+.0%}).")
    elif f.variety_above.low / scale >= -0.05:
        said.append(f"Its pictures of one prompt vary as the base's do ({loss:+.0%}).")
    else:
        said.append(_untold("its pictures of one prompt vary less than the base's", f.variety_above, scale, f.pictures))
    return tuple(said)


def _untold(what: str, found: Estimate, scale: float, pictures: int) -> str:
    low, value, high = (f"{x / scale:+.2g}" for x in (found.low, found.value, found.high))
    return f"Whether {what} cannot be told from {pictures} pictures ({value}, between {low} and {high}); draw more with --seeds."


def forgetting(
    pipe: DiffusionPipeline,
    adapter: Adapter,
    groups: Sequence[Mapping[str, Tensor]],
    seed: int,
    by_base: Sequence[Mapping[str, Tensor]] | None = None,
    batch: int = 16,
) -> list[FisherDivergence]:
    """Latent Fisher divergence between base and adapter, one for each group of prompts with their latents. by_base: `predictions` of the base
    for the same groups and seed; without it the base predicts here, first, since an adapter may change the very UNet it is attached to. batch:
    latents at a time."""
    by_base = by_base or predictions(pipe, groups, seed, batch)
    with adapter.attached(pipe) as custom:
        by_custom = predictions(custom, groups, seed, batch)
    return [divergence(a, b, pipe.scheduler.alphas_cumprod) for a, b in zip(by_base, by_custom, strict=True)]


def predictions(
    pipe: DiffusionPipeline, groups: Sequence[Mapping[str, Tensor]], seed: int, batch: int = 16
) -> list[dict[str, Tensor]]:
    """What a pipeline predicts of noised latents, as noise (`predicted_noise`), one for each group of prompts with their latents."""
    kind, alphas = pipe.scheduler.config["prediction_type"], pipe.scheduler.alphas_cumprod
    return [predicted_noise(denoiser(pipe), latents, alphas, kind, seed=seed, batch=batch) for latents in groups]


def unrelated(prompts: Sequence[str], word: str) -> list[str]:
    """The prompts that do not name `word`, nor, of the world's classes, another word for the same."""
    classes = class_words()
    same = {w for w, kind in classes.items() if kind == classes.get(word.lower())} | {word.lower()}
    return [p for p in prompts if not any(re.search(rf"\b{re.escape(w)}s?\b", p.lower()) for w in same)]


def _figures(
    pipe: DiffusionPipeline, lesson: Lesson, base: list[Picture], custom: list[Picture], forgotten: list[FisherDivergence],
    config: EvaluateConfig,
) -> tuple[Figures, list[int]]:  # fmt: skip
    latents = [_encoded(pipe, [p.image for p in pictures]) for pictures in (base, custom)]
    centre = latents[0].mean(0, keepdim=True)
    photos = lesson.latents.cpu().double() - centre  # and their mirror images: those of a repeated photo repeat it too
    b, c = (x - centre for x in latents)
    small = principal(b.flatten(1), c.flatten(1), dimensions=config.dimensions)

    def gaussian(kept: Tensor) -> GaussianW2:
        return gaussian_w2(Moments.of(small[0][kept]), Moments.of(small[1][kept]))

    found, similarity = nearest(c.flatten(1), photos.flatten(1))
    base_similarity = nearest(b.flatten(1), photos.flatten(1))[1]
    background = above = None
    if (outside := lesson.outside()) is not None:
        like = [background_likeness(x, photos, outside, lesson.flipped) for x in (c, b)]
        background, above = bootstrap(like[0]), paired(like[0], like[1])
    groups = [x.flatten(1).unflatten(0, (-1, config.seeds)) for x in (c, b)]
    varies = [spread(group) for group in groups]
    figures = Figures(
        forgetting=forgotten[0],
        generic=forgotten[1],
        w2_mean=jackknife(lambda kept: gaussian(kept).mean, len(custom)),
        w2_covariance=jackknife(lambda kept: gaussian(kept).covariance, len(custom)),
        w2_exact=jackknife(lambda kept: empirical_w2(small[0][kept], small[1][kept]), len(custom)),
        background=background,
        background_above=above,
        nearest_photo=bootstrap(similarity),
        nearest_photo_above=paired(similarity, base_similarity),
        variety=bootstrap(varies[0]),
        variety_base=bootstrap(varies[1]),
        variety_above=paired(varies[0], varies[1]),
        pictures=len(custom),
    )
    return figures, (found % len(lesson.pictures)).tolist()


def _encoded(pipe: DiffusionPipeline, pictures: Sequence[Image.Image]) -> Tensor:
    return encode_pictures(pipe, pictures).cpu().double()
