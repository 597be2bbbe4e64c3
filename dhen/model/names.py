"""What an error says about a name that isn't known: the nearest right one, and the list."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_name(what: str, name: str, allowed: Iterable[str]) -> str:
    """A sentence for an error message.

    >>> unknown_name("interaction kind", "liner", ["deep_cross", "linear"])
    "unknown interaction kind 'liner'. Did you mean 'linear'? Allowed: deep_cross, linear."
    """
    names = sorted(allowed)
    nearest = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {what} {name!r}.{hint} Allowed: {', '.join(names) or 'none'}."


def check_names(what: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise ValueError about the first of `names` that is not in `allowed`."""
    allowed = set(allowed)
    for name in names:
        if name not in allowed:
            raise ValueError(unknown_name(what, name, allowed))
