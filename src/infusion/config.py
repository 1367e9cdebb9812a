"""Configurations hold what their annotations say: a typo must not run as something else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

from infusion.errors import InfusionError


def hold_types(config: Any) -> None:
    """Bring every field of a frozen dataclass to its annotated type (a list to a tuple, "false" to False); for `__post_init__`.

    Raises InfusionError for what has no such reading: text for a tuple, 2.5 for a count.
    """
    from pydantic import ValidationError

    for field in fields(config):
        value = getattr(config, field.name)
        try:
            held = _adapter(type(config), field.name).validate_python(value)
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            raise InfusionError(f"{field.name} is {value!r}: {said[0].lower()}{said[1:]}.") from None
        object.__setattr__(config, field.name, held)
        if field.name == "seed":
            check_seed(held)


def check_seed(seed: int) -> None:
    """Raise InfusionError for a seed that torch's generators do not take."""
    if not -(2**63) <= seed < 2**63:
        raise InfusionError(f"seed is {seed}; it must be a whole number of 64 bits, such as one from 0 to {2**63 - 1}.")


def check_prompts(prompts: Iterable[str]) -> None:
    """Raise InfusionError for a prompt that does not leave the subject's place open once, as "{} on the beach" does."""
    if bad := [p for p in prompts if p.count("{}") != 1]:
        raise InfusionError(
            f"The prompt {bad[0]!r} does not name the subject exactly once; write {{}} where it stands."
        )


@cache
def _adapter(kind: type, field: str) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(get_type_hints(kind)[field])
