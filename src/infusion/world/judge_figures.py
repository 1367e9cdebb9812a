"""How good the judge is, when it is to be believed, and its model card.

    python -m infusion.world.judge_figures --folder F --families 384 --seed 20261130

draws fresh families, examines the shipped judge on them, and writes its card to F.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from infusion.metrics.estimate import rate
from infusion.world.autoencoder import autoencoded
from infusion.world.facing import FIGURES, ONE_SIDED
from infusion.world.judge import (
    GRID,
    SHIPPED,
    Judge,
    JudgeNetwork,
    Maps,
    beliefs,
    digest_of,
    evidence,
    load_judge,
    look,
    peaks,
)
from infusion.world.judge_lessons import Labels, cells, corrupt, labels_of, shows_change
from infusion.world.models import pixels_to_tensor
from infusion.world.release import shipped_autoencoder
from infusion.world.truth import NONE, SCENE_HEADS, SUBJECT_HEADS
from infusion.world.twins import CHANGES, VIEWS, Families, build_families, load_families

TRAININGS = "trainings.json"
WEIGHTS = (0.0, 2.0, 5.0, 10.0, 20.0)  # what the embedding's cosine may count beside the heads' evidence


@torch.no_grad()
def calibrate(
    network: JudgeNetwork,
    data: Families,
    autoencoder: AutoencoderKL | None,
    precision: float = 0.995,
    batch: int = 64,
    passes: int = 4,
) -> dict[str, float]:
    """For each head the lowest probability from which on its answers are right in `precision` of the cases, on pictures as
    generators make them (`corrupt`, drawn anew in each of `passes`; real generators do worse, so ask for more than is wanted of theirs); for
    "embedding" what the cosine counts beside the heads' evidence, the best of WEIGHTS; for "same" the sum at which as many twins pass as individuals
    fail."""
    network.eval()
    told: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in (*SUBJECT_HEADS, *SCENE_HEADS)}
    firsts = []
    rng = np.random.default_rng(0)
    starts = range(0, len(data), batch)
    for seed, i in enumerate(i for _ in range(passes) for i in starts):
        rows = np.arange(i, min(i + batch, len(data)))
        labels = labels_of(data, rows)
        noise = torch.Generator().manual_seed(seed)
        pictures = corrupt(pixels_to_tensor(torch.from_numpy(data.pixels[rows])), autoencoder, rng, 0.6, noise)
        maps = look(network, pictures)
        b, s, x, y = cells(labels.centre)
        for k, name in enumerate(SUBJECT_HEADS):
            known = labels.subject[b, s, k] != NONE
            p, answer = maps.subject[name][b, :, y, x][known].float().softmax(1).max(1)
            told[name].append((p, answer == labels.subject[b, s, k][known]))
        for k, name in enumerate(SCENE_HEADS):
            p, answer = maps.scene[name].float().softmax(1).max(1)
            told[name].append((p, answer == labels.scene[:, k]))
        firsts.append(first_subjects(maps, labels))
    thresholds = {
        name: believed_from(*map(torch.cat, zip(*parts, strict=True)), precision) for name, parts in told.items()
    }
    everyone, labels = _joined(firsts), labels_of(data, np.tile(np.arange(len(data)), passes))
    parts = same_pairs(labels), twin_pairs(labels)
    scores = {w: [resemblance(everyone, p, w) for p in parts] for w in WEIGHTS}
    weight = max(WEIGHTS, key=lambda w: auc(*scores[w]))
    same, other = scores[weight]
    candidates = torch.cat([same, other]).sort().values
    fails = torch.searchsorted(same.sort().values, candidates) / len(same)
    passed = 1 - torch.searchsorted(other.sort().values, candidates) / len(other)
    thresholds |= {"same": float(candidates[(fails - passed).abs().argmin()]), "embedding": weight}
    return {name: round(value, 4) for name, value in thresholds.items()}


def first_subjects(maps: Maps, labels: Labels) -> dict[str, Tensor]:
    """What the network makes of each picture's first subject at its true centre: `beliefs` and the "embedding"."""
    x, y = labels.centre[:, 0].nan_to_num(GRID / 2).long().clamp(0, GRID - 1).unbind(-1)
    rows = torch.arange(len(x))
    return beliefs(maps, rows, y, x) | {"embedding": maps.embedding[rows, :, y, x]}


def resemblance(everyone: dict[str, Tensor], pairs: Tensor, weight: float) -> Tensor:
    """Whether pairs (p, 2) are of one individual, as `Judge.same` reckons it: evidence plus `weight` times the cosine (p,)."""
    a, b = ({name: value[pairs[:, i]] for name, value in everyone.items()} for i in (0, 1))
    return evidence(a, b) + weight * (a["embedding"] * b["embedding"]).sum(-1)


def _cosines(everyone: dict[str, Tensor], pairs: Tensor) -> Tensor:
    a, b = everyone["embedding"][pairs].unbind(1)
    return (a * b).sum(-1)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def believed_from(probability: Tensor, right: Tensor, precision: float) -> float:
    """The lowest probability from which on answers (n,) are right in at least `precision` of the cases; above 1 where
    none is."""
    order = probability.argsort(descending=True)
    share = right[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    enough = torch.nonzero(share >= precision)
    return float(probability[order[enough[-1, 0]]]) if len(enough) else 1.01


@torch.no_grad()
def examine(
    network: JudgeNetwork, data: Families, weight: float, autoencoder: AutoencoderKL | None = None, batch: int = 64
) -> dict[str, float]:
    """Figures on `data`, of fresh seed: accuracy of every head over what is visible, read at the true centre; found and
    phantom subjects; position; and the AUC of telling the same individual from its twin of another visible attribute, from one of other
    proportions, and from others of its class, the cosine counted `weight`. With an autoencoder, on autoencoded pictures. A share has Wilson's
    interval and what it was counted over beside it: "kind", "kind_low", "kind_high", "kind_n"."""
    network.eval()
    hits: dict[str, list[Tensor]] = {name: [] for name in (*SUBJECT_HEADS, *SCENE_HEADS, "found", "real", "position")}
    firsts = []
    for i in range(0, len(data), batch):
        rows = np.arange(i, min(i + batch, len(data)))
        labels = labels_of(data, rows)
        pictures = pixels_to_tensor(torch.from_numpy(data.pixels[rows]))
        if autoencoder is not None:
            pictures = autoencoded(autoencoder, pictures)
        maps = look(network, pictures)
        _count(maps, labels, hits)
        firsts.append(first_subjects(maps, labels))
    figures: dict[str, float] = {}
    for name, h in hits.items():
        found = rate(torch.cat(h))
        figures |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_n": found.n}
    everyone, labels = _joined(firsts), labels_of(data, np.arange(len(data)))
    same = resemblance(everyone, same_pairs(labels), weight)
    others = {
        "same_auc": twin_pairs(labels),
        "proportions_auc": twin_pairs(labels, of_shape=True),
        "stranger_auc": stranger_pairs(labels),
    }
    figures |= {name: auc(same, resemblance(everyone, pairs, weight)) for name, pairs in others.items()}
    figures["cosine_auc"] = auc(*(_cosines(everyone, pairs) for pairs in (same_pairs(labels), others["same_auc"])))
    counts = {"pictures": len(data), "twins": len(others["same_auc"])}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()} | counts


@torch.no_grad()
def examine_told(judge: Judge, data: Families, autoencoder: AutoencoderKL, batch: int = 64) -> dict[str, float]:
    """For each head, on autoencoded pictures and at the true centre: how often it is right where it says anything (`name`), and
    how often it says anything (`name_told`)."""
    answered: dict[str, list[Tensor]] = {name: [] for name in (*SUBJECT_HEADS, *SCENE_HEADS)}
    right: dict[str, list[Tensor]] = {name: [] for name in answered}
    for i in range(0, len(data), batch):
        rows = np.arange(i, min(i + batch, len(data)))
        labels = labels_of(data, rows)
        pictures = pixels_to_tensor(torch.from_numpy(data.pixels[rows]))
        maps = look(judge.network, autoencoded(autoencoder, pictures))
        b, s, x, y = cells(labels.centre)
        for name, logits, target in (
            *((n, maps.subject[n][b, :, y, x], labels.subject[b, s, k]) for k, n in enumerate(SUBJECT_HEADS)),
            *((n, maps.scene[n], labels.scene[:, k]) for k, n in enumerate(SCENE_HEADS)),
        ):
            p, answer = logits[target != NONE].softmax(1).max(1)
            told = p >= judge.thresholds.get(name, 0.0)
            answered[name].append(told)
            right[name].append((answer == target[target != NONE])[told])
    figures = {name: float(torch.cat(parts).float().mean()) for name, parts in right.items()}
    figures |= {f"{name}_told": float(torch.cat(parts).float().mean()) for name, parts in answered.items()}
    return {name: round(value, 4) for name, value in figures.items()}


def auc(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve: how often a value of `positive` is above one of `negative`; a tie counts half."""
    ranked = negative.sort().values
    below, upto = (torch.searchsorted(ranked, positive, right=right).double() for right in (False, True))
    return float((below + upto).mean() / 2 / len(negative))


def stranger_pairs(labels: Labels) -> Tensor:
    """Pairs (p, 2) of pictures of individuals of one class from different families, that both show colours."""
    heads = list(SUBJECT_HEADS)
    kind, color = labels.subject[:, 0, heads.index("kind")], labels.subject[:, 0, heads.index("color1")]
    counted = torch.nonzero((color != NONE) & (kind != NONE))[:, 0]
    family = counted // VIEWS
    i, j = torch.nonzero(
        (kind[counted][:, None] == kind[counted][None]) & (family[:, None] < family[None]), as_tuple=True
    )
    return torch.stack([counted[i], counted[j]], 1)


def same_pairs(labels: Labels) -> Tensor:
    """Pairs (p, 2) of pictures of one individual."""
    first = torch.arange(0, len(labels.centre), VIEWS)
    return _here(labels, torch.cat([torch.stack([first + a, first + b], 1) for a, b in ((0, 1), (2, 3))]))


def twin_pairs(labels: Labels, of_shape: bool = False) -> Tensor:
    """Pairs (p, 2) of pictures of an individual and its twin of another attribute, where both show the difference; `of_shape`: its twin of
    other proportions."""
    first = torch.arange(0, len(labels.centre), VIEWS)
    pairs = torch.cat([torch.stack([first + a, first + b], 1) for a in (0, 1) for b in (2, 3)])
    shape = labels.change[pairs[:, 0]] == CHANGES.index("shape")
    return _here(labels, pairs[shows_change(labels)[pairs].all(1) & (shape == of_shape)])


def _here(labels: Labels, pairs: Tensor) -> Tensor:
    """Those of the pairs in which both pictures show their first subject."""
    return pairs[~labels.centre[:, 0].isnan().any(-1)[pairs].any(1)]


def _count(maps: Maps, labels: Labels, hits: dict[str, list[Tensor]]) -> None:
    present = ~labels.centre.isnan().any(-1)
    b, s, x, y = cells(labels.centre)
    for k, name in enumerate(SUBJECT_HEADS):
        target = labels.subject[b, s, k]
        known = target != NONE
        hits[name].append((maps.subject[name][b, :, y, x].argmax(1) == target)[known])
    for k, name in enumerate(SCENE_HEADS):
        hits[name].append(maps.scene[name].argmax(1) == labels.scene[:, k])
    for i in range(len(labels.centre)):
        found = torch.tensor([[c + 0.5, r + 0.5] for r, c, _ in peaks(maps.heat[i])]).reshape(-1, 2)
        true = labels.centre[i][present[i]]
        near = torch.cdist(true, found)
        hits["found"].append((near < 2).any(1) if len(found) else torch.zeros(len(true), dtype=torch.bool))
        hits["real"].append((near < 2).any(0) if len(true) else torch.zeros(len(found), dtype=torch.bool))
        for t, d in zip(true, near, strict=True):
            if len(found) and float(d.min()) < 2:
                hits["position"].append((t[:1] * 3 // GRID) == (found[d.argmin()][:1] * 3 // GRID))


_NAMES = {
    "kind": "class", "color1": "first colour", "color2": "second colour", "pattern": "pattern", "accessory": "accessory",
    "background": "background", "style": "style", "found": "subjects found", "real": "found subjects that are real",
    "position": "position", "same_auc": "same individual against its twin of another attribute, AUC",
    "cosine_auc": "the same by the embedding's cosine alone, AUC", "proportions_auc": "same individual against its twin of other proportions, AUC", "stranger_auc": "same individual against others of its class, AUC",
}  # fmt: skip


_ENDS = {"value": "", "low": "_low", "high": "_high", "n": "_n"}  # how `examine` names a share's parts


def training_of(log: list[dict[str, Any]]) -> dict[str, Any]:
    """A training in short, from its run's log."""
    start = next(line for line in log if line["stage"] == "start")
    last = [line for line in log if line["stage"] == "judge"][-1]
    batch = start["families"] * VIEWS
    return {
        "families": start["drawn"],
        "steps": last["step"],
        "batch": batch,
        "pictures": last["step"] * batch,
        "minutes": round(last["seconds"] / 60),
        "hardware": start["hardware"],
        "learning_rate": start["learning_rate"],
        "corrupted": start["corrupted"],
    }


def read_trainings() -> list[dict[str, Any]]:
    """The trainings (`training_of`) that the shipped judge has been through, in order."""
    return json.loads((SHIPPED.parent / TRAININGS).read_text())


def _share(figures: dict[str, float], name: str) -> str:
    """A figure of `examine`, with its interval and what it was counted over where it has them."""
    if f"{name}_n" not in figures:
        return f"{figures[name]:.1%}"
    return _with_interval({key: figures[f"{name}{end}"] for key, end in _ENDS.items()})


def _with_interval(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.1%} [{figure['low']:.1%}, {figure['high']:.1%}] of {figure['n']:,}"


def facing_section(path: Path) -> str:
    """What the card tells of the head for the facing, from its `facing.json`; nothing where there is none."""
    if not path.exists():
        return ""
    told = json.loads(path.read_text())
    training, figures = told["training"], told["figures"]
    classes = ", ".join(f"{kind} {figures[kind]['value']:.1%}" for kind in ONE_SIDED if kind in figures)
    return f"""
## Facing
Which way a subject faces is told by a head of its own on the judge's features (`facing.safetensors`), for classes whose outline is another one
in the mirror. Read at the true centres of fresh scenes, where the picture shows it at all, it is right for {_with_interval(figures["clean"])} subjects ({classes}); of
autoencoded pictures for {_with_interval(figures["autoencoded"])}, and where it says something of those for {_with_interval(figures["told"])}, which is {figures["believed"]["value"]:.1%} of them.
{training["steps"]:,} steps of {training["batch"]} of {training["scenes"]:,} scenes, {training["minutes"]} min on {training["hardware"]}
(`python -m infusion.world.facing_training --folder runs/facing --minutes {training["minutes"]}`).
"""


def judge_card(
    trainings: list[dict[str, Any]], figures: dict[str, dict[str, float]], path: Path, facing: str = ""
) -> str:
    """The judge's model card in Markdown, from the trainings gone through and its figures; facing: a section of its own at the end."""
    rows = [
        f"| {label} | {_share(figures['clean'], name)} | {figures['autoencoded'][name]:.1%} | "
        + (f"{figures['told'][name]:.1%} of {figures['told'][name + '_told']:.1%}" if name in figures["told"] else "")
        + " |"
        for name, label in _NAMES.items()
    ]
    pictures, minutes = (sum(t[key] for t in trainings) for key in ("pictures", "minutes"))
    corrupted = trainings[-1]["corrupted"]
    parts = "; then ".join(
        f"{t['pictures']:,} pictures ({t['steps']:,} steps of {t['batch']}, {t['minutes']} min on {t['hardware']}, learning rate {t['learning_rate']:g}) of {t['families']:,} families of {VIEWS}"
        for t in trainings
    )
    return f"""# The judge

Reads background and style of a picture of the world, and for each subject class, two colours, pattern, accessory, place and an
embedding of the individual. What it is not sure of it does not say ("cannot tell"). It knows this world and nothing else; the same hands
made world, judge, base and methods.

| | |
|---|---|
| file | `{path.name}`, {path.stat().st_size:,} bytes, fp16 safetensors, SHA-256 `{digest_of(path)}` |
| trained on | {pictures:,} pictures seen: {parts}; half of them mirrored, {corrupted:.0%} autoencoded, blurred or noised, {corrupted / 2:.0%} warped |
| wall time | {minutes:.0f} min beside other work |
| train one like it | `python -m infusion.world.judge_training --folder runs/judge --drawn {sum(t["families"] for t in trainings)} --minutes {minutes:.0f}` |

On {figures["clean"]["pictures"]:.0f} fresh pictures of families it never saw, counting what a picture shows at all (with any other value of the attribute the
picture would differ by 6 % of full brightness over some 4x4 pixels), with Wilson's 95 % intervals. "Told" is on autoencoded pictures: right where it says something, and how often it does.

| | as drawn | autoencoded | told: right, of |
|---|---|---|---|
{chr(10).join(rows)}

Twins differ in one attribute, or in their proportions alone; {figures["clean"]["twins"]:.0f} pairs in an attribute that both pictures show. Whether two
are one individual is told by the heads whose beliefs differ (how much likelier they are of two individuals that the world drew than of one) and by the embedding's cosine. Every picture is looked at in six views: as it is and a pixel up and down, each mirrored too. "Likeness" in reports and benchmarks is that cosine alone.
{facing}"""


def all_figures(judge: Judge, data: Families, autoencoder: AutoencoderKL) -> dict[str, dict[str, float]]:
    """What the card tells: "clean" and "autoencoded" (`examine`), "told" (`examine_told`)."""
    network, weight = judge.network, judge.thresholds["embedding"]
    return {
        "clean": examine(network, data, weight),
        "autoencoded": examine(network, data, weight, autoencoder),
        "told": examine_told(judge, data, autoencoder),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--families", type=int, default=256, help=f"of {VIEWS} pictures each; 64 take some minutes")
    parser.add_argument("--seed", type=int, required=True, help="one that no training and no choice was made on")
    args = parser.parse_args()
    drawn = args.folder / f"families-{args.seed}"  # of another seed they are others
    for _ in build_families(drawn, args.families, args.seed, strict=True):
        pass
    figures = all_figures(load_judge(), load_families(drawn), shipped_autoencoder().requires_grad_(False))
    (args.folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    facing = facing_section(SHIPPED.parent / FIGURES) if load_judge().facing else ""
    (args.folder / "README.md").write_text(judge_card(read_trainings(), figures, SHIPPED, facing))


if __name__ == "__main__":
    main()
