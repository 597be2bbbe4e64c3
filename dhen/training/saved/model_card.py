"""The model card (README.md) of an exported model."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dhen.data.schema import Schema
from dhen.model.configuration_dhen import DhenConfig

_METRICS = {"auc": "AUC", "ne": "normalized entropy", "logloss": "log loss", "calibration": "calibration"}


def model_card(config: DhenConfig, schema: Schema, summary: dict[str, Any]) -> str:
    """Markdown: what the model is, what it was trained on, how well it does, how to use it.

    summary: a run's summary.json; its values that are dictionaries are the metrics of a split.
    """
    splits = {name: values for name, values in summary.items() if isinstance(values, dict)}
    parameters = sum(table.num_embeddings for table in config.tables) * config.embedding_dim
    layers = "\n".join(
        f"- layer {index + 1}: {' + '.join(f'{spec.kind} ({spec.num_embeddings})' for spec in layer.interactions)}, "
        f"{layer.ensemble}"
        for index, layer in enumerate(config.layer_specs)
    )
    rows = "\n".join(
        f"| {name} | {values['auc']:.5f} | {values['ne']:.5f} | {values['logloss']:.5f} | "
        f"{values['calibration']:.4f} | {values['examples']:,} |"
        for name, values in splits.items()
    )
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

Trained on {schema.splits["train"].rows:,} rows, {summary["steps"]:,} updates.

## Use

```python
import dhen.model.modeling_dhen  # registers the architecture
from transformers import AutoModel

model = AutoModel.from_pretrained("this folder")
```

`schema.json` and `vocabulary/` turn raw rows into this model's ids: `recipes/predict.py --model_name_or_path` does it.
"""


def _metadata(splits: dict[str, dict[str, Any]]) -> ModelCardData:
    """What the Hugging Face hub reads: library, tags, and the metrics that exist on each split."""
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
        if values[metric] == values[metric]  # NaN has no place in YAML of the hub
    ]
    return ModelCardData(
        library_name="transformers",
        tags=["click-through-rate", "dhen"],
        model_name="DHEN click model" if results else None,
        eval_results=results or None,
    )
