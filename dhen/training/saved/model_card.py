"""The model card (README.md) of an exported model."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dhen.data.schema import Schema
from dhen.model.configuration_dhen import DhenConfig, LayerSpec
from dhen.training.evaluation.unseen import MANY

_METRICS = {"auc": "AUC", "ne": "normalized entropy", "logloss": "log loss", "calibration": "calibration"}


def model_card(config: DhenConfig, schema: Schema, summary: dict[str, Any]) -> str:
    """Markdown text: the architecture, the training data, the metrics, and how to use the model.

    summary: the contents of summary.json. Each dictionary with an auc holds the metrics of a split.
    """
    splits = {name: values for name, values in summary.items() if isinstance(values, dict) and "auc" in values}
    parameters = sum(table.num_embeddings for table in config.tables) * config.embedding_dim
    layers = "\n".join(
        f"- layer {index + 1}: {' + '.join(f'{spec.kind} ({spec.num_embeddings})' for spec in layer.interactions)}, "
        f"{layer.ensemble}{_experts(layer)}"
        for index, layer in enumerate(config.layer_specs)
    )
    rows = "\n".join(
        f"| {name} | {values['auc']:.5f} | {values['ne']:.5f} | {values['logloss']:.5f} | "
        f"{values['calibration']:.4f} | {values['examples']:,} |"
        for name, values in _with_tasks(splits).items()
    )
    decay = summary.get("ema_decay")
    average = f" The weights are moving averages over the steps, with decay {decay}." if decay else ""
    return f"""---
{_metadata(splits).to_yaml()}
---
# DHEN click model

Deep and Hierarchical Ensemble Network (Zhang et al. 2022), {len(config.layer_specs)} layers over
{len(schema.dense)} dense and {len(schema.sparse)} sparse features of dimension {config.embedding_dim};
{parameters:,} parameters in the embedding tables.

{layers}

## Results

| split | AUC | normalized entropy | log loss | calibration | examples |
| --- | --- | --- | --- | --- | --- |
{rows}

A row of a table that training never used holds the mean of the table's rows, weighted by how often training used each.
A value that is not in a vocabulary gets row 0.
{_unseen(splits)}

Trained on {schema.splits["train"].rows:,} rows for {summary["steps"]:,} steps.{average}

## Use

```python
import dhen.model.modeling_dhen  # registers the architecture
from transformers import AutoModel

model = AutoModel.from_pretrained("this folder")
```

To score raw rows, run `recipes/predict.py --model_name_or_path`. It uses `schema.json` and `vocabulary/` to map values
to ids.
"""


def _with_tasks(splits: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The metrics by split, each followed by those of its further tasks."""
    rows = {}
    for split, values in splits.items():
        rows[split] = values
        rows |= {f"{split}, {task}": of_task for task, of_task in values.get("tasks", {}).items()}
    return rows


def _experts(layer: LayerSpec) -> str:
    if layer.experts == "none":
        return ""
    return f", {len(layer.interactions_by_expert)} experts, {layer.experts_per_example} per example"


def _unseen(splits: dict[str, dict[str, Any]]) -> str:
    """A sentence on the features of which training saw less than half of a split's values."""
    many = {
        name: [feature for feature, share in values.get("unseen", {}).items() if share > MANY]
        for name, values in splits.items()
    }
    return "".join(
        f"In {name}, training never saw more than half of the values of {', '.join(features)}.\n"
        for name, features in many.items()
        if features
    )


def _metadata(splits: dict[str, dict[str, Any]]) -> ModelCardData:
    """Metadata for the Hugging Face hub: library, tags, and the metrics of each split, without NaN."""
    results = [
        EvalResult(
            task_type="tabular-classification",
            dataset_type="click-log",
            dataset_name="click log",
            dataset_split=split,
            metric_type=metric,
            metric_name=name,
            metric_value=values[metric],
        )
        for split, values in splits.items()
        for metric, name in _METRICS.items()
        if values[metric] == values[metric]  # the hub's metadata has no NaN
    ]
    return ModelCardData(
        library_name="transformers",
        tags=["click-through-rate", "dhen"],
        model_name="DHEN click model" if results else None,
        eval_results=results or None,
    )
