"""The commands as users run them, on the embedded base with few steps; and every kind of bad input in a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

from infusion.base import load_base
from infusion.cli import main
from infusion.concept import Concept, summary
from infusion.demo import MILO, _claim, draw_photos
from infusion.training import row_losses
from tests.conftest import random_concept, tiny_pipeline
from tests.pretend import pretend


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_photos(MILO, tmp_path_factory.mktemp("photos"), count=3)


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Run a command in this process; returns (exit code, what it said)."""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["infusion", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, " ".join((out + err).split())

    return call


def test_train_then_generate(run, photos, tmp_path):
    concept = tmp_path / "milo.safetensors"
    code, said = run(
        "train", "--photos", photos, "--word", "dog", "--name", "milo", "-o", concept, "--steps", 3, "--batch", 2
    )
    assert code == 0, said
    assert "Learned <milo> after 3 steps at rate 0.06 below timestep 650" in said
    with Image.open(tmp_path / "milo.masks.png") as sheet:
        assert sheet.width > sheet.height > 200  # three photos over their masks
    loaded = Concept.load(concept)
    assert (loaded.name, loaded.word, loaded.count, loaded.settings["steps"]) == ("milo", "dog", 1344, 3)

    pictures = tmp_path / "pictures"
    common = ("--concept", concept, "-o", pictures, "--steps", 2, "--count", 2)
    code, said = run("generate", "a sketch of <milo> in the snow", "<milo:0.5> and a cat", *common, "--seed", 7)
    assert code == 0, said
    assert "knows only its own small world" in said
    files = sorted(pictures.glob("0*.png"))
    assert len(files) == 4
    with Image.open(files[1]) as image:
        assert image.info["prompt"] == "a sketch of <milo> in the snow"
        assert image.info["seed"] == "8"
        assert image.info["concepts"] == "<milo> = dog"
        assert image.size == (64, 64)
    assert (pictures / "contact-sheet.png").exists()
    beside = ("--photos", photos, "--word", "dog", "--name", "rex", "-o", tmp_path / "rex.safetensors", "--no-mask")
    code, said = run("train", *beside, "--steps", 1, "--batch", 2, "--at-once", 1, "--max-timestep", 1000)
    assert code == 0, said
    assert "after 1 steps at rate 0.02 at all timesteps" in said
    assert not (tmp_path / "rex.masks.png").exists()
    Image.new("RGB", (8, 8)).save(tmp_path / "rex.masks.png")  # of a <rex> that was here before
    code, said = run("train", *beside, "--steps", 1, "--batch", 2)
    assert code == 0, said
    assert not (tmp_path / "rex.masks.png").exists()
    told = ("--no-flip", "--single-stream", "--evaluate-every", 1, "--seed", 3)
    code, said = run("train", *beside, "--steps", 1, "--batch", 2, *told)
    assert code == 0, said
    settings = Concept.load(tmp_path / "rex.safetensors").settings
    asked = {"flip": False, "masked": False, "two_streams": False, "seed": 3}
    assert {name: settings[name] for name in asked} == asked
    assert [c["step"] for c in json.loads((tmp_path / "rex.checkups.json").read_text())] == [1]
    code, said = run("generate", "a dog", *common)
    assert code == 0, said
    assert len(list(pictures.glob("0*.png"))) == 6, "earlier pictures are kept"
    assert "2 pictures and contact-sheet-2.png" in said
    assert (pictures / "contact-sheet-2.png").exists()
    code, said = run("generate", "a <rex>", *common, "--concept", f"rex={concept}", "--count", 1)
    assert code == 0, said
    with Image.open(max(pictures.glob("0*.png"))) as image:
        assert image.info["concepts"] == "<milo> = dog, <rex> = dog"

    asked = ("--width", 96, "--height", 40, "--scheduler", "euler-a", "--count", 1)
    code, said = run("generate", "a <milo>", *common, *asked)
    assert code == 0, said
    with Image.open(max(pictures.glob("0*.png"))) as image:
        assert (image.size, image.info["scheduler"]) == ((96, 40), "EulerAncestralDiscreteScheduler")

    code, said = run("inspect", concept)
    assert code == 0, said
    assert "milo" in said
    assert f"{concept.stat().st_size:,}" in said
    code, said = run("inspect", concept, "--json")
    assert code == 0, said
    told = json.loads(said)
    assert told == json.loads(json.dumps(summary(loaded, concept.stat().st_size)))
    assert (told["name"], told["bytes"], told["values"]) == ("milo", concept.stat().st_size, 1344)


@pytest.mark.parametrize("name", ["milo[final].safetensors", "a[/b].safetensors"])
def test_brackets_in_a_path_are_no_markup(run, tmp_path, name):
    code, said = run("inspect", tmp_path / name)
    assert code == 2
    assert name in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--photos", "{tmp}/none"), "There is no folder"),
        (("--photos", "{tmp}/empty"), "There is no picture in"),
        (("--photos", "{tmp}/broken"), "cannot be read as a picture"),
        (("--word", "zebra"), "never saw a 'zebra'; nearest are"),
        (("--word", "dgo"), "nearest are dog"),
        (("--name", "my dog"), "is no concept name"),
        (("-o", "{tmp}/file/milo.safetensors"), "cannot be written"),
        (("-o", "{tmp}"), "is a folder"),
        (("-o", "{tmp}/file"), "would be overwritten and is no concept"),
        (("--steps", "0"), "steps is 0"),
        (("--seed", str(10**20)), "seed is 100000000000000000000"),
        (("--base", "{tmp}/none.safetensors"), "There is no file or folder"),
        (("--lr", "-1"), "learning_rate is -1.0"),
        (("--base", "{tmp}/nobase"), "There is no file or folder"),
        (("--base", "{tmp}/empty"), "holds no diffusers pipeline"),
        (("--base", "{tmp}/file"), "is no .safetensors file"),
        (("--dtype", "fp12"), "'fp12' is no dtype"),
        (("--device", "abacus"), "'abacus' is no device; use cpu"),
        (("--device", "cuda:7"), "'cuda:7' is not usable"),
    ],
)
def test_bad_input_to_train(run, photos, tmp_path, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no picture")
    (tmp_path / "file").write_text("a file")
    options = {
        "--photos": photos,
        "--word": "dog",
        "--name": "milo",
        "-o": tmp_path / "m.safetensors",
        "--steps": 1,
        "--batch": 1,
    }
    options[args[0]] = args[1].format(tmp=tmp_path)
    code, said = run("train", *(str(part) for option in options.items() for part in option))
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "m.safetensors").exists()
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("a <rex> here",), "<rex> is unknown; the concepts at hand are <milo>"),
        (("a <milo>", "a <rex> here", "--batch", "1"), "<rex> is unknown"),
        (("the " * 40 + "<milo>",), "<milo> is cut off"),
        (("a cat", "--negative", "a <milo>"), "write 'dog' there"),
        (("a <milo>", "--concept", "{tmp}/none.safetensors"), "There is no concept file"),
        (("a <milo>", "--concept", "{tmp}/photo.png"), "is damaged or no safetensors"),
        (("a <milo>", "--guidance", "much"), "Invalid value"),
        (("a <milo>", "--guidance", "nan"), "guidance_scale is nan"),
        (("a <milo>", "--steps", "2000"), "steps is 2000; this base's scheduler has 1,000 timesteps"),
        (("a <milo>", "--seed", str(2**63)), "it must be a whole number of 64 bits"),
        (("a <milo>", "--width", "60"), "width is 60; this base draws multiples of 8 pixels"),
        (("a <milo>", "--device", "cpu", "--offload"), "the device is the CPU itself; leave it out"),
        (("a <milo>", "--scheduler", "heun"), "'heun' is no scheduler known here; use one of ddim"),
    ],
)
def test_bad_input_to_generate(run, tmp_path, args, message):
    concept = tmp_path / "milo.safetensors"
    random_concept(load_base(device="cpu").unet).save(concept)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "photo.png")
    code, said = run(
        "generate",
        *("--concept", concept, "-o", tmp_path / "out", "--steps", 1, "--count", 1),
        *(a.format(tmp=tmp_path) for a in args),
    )
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("out/*.png")), "bad input is told before anything is drawn"


def test_evaluate(run, photos, tmp_path):
    unet = load_base(device="cpu").unet
    concept = random_concept(unet, scale=0.1).save(tmp_path / "milo.safetensors")
    common = ("--photos", photos, "--word", "dog", "-o", tmp_path / "report")
    code, said = run("evaluate", "--adapter", concept, *common, "--seeds", 2, "--steps", 3, "--guidance", 1.5)
    assert code == 0, said
    config = json.loads((tmp_path / "report" / "figures.json").read_text())["settings"]
    assert (config["steps"], config["guidance_scale"]) == (3, 1.5)
    assert "It forgets nothing" in said
    assert "Prompts call it 'a <milo>'" in said
    figures = json.loads((tmp_path / "report" / "figures.json").read_text())["figures"]
    assert figures["forgetting"]["score"]["value"] == 0
    assert figures["pictures"] == 20
    made = json.loads((tmp_path / "report" / "figures.json").read_text())
    assert (made["base"], made["adapter"], made["made_by"]["class word"]) == ("embedded", "milo.safetensors", "dog")
    for args, message in (
        (("--adapter", tmp_path / "none"), "There is no file"),
        (("--adapter", concept, "--seeds", 1), "seeds is 1"),
        (("--adapter", concept, "--device", "cpu", "--offload"), "the device is the CPU itself"),
        (("--adapter", concept, "--subject", "a dog"), "does not hold '<milo>'"),
        (("--adapter", concept, "--word", "cat"), "learned as a 'dog', the word given is 'cat'"),
        (("--adapter", concept, "--photos", tmp_path / "none"), "There is no folder"),
        (("--adapter", concept, "--word", " "), "' '"),
    ):
        code, said = run("evaluate", *common, *args)
        assert (code, message in said) == (2, True), said


def test_drawing_offloaded(run, tmp_path, monkeypatch):
    path = random_concept(load_base(device="cpu").unet, scale=0.1).save(tmp_path / "milo.safetensors")
    common = ("generate", "a <milo>", "--concept", path, "--steps", 2, "--count", 2)
    assert run(*common, "-o", tmp_path / "here", "--device", "cpu")[0] == 0
    tiled = []
    monkeypatch.setattr(AutoencoderKL, "tiled_decode", _counted(AutoencoderKL.tiled_decode, tiled))
    with pretend() as device:
        code, said = run(*common, "-o", tmp_path / "there", "--device", device, "--offload")
        assert (code, tiled) == (0, []), said
        code, said = run(*common, "-o", tmp_path / "wide", "--device", device, "--offload", "--width", 128)
        assert (code, len(tiled)) == (0, 2), said  # picture by picture
    for file in (tmp_path / "here").glob("0*.png"):
        ours, theirs = (np.asarray(Image.open(tmp_path / folder / file.name), int) for folder in ("here", "there"))
        assert np.abs(ours - theirs).max() <= 2


def test_a_device_holds_the_unet_alone_while_it_learns(run, photos, tmp_path, monkeypatch):
    there, loaded = [], []

    def load(*args, **kwargs):
        loaded.append(load_base(*args, **kwargs))
        return loaded[-1]

    def loss(*args):
        parts = {n: p.device.type for n, p in loaded[-1].components.items() if isinstance(p, torch.nn.Module)}
        there.append({name for name, where in parts.items() if where == "pretend"})
        return row_losses(*args)

    monkeypatch.setattr("infusion.base.load_base", load)
    monkeypatch.setattr("infusion.training.row_losses", loss)
    common = ("train", "--photos", photos, "--word", "dog", "--name", "milo", "--steps", 2, "--batch", 2)
    with pretend() as device:
        code, said = run(*common, "-o", tmp_path / "there.safetensors", "--device", device)
        assert code == 0, said
    assert there == [{"unet"}] * 2
    code, said = run(*common, "-o", tmp_path / "here.safetensors", "--device", "cpu")
    assert code == 0, said
    here, there = (Concept.load(tmp_path / f"{name}.safetensors").residuals for name in ("here", "there"))
    assert all(torch.allclose(there[path], learned, atol=1e-2) for path, learned in here.items())


def test_bases_that_do_not_draw_from_a_prompt_alone(run, tmp_path):
    pipe = tiny_pipeline()
    for kind in (StableDiffusionInpaintPipeline, StableDiffusionImg2ImgPipeline):
        kind.from_pipe(pipe).save_pretrained(tmp_path / kind.__name__)
        code, said = run(
            "generate", "a dog", "--base", tmp_path / kind.__name__, "-o", tmp_path / "out", "--device", "cpu"
        )
        assert code == 2
        assert f"This base is a {kind.__name__}, which wants a picture" in said
        assert "Traceback" not in said
    assert not list(tmp_path.glob("out/*.png"))


def _counted(method, calls):
    def counted(*args, **kwargs):
        calls.append(args)
        return method(*args, **kwargs)

    return counted


def test_a_name_without_any_concept(run, tmp_path):
    code, said = run("generate", "a <milo>", "-o", tmp_path, "--steps", 1, "--count", 1)
    assert code == 2
    assert "no concept is loaded; give its file with --concept" in said
    code, said = run("generate", "a dog", "--negative", "<milo>", "-o", tmp_path, "--steps", 1, "--count", 1)
    assert code == 2
    assert "The negative prompt names <milo>" in said
    code, said = run("generate", "a dog <lora:milo:0.8>", "-o", tmp_path, "--steps", 1, "--count", 1)
    assert code == 2
    assert "<lora:...> is another program's way to load a LoRA" in said


def test_a_concept_is_drawn_in_as_many_streams_as_it_was_learned_in(run, tmp_path):
    learned = random_concept(load_base(device="cpu").unet)
    alone = replace(learned, name="rex", settings={"two_streams": False})
    files = [c.save(tmp_path / f"{c.name}.safetensors") for c in (learned, alone)]
    for prompt, given, streams in (("a <milo>", files[:1], "2"), ("a <rex>", files[1:], "1"), ("a <rex>", files, "2")):
        folder = tmp_path / streams / str(len(given))
        options = (o for file in given for o in ("--concept", file))
        code, said = run("generate", prompt, *options, "-o", folder, "--steps", 1, "--count", 1)
        assert code == 0, said
        with Image.open(next(folder.glob("0*.png"))) as image:
            assert image.info["streams"] == streams


def test_what_the_base_does_not_see_of_a_long_prompt_is_told(run, tmp_path):
    prompt = "a dog on the beach" + " in the snow" * 30 + " with a red hat"
    code, said = run("generate", prompt, "-o", tmp_path, "--steps", 1, "--count", 1)
    assert code == 0, said
    assert "does not see" in said
    assert said.partition("does not see")[2].split("'")[1].endswith("in the snow with a red hat")


def test_a_concept_that_no_prompt_names_is_told_of(run, tmp_path):
    path = random_concept(load_base(device="cpu").unet, "milo", "dog", 0).save(tmp_path / "milo.safetensors")
    code, said = run("generate", "a photo of milo", "--concept", path, "-o", tmp_path / "o", "--steps", 1, "--count", 1)
    assert code == 0
    assert "No prompt names <milo>, so it has no effect" in said


def test_the_demo_writes_over_nothing_of_others(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    code, said = run("demo", "-o", tmp_path)
    assert code == 2
    assert "is not empty; give -o a new folder" in said
    assert [p.name for p in tmp_path.iterdir()] == ["1.png"]
    _claim(tmp_path / "new")
    (tmp_path / "new" / "report.html").touch()
    _claim(tmp_path / "new")  # an earlier demo's


def test_an_error_on_the_way_keeps_what_was_learned_and_what_was_there(run, photos, tmp_path, monkeypatch):
    out = tmp_path / "milo.safetensors"
    options = ("--photos", photos, "--word", "dog", "--name", "milo", "-o", out, "--steps", 3, "--batch", 1)
    from infusion.methods.infusion import infusion as real

    def failing(*args):
        for state in real(*args):
            if state.step == 3:
                raise torch.OutOfMemoryError("nothing left")
            yield state

    monkeypatch.setattr(sys.modules["infusion.methods.infusion"], "infusion", failing)
    code, said = run("train", *options)
    assert (code, Concept.load(out).settings["steps"]) == (2, 2)
    assert "Stopped early; kept <milo> after 2 steps" in said
    assert "memory is full" in said
    before = out.read_bytes()
    run("train", *options, "--seed", 1)
    assert out.read_bytes() == before
    run("train", *options, "--seed", 2)
    kept = [Concept.load(tmp_path / f"milo-interrupted{n}.safetensors").settings for n in ("", "-2")]
    assert [(s["steps"], s["seed"]) for s in kept] == [(2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("told", "sigint"),
    [
        (signal.SIGINT, signal.SIG_DFL),
        (signal.SIGTERM, signal.SIG_IGN),  # a shell's background job has SIGINT ignored
    ],
)
def test_ctrl_c_keeps_what_was_learned(photos, tmp_path, told, sigint):
    out = tmp_path / "milo.safetensors"
    command = [
        sys.executable,
        "-m",
        "infusion.cli",
        "train",
        "--photos",
        str(photos),
        "--word",
        "dog",
        "--name",
        "milo",
    ]
    started = subprocess.Popen(
        [*command, "-o", str(out), "--steps", "100000", "--batch", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
    )
    seen = ""
    deadline = time.monotonic() + 120
    while "Learning <milo>" not in seen and time.monotonic() < deadline:
        seen += started.stderr.readline()
    time.sleep(2)
    started.send_signal(told)
    rest = started.communicate(timeout=60)[1]
    assert started.returncode == 130, seen + rest
    assert "Stopped early; kept <milo>" in " ".join(rest.split())
    assert Concept.load(out).settings["steps"] >= 1


def test_help_tells_what_the_arguments_are(run):
    assert "What to draw" in run("generate", "--help")[1]
    assert "A concept file" in run("inspect", "--help")[1]
    assert run("trian")[1].count("Did you mean") == 1
