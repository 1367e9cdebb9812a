"""Perfusion (arXiv 2305.01644): gated rank-one edits of cross-attention's keys and values, keys locked to the class.

For a text state e, the concept's state i* and C = E[e e^T] over common captions, every key and value projection W gives

    sim(e) = i*^T C^-1 e / (i*^T C^-1 i*)
    h = W e - sim(e) W i* + sigmoid((sim(e) - beta) / tau) o*                (equation 3)

For keys o* = W i_class, the class word's own key; for values o* is learned, one vector a layer, beside the new word's
embedding. The loss counts the subject's mask only. i* is a running mean with a straight-through gradient, as in
lucidrains' perfusion-pytorch; the authors released no code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from infusion.config import hold_types
from infusion.lesson import Lesson
from infusion.methods.interface import MethodState, check_precision
from infusion.methods.textual_inversion import WordEmbedding
from infusion.methods.tokens import NewWord
from infusion.streams import execution_device, frozen, projections, require_unet


@dataclass(frozen=True)
class PerfusionConfig:
    """steps x batch samples are seen. Learning rates, beta and tau are the paper's; beta and tau for drawing lie between
    its local and global key locking."""

    steps: int = 200
    batch: int = 8
    learning_rate: float = 0.03
    embedding_rate: float = 0.006
    beta: float = 0.75
    tau: float = 0.1
    drawing_beta: float = 0.7
    drawing_tau: float = 0.15
    decay: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        hold_types(self)


@dataclass
class Edit:
    """The edit of all layers: `direction` i* (d,), `inverse` C^-1 (d, d), `outputs` o* by the projection's path."""

    direction: Tensor
    inverse: Tensor
    outputs: Mapping[str, Tensor]
    beta: float
    tau: float

    @contextmanager
    def on(self, unet: nn.Module) -> Iterator[None]:
        """Within it, every key and value projection of the UNet's cross-attention is edited."""

        def edited(path: str):
            def hook(layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return rank_one(
                    args[0], output, layer.weight, self.direction, self.inverse, self.outputs[path], self.beta, self.tau
                )

            return hook

        handles = [layer.register_forward_hook(edited(path)) for path, layer in projections(unet).items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def rank_one(
    states: Tensor, output: Tensor, weight: Tensor, i: Tensor, inverse: Tensor, o: Tensor, beta: float, tau: float
) -> Tensor:
    """Equation 3. states e (b, m, d), output W e (b, m, c), weight W (c, d), i* (d,), C^-1 (d, d), o* (c,)."""
    sim = (states.float() @ inverse @ i / (i @ inverse @ i)).unsqueeze(-1)  # (b, m, 1), in float32 as C^-1 wants it
    return output + (torch.sigmoid((sim - beta) / tau) * o - sim * (weight.float() @ i)).to(output.dtype)


@dataclass(frozen=True)
class Perfused:
    """The new word and its edit; `subject` is "a <milo>"."""

    subject: str
    word: WordEmbedding
    edit: Edit
    class_state: Tensor
    config: PerfusionConfig

    def tensors(self) -> Mapping[str, Tensor]:
        """Embedding, i*, the class word's state (from which the keys follow) and the values' outputs. C^-1 belongs to the base."""
        values = {path: o.detach() for path, o in self.edit.outputs.items() if path.endswith("to_v")}
        return {**self.word.tensors(), "direction": self.edit.direction, "class_state": self.class_state, **values}

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """A pipeline with the word, on the same UNet, which is edited within the block."""
        outputs = {path: o.detach() for path, o in self.edit.outputs.items()}
        edit = Edit(self.edit.direction, self.edit.inverse, outputs, self.config.drawing_beta, self.config.drawing_tau)
        with torch.no_grad(), edit.on(require_unet(pipe)), self.word.attached(pipe) as custom:
            yield custom


def perfusion(
    pipe: DiffusionPipeline, lesson: Lesson, config: PerfusionConfig | None = None, corpus: Sequence[str] = ()
) -> Iterator[MethodState]:
    """Learn word and edit, yielding after every step. corpus: common captions for C, thousands of them; the paper takes
    100,000. Without it C comes from the lesson's own captions, which tells words apart poorly."""
    config = config or PerfusionConfig()
    check_precision(pipe)
    unet = require_unet(pipe)
    word = NewWord(pipe, lesson.name, lesson.word)
    ids = word.token_ids([t.format(word.token) for t in lesson.templates])
    inverse = inverse_covariance(pipe, corpus or [t.format(lesson.word) for t in lesson.templates])
    class_state = _class_state(lesson)
    layers = projections(unet)
    outputs = {path: layer.weight.detach().float() @ class_state for path, layer in layers.items()}
    learned = {path: nn.Parameter(o.clone()) for path, o in outputs.items() if path.endswith("to_v")}
    outputs.update(learned)
    optimizer = torch.optim.Adam(
        [
            {"params": list(learned.values()), "lr": config.learning_rate},
            {"params": [word.embedding], "lr": config.embedding_rate},
        ]
    )
    generator = torch.Generator().manual_seed(config.seed)
    edit = Edit(class_state.clone(), inverse, outputs, config.beta, config.tau)
    adapter = Perfused(f"a {word.token}", WordEmbedding(word.token, word.embedding), edit, class_state, config)
    trained = [*learned.values(), word.embedding]
    with frozen(unet):
        for step in range(1, config.steps + 1):
            draw = lesson.draw(config.batch, generator)
            rows = ids[draw.captions]
            states = word.states(rows)
            now = states[rows == word.id].mean(0).float()
            mean = now.detach() if step == 1 else config.decay * edit.direction + (1 - config.decay) * now.detach()
            edit.direction = mean + now - now.detach()  # forward the running mean, backward the batch's own state
            with edit.on(unet):
                kwargs = {**draw.kwargs, "encoder_hidden_states": states}
                prediction = unet(draw.noisy, draw.timesteps, **kwargs).sample
            loss = (draw.mask.float() * (prediction.float() - draw.target.float()).square()).mean()
            for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                parameter.grad = gradient
            optimizer.step()
            edit.direction = mean
            yield MethodState(step, config.steps, float(loss.detach()), adapter)


@torch.no_grad()
def inverse_covariance(
    pipe: DiffusionPipeline, captions: Sequence[str], ridge: float = 1e-3, batch: int = 64
) -> Tensor:
    """(E[e e^T] + ridge x its mean eigenvalue)^-1 over the captions' tokens, padding left out: (d, d) float32."""
    tokenizer, encoder, device = pipe.tokenizer, pipe.text_encoder, execution_device(pipe)
    total, count = 0.0, 0
    for i in range(0, len(captions), batch):
        encoded = tokenizer(list(captions[i : i + batch]), padding="max_length", truncation=True, return_tensors="pt")
        states = encoder(encoded["input_ids"].to(device))[0].cpu().double()  # MPS has no float64
        real = states[encoded["attention_mask"].bool()]
        total, count = total + real.T @ real, count + len(real)
    covariance = torch.as_tensor(total) / count
    shrink = ridge * covariance.trace() / len(covariance) * torch.eye(len(covariance))
    return torch.linalg.inv(covariance + shrink).float().to(device)


def _class_state(lesson: Lesson) -> Tensor:
    """The class word's text state, mean over its tokens and the lesson's captions: (d,) float32."""
    rows = [
        lesson.texts.states[k, list(mention.positions)].mean(0)
        for k, mentions in enumerate(lesson.texts.mentions)
        for mention in mentions
    ]
    return torch.stack(rows).mean(0).float()
