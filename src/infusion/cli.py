"""The command line: parse, then start the chain photos -> concept -> pictures -> report.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infusion.arguments import EMBEDDED, check_names, check_negative, known_word, named_concept, tell_cut, writable
from infusion.bench.commands import bench
from infusion.console import progress, say
from infusion.errors import InfusionError

if TYPE_CHECKING:
    from infusion.steering import Checkup

app = typer.Typer(
    help="Teach a text-to-image diffusion model one new thing from a few photos.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click does
)
app.add_typer(bench, name="bench")

Base = Annotated[
    str, typer.Option("--base", help="A hub id, a diffusers folder, a .safetensors checkpoint, or 'embedded'.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best there is by default.")]
DType = Annotated[str, typer.Option(help="fp32, fp16 or bf16.")]
Prediction = Annotated[
    str | None,
    typer.Option(help="epsilon or v_prediction, where a checkpoint does not say what it predicts or says it wrongly."),
]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="Less memory, slower: the device holds one part of the base at a time."),
]
Together = Annotated[
    int | None,
    typer.Option("--batch", min=1, help="Pictures drawn at a time; by default as many as suit the base's size."),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where pictures, concept and report go.")] = Path(
        "outputs/demo"
    ),
) -> None:
    """Learn a subject on the embedded base and show what overfitting is, in one report."""
    say.print("Infusion demo: four pictures of Milo, one concept, new scenes. About two minutes on two CPU cores.")
    with progress("Loading torch and the embedded base") as told:
        from infusion.demo import run

        report = run(out, told)
    say.print(f"Done. Open {report}; the concept is {out / 'milo.safetensors'}.")


@app.command()
def train(
    photos: Annotated[Path, typer.Option("--photos", help="Folder with 3 to 6 pictures of one subject.")],
    word: Annotated[str, typer.Option("--word", help="What the subject is, in a word the base knows: dog.")],
    name: Annotated[str, typer.Option("--name", help="How prompts will call it: milo, for <milo>.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The concept file to write.")],
    base: Base = EMBEDDED,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples that the UNet takes at a time: fewer need less memory, and teach the same. By default all on small bases, 4 on Stable Diffusion 1.5, 1 on XL.",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--lr",
            "--learning-rate",
            help="Learning rate; if not given 0.06 where early timesteps are left to the base, as on the embedded one, else 0.02.",
        ),
    ] = None,
    max_timestep: Annotated[
        int | None,
        typer.Option(
            help="Learn and draw below this timestep only; where layouts are settled if not given, 1000 for all, as published."
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Share of what was learned that the file holds; 1 if not given."),
    ] = None,
    flip: Annotated[bool, typer.Option(help="Learn from mirror images too; --no-flip for asymmetric subjects.")] = True,
    mask: Annotated[bool, typer.Option(help="Count only the subject; --no-mask counts the whole picture.")] = True,
    single_stream: Annotated[
        bool, typer.Option("--single-stream", help="The ablation without the foundational stream.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The same seed on the same CPU gives the same file.")] = 0,
    evaluate_every: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Look every so many steps at what is repeated and forgotten; curves go beside the concept, as milo.checkups.json.",
        ),
    ] = None,
    stop_when_overfit: Annotated[
        bool,
        typer.Option(
            "--stop-when-overfit",
            help="Stop when two looks in a row find the photos' background or position come back; keep the last state before.",
        ),
    ] = False,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Less memory, slower: activations are computed again on the way back."),
    ] = False,
    device: Device = None,
    dtype: DType = "fp32",
    prediction: Prediction = None,
) -> None:
    """Learn a concept from a folder of photos. Ctrl-C, and any error on the way, keep what was learned so far. A concept that -o names is
    replaced with what lies beside it, another file never."""
    with progress("Loading the base model") as told:
        from infusion.base import best_device, load_base
        from infusion.concept import Concept, beside, refuse_others
        from infusion.files import write_picture
        from infusion.generation import free
        from infusion.lesson import mask_overlays, prepare_lesson
        from infusion.methods.infusion import infusion
        from infusion.offloading import has_own_memory, take_back
        from infusion.photos import OVERLAYS, load_photos
        from infusion.sheets import contact_sheet
        from infusion.steering import SteerConfig, steered, write_checkups
        from infusion.training import LearnConfig

        steer = SteerConfig(every=evaluate_every or (50 if stop_when_overfit else 0), stop=stop_when_overfit)
        given = {
            "steps": steps, "batch": batch, "learning_rate": learning_rate, "max_timestep": max_timestep, "strength": strength,
        }  # fmt: skip
        config = LearnConfig(
            flip=flip,
            masked=mask,
            two_streams=not single_stream,
            seed=seed,
            **{k: v for k, v in given.items() if v is not None},
        )
        pictures = load_photos(photos)
        Concept(name, word, {})  # names are checked before any work
        writable(out)
        refuse_others(out)
        known_word(base, word)
        # Text encoders and autoencoder make the lesson and draw what is looked at; the memory in between is the learning UNet's.
        pipe = load_base(base, device, dtype, prediction, offload=has_own_memory(device or best_device()))
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        now, checkups, failed, shown = None, [], None, None
        try:
            told("Encoding the photos", 0, 0)
            lesson = prepare_lesson(pipe, pictures, word, name, flip=flip, masked=mask)
            take_back(pipe)
            shown = contact_sheet([lesson.pictures, mask_overlays(lesson)]) if mask else None
            for now in steered(pipe, infusion(pipe, lesson, config, at_once), lesson, steer, told):
                told(f"Learning <{name}>", now.state.step, now.state.steps, f"loss {now.state.loss:.4f}")
                if now.checkup:
                    checkups.append(asdict(now.checkup))
                    say.print(_seen(now.checkup))
        except KeyboardInterrupt:
            if now is None:
                say.print("Stopped before the first step; nothing was written.")
                raise typer.Exit(130) from None
            told(f"Stopped at step {now.state.step}", now.state.step, now.state.steps)
        except Exception as error:
            if now is None:
                raise
            failed = error
    assert now is not None
    kept = now.kept
    interrupted = kept.step < kept.steps and not now.stopped
    if interrupted and out.exists():  # what is there may be a finished one
        out = free(out.with_stem(f"{out.stem}-interrupted"))
    path = kept.adapter.concept.save(out)
    write_checkups(path, checkups)
    overlay = beside(path, OVERLAYS)
    if shown:
        write_picture(overlay, shown)
    else:  # one of a concept that was here before
        overlay.unlink(missing_ok=True)
    if now.stopped:
        say.print(now.stopped)
    learned, limit = kept.adapter.concept.settings, kept.adapter.concept.max_timestep
    heard = f"below timestep {limit:,}" if limit else "at all timesteps"
    say.print(
        f"{'Stopped early; kept' if interrupted else 'Learned'} <{name}> after {kept.step} steps at rate {learned['learning_rate']:g} {heard}: {path}, {path.stat().st_size:,} bytes."
    )
    if failed:
        raise failed
    given = {"prediction": prediction, "device": device, "dtype": dtype if dtype != "fp32" else None}
    flags = "".join(f" --{k} {v}" for k, v in given.items() if v)
    say.print(
        f'Next: infusion generate --base {shlex.quote(base)} --concept {shlex.quote(str(path))}{flags} "a photo of a <{name}> on the beach" -o pictures',
        soft_wrap=True,  # it can be copied
    )
    if interrupted:
        raise typer.Exit(130)


def _seen(checkup: Checkup) -> str:
    repeats = ", ".join(f"{name} {100 * found.above:+.0f}" for name, found in checkup.repeats.items())
    return (
        f"Step {checkup.step}: repeats of the photos' {repeats} points beside the base, "
        f"forgetting {checkup.forgetting:.2g}, variety {checkup.variety:.0%} of the base's."
        + (f" Pull to the photos' position {100 * checkup.pull.above:+.0f}." if checkup.pull else "")
        + ("" if "background" in checkup.repeats else " The photos show the subject everywhere, so no background.")
    )


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help='What to draw: "a sketch of <milo> in the snow".')],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")],
    concept: Annotated[
        list[str] | None,
        typer.Option(
            "--concept",
            help="A concept file; may be given several times. NAME=FILE calls it by another name: rex=milo.safetensors.",
        ),
    ] = None,
    base: Base = EMBEDDED,
    count: Annotated[int, typer.Option(min=1, help="Pictures a prompt.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next ones count up.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 6.0,
    negative: Annotated[str | None, typer.Option(help="What the pictures should not show.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8; the base's own if not given.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8; the base's own if not given.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, euler, euler-a, dpm++, lcm or unipc; the base's own if not given.")
    ] = None,
    single_stream: Annotated[
        bool,
        typer.Option(
            "--single-stream", help="The ablation without the foundational stream, as for concepts learned so."
        ),
    ] = False,
    batch: Together = None,
    offload: Offload = False,
    device: Device = None,
    dtype: DType = "fp32",
    prediction: Prediction = None,
) -> None:
    """Draw pictures of prompts in which concepts are called by <name> or <name:0.7>."""
    with progress("Loading the base model") as told:
        from infusion.base import load_base
        from infusion.files import write_picture
        from infusion.generation import check_draws, drawing, free, save_pictures
        from infusion.offloading import in_parts
        from infusion.pipelines import attach, encode
        from infusion.schedulers import check_scheduler, scheduler_for
        from infusion.sheets import square_grid

        concepts = [named_concept(given) for given in concept or []]
        learned_so = bool(concepts) and not any(c.settings.get("two_streams", True) for c in concepts)
        two_streams = not (single_stream or learned_so)
        if scheduler:
            check_scheduler(scheduler)
        writable(out / "contact-sheet.png")
        pipe = load_base(base, device, dtype, prediction, offload)
        if offload:
            in_parts(pipe, tiles=True)
        check_draws(pipe)
        if scheduler:
            pipe.scheduler = scheduler_for(pipe, scheduler)
        known = pipe.tokenizer.get_vocab()
        check_names(prompts, concepts, known)
        check_negative(negative, {*known, *(f"<{c.name}>" for c in concepts)})
        tell_cut(prompts, {c.name: c.word for c in concepts}, pipe.tokenizer)
        texts = [p for p in prompts for _ in range(count)]
        seeds = [seed + i for _ in prompts for i in range(count)]
        details = {
            "concepts": ", ".join(f"<{c.name}> = {c.word}" for c in concepts),
            "base": base,
            "steps": str(steps),
            "guidance_scale": str(guidance),
            "scheduler": type(pipe.scheduler).__name__,
            "negative_prompt": negative or "",
            "streams": "2" if two_streams else "1",
            "dtype": dtype,
        }
        pictures, paths = [], []
        on_step = lambda a, b: told("Drawing", a, b)  # noqa: E731
        with attach(pipe, *concepts, two_streams=two_streams) if concepts else contextlib.nullcontext():
            if concepts:
                encode(pipe, prompts)  # an unknown name is told before anything is drawn
            for part in drawing(pipe, texts, seeds, steps, guidance, batch, negative, on_step, width, height):
                pictures += part
                paths += save_pictures(part, out, details)  # what is drawn is kept, whatever comes
        sheet = free(out / "contact-sheet.png")
        write_picture(sheet, square_grid([p.image for p in pictures]))
    if base == EMBEDDED:
        say.print(
            "The embedded base knows only its own small world; for other pictures give --base a Stable Diffusion model."
        )
    say.print(f"{len(paths)} pictures and {sheet.name} in {out}.")


@app.command()
def evaluate(
    adapter: Annotated[
        Path, typer.Option("--adapter", help="A concept, a LoRA, an embedding, or the folder of a tuned pipeline.")
    ],
    photos: Annotated[Path, typer.Option("--photos", help="Folder with the pictures it was learned from.")],
    word: Annotated[str, typer.Option("--word", help="What the subject is, in a word the base knows: dog.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for report.html, figures.json and the adapter's pictures.")
    ],
    base: Base = EMBEDDED,
    subject: Annotated[
        str | None,
        typer.Option(help='How prompts call it: "a <milo:0.7>", "sks dog". By default "a <name>" or "a WORD".'),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Pictures a prompt, by the base and by the adapter.")] = 10,
    steps: Annotated[
        int, typer.Option(min=1, help="Denoising steps; of a few-step base (Turbo, LCM) as many as it was made for.")
    ] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 for a base that draws without.")] = 6.0,
    clip: Annotated[str | None, typer.Option(help="CLIP weights for CLIP-I and CLIP-T: a folder or a hub id.")] = None,
    dino: Annotated[str | None, typer.Option(help="DINO weights for subject fidelity: a folder or a hub id.")] = None,
    lpips: Annotated[
        bool, typer.Option("--lpips", help="Diversity and copies by LPIPS too, with torchvision's AlexNet.")
    ] = False,
    cache: Annotated[
        bool, typer.Option(help="Keep the base's own pictures in ~/.cache/infusion for the next evaluation.")
    ] = True,
    batch: Together = None,
    offload: Offload = False,
    device: Device = None,
    dtype: DType = "fp32",
    prediction: Prediction = None,
) -> None:
    """Measure overfitting: what a customization forgets, repeats, and whether it still varies."""
    with progress("Loading the base model") as told:
        from infusion.adapters import load_adapter
        from infusion.album import default_album
        from infusion.base import load_base
        from infusion.concept import Concept
        from infusion.evaluation import EvaluateConfig
        from infusion.evaluation import evaluate as measure
        from infusion.evaluation_report import write_report
        from infusion.features import load_features, load_lpips
        from infusion.offloading import in_parts
        from infusion.photos import load_photos
        from infusion.steering import read_checkups
        from infusion.streams import execution_device
        from infusion.world.judge import shipped_judge

        config = EvaluateConfig(seeds=seeds, batch=batch, steps=steps, guidance_scale=guidance)
        Concept("subject", word, {})  # the word is checked before any work
        pictures = load_photos(photos)
        loaded, checkups = load_adapter(adapter, word, subject, prediction), read_checkups(adapter)
        spaces, distance = load_features(clip, dino), load_lpips() if lpips else None
        writable(out / "report.html")
        known_word(base, word)
        asked = "" if subject else " (no --subject was given; a LoRA's trigger word goes there)"
        say.print(f"Prompts call it {loaded.subject!r}{asked}.")
        pipe = load_base(base, device, dtype, prediction, offload)
        if offload:  # no tiles: what is measured should not depend on it
            in_parts(pipe, tiles=False)
        for space in spaces:
            space.model.to(execution_device(pipe))
        if distance:
            distance.net.to(execution_device(pipe))
        judge = shipped_judge() if base == EMBEDDED else None
        album = default_album() if cache else None
        drawings = out / "pictures"
        evaluation = measure(pipe, loaded, pictures, word, config, told, spaces, judge, album, distance, drawings)
        for sentence in evaluation.verdict:  # before the page is written: a full disk must not swallow it
            say.print(sentence)
        report = write_report(evaluation, out, base, adapter.resolve().name, checkups)
    say.print(f"The figures are in {report} and {out / 'figures.json'}.")


@app.command()
def inspect(
    concept: Annotated[Path, typer.Argument(help="A concept file.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what a concept file holds."""
    import json

    from infusion.concept import Concept, summary

    shown = summary(Concept.load(concept), concept.stat().st_size)
    if as_json:
        print(json.dumps(shown, indent=1))
        return
    print(
        f"<{shown['name']}> stands for {shown['word']!r}: {shown['values']:,} values in {len(shown['layers'])} layers, {shown['bytes']:,} bytes"
    )
    print(f"base: {shown['base']['family']}, {shown['base']['side']} pixels a side, weights {shown['base']['weights']}")
    print("learned with: " + ", ".join(f"{k} {v}" for k, v in shown["settings"].items()))
    for path, layer in shown["layers"].items():
        print(f"  {path:62} {layer['values']:6,} values, norm {layer['norm']}")


def main() -> None:
    """Entry point: errors of ours are one sentence, never a traceback. To be told to end is to be interrupted."""
    # Not by way of SIGINT, which a shell has its background jobs ignore.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(app(standalone_mode=False) or 0)  # a command's typer.Exit comes back as its code
    except InfusionError as error:
        say.print("Error:", error, style="red", soft_wrap=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        say.print("Stopped.")
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            say.print(
                "Error: the device's memory is full; draw fewer pictures at a time with --batch, learn with --at-once 1 and --checkpointing, draw and measure with --offload, or use --dtype bf16.",
                style="red",
                soft_wrap=True,
            )
            sys.exit(2)
        show = getattr(error, "show", None)  # click's usage errors know how to show themselves
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main()
