"""What the commands check of their arguments and say of them, before any work.

Heavy imports happen inside the functions, as in `cli.py`.
"""

from __future__ import annotations

from collections.abc import Container, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infusion.console import say
from infusion.errors import InfusionError

if TYPE_CHECKING:
    from infusion.concept import Concept

EMBEDDED = "embedded"  # base.EMBEDDED, which would wait for torch


def writable(path: Path) -> None:
    """Raises InfusionError before any work if nothing can be written there."""
    import tempfile

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InfusionError(
            f"{str(path.parent)!r} cannot be written ({error.strerror}); choose a folder that you may write to."
        ) from None
    if path.is_dir():
        raise InfusionError(
            f"{str(path)!r} is a folder; give the name of a file, such as {str(path / 'milo.safetensors')!r}."
        )


def known_word(base: str, word: str) -> None:
    """The embedded base knows few words; a word that it never saw cannot be customized."""
    if base != EMBEDDED:
        return
    import difflib

    from infusion.world.tokenizer import class_words

    known = list(class_words())
    if word.lower() not in known:
        near = difflib.get_close_matches(word.lower(), known, n=3, cutoff=0.4) or known
        raise InfusionError(
            f"The embedded base never saw a {word!r}; nearest are {', '.join(near)}. For other subjects give --base a Stable Diffusion model."
        )


def named_concept(given: str) -> Concept:
    """The concept of FILE, or of NAME=FILE under that name."""
    from dataclasses import replace

    from infusion.concept import Concept
    from infusion.prompts import NAME

    name, equals, file = given.partition("=")
    if not equals or Path(given).exists() or not NAME.fullmatch(name):
        return Concept.load(given)
    return replace(Concept.load(file), name=name)


def tell_cut(prompts: list[str], words: dict[str, str], tokenizer: Any) -> None:
    """Tell of what the base does not see of long prompts. A warning of diffusers', which would come with others that help nobody."""
    from infusion.prompts import parse

    limit = tokenizer.model_max_length
    for prompt in prompts:
        ids = tokenizer(parse(prompt, words, tokenizer).text)["input_ids"]
        if len(ids) > limit:
            lost = tokenizer.decode(ids[limit - 1 : -1]).strip()
            say.print(f"The base reads {limit} tokens; of {prompt!r} it does not see {lost!r}.", style="yellow")


def check_negative(negative: str | None, known: Set[str]) -> None:
    """Refuse `<name>` in the negative prompt, except words that the tokenizer knows and concepts, of which the pipeline says more."""
    from infusion.prompts import TAG

    for tag in TAG.finditer(negative or ""):
        if tag[0] not in known:
            raise InfusionError(
                f"The negative prompt names {tag[0]}; concepts have no effect there, so write the class word instead."
            )


def check_names(prompts: list[str], concepts: list[Any], known: Container[str]) -> None:
    """Refuse `<name>` where no concept is loaded, unless it is one of the base's `known` words: it would reach the base as plain text.
    Tell of concepts that nobody calls."""
    from infusion.prompts import LORAS, TAG, unknown

    called = {tag["name"]: tag[0] for prompt in prompts for tag in TAG.finditer(prompt)}
    for name, tag in called.items():
        if not concepts and tag not in known:
            raise InfusionError(
                unknown(name, {})
                if name.lower() in LORAS
                else f"The prompt names {tag}, but no concept is loaded; give its file with --concept."
            )
    for concept in concepts:
        if concept.name not in called:
            say.print(f"No prompt names <{concept.name}>, so it has no effect; call it as 'a <{concept.name}>'.")
