"""Ship a trained base: python -m infusion.world.release --folder runs/base

Writes the networks in fp16, in files below 15 MB, with their index, the trainings they have been through, the loss curve and the model
card, into the package's `weights` folder (or --out).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infusion.world.grounding import BARS
from infusion.world.models import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    build_autoencoder,
    build_pipeline,
    build_text_encoder,
    build_unet,
)
from infusion.world.runs import between, read_log
from infusion.world.tokenizer import build_tokenizer

WEIGHTS = Path(__file__).parent / "weights"
SHARD_BYTES = 14_000_000
PARTS = ("vae", "text_encoder", "unet")
TRAININGS = "trainings.json"
EXAMINATION = "examination.json"
NAMES = {
    "kind": "class",
    "color1": "first colour",
    "color2": "second colour",
    "both": "two subjects, both there",
    "own colors": "two subjects, each in its colour",
}


def write_weights(networks: dict[str, nn.Module], folder: Path) -> dict[str, Any]:
    """Write fp16 shards and index.json; returns the index: files of each part, and a SHA-256 over all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    digest, files = hashlib.sha256(), {}
    for part in PARTS:
        shards = list(_shards(networks[part].state_dict()))
        files[part] = []
        for i, shard in enumerate(shards, 1):
            name = f"{part}-{i}-of-{len(shards)}.safetensors"
            save_file(shard, folder / name)
            digest.update((folder / name).read_bytes())
            files[part].append(name)
    index = {"files": files, "sha256": digest.hexdigest()}
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    return index


def read_index(folder: Path = WEIGHTS) -> dict[str, Any]:
    """The shipped weights' index: `files` by part and `sha256`. Raises FileNotFoundError where none are shipped."""
    return json.loads((folder / "index.json").read_text())


def read_weights(part: str, folder: Path = WEIGHTS) -> dict[str, Tensor]:
    """A network's shipped weights as float32. Raises FileNotFoundError where none are shipped."""
    index = read_index(folder)
    return {k: v.float() for name in index["files"][part] for k, v in load_file(folder / name).items()}


def load_pipeline(weights: Path = WEIGHTS) -> StableDiffusionPipeline:
    """The base in a folder of weights as a pipeline. Raises FileNotFoundError where none are there."""
    pipe = build_pipeline()
    for part in PARTS:
        getattr(pipe, part).load_state_dict(read_weights(part, weights))
        getattr(pipe, part).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shipped_autoencoder() -> AutoencoderKL:
    """The shipped autoencoder. Raises FileNotFoundError where none is shipped."""
    model = build_autoencoder()
    model.load_state_dict(read_weights("vae"))
    return model.eval()


def _shards(state: dict[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in sorted(state.items()):
        half = tensor.detach().cpu().half().contiguous() if tensor.is_floating_point() else tensor.cpu()
        if shard and sum(t.nbytes for t in shard.values()) + half.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = half
    yield shard


def draw_curve(log: list[dict[str, Any]], path: Path) -> None:
    """The loss curve of the base's training as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [line for line in log if line["stage"] == "base"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
    for axis, key in zip(axes, ("denoising", "grounding"), strict=True):
        axis.plot([r["seen"] / 1000 for r in rows], [r[key] for r in rows], color="#6b3fc4", lw=1.2)
        axis.set(xlabel="thousand pictures seen", title=f"{key} loss, mean of 100 steps")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def training_of(log: list[dict[str, Any]]) -> dict[str, Any]:
    """A training in short, from its run's log: pictures seen and minutes spent up to the weights that are released, its settings, how far of
    the way from the weights it began with it was gone (`picking.keep_best`), and what its autoencoder saw (None where it was left as it was)."""
    starts = [line for line in log if line["stage"] == "start"]
    base = [line for line in log if line["stage"] == "base"]
    coder = [line for line in log if line["stage"] == "autoencoder"]
    kept = _kept(log, base)
    return {
        "scenes": starts[0]["scenes"],
        "pictures": kept["seen"],
        "batch": starts[0]["batch"],
        "minutes": round(kept["seconds"] / 60),
        "hardware": starts[-1]["hardware"],
        "settings": f"{_parts(starts, base)}; the rate falls to zero over the last {starts[-1]['decay']:.0%}",
        "share": _picked(log).get("share", 1.0),
        "autoencoder": {
            "steps": coder[-1]["step"],
            "crops": starts[0]["autoencoder"]["batch"],
            "minutes": starts[0]["autoencoder"]["minutes"],
            "psnr": round(coder[-1]["psnr"], 2),
        }
        if coder
        else None,
    }


def read_trainings(folder: Path = WEIGHTS) -> list[dict[str, Any]]:
    """The trainings (`training_of`) that the shipped weights have been through, in order."""
    return json.loads((folder / TRAININGS).read_text())


def model_card(trainings: list[dict[str, Any]], log: list[dict[str, Any]], index: dict[str, Any], folder: Path) -> str:
    """The card in Markdown, from the trainings gone through and the last one's own log."""
    start = next(line for line in log if line["stage"] == "start")
    gate = next((line for line in reversed(log) if line["stage"] == "done"), {})
    bytes_ = sum((folder / name).stat().st_size for names in index["files"].values() for name in names)
    coders = [t["autoencoder"] for t in trainings if t["autoencoder"]]
    seen, minutes = (sum(t[key] for t in trainings) for key in ("pictures", "minutes"))
    parts = "\n".join(
        f"{i}. {t['pictures']:,} pictures in {t['minutes']} min ({t['hardware']}); {t['settings']}{_way(t)}."
        for i, t in enumerate(trainings, 1)
    )
    rewarded = sum(t["minutes"] for t in trainings if "reward" in t["settings"])
    curves = "\n\n".join(
        f"![loss curve of training {i}](loss-{i}.png)"
        for i in range(1, len(trainings) + 1)
        if (folder / f"loss-{i}.png").exists()
    )
    return f"""# The embedded base

A small latent diffusion model of the procedural world in `infusion.world`, in diffusers' own classes
(AutoencoderKL, CLIPTextModel, CLIPTokenizer, UNet2DConditionModel in a StableDiffusionPipeline).
64x64 pictures, {LATENT_SIDE}x{LATENT_SIDE}x{LATENT_CHANNELS} latents, ten cross-attention layers, 1,344 values a concept. It knows its own world and
nothing else.

| | |
|---|---|
| files | {bytes_:,} bytes, fp16 safetensors |
| SHA-256 over the shards, in the order of `index.json` | `{index["sha256"]}` |
| training set | {start["scenes"]:,} scenes drawn once a training, four captions each; held-out combinations never drawn (`scenes.held_out`) |
| autoencoder | {"; then ".join(f"{c['steps']:,} steps of {c['crops']} crops of 32x32 in {c['minutes']:g} min, {c['psnr']:.1f} dB PSNR" for c in coders)}; the last 15 % of each on whole scenes |
| text encoder and UNet | {seen:,} pictures seen, v-prediction, AdamW, averaged weights ({start["ema"]}), captions dropped {start["caption_dropout"]:.0%} |
| terms beside denoising | grounding: the class word's maps of 16x16 and 8x8 on the subject's mask; separation: words of one kind apart in the text encoder; segmentation and attributes: each pixel's class, colours, pattern and accessory, read from features; subjects: how much more errors inside masks count; reward: what a reader of latents, trained before it on the same scenes and other than the judge, says of the base's own drawings of seen combinations |
| wall time | text encoder and UNet {minutes:.0f} min, with other work beside it |
| map gate | peak inside the mask {gate.get("peak", float("nan")):.1%}, soft IoU {gate.get("iou", float("nan")):.2f}, inside/outside {gate.get("ratio", float("nan")):.1f}, two subjects each on its own {gate.get("own", float("nan")):.1%} ({gate.get("count", 0)} subjects) |

The bar for the map gate is {BARS["peak"]:.0%} inside, IoU {BARS["iou"]:.2f}, {BARS["own"]:.0%} on their own: this base {_verdict(gate)}.

Its trainings, each begun from the weights of the one before, in batches of {start["batch"]}:

{parts}

{curves}

Means of what was minimized: where a setting changed (above), values before and after do not compare.

{_examined(index, folder)}![64 pictures of unseen combinations](../../../../docs/base.png)

What was seen in these 64 pictures of unseen combinations by eye is in `docs/world.md`.

**Its attention maps come from supervision.** Real Stable Diffusion gets usable maps from scale. This base is too small
for that: its training holds the class word's map to the subject's true mask (as TokenCompose, arXiv 2312.03626).

Train one like it, on a GPU where there is one; a release takes the place of these weights (`--out` names another folder):

    python -m infusion.world.pretrain --folder runs/base --autoencoder-minutes {sum(c["minutes"] for c in coders):.0f} --minutes {minutes - rewarded:.0f}
    python -m infusion.world.release --folder runs/base
{_rewarded(start, rewarded)}
`--from-weights` with a new folder goes on from these weights alone.
"""


def _examined(index: dict[str, Any], folder: Path) -> str:
    """What the judge said of these weights (`examination.py`), with intervals; nothing where they were not examined."""
    path = folder / EXAMINATION
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("sha256") != index["sha256"]:
        return ""
    rows = [
        f"| {NAMES.get(name, name)} | {e['value']:.1%} [{e['low']:.1%}, {e['high']:.1%}] | {e['n']:,} |"
        for name, e in found["followed"].items()
    ]
    table = "\n".join(rows)
    return f"""What was asked for and is there, by the judge, of pictures of combinations that training never saw (Wilson's intervals; what the judge
cannot tell is wrong; the bars, and a base without fault, are in `docs/world.md`):

| asked for | right | n |
|---|---|---|
{table}

"""


def _rewarded(start: dict[str, Any], minutes: float) -> str:
    """The commands of the last trainings, of so many minutes, where they were rewarded; nothing where they were not."""
    if not start.get("reward_weight"):
        return ""
    given = ("reward_weight", "learning_rate", "segmentation_weight", "attribute_weight", "decay")
    options = " ".join(f"--{name.replace('_', '-')} {start[name]:g}" for name in given)
    return (
        f"    python -m infusion.world.pretrain --folder runs/rewarded --from-weights --minutes {minutes:.0f} {options} "
        f"--reader-minutes {start['reader']['minutes']:g}\n"
        "    python -m infusion.world.release --folder runs/rewarded --before runs/base --share 0.6\n"
    )


def _way(training: dict[str, Any]) -> str:
    """How far of a training's way was gone, where that is not all of it."""
    share = training.get("share", 1.0)
    return f"; {share:.0%} of the way from the weights before to those after it was gone" if share < 1 else ""


def _picked(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The line that says what the judge picked; empty where it picked nothing."""
    return next((line for line in reversed(log) if line["stage"] == "picked"), {})


def _kept(log: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """The line of the step whose weights are released: the last, or the one that the judge picked."""
    step = _picked(log).get("kept")
    return base[-1] if step is None else min(base, key=lambda line: abs(line["step"] - step))


def _verdict(gate: dict[str, Any]) -> str:
    reached = [gate.get(name, 0.0) >= bar for name, bar in BARS.items()]
    return "reaches all three" if all(reached) else f"reaches {sum(reached)} of the three"


_SETTINGS = {
    "learning rate": "learning_rate",
    "grounding": "grounding_weight",
    "separation": "separation_weight",
    "segmentation": "segmentation_weight",
    "attributes": "attribute_weight",
    "subjects": "subject_weight",
    "reward": "reward_weight",
}


def _parts(starts: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """The settings that changed between the resumed parts of a run, each from the pictures seen on."""
    parts: list[str] = []
    for start in starts:
        seen = max((line["seen"] for line in base if line["time"] <= start["time"]), default=0)
        after = next((line for line in base if line["time"] > start["time"]), None)
        setting = ", ".join(f"{label} {start[key]:g}" for label, key in _SETTINGS.items() if start.get(key))
        if after and (not parts or not parts[-1].endswith(setting)):
            parts.append(f"from {seen:,} pictures on: {setting}")
    return "; ".join(parts)


def _final(folder: Path) -> dict[str, dict[str, Tensor]]:
    return torch.load(folder / "final.pt", weights_only=True, map_location="cpu")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of `infusion.world.pretrain`")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument(
        "--before", type=Path, help="folder of an earlier training: release weights between its and these"
    )
    parser.add_argument(
        "--share", type=float, default=0.6, help="with --before: how far of the way from its weights to these"
    )
    args = parser.parse_args()
    final = _final(args.folder)
    if args.before:
        before = _final(args.before)
        final = {part: between(before[part], after, args.share) for part, after in final.items()}
    networks = {"vae": build_autoencoder(), "text_encoder": build_text_encoder(build_tokenizer()), "unet": build_unet()}
    for part, state in final.items():
        networks[part].load_state_dict(state)
    index = write_weights(networks, args.out)
    log = read_log(args.folder)
    begun = next(line for line in log if line["stage"] == "start")
    trainings = [*begun["earlier"], training_of(log)]
    (args.out / TRAININGS).write_text(json.dumps(trainings, indent=1) + "\n")
    draw_curve(log, args.out / f"loss-{len(trainings)}.png")
    (args.out / "README.md").write_text(model_card(trainings, log, index, args.out))
    print(f"{args.out}: {sum(p.stat().st_size for p in args.out.glob('*.safetensors')):,} bytes")


if __name__ == "__main__":
    main()
