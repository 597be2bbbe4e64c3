"""Checks of the names and values that users write: an error says the nearest right name, or the right type."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from huggingface_hub.dataclasses import type_validator
from torch import nn


def unknown_name(what: str, name: str, allowed: Iterable[str]) -> str:
    """A sentence for an error message.

    >>> unknown_name("interaction kind", "liner", ["deep_cross", "linear"])
    "unknown interaction kind 'liner'. Did you mean 'linear'? Allowed: deep_cross, linear."
    """
    names = sorted(allowed)
    by_small_letters = {other.lower(): other for other in names}
    nearest = get_close_matches(name.lower(), by_small_letters, n=1, cutoff=0.5)
    hint = f" Did you mean {by_small_letters[nearest[0]]!r}?" if nearest else ""
    return f"unknown {what} {name!r}.{hint} Allowed: {', '.join(names) or 'none'}."


def check_names(what: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise ValueError about the first of `names` that is not in `allowed`."""
    allowed = set(allowed)
    for name in names:
        if name not in allowed:
            raise ValueError(unknown_name(what, name, allowed))


def can_name_a_table(name: str) -> bool:
    """Whether a feature may have this name: a table's is an attribute of a torch module, and a key of its weights."""
    return bool(name) and "." not in name and not hasattr(nn.Module, name) and name not in vars(nn.Module())


def check_type(what: str, value: Any, expected: Any) -> None:
    """Raise ValueError if `value` isn't of the annotation `expected`. A whole number is a float, a bool isn't."""
    if get_origin(expected) is Literal and isinstance(value, str):
        if value not in get_args(expected):
            raise ValueError(unknown_name(what, value, get_args(expected)))
        return
    is_whole_float = type(value) is int and float in (expected, *get_args(expected))
    try:
        type_validator(what, float(value) if is_whole_float else value, expected)
    except TypeError as error:
        name = expected.__name__ if isinstance(expected, type) else str(expected)
        name = name.replace("collections.abc.", "").replace("typing.", "")
        raise ValueError(f"{what} is {value!r}. Use {name}.") from error
