"""Builds a command line from dataclasses: the parser, its --help, and the checks of names and types."""

import argparse
import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import Any, NoReturn, get_type_hints

from pydantic import TypeAdapter, ValidationError
from transformers import HfArgumentParser

from dhen.model.names import unknown_name
from dhen.paths import find

Paths = str | list[str] | None
"""One path or several: one or more words after the flag, or a string or a list in YAML."""


class ArgumentError(ValueError):
    """A wrong argument. The message names the file or flag, the value, and what is allowed."""


def option(default: Any, meaning: str) -> Any:
    """A field with its default and its line of --help."""
    metadata = {"help": meaning}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints each flag once, with the type of its value and its default, if any."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)  # HfArgumentParser also accepts each --long_flag as --long-flag
        shown.option_strings = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
        return super()._format_action_invocation(shown)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "BOOL" if action.nargs == "?" else getattr(action.type, "__name__", "str").upper()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.const is False:  # HfArgumentParser gives --no_x the help of --x
            return f"Turn --{action.dest} off."
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """HfArgumentParser with a compact --help and one-line errors."""

    def __init__(self, parts: Sequence[type], **kwargs: Any) -> None:
        super().__init__(parts, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise ArgumentError."""
        raise ArgumentError(f"command line: {message}. Use --help to list all arguments.")


def unknown_argument(flag: str, parts: Sequence[type]) -> ArgumentError:
    """The error for a word on the command line that is not a flag of `parts`, with the nearest flag as a hint."""
    if not flag.startswith("-"):
        return ArgumentError(
            f"command line: {flag!r} does not belong to any argument. Write several interactions as one word, such as "
            "linear,self_attention, or as JSON."
        )
    flags = {f"--{f.name}" for part in parts for f in dataclasses.fields(part)} | {"--config", "--ds_config", "--check"}
    return ArgumentError(f"command line: {unknown_name('argument', flag.split('=')[0], flags)}")


def copy_for_parser(part: type, group: str | None = None) -> type:
    """A copy of a dataclass for HfArgumentParser, which overwrites the types of the fields.

    group: the heading above its flags in --help.
    """
    hints = {name: list[str] | None if hint == Paths else hint for name, hint in get_type_hints(part).items()}
    return dataclasses.make_dataclass(
        part.__name__,
        [(f.name, hints[f.name], _fresh(f)) for f in dataclasses.fields(part)],
        namespace={"_argument_group_name": group} if group else {},
    )


def _fresh(given: dataclasses.Field) -> Any:
    return field(default=given.default, default_factory=given.default_factory, metadata=given.metadata)


def check_types(part: type, values: dict[str, Any], where: str) -> Any:
    """Build the dataclass and check the type of every value: argparse checks flags only, this also checks YAML.

    where: the file, or "command line", for the error message. Raises ArgumentError.
    """
    for name, hint in get_type_hints(part).items():
        if hint in (int, float) and isinstance(values.get(name), bool):
            raise ArgumentError(f"{where}: {name} is {values[name]}. Use a number.")
    try:
        checked = TypeAdapter(part).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(step) for step in first["loc"] if not str(step).startswith(("list", "str")))
        raise ArgumentError(f"{where}: {key} is {first['input']!r}. {first['msg']}.") from error
    for name, hint in get_type_hints(part).items():
        value = getattr(checked, name)
        if hint == Paths and isinstance(value, list) and len(value) == 1:  # a flag always gives a list
            setattr(checked, name, value[0])
    return checked


def find_paths(part: Any, *names: str) -> None:
    """Resolve the relative paths in these fields: a path that exists only in the repository is replaced by that one."""
    for name in names:
        value = getattr(part, name)
        if value is not None:
            setattr(part, name, [find(path) for path in value] if isinstance(value, list) else find(value))
