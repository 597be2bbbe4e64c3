"""Checks the private names of DeepSpeed that this project uses against the DeepSpeed that is installed.

    python tools/canary.py && python -m pytest tests/dense/test_hsdp.py

Prints a line for each name that is gone and each method that takes other arguments. The exit status is 1 if there is
one. The names are read from the code of `FILES`.
"""

import argparse
import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("dhen/dense/hsdp.py", "dhen/dense/lean_stage3.py", "dhen/dense/averaged_weights.py")
ZERO = ("stage3", "stage_1_and_2", "partition_parameters", "parameter_offload", "partitioned_param_coordinator")
MODULES = ("runtime.engine", "runtime.base_optimizer", *(f"runtime.zero.{name}" for name in ZERO))
"""Of DeepSpeed, where the names are defined."""
OBJECTS = {"optimizer", "zero", "engine", "bucket", "param", "parameter", "weight"}
"""Variables that hold one of DeepSpeed's objects."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, which has --help only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return parser.parse_args(arguments)


def main() -> int:
    """Exit status: 0, or 1 if a name is gone or has changed."""
    parse_arguments()
    faults = list(find_faults())
    print(*faults, f"deepspeed {version('deepspeed')}: {len(faults)} faults", sep="\n")
    return int(bool(faults))


def find_faults() -> Iterator[str]:
    """A line for each name that is gone or has changed."""
    try:
        source = source_of_deepspeed()
        modules = [importlib.import_module(file.removesuffix(".py").replace("/", ".")) for file in FILES]
    except (ImportError, AttributeError) as error:
        yield f"{type(error).__name__}: {error}"
        return
    extended = [each for module in modules for each in vars(module).values() if extends_deepspeed(each)]
    own = {name for each in extended for name in {*vars(each), *each.__annotations__} - overridden(each).keys()}
    for file in FILES:
        for name in sorted(used_names((ROOT / file).read_text(), {each.__name__ for each in extended}) - own):
            unmangled = re.sub(r"^_[A-Z]\w*?(?=__)", "", name)
            if not re.search(rf"(\bdef |\.){unmangled}\b", source):
                yield f"{file}: DeepSpeed has no {unmangled}"
    for each in dict.fromkeys(extended):
        yield from changed_methods(each, methods_in(source))


def source_of_deepspeed() -> str:
    """The text of MODULES."""
    return "\n".join(inspect.getsource(importlib.import_module(f"deepspeed.{name}")) for name in MODULES)


def extends_deepspeed(value: object) -> bool:
    """Whether it is a class of this project that extends one of DeepSpeed's."""
    rooms = [parent.__module__.split(".")[0] for parent in value.__mro__] if inspect.isclass(value) else []
    return rooms[:1] == ["dhen"] and "deepspeed" in rooms


def overridden(ours: type) -> dict[str, list[str]]:
    """Methods of a class that call the one that they override, or say that it is DeepSpeed's, with their arguments."""
    return {
        method.__name__: list(inspect.signature(method).parameters)
        for method in filter(inspect.isfunction, vars(ours).values())
        if f"super().{method.__name__}" in inspect.getsource(method)
        or (method.__doc__ or "").startswith("DeepSpeed's ")
    }


def used_names(source: str, extended: set[str]) -> set[str]:
    """Attributes of DeepSpeed's objects in a file. extended: classes whose `self` is one."""
    names = set()
    for top in ast.parse(source).body:
        objects = OBJECTS | ({"self", "super()"} if getattr(top, "name", "") in extended else set())
        for node in ast.walk(top):
            match node:
                case ast.Attribute(value=value, attr=name):
                    base = ast.unparse(value)
                    names |= {name} if base in objects or base.endswith(".optimizer") or "__" in name else set()
                case ast.Constant(value=str(name)) if re.fullmatch(r"ds_\w+", name):
                    names.add(name)
    return names


def methods_in(source: str) -> dict[tuple[str, str], list[str]]:
    """Arguments of each method, by class and name."""
    return {
        (top.name, node.name): [argument.arg for argument in node.args.args]
        for top in ast.parse(source).body
        if isinstance(top, ast.ClassDef)
        for node in top.body
        if isinstance(node, ast.FunctionDef)
    }


def changed_methods(ours: type, methods: dict[tuple[str, str], list[str]]) -> Iterator[str]:
    """A line for each method that `ours` overrides and that DeepSpeed does not have, or has with other arguments."""
    for name, arguments in overridden(ours).items():
        theirs = [methods[parent.__name__, name] for parent in ours.__mro__ if (parent.__name__, name) in methods]
        if not theirs:
            yield f"{ours.__name__}.{name}: DeepSpeed has no such method"
        elif theirs[0] != arguments:
            yield f"{ours.__name__}.{name}: DeepSpeed's takes ({', '.join(theirs[0])}), not ({', '.join(arguments)})"


if __name__ == "__main__":
    sys.exit(main())
