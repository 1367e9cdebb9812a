"""The judge: reads from a picture what it shows, and whether two pictures show the same individual.

A small convolutional network over 16x16 cells, trained on scenes of known truth (`judge_training.py`). For the picture: background
and style. For every subject found at a peak of its heatmap: class, both colours, pattern, accessory, position and an
embedding. A head that is not sure says nothing: "cannot tell" is None.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infusion.world.facing import FILE as FACING_FILE
from infusion.world.facing import Facing
from infusion.world.models import half_weights, pixels_to_tensor
from infusion.world.truth import COLORED, SCENE_HEADS, SHARES, SUBJECT_HEADS
from infusion.world.vocabulary import POSITIONS

GRID = 16  # cells a side
EMBEDDING = 48
SHIPPED = Path(__file__).parent / "weights" / "judge" / "judge.safetensors"
FOUND = 0.35  # height of the heatmap above which a peak is a subject
MAX_SUBJECTS = 3


@dataclass(frozen=True)
class SubjectReading:
    """One subject: names as in `vocabulary`, None for what cannot be told; centre x and y in [0, 1], `found` the height of
    its peak, `facing` "left" or "right", a unit `embedding` (EMBEDDING,) whose cosine tells how alike individuals are, and `beliefs`, each head's probabilities."""

    kind: str | None
    color1: str | None
    color2: str | None
    pattern: str | None
    accessory: str | None
    x: float
    y: float
    found: float
    embedding: Tensor
    beliefs: Mapping[str, Tensor] = field(default_factory=dict)
    facing: str | None = None

    @property
    def position(self) -> str:
        """ "left", "center" or "right": the third of the frame that holds the centre."""
        return POSITIONS[min(2, int(self.x * 3))]


@dataclass(frozen=True)
class Reading:
    """What a picture shows; `subjects` from the surest peak down."""

    background: str | None
    style: str | None
    subjects: tuple[SubjectReading, ...]


@dataclass(frozen=True)
class Maps:
    """The network's output for b pictures: logits of each head, `heat` (b, g, g) logits, `embedding` (b, e, g, g)."""

    heat: Tensor
    subject: dict[str, Tensor]  # (b, names, g, g)
    scene: dict[str, Tensor]  # (b, names)
    embedding: Tensor


class JudgeNetwork(nn.Module):
    """64x64 pictures to `Maps`: three halvings, features of 8x8 brought back to 16x16, a 1x1 head for each attribute."""

    def __init__(self, widths: tuple[int, int, int, int] = (24, 48, 96, 160)) -> None:
        super().__init__()
        a, b, c, d = widths
        self.stem = nn.Sequential(nn.Conv2d(3, a, 3, padding=1), nn.GroupNorm(8, a), nn.SiLU())
        self.down1 = nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), Residual(b))
        self.down2 = nn.Sequential(nn.Conv2d(b, c, 3, 2, 1), Residual(c), Residual(c))
        self.down3 = nn.Sequential(nn.Conv2d(c, d, 3, 2, 1), Residual(d), Residual(d))
        self.back = nn.Conv2d(d, c, 1)
        self.merge = Residual(c)
        self.heat = nn.Conv2d(c, 1, 1)
        self.subject = nn.ModuleDict({name: nn.Conv2d(c, len(names), 1) for name, names in SUBJECT_HEADS.items()})
        self.embedding = nn.Sequential(nn.Conv2d(c, d, 1), nn.SiLU(), nn.Conv2d(d, EMBEDDING, 1))
        self.scene = nn.ModuleDict({name: nn.Linear(c + d, len(names)) for name, names in SCENE_HEADS.items()})

    def features(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Of pictures (b, 3, 64, 64) in [-1, 1]: (b, c, 16, 16), which each subject's heads read, and (b, d, 8, 8)."""
        fine = self.down2(self.down1(self.stem(pictures)))
        coarse = self.down3(fine)
        return self.merge(fine + F.interpolate(self.back(coarse), scale_factor=2.0, mode="nearest")), coarse

    def forward(self, pictures: Tensor) -> Maps:
        """pictures (b, 3, 64, 64) in [-1, 1]."""
        x, coarse = self.features(pictures)
        whole = torch.cat([x.mean((2, 3)), coarse.mean((2, 3))], 1)
        return Maps(
            heat=self.heat(x)[:, 0],
            subject={name: head(x) for name, head in self.subject.items()},
            scene={name: head(whole) for name, head in self.scene.items()},
            embedding=F.normalize(self.embedding(x).float(), dim=1),
        )


def look(network: nn.Module, pictures: Tensor) -> Maps:
    """What the network makes of pictures (b, 3, 64, 64) in six views, as they are and a pixel up and down, each mirrored too and turned
    back: the mean of logits and embeddings. It reads better so than from one alone, since its errors differ from view to view."""
    padded = F.pad(pictures, (0, 0, 1, 1), mode="replicate")
    seen = []
    for row in range(3):
        moved = padded[:, :, row : row + pictures.shape[2]]
        seen += [network(moved), _turned(network(moved.flip(-1)))]
    mean = lambda parts: torch.stack(list(parts)).mean(0)  # noqa: E731
    return Maps(
        heat=mean(m.heat for m in seen),
        subject={name: mean(m.subject[name] for m in seen) for name in seen[0].subject},
        scene={name: mean(m.scene[name] for m in seen) for name in seen[0].scene},
        embedding=F.normalize(mean(m.embedding for m in seen), dim=1),
    )


def _turned(maps: Maps) -> Maps:
    """Maps of mirrored pictures, turned back."""
    subject = {name: logits.flip(-1) for name, logits in maps.subject.items()}
    return Maps(maps.heat.flip(-1), subject, maps.scene, maps.embedding.flip(-1))


class Residual(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))))))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Judge:
    """A network with its calibration, and a head for the facing where there is one: `thresholds` give, for each head, the probability from
    which it is believed; "same" the evidence from which two subjects are one individual, to which the embeddings' cosine adds "embedding" times itself."""

    def __init__(
        self, network: JudgeNetwork, thresholds: dict[str, float] | None = None, facing: Facing | None = None
    ) -> None:
        self.network = network.eval()
        self.thresholds = thresholds or {}
        self.facing = facing

    @torch.no_grad()
    def read(self, pixels: Tensor, batch: int = 64) -> list[Reading]:
        """Read pictures (n, 64, 64, 3) uint8."""
        device = next(self.network.parameters()).device
        if self.facing:
            self.facing.head.to(device)
        readings = []
        for part in pixels.split(batch):
            pictures = pixels_to_tensor(part).to(device)
            maps = look(self.network, pictures)
            left = self.facing.logits(self.fine, pictures) if self.facing else None
            readings += [self._reading(maps, b, left) for b in range(len(part))]
        return readings

    def fine(self, pictures: Tensor) -> Tensor:
        """The features (b, c, 16, 16) of pictures (b, 3, 64, 64) in [-1, 1] that the heads of each subject read."""
        return self.network.features(pictures)[0]

    def same(self, a: SubjectReading, b: SubjectReading) -> bool:
        """Whether two subjects are one individual: by what each head believes, and by the embedding."""
        weight = self.thresholds.get("embedding", 0.0)
        return float(evidence(a.beliefs, b.beliefs) + weight * (a.embedding @ b.embedding)) >= self.thresholds.get(
            "same", 0.0
        )

    def save(self, path: Path) -> Path:
        """Weights in fp16 and thresholds, one safetensors file."""
        metadata = {"thresholds": json.dumps(self.thresholds, sort_keys=True)}
        save_file(half_weights(self.network), path, metadata=metadata)
        return path

    @classmethod
    def load(cls, path: Path) -> Judge:
        """A judge from its file, with the facing's beside it if there is one. Raises FileNotFoundError where there is none."""
        from safetensors import safe_open

        network = JudgeNetwork()
        network.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        with safe_open(path, framework="pt") as file:
            thresholds = json.loads((file.metadata() or {}).get("thresholds", "{}"))
        return cls(network, thresholds, Facing.load(path.with_name(FACING_FILE), digest_of(path)))

    def _reading(self, maps: Maps, b: int, left: Tensor | None) -> Reading:
        scene = {name: self._name(name, SCENE_HEADS[name], maps.scene[name][b]) for name in SCENE_HEADS}
        hidden = () if scene["style"] in (None, *COLORED) else ("color1", "color2")  # a sketch shows none
        subjects = []
        for y, x, height in peaks(maps.heat[b]):
            believed = beliefs(maps, torch.tensor([b]), torch.tensor([y]), torch.tensor([x]))
            named = {
                name: None if name in hidden else self._name(name, SUBJECT_HEADS[name], maps.subject[name][b, :, y, x])
                for name in SUBJECT_HEADS
            }
            cx, cy = centre(maps.heat[b], y, x)
            subjects.append(
                SubjectReading(
                    **named,
                    x=cx,
                    y=cy,
                    found=height,
                    embedding=maps.embedding[b, :, y, x].cpu(),
                    beliefs={name: p[0].cpu() for name, p in believed.items()},
                    facing=self.facing.name(named["kind"], left[b, y, x]) if self.facing and left is not None else None,
                )
            )
        return Reading(**scene, subjects=tuple(subjects))

    def _name(self, head: str, names: Sequence[str], logits: Tensor) -> str | None:
        probability, index = logits.float().softmax(0).max(0)
        return names[int(index)] if float(probability) >= self.thresholds.get(head, 0.0) else None


def beliefs(maps: Maps, rows: Tensor, ys: Tensor, xs: Tensor) -> dict[str, Tensor]:
    """Probabilities (n, names) of each of a subject's heads at cells (rows, ys, xs); the world's own shares for colours in a picture whose
    style seems to show none."""
    colored = torch.tensor([style in COLORED for style in SCENE_HEADS["style"]], device=maps.heat.device)
    hidden = ~colored[maps.scene["style"][rows].argmax(1)]
    found = {name: logits[rows, :, ys, xs].float().softmax(1) for name, logits in maps.subject.items()}
    for name in ("color1", "color2"):
        found[name] = torch.where(hidden[:, None], found[name].new_tensor(SHARES[name]), found[name])
    return found


def evidence(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """What beliefs (..., names) of a subject's heads say against one individual: the log of how much likelier they are of one than of two
    that the world drew, summed over the heads where it is below 0. Agreement says nothing: a twin agrees in all but one."""
    ratios = [(a[name] * b[name] / a[name].new_tensor(shares)).sum(-1) for name, shares in SHARES.items()]
    return torch.stack(ratios).clamp(1e-3, 1).log().sum(0)


@cache
def load_judge() -> Judge:
    """The shipped judge. Raises FileNotFoundError where its weights are missing."""
    return Judge.load(SHIPPED)


def shipped_judge() -> Judge | None:
    """The shipped judge, or None where its weights are missing."""
    try:
        return load_judge()
    except FileNotFoundError:
        return None


def judge_digest() -> str:
    """SHA-256 of the shipped judge's file."""
    return digest_of(SHIPPED)


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def peaks(heat: Tensor) -> list[tuple[int, int, float]]:
    """Local maxima (row, column, probability) of heat logits (g, g) above `FOUND`, highest first, at most MAX_SUBJECTS."""
    p = heat.float().sigmoid()
    highest = F.max_pool2d(p[None, None], 5, 1, 2)[0, 0]
    found = torch.nonzero((p == highest) & (p >= FOUND)).tolist()
    return sorted(((y, x, float(p[y, x])) for y, x in found), key=lambda f: -f[2])[:MAX_SUBJECTS]


def centre(heat: Tensor, y: int, x: int) -> tuple[float, float]:
    """The peak's centre (x, y) in [0, 1], to a fraction of a cell: centre of mass of the 3x3 cells around it."""
    p = heat.float().sigmoid()
    rows, columns = slice(max(0, y - 1), y + 2), slice(max(0, x - 1), x + 2)
    window = p[rows, columns]
    ys = torch.arange(rows.start, rows.start + window.shape[0], device=p.device)[:, None] + 0.5
    xs = torch.arange(columns.start, columns.start + window.shape[1], device=p.device)[None] + 0.5
    total = window.sum()
    return float((window * xs).sum() / total) / GRID, float((window * ys).sum() / total) / GRID
