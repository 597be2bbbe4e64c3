"""A feature's name must not collide with an attribute of PlainTables, because its table becomes a submodule of it."""

import pytest
from torch import nn

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import PlainTables
from dhen.model.names import is_valid_table_name


def valid_attributes(module):
    """The attributes of a module that would be accepted as table names."""
    return {name for name in {*dir(type(module)), *vars(module)} if is_valid_table_name(name)}


def test_no_attribute_of_the_installed_torchs_module_is_a_valid_name():
    assert valid_attributes(nn.Module()) == set()


def test_no_attribute_of_plain_tables_is_a_valid_name():
    assert valid_attributes(PlainTables(DhenConfig(), seed=0)) == set()


def test_an_attribute_that_is_missing_from_the_list_would_be_noticed():
    """Negative control."""

    class NewerModule(nn.Module):
        added_method = print

        def __init__(self):
            super().__init__()
            self.added_value = 1

    assert valid_attributes(NewerModule()) == {"added_method", "added_value"}


@pytest.mark.parametrize("name", ["type", "training", "_buffers", "embedding_dim"])
def test_torch_refuses_a_submodule_with_such_a_name(name):
    assert not is_valid_table_name(name)
    with pytest.raises(KeyError, match="already exists"):
        PlainTables(DhenConfig(), seed=0).add_module(name, nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["site", "user id", "C1", "_site", "Type"])
def test_other_names_are_valid(name):
    assert is_valid_table_name(name)
    PlainTables(DhenConfig(sparse_features=[{"name": name, "num_embeddings": 2}]), seed=0)
