"""The "dhen" section of a ds_config: what this project adds to DeepSpeed's own keys."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

TableOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd"]
TableDtype = Literal["fp32", "fp16"]
TableRounding = Literal["stochastic", "nearest"]
WireDtype = Literal["fp32", "fp16", "bf16", "int8"]

_Count = Annotated[int, Field(strict=True, ge=0)]
_Positive = Annotated[int, Field(strict=True, gt=0)]
"""Strict: `true` is no number of layers."""


class PlacementSection(BaseModel):
    """Where the embedding tables go, as far as the user decides it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    costs: str | None = Field(
        None, description='Costs of lookups and links: "cpu", "gpu", or a file of tools/calibrate_costs.py.'
    )
    max_column_shards: _Positive | None = Field(
        None, description="Most column shards of a table; null is as many as its columns allow."
    )
    tables: dict[str, _Count | list[_Count]] = Field(
        {}, description="Tables placed by hand: the rank, or the ranks of its column shards."
    )
    replicate_below_rows: _Count = Field(
        0, description="Smaller tables join the dense part on every rank, under its optimizer, where that is cheaper."
    )
    memory_gib: PositiveFloat | None = Field(
        None, description="Memory of a rank for tables and their optimizer's state; null is 0.8 of what it has."
    )


class WireSection(BaseModel):
    """What the tables' all-to-all carries."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    forward: WireDtype = Field("fp32", description="Of pooled embeddings.")
    backward: WireDtype = Field("fp32", description="Of their gradients.")

    @model_validator(mode="before")
    @classmethod
    def _one_for_both(cls, value: Any) -> Any:
        return {"forward": value, "backward": value} if isinstance(value, str) else value


class DhenSection(BaseModel):
    """The "dhen" section of a ds_config: what DeepSpeed has no word for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table_optimizer: TableOptimizer = Field("rowwise_adagrad", description="Optimizer fused into the tables' backward.")
    table_dtype: TableDtype = Field("fp32", description="Dtype of the tables' weights.")
    table_rounding: TableRounding = Field(
        "stochastic", description="How updates of fp16 tables are rounded; nearest loses small ones."
    )
    all_to_all_dtype: WireSection = Field(
        WireSection(), description="What the tables' all-to-all carries, both ways or each: fp32, fp16, bf16, int8."
    )
    overlap_tables: bool = Field(True, description="The tables' all-to-all runs under what is computed meanwhile.")
    placement: PlacementSection = Field(PlacementSection(), description="Where the embedding tables go.")
    activation_checkpointing: Literal["none", "all"] | _Count | list[str] = Field(
        "none",
        description="Layers, counted from the input, or interactions of all layers, that are computed again in the "
        "backward.",
    )
    activation_offload: Literal["none", "all"] | _Count = Field(
        "none", description="Layers, counted from the input, whose activations wait in the host's memory, on GPUs."
    )
    shard_group: Literal["world", "node"] | _Positive = Field(
        "world", description="Ranks that ZeRO shards over: all, those of a node (HSDP), or a number of ranks."
    )
    all_reduce_dtype: Literal["bf16", "fp16"] | None = Field(
        None, description="HSDP: what crosses nodes in the all-reduce of gradient shards; null is their own."
    )
    async_all_reduce: bool = Field(True, description="HSDP: the all-reduce across nodes runs under the backward.")
