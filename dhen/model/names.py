"""Checks on the names and values that users write. Errors suggest the nearest valid name or the expected type."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from huggingface_hub.dataclasses import type_validator

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


def quoted(value: Any, most: int = 80) -> str:
    """The value as Python writes it, on one line. Longer text than `most` characters is cut, with its length.

    >>> quoted("two\\nlines")
    "'two\\\\nlines'"
    >>> quoted("a" * 5000, most=8)
    "'aaaaaaa… (5,002 characters)"
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def unknown_name(what: str, name: str, allowed: Iterable[str]) -> str:
    """Return an error sentence that suggests the nearest allowed name and lists all of them.

    >>> unknown_name("interaction kind", "liner", ["deep_cross", "linear"])
    "unknown interaction kind 'liner'. Did you mean 'linear'? Allowed: deep_cross, linear."
    """
    names = sorted(allowed)
    by_lower_case = {other.lower(): other for other in names}
    nearest = get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
    hint = f" Did you mean {by_lower_case[nearest[0]]!r}?" if nearest else ""
    return f"unknown {what} {name!r}.{hint} Allowed: {', '.join(names) or 'none'}."


def check_names(what: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise ValueError for the first of `names` that is not in `allowed`."""
    allowed = set(allowed)
    for name in names:
        if name not in allowed:
            raise ValueError(unknown_name(what, name, allowed))


def is_valid_table_name(name: str) -> bool:
    """Whether a feature may have this name. Its table becomes an attribute of a torch module under the same name."""
    return bool(name) and "." not in name and not name.startswith("__") and name not in _RESERVED_NAMES


def check_type(what: str, value: Any, expected: Any) -> None:
    """Raise ValueError if `value` does not match the annotation `expected`. Ints count as floats, bools do not."""
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
