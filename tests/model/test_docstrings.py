"""The docstring examples in dhen.model run and print what they show, and every public module has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
from torch import nn

import dhen.model

MODULES = [info.name for info in pkgutil.walk_packages(dhen.model.__path__, "dhen.model.")]
# Abstract base classes have no example.
WITHOUT_EXAMPLE = {"Interaction", "DhenPreTrainedModel"}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, monkeypatch):
    from dhen.model.interactions import registry

    monkeypatch.setattr(registry, "_INTERACTIONS", dict(registry._INTERACTIONS))
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_modules_have_an_example(name):
    module = importlib.import_module(name)
    for cls in vars(module).values():
        is_ours = inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == name
        if is_ours and not cls.__name__.startswith("_") and cls.__name__ not in WITHOUT_EXAMPLE:
            assert ">>> " in (cls.__doc__ or ""), f"{cls.__name__} has no example"
