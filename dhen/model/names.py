"""Checks on the names and values that users write. Errors suggest the nearest valid name or the expected type."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

_RESERVED_NAMES = frozenset(
    """
    T_destination _apply _backward_hooks _backward_pre_hooks _buffers _call_impl _compiled_call_impl _forward_hooks
    _forward_hooks_always_called _forward_hooks_with_kwargs _forward_pre_hooks _forward_pre_hooks_with_kwargs
    _get_backward_hooks _get_backward_pre_hooks _get_name _is_full_backward_hook _load_from_state_dict
    _load_state_dict_post_hooks _load_state_dict_pre_hooks _maybe_warn_non_full_backward_hook _modules _named_members
    _non_persistent_buffers_set _parameters _register_load_state_dict_pre_hook _register_state_dict_hook
    _replicate_for_data_parallel _save_to_state_dict _slow_forward _state_dict_hooks _state_dict_pre_hooks _version
    _wrapped_call_impl add_module apply bfloat16 buffers call_super_init children compile cpu cuda double dump_patches
    embedding_dim eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu
    load_state_dict modules mtia named_buffers named_children named_modules named_parameters parameters
    register_backward_hook register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
    register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
    register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state
    set_submodule share_memory smart_apply state_dict to to_empty train training type xpu zero_grad
    """.split()  # noqa: SIM905
)
"""Attributes of torch.nn.Module (`smart_apply` is added by transformers) and of PlainTables (`embedding_dim`), written
out so that data preparation can check names without importing torch."""


_MOST, _MOST_LISTED = 80, 200
_BOUNDS = {
    "greater_than": "a number above {}", "greater_than_equal": "{} or more",
    "less_than": "a number below {}", "less_than_equal": "{} or less",
    "string_too_short": "text that is not empty", "string_pattern_mismatch": "text on one line",
}  # fmt: skip
"""What is allowed, by the type of pydantic's error."""
_ALTERNATIVE = re.compile(r"bool|int|float|str|(list|dict|tuple|union|nullable|constrained|function|literal)[\[-].*")
"""Steps of pydantic's location that name a type of a union, not a key."""


def quoted(value: Any, most: int = _MOST) -> str:
    """The value as Python writes it, on one line. Longer text than `most` characters is cut, with its length.

    >>> quoted("two\\nlines")
    "'two\\\\nlines'"
    >>> quoted("a" * 5000, most=8)
    "'aaaaaaa… (5,002 characters)"
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more digits than Python prints, or deep nesting
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def shown(value: object) -> str:
    """A name or path as it is, or quoted if it does not fit into a line."""
    text = str(value)
    return text if text.isprintable() and len(text) <= 2 * _MOST else quoted(text)


def unknown_name(what: str, name: str, allowed: Iterable[str]) -> str:
    """Return an error sentence that suggests the nearest allowed name and lists all of them, or the nearest of many.

    >>> unknown_name("interaction kind", "liner", ["deep_cross", "linear"])
    "unknown interaction kind 'liner'. Did you mean 'linear'? Allowed: deep_cross, linear."
    """
    names = sorted(allowed)
    by_lower_case = {other.lower(): other for other in names}
    nearest = get_close_matches(name.lower()[:_MOST], by_lower_case, n=5, cutoff=0.5)
    hint = f" Did you mean {quoted(by_lower_case[nearest[0]])}?" if nearest else ""
    likely = [by_lower_case[other] for other in nearest]
    return f"unknown {what} {quoted(name)}.{hint} Allowed: {listed(names, likely) or 'none'}."


def listed(names: Sequence[str], likely: Sequence[str] = ()) -> str:
    """The names, separated by commas; only the `likely` or the first ones if they do not fit into a line."""
    text = ", ".join(names)
    if len(text) <= _MOST_LISTED:
        return text
    some = ", ".join(likely) or text[:_MOST_LISTED].rpartition(", ")[0]
    return f"{some[:_MOST_LISTED]}, … ({len(names)} in all)"


def check_names(what: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise ValueError for the first of `names` that is not in `allowed`."""
    allowed = set(allowed)
    for name in names:
        if name not in allowed:
            raise ValueError(unknown_name(what, name, allowed))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A hook for json.loads: the object, or ValueError if a key appears twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {quoted(next(key for key in keys if keys.count(key) > 1))} appears twice")
    return values


def is_valid_table_name(name: str) -> bool:
    """Whether a feature may have this name. Its table becomes an attribute of a torch module under the same name."""
    return bool(name) and "." not in name and not name.startswith("__") and name not in _RESERVED_NAMES


def check_type(what: str, value: Any, expected: Any) -> None:
    """Raise ValueError if `value` does not match the annotation `expected`, or is out of its range.

    Ints count as floats, bools do not. NaN and infinity are no floats.
    """
    if get_origin(expected) is Literal and isinstance(value, str):
        if value not in get_args(expected):
            raise ValueError(unknown_name(what, value, get_args(expected)))
        return
    try:
        _adapter(expected).validate_python(value)
    except ValidationError as error:
        raise ValueError(first_mistake(error, what)) from error


@cache
def _adapter(expected: Any) -> TypeAdapter:
    return TypeAdapter(expected, config=ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True))


def first_mistake(error: ValidationError, *where: str, known: Iterable[str] = ()) -> str:
    """The first mistake that pydantic found, on one line: the key, its value, and what is allowed.

    where: keys above those of pydantic. known: the keys beside one that is unknown.
    """
    first, *others = error.errors()
    keys = _keys_of(first)
    place, given = ".".join([*where, *(key[:_MOST] for key in keys)]), first["input"]
    if first["type"] == "value_error":
        return f"{place}: {first['ctx']['error']}" if place else str(first["ctx"]["error"])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden") and known:
        above = ".".join([*where, *keys[:-1]])
        return f"{above}{': ' * bool(above)}{unknown_name('key', keys[-1], known)}"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden", "missing"):
        return f"{place}: {first['msg']}."
    ways_out = dict.fromkeys([_advice(first), *(_advice(other) for other in others if _keys_of(other) == keys)])
    return f"{place} is {quoted(given)}. {', or '.join(ways_out).replace(', or Use', ', or')}."


def _keys_of(mistake: Mapping[str, Any]) -> list[str]:
    return [str(key) for key in mistake["loc"] if not _ALTERNATIVE.fullmatch(str(key))]


def _advice(mistake: Mapping[str, Any]) -> str:
    if mistake["type"] in _BOUNDS:
        (bound,) = mistake["ctx"].values()
        return f"Use {_BOUNDS[mistake['type']].format(bound if isinstance(bound, str) else f'{bound:,.15g}')}"
    return re.sub(r", (unable|got|exceeded) .*", "", mistake["msg"]).replace("Input should be", "Use")
