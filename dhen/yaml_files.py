"""YAML files, as users write them: recipes, schemas and machines. No key in them is dropped in silence."""

import os
from pathlib import Path
from typing import Any

import yaml

from dhen.model.names import quoted, shown
from dhen.paths import looked_in

_MOST_VALUES, _DEEPEST = 1_000_000, 50
"""What a file may hold with its aliases written out. No later check then runs out of memory or of stack."""


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader without keys that appear twice, deep nesting, and aliases that multiply or recur."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        is_alias, line = self.check_event(yaml.AliasEvent), self.peek_event().start_mark.line + 1
        node = super().compose_node(parent, index)
        if not is_alias:
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            if isinstance(node, yaml.MappingNode):
                _check_keys([key for key, _ in node.value])
                children = [part for pair in node.value for part in pair]
            node.size = 1 + sum(child.size for child in children)
            node.depth = 1 + max((child.depth for child in children), default=0)
        elif not hasattr(node, "size"):
            raise ValueError(f"line {line}: a value contains itself")
        if node.size > _MOST_VALUES or node.depth > _DEEPEST:
            raise ValueError(f"line {line}: more than {_MOST_VALUES:,} values, or nested in {_DEEPEST} levels")
        return node


def _check_keys(keys: list[yaml.Node]) -> None:
    first: dict[tuple[str, str], yaml.Node] = {}
    for key in keys:
        if isinstance(key, yaml.ScalarNode) and (same := first.setdefault((key.tag, key.value), key)) is not key:
            lines = f"{same.start_mark.line + 1} and {key.start_mark.line + 1}"
            raise ValueError(f"the key {quoted(key.value)} appears twice, in lines {lines}")


def read_yaml(path: str | Path, what: str = "") -> dict[str, Any]:
    """The mapping in a YAML file. Raises FileNotFoundError or ValueError, in one line that names the file.

    what: a sentence for the error about a missing file: which file to give.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{shown(path)}: no such file. {what}{looked_in(path)}")
    return parse_yaml(Path(path).read_bytes(), path)


def parse_yaml(text: str | bytes, path: str | Path) -> dict[str, Any]:
    """The mapping in the text of a YAML file. Raises ValueError, in one line that names the file and the line.

    >>> parse_yaml("seed: 1", "recipe.yaml")
    {'seed': 1}
    """
    try:
        # Not all mistakes are YAMLErrors: `!!int x`, for example, is an IndexError or a ValueError.
        values = yaml.load(text.decode("utf-8") if isinstance(text, bytes) else text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}.") from error
    if values is not None and not isinstance(values, dict):
        raise ValueError(
            f"{path}: expected a mapping from keys to values, got a {type(values).__name__}. Write one 'key: value' "
            "per line."
        )
    return values or {}


def write_yaml(values: dict[str, Any], path: Path) -> None:
    """Write values as YAML that `read_yaml` reads, in their order."""
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
