"""Builds a command line from dataclasses: the parser, its --help, and the checks of names and types."""

import argparse
import copy
import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cache
from typing import Annotated, Any, NoReturn, get_type_hints

from annotated_types import Len
from pydantic import StringConstraints, TypeAdapter, ValidationError
from transformers import HfArgumentParser

from dhen.model.names import first_mistake, quoted, unknown_name
from dhen.paths import find

logger = logging.getLogger(__name__)

Text = Annotated[str, StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f]*$")]
"""Not empty, on one line, and short enough for a path."""
Paths = Text | Annotated[list[Text], Len(1)] | None
"""One path or several: one or more words after the flag, or a string or a list in YAML."""
_adapter = cache(TypeAdapter)
_PLAIN_PATHS = str | list[str] | None


_OF_HUGGING_FACE = {
    "--deepspeed": "Use --ds_config.",
    **dict.fromkeys(("--bf16", "--fp16"), "The ds_config sets the precision: see ds_configs/zero2_bf16.json."),
    "--gradient_checkpointing": "The ds_config sets it: use dhen.activation_checkpointing.",
}


class ArgumentError(ValueError):
    """A wrong argument. The message names the file or flag, the value, and what is allowed."""


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
    """HfArgumentParser with a compact --help, checks of all values, and one-line errors.

    parts: dataclasses, by the heading above their flags in --help.
    """

    def __init__(self, parts: Mapping[str, type], **kwargs: Any) -> None:
        copies = [copy_for_parser(part, group) for group, part in parts.items()]
        super().__init__(copies, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        self._parts = list(parts.values())

    def parse(self, words: Sequence[str] | None) -> list[Any]:
        """The dataclasses. Raises ArgumentError for a flag that is unknown or has a wrong value."""
        *given, unknown = self.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise _unknown_argument(unknown[0], self._parts)
        found = zip(self._parts, given, strict=False)  # other flags than those of the parts come last
        return [check_types(part, vars(values), "command line") for part, values in found]

    def error(self, message: str) -> NoReturn:
        """Raise ArgumentError. argparse quotes a value in full."""
        message = re.sub(r"\S{81,}", lambda word: f"{word[0][:80]}… ({len(word[0]):,} characters)", message)
        raise ArgumentError(f"command line: {' '.join(message.split())[:300]}. Use --help to list all arguments.")


def _unknown_argument(flag: str, parts: Sequence[type]) -> ArgumentError:
    """The error for a word on the command line that is not a flag of `parts`, with the nearest flag as a hint."""
    if not flag.startswith("--"):
        return ArgumentError(
            f"command line: {quoted(flag)} does not belong to any argument. Write several interactions as one word, "
            "such as linear,self_attention, or as JSON."
        )
    (name,) = flags_of([flag])
    if name in _OF_HUGGING_FACE:
        return ArgumentError(f"command line: unknown argument {name!r}. {_OF_HUGGING_FACE[name]}")
    flags = {f"--{f.name}" for part in parts for f in dataclasses.fields(part)} | {"--config", "--ds_config", "--check"}
    return ArgumentError(f"command line: {unknown_name('argument', flag.split('=')[0], flags)}")


def flags_of(words: Sequence[str]) -> list[str]:
    """The flags on a command line, without their values."""
    return ["--" + word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")]


def say_what_repeats(words: Sequence[str]) -> None:
    """Log which flags are given more than once: argparse takes the last."""
    for flag, times in Counter(flags_of(words)).items():
        if times > 1:
            logger.info("command line: %s is given %d times. The last one counts.", flag, times)


@cache
def copy_for_parser(part: type, group: str) -> type:
    """A copy of a dataclass for HfArgumentParser, which overwrites the types of the fields."""
    hints = {name: list[str] | None if hint == _PLAIN_PATHS else hint for name, hint in get_type_hints(part).items()}
    return dataclasses.make_dataclass(
        part.__name__,
        [
            (f.name, hints[f.name], field(default=f.default, default_factory=f.default_factory, metadata=f.metadata))
            for f in dataclasses.fields(part)
        ],
        namespace={"_argument_group_name": group},
    )


def check_types(part: type, values: dict[str, Any], where: str) -> Any:
    """Build the dataclass and check the type of every value: argparse checks flags only, this also checks YAML.

    where: the file, or "command line", for the error message. Raises ArgumentError.
    """
    try:
        checked = _adapter(part).validate_python(values)
    except ValidationError as error:
        raise ArgumentError(f"{where}: {first_mistake(error)}") from error
    for name, hint in get_type_hints(part).items():
        value = getattr(checked, name)
        if hint == _PLAIN_PATHS and isinstance(value, list) and len(value) == 1:  # a flag always gives a list
            setattr(checked, name, value[0])
    return checked


def find_paths(part: Any, *names: str) -> None:
    """Resolve the relative paths in these fields: a path that exists only in the repository is replaced by that one."""
    for name in names:
        value = getattr(part, name)
        if value is not None:
            setattr(part, name, [find(path) for path in value] if isinstance(value, list) else find(value))
