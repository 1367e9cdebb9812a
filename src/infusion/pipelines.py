"""Attach concepts to a stock diffusers pipeline, reversibly.

All attachments to one UNet share one session: its streams, and every pipeline built on that UNet, also
siblings made with `from_pipe` before or meanwhile. In each of them `encode_prompt` is replaced, on
the instance, by one that understands `<name>`, and `maybe_free_model_hooks` by one that knows the call is over; while anything is
attached, diffusers' `register_modules` tells us of new siblings. The last detach takes everything back.
A call belongs to the thread that encodes its prompt, so pipelines on one UNet may draw at once.
"""

from __future__ import annotations

import functools
import gc
import inspect
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from infusion.concept import Concept
from infusion.errors import InfusionError, InfusionWarning
from infusion.fit import check_fits
from infusion.prompts import Mention, Parsed, parse, refuse_in_negative, slips
from infusion.streams import Plan, Rows, Streams, execution_device, require_unet, unwrapped

MAX_CALLS = 16  # kept; a call that broke off leaves its entry


def attach(
    pipe: DiffusionPipeline,
    *concepts: Concept,
    two_streams: bool = True,
    strength: Mapping[str, float] | None = None,
) -> Attachment:
    """Let a stock pipeline understand the concepts' names in its prompts.

        with infusion.attach(pipe, milo, rex):
            pipe("a photo of <milo> next to <rex> on the beach").images[0]

    two_streams: maps from the foundational stream, as in the paper; False takes them from the
    customized stream itself (cheaper, for comparison); of nested attachments the innermost decides for all. strength: concept name -> factor on its residual,
    beside `<name:0.7>` in a prompt; both multiply.

    Calls without a `<name>` are the base model's, bit for bit. Threads may draw at once, each with a pipeline and a scheduler of its own
    on the UNet; attach and detach while none draws, or what is under way may change. Returns an `Attachment`, which ends with its
    `with` block or with `detach()`. Raises InfusionError for a concept of another architecture, for
    two concepts of one name, and for pipelines that have no cross-attention; warns where the
    architecture fits but the weights are others than the concept was learned on.
    """
    if not concepts:
        raise InfusionError("attach needs at least one concept; load one with infusion.Concept.load(path).")
    return Attachment(pipe, concepts, two_streams, strength or {})


@torch.no_grad()
def encode(pipe: DiffusionPipeline, prompt: str | list[str], **kwargs: Any) -> dict[str, Tensor]:
    """Encode prompts with `<name>` for those who pass `prompt_embeds` themselves; without gradients.

        with infusion.attach(pipe, milo):
            states = infusion.encode(pipe, ["a <milo>", "a cat"], negative_prompt="blurry")
            pipe(**states).images

    Further arguments are those of the pipeline's `encode_prompt`; a single negative prompt holds for all. Returns the keyword arguments for the
    pipeline's call. The tensors are recognized by identity: pass them on as they are; a copy, and what was made elsewhere, is drawn without a concept, with a warning.
    """
    session = _Session.open.get(id(require_unet(pipe)))
    if session is None:
        raise InfusionError("encode needs attached concepts; call it inside `with infusion.attach(pipe, concept):`.")
    given = {
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": True,
        **kwargs,
    }
    negative = given.get("negative_prompt")
    if isinstance(prompt, list) and isinstance(negative, str):  # Stable Diffusion's own wants as many
        given["negative_prompt"] = [negative] * len(prompt)
    encoded = pipe.encode_prompt(prompt, **given)
    session.ended(pipe)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {name: states for name, states in zip(names, encoded, strict=False) if states is not None}


class Attachment:
    """Concepts attached to a pipeline: a context manager, and a handle with `detach()`."""

    def __init__(
        self, pipe: DiffusionPipeline, concepts: Sequence[Concept], two_streams: bool, strength: Mapping[str, float]
    ) -> None:
        unet = require_unet(pipe)
        if not hasattr(pipe, "encode_prompt"):
            raise InfusionError(
                f"{type(pipe).__name__} does not encode its prompts itself; concepts know pipelines with encode_prompt, not yet modular ones."
            )
        check_fits(concepts, unet)
        names = [c.name for c in concepts]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise InfusionError(
                f"Two concepts are named {twice[0]!r}; rename one, for example with dataclasses.replace(concept, name=...)."
            )
        if unknown := sorted(set(strength) - set(names)):
            raise InfusionError(
                f"strength names {unknown[0]!r}, which is not attached here; attached: {', '.join(names)}."
            )
        if wild := [f"{name}: {value}" for name, value in strength.items() if not math.isfinite(value)]:
            raise InfusionError(f"strength is {wild[0]}; give finite numbers, usually 0 to 1.")
        self.concepts = {c.name: c for c in concepts}
        self.two_streams, self.strength = two_streams, dict(strength)
        self._session = _Session.of(unet)
        self._session.adopt(pipe)
        self._session.add(self)

    @property
    def streams(self) -> Streams:
        """The streams of the pipeline's UNet. Raises InfusionError after `detach`."""
        if self not in self._session.attachments:
            raise InfusionError("Nothing is attached any more; attach the concepts again.")
        return self._session.streams

    @property
    def alone(self) -> bool:
        """Whether nothing else is attached to the pipeline's UNet."""
        return self._session.attachments == [self]

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Undo the attachment; calling it again does nothing."""
        self._session.drop(self)


_REPLACED = ("encode_prompt", "maybe_free_model_hooks")


class _Session:
    """Everything attached to one UNet."""

    open: ClassVar[dict[int, _Session]] = {}  # id of the UNet -> its session, as long as something is attached
    encoding: ClassVar = threading.RLock()  # pipelines share tokenizers, which hold state while they work
    # What was encoded, where concepts stand in it and for which class words, by UNet: known in later sessions too, as long as the states are alive.
    encoded: ClassVar[WeakKeyDictionary[nn.Module, WeakTensorKeyDictionary]] = WeakKeyDictionary()

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.streams = Streams(unet)
        self.attachments: list[Attachment] = []
        # The pipelines that understand names -> what each had of _REPLACED itself, not from its class. A server may build one for every request.
        self.own: WeakKeyDictionary[DiffusionPipeline, dict[str, Any]] = WeakKeyDictionary()

    @classmethod
    def of(cls, unet: nn.Module) -> _Session:
        """The UNet's session, opened where there is none."""
        session = cls.open.get(id(unet))
        if session is None:
            session = cls.open[id(unet)] = cls(unet)
            for sibling in _pipelines_on(unet):
                session.adopt(sibling)
            _watch_new_pipelines(True)
        return session

    def add(self, attachment: Attachment) -> None:
        self.attachments.append(attachment)
        self._refresh()

    def drop(self, attachment: Attachment) -> None:
        if attachment not in self.attachments:
            return
        self.attachments.remove(attachment)
        self._refresh()
        if self.attachments:
            return
        self.streams.remove()
        for pipe, own in self.own.items():
            for method in _REPLACED:
                pipe.__dict__.pop(method, None)
            pipe.__dict__.update(own)
        del self.open[id(self.unet)]
        _watch_new_pipelines(bool(self.open))

    def adopt(self, pipe: DiffusionPipeline) -> None:
        """Let `pipe` understand names from now on."""
        if pipe in self.own or not hasattr(pipe, "encode_prompt"):
            return
        self.own[pipe] = {method: pipe.__dict__[method] for method in _REPLACED if method in pipe.__dict__}
        stock = pipe.encode_prompt
        # The class's, for the arguments' names: a method of the pipeline's own may take (*args, **kwargs).
        signature = inspect.signature(functools.partial(type(pipe).encode_prompt, pipe))

        @functools.wraps(stock)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            with self.encoding:
                return self.encode(pipe, call, lambda: _called(stock, call, len(args)))

        free = pipe.maybe_free_model_hooks

        @functools.wraps(free)
        def maybe_free_model_hooks() -> None:  # the last thing that a stock pipeline's call does
            free()
            plan = self.ended(pipe)
            if plan is not None:
                self._check_followed(plan)

        pipe.encode_prompt, pipe.maybe_free_model_hooks = encode_prompt, maybe_free_model_hooks

    def begun(self, plan: Plan) -> None:
        """A call of the plan's caller follows it until it ends; a call inside it, by a callback, is another."""
        here = self.streams.here
        here.plans = [*here.plans[-MAX_CALLS:], plan]

    def ended(self, pipe: DiffusionPipeline) -> Plan | None:
        """The innermost call of `pipe` is over, and with it those inside that never ended. Returns its plan if it names a concept."""
        here = self.streams.here
        for i in reversed(range(len(here.plans))):
            if (plan := here.plans[i]).caller is pipe:
                here.plans = here.plans[:i]
                return plan if any(plan.rows) else None
        return None

    def _check_followed(self, plan: Plan) -> None:
        """Raise InfusionError where no UNet call followed the plan of a call that is over, warn where some did not."""
        names = ", ".join(sorted({f"<{m.name}>" for row in plan.rows for m in row}))
        if plan not in self.streams.met:
            raise InfusionError(
                f"{names} was in the prompt, but no UNet call had the prompt's text states, unconditional rows first; "
                "do not change prompt_embeds on the way, or attach to a stock pipeline."
            )
        if plan not in self.streams.heard:
            warnings.warn(
                f"{names} was in the prompt, but no step of the drawing lies below the timestep from which on it is left to the base "
                f"({max(self.streams.limits.values())} at most), so it was drawn without it; draw in more steps, or learn it with max_timestep=1000.",
                InfusionWarning,
                stacklevel=4,
            )
        if plan in self.streams.strayed:
            warnings.warn(
                f"{names} was in the prompt, but some UNet calls had other text states and were made without it; "
                "do not change prompt_embeds on the way.",
                InfusionWarning,
                stacklevel=4,
            )

    def encode(self, pipe: DiffusionPipeline, call: inspect.BoundArguments, stock: Callable[[], Any]) -> Any:
        """Encode a prompt with `stock`, the pipeline's own method with the arguments of `call`, names replaced, and plan the rows."""
        result, rows = self._encoded(pipe, call, stock)
        given = call.arguments
        if given.get("prompt_embeds") is None and isinstance(result[0], Tensor):
            known = self.encoded.setdefault(self.unet, WeakTensorKeyDictionary())
            known[result[0]] = (rows, self._words())
        if isinstance(result[0], Tensor):  # a call without a concept has a plan too: it may run inside one that has
            carried = tuple(self._weighted(row) for row in rows) or ((),) * len(result[0])
            self.begun(Plan(carried, result[0], given.get("do_classifier_free_guidance"), pipe))
        return result

    def _encoded(
        self, pipe: DiffusionPipeline, call: inspect.BoundArguments, stock: Callable[[], Any]
    ) -> tuple[Any, Rows]:
        """What the pipeline's own method makes of the prompt without names, and the mentions of its rows."""
        given = call.arguments
        words = self._words()
        for key in ("negative_prompt", "negative_prompt_2"):
            for text in _as_list(given.get(key)):
                refuse_in_negative(text, words)
        copies = given.get("num_images_per_prompt", 1)
        if given.get("prompt_embeds") is not None:
            rows = self._rows_of(given["prompt_embeds"])
            return stock(), tuple(row for row in rows for _ in range(copies))
        for text in dict.fromkeys([*_as_list(given.get("prompt")), *_as_list(given.get("prompt_2"))]):
            for slip in slips(text, words):
                warnings.warn(slip, InfusionWarning, stacklevel=4)
        parsed = _parse(pipe, given.get("prompt"), words, "tokenizer")
        parsed_2 = _parse(pipe, given.get("prompt_2") or given.get("prompt"), words, "tokenizer_2")
        if not any(p.mentions for p in (*parsed, *parsed_2)):
            return stock(), ()
        if parsed_2 and [p.mentions for p in parsed] != [p.mentions for p in parsed_2]:
            raise InfusionError(
                "prompt and prompt_2 must name the same concepts at the same places; leave prompt_2 out, or begin both alike."
            )
        for key, texts in (("prompt", parsed), ("prompt_2", parsed_2)):
            if given.get(key) is not None:
                given[key] = texts[0].text if isinstance(given[key], str) else [p.text for p in texts]
        return stock(), tuple(p.mentions for p in parsed for _ in range(copies))

    def _rows_of(self, states: Tensor) -> Rows:
        """The rows of states that were encoded here; others carry no concept. Raises InfusionError for one that is detached by now, or another
        of that name."""
        known, attached = self.encoded.get(self.unet, {}), self._words()
        if states not in known:
            said = _without(states, [(ours, rows) for ours, (rows, _) in known.items()], attached)
            if said:
                warnings.warn(said, InfusionWarning, stacklevel=5)
            return ()
        rows, words = known[states]
        for name in sorted({m.name for row in rows for m in row}):
            if name not in attached:
                raise InfusionError(f"prompt_embeds were encoded with <{name}>, which is detached; attach it again.")
            if attached[name] != words[name]:
                raise InfusionError(
                    f"prompt_embeds were encoded with <{name}> for {words[name]!r}, which stands for {attached[name]!r} by now; encode the prompt again."
                )
        return rows

    def _words(self) -> dict[str, str]:
        """The class word that each attached name stands for."""
        return {name: c.word for a in self.attachments for name, c in a.concepts.items()}

    def _refresh(self) -> None:
        """Later attachments go before earlier ones of the same name."""
        alive = next(iter(self.own), None)
        device = execution_device(alive) if alive else next(self.unet.parameters()).device
        last = {name: c for a in self.attachments for name, c in a.concepts.items()}
        self.streams.residuals = {
            name: {path: r.to(device) for path, r in c.residuals.items()} for name, c in last.items()
        }
        self.streams.limits = {name: c.max_timestep for name, c in last.items() if c.max_timestep}
        self.streams.two_streams = all(a.two_streams for a in self.attachments[-1:])

    def _weighted(self, mentions: tuple[Mention, ...]) -> tuple[Mention, ...]:
        factors = {n: a.strength.get(n, 1.0) for a in self.attachments for n in a.concepts}
        return tuple(Mention(m.name, m.strength * factors[m.name], m.positions) for m in mentions)


def _parse(pipe: DiffusionPipeline, prompt: Any, words: Mapping[str, str], tokenizer_name: str) -> list[Parsed]:
    tokenizer = getattr(pipe, tokenizer_name, None)
    if tokenizer is None:
        return []
    convert = getattr(pipe, "maybe_convert_prompt", None)
    conversion = (lambda text: convert(text, tokenizer)) if convert else str
    return [parse(text, words, tokenizer, conversion) for text in _as_list(prompt)]


def _pipelines_on(unet: nn.Module) -> list[DiffusionPipeline]:
    return [
        o
        for o in gc.get_objects()
        if issubclass(type(o), DiffusionPipeline) and unwrapped(o.__dict__.get("unet")) is unet
    ]


_stock_register = DiffusionPipeline.register_modules


@functools.wraps(_stock_register)
def _register_and_adopt(self: DiffusionPipeline, **kwargs: Any) -> None:
    """diffusers calls `register_modules` whenever a pipeline is built, also by `from_pipe`."""
    _stock_register(self, **kwargs)
    session = _Session.open.get(id(unwrapped(kwargs.get("unet"))))
    if session is not None:
        session.adopt(self)


def _called(method: Callable[..., Any], call: inspect.BoundArguments, by_place: int) -> Any:
    """Call `method` with the arguments of `call`, the first `by_place` by place and the others by name, as they were given."""
    places = list(call.signature.parameters)
    named = dict(zip(places, call.args, strict=False)) | call.kwargs
    return method(*call.args[:by_place], **{k: v for k, v in named.items() if k not in places[:by_place]})


def _watch_new_pipelines(on: bool) -> None:
    DiffusionPipeline.register_modules = _register_and_adopt if on else _stock_register


def _without(states: Tensor, encoded: Sequence[tuple[Tensor, Rows]], attached: Iterable[str]) -> str | None:
    """What to tell of states that are none of those `encoded` here, so that their call is drawn without a concept; None where rows of them
    are, and carry none.

    Equal states tell no concept (the class word's own are the same), but may be meant to. Each row counts: copies are also slices of a
    batch, batches put together, and longer ones."""
    copied = [mentions for ours, rows in encoded for mentions in _rows_within(states, ours, rows)]
    if named := next((mentions[0].name for mentions in copied if mentions), None):
        return (
            f"prompt_embeds hold states encoded with <{named}> but are another tensor, so they are drawn without it; "
            f"if <{named}> is meant, pass on the very tensors that infusion.encode returned."
        )
    if copied:
        return None
    names = " and ".join(f"<{name}>" for name in attached)
    return (
        f"prompt_embeds were made elsewhere and carry no concept, so they are drawn without {names}; "
        "if one is meant, make them with infusion.encode(pipe, prompt)."
    )


def _rows_within(states: Tensor, ours: Tensor, rows: Rows) -> Rows:
    """The mentions of those rows of `ours` that begin a row of `states`."""
    if ours.shape[2:] != states.shape[2:] or ours.shape[1] > states.shape[1]:
        return ()
    begin = states[:, : ours.shape[1]]
    each = zip(ours.to(states), rows or ((),) * len(ours), strict=False)
    return tuple(mentions for row, mentions in each if bool((begin == row).flatten(1).all(1).any()))


def _as_list(prompt: str | Sequence[str] | None) -> list[str]:
    return [] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
