"""The "dhen" section of a ds_config: what this project adds to DeepSpeed's own keys."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TableOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "adam"]
TableDtype = Literal["fp32", "fp16"]
TableRounding = Literal["stochastic", "nearest"]
WireDtype = Literal["fp32", "fp16", "bf16", "int8"]

_Count = Annotated[int, Field(strict=True, ge=0)]
_Positive = Annotated[int, Field(strict=True, gt=0)]
_Flag = Annotated[bool, Field(strict=True)]
"""Strict, so that `true` is not accepted as a number, nor 1 as true."""


class PlacementSection(BaseModel):
    """What the user decides about the placement of the embedding tables."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    costs: str | None = Field(
        None, description='Costs of lookups and links: "cpu", "gpu", or a file written by tools/calibrate_costs.py.'
    )
    max_column_shards: _Positive | None = Field(
        None, description="Maximum number of column shards of a table; null means as many as its columns allow."
    )
    tables: dict[str, _Count | list[_Count]] = Field(
        {}, description="Tables placed by hand: for each table its rank, or the ranks of its column shards."
    )
    replicate_below_rows: _Count = Field(
        0, description="Tables with fewer rows are replicated in the dense part, if that is cheaper."
    )
    memory_gib: Annotated[float, Field(strict=True, gt=0)] | None = Field(
        None, description="Memory per rank for tables and optimizer state, in GiB; null means 0.8 of its memory."
    )


class WireSection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    forward: WireDtype = Field("fp32", description="Dtype of pooled embeddings.")
    backward: WireDtype = Field("fp32", description="Dtype of their gradients.")

    @model_validator(mode="before")
    @classmethod
    def _one_for_both(cls, value: Any) -> Any:
        return {"forward": value, "backward": value} if isinstance(value, str) else value


class DhenSection(BaseModel):
    """The "dhen" section of a ds_config: options that DeepSpeed does not have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table_optimizer: TableOptimizer | Literal["auto"] = Field(
        "rowwise_adagrad", description="Optimizer of the tables, part of their backward; auto takes the recipe's."
    )
    table_dtype: TableDtype = Field("fp32", description="Dtype of the tables' weights.")
    table_rounding: TableRounding = Field(
        "stochastic", description='How updates of fp16 tables are rounded; "nearest" loses small updates.'
    )
    all_to_all_dtype: WireSection = Field(
        WireSection(),
        description="Dtype of the tables' all-to-all, for both directions or each: fp32, fp16, bf16, int8.",
    )
    all_to_all_hops: Literal[1, 2, "auto"] = Field(
        1,
        description="Hops of the tables' all-to-all: 2 sends within each node and then one message to each other node; "
        "auto takes what the placement's costs say is faster.",
    )
    allow_tf32: _Flag = Field(
        False,
        description="Round the inputs of fp32 matrix products and convolutions to TF32 (GPUs only).",
    )
    overlap_tables: _Flag = Field(True, description="Overlap the tables' all-to-all with computation.")
    table_group: Literal["world", "node", "auto"] | _Positive = Field(
        "world",
        description="Ranks that tables are sharded over: all, the ranks of a node, or a number of ranks; the groups "
        "hold replicas. auto takes what the placement's costs say is faster, all or a node.",
    )
    table_sync_steps: _Positive = Field(
        1, description="Table groups: 1 adds up gradients of rows in each step; k adds up moves of rows after k steps."
    )
    table_sync_dtype: Literal["fp32", "bf16", "int8"] = Field(
        "fp32", description="Table groups: dtype of the moves of weights; those of optimizer states are fp32."
    )
    table_sync_overlap: _Flag = Field(
        False,
        description="Table groups: exchange moves, even with table_sync_steps 1, and let them travel during the next "
        "step, so that they arrive one step later.",
    )
    placement: PlacementSection = Field(PlacementSection(), description="Where the embedding tables go.")
    compile: Literal["none", "layers"] = Field(
        "none", description='torch.compile: "layers" compiles the forward and backward of each layer.'
    )
    activation_checkpointing: Literal["none", "all"] | _Count | list[str] = Field(
        "none",
        description="Layers, counted from the input, or kinds of interactions, that are recomputed in the backward.",
    )
    activation_offload: Literal["none", "all"] | _Count = Field(
        "none", description="Layers, counted from the input, whose activations are kept in host memory (GPUs only)."
    )
    shard_group: Literal["world", "node"] | _Positive = Field(
        "world", description="Ranks that ZeRO shards over: all, the ranks of a node (HSDP), or a number of ranks."
    )
    all_reduce_dtype: Literal["bf16", "fp16"] | None = Field(
        None, description="HSDP: dtype of the all-reduce of gradient shards across nodes; null keeps their own."
    )
    async_all_reduce: _Flag = Field(True, description="HSDP: overlap the all-reduce across nodes with the backward.")

    @property
    def exchanges_moves(self) -> bool:
        """Whether replicas of the tables add up how far they moved their rows, instead of their gradients."""
        return self.table_sync_steps > 1 or self.table_sync_overlap
