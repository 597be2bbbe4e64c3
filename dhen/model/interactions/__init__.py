"""The interactions of paper 2.3, Wukong's factorization machine, and a registry for user-defined interactions."""

# ruff: noqa: F401
from dhen.model.interactions.attention import SelfAttention
from dhen.model.interactions.convolution import Convolution
from dhen.model.interactions.deep_cross import DeepCross, FlattenedDeepCross
from dhen.model.interactions.dot_products import AdvancedDlrm, FactorizationMachine
from dhen.model.interactions.linear import Linear, MixEmbeddings
from dhen.model.interactions.multiplicative import Multiplicative
from dhen.model.interactions.registry import (
    PRESETS,
    Axes,
    Interaction,
    InteractionContext,
    InteractionSpec,
    build_interaction,
    check_interaction,
    import_interactions,
    interaction_kinds,
    interaction_options,
    register_interaction,
    with_prefix,
)
