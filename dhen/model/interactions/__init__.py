"""The interactions of paper 2.3, Wukong's factorization machine, and the registry for a user's own."""

from dhen.model.interactions.linear import Linear, MixEmbeddings
from dhen.model.interactions.registry import (
    PRESETS,
    Interaction,
    InteractionContext,
    InteractionSpec,
    build_interaction,
    check_interaction,
    interaction_kinds,
    interaction_options,
    register_interaction,
)

__all__ = [
    "PRESETS",
    "Interaction",
    "InteractionContext",
    "InteractionSpec",
    "Linear",
    "MixEmbeddings",
    "build_interaction",
    "check_interaction",
    "interaction_kinds",
    "interaction_options",
    "register_interaction",
]
