"""The model card (README.md) of an exported model."""

from pathlib import Path
from shlex import quote
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dhen.data.formats.roles import ColumnRoles
from dhen.data.preparation.settings import as_tuple
from dhen.data.schema import Schema
from dhen.model.configuration_dhen import DhenConfig, LayerSpec

_METRICS = {"auc": "AUC", "ne": "normalized entropy", "logloss": "log loss", "calibration": "calibration"}
_PACKAGES = ("dhen", "torch", "deepspeed", "fbgemm-gpu", "fbgemm-gpu-cpu", "transformers")
_MOST_SHARES = 6


def model_card(
    config: DhenConfig,
    schema: Schema,
    summary: dict[str, Any],
    environment: dict[str, Any],
    folder: Path,
    roles: ColumnRoles | None = None,
) -> str:
    """Markdown text: the architecture, the training data, the metrics, the run, and how to use the model.

    summary: the contents of summary.json. Each dictionary with an auc holds the metrics of a split. environment: those
    of environment.json. folder: of the model. roles: of the raw columns, if they are known.
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
    head = "| split | AUC | normalized entropy | log loss | calibration | examples |\n" + "| --- " * 6 + "|\n"
    table = head + rows if rows else "The run had no validation split and no test split."
    rows_file = quote(_test_file(schema))
    decay = summary.get("ema_decay")
    average = f" The weights are moving averages over the steps, with decay {decay}." if decay else ""
    scale = summary.get("logit_scale", 1)
    scaled = f" All logits are multiplied by {scale:.4f}, fitted on the validation split." if scale != 1 else ""
    versions = environment.get("versions") or {}
    counts = "\n".join(
        f"| {name} | {of.rows:,} | {of.clicks:,} ({of.clicks / of.rows:.2%}) |" for name, of in schema.splits.items()
    )
    return f"""---
{_metadata(splits).to_yaml()}
---
# DHEN click model

Deep and Hierarchical Ensemble Network (Zhang et al. 2022), {len(config.layer_specs)} layers over
{len(schema.dense)} dense and {len(schema.sparse)} sparse features of dimension {config.embedding_dim};
{parameters:,} parameters in the embedding tables.

{layers}

## Data

{_data(schema)}

| split | rows | clicks |
| --- | --- | --- |
{counts}

## Results

{table}

A row of a table that training never used holds the mean of the table's rows, weighted by how often training used each.
A value that is not in a vocabulary gets row 0.{_unseen(splits)}

## Training

Trained on {schema.splits["train"].rows:,} rows for {summary["steps"]:,} steps.{average}{scaled}
The ds_config was `{summary["ds_config"]}`: {summary["setup"]}. The command:

```text
{environment.get("command")}
```

Versions: {", ".join(f"{name} {versions[name]}" for name in _PACKAGES if versions.get(name))}.

## Use

{_in_python(folder, roles) if roles else ""}For files of rows, on any number of ranks:

```bash
python recipes/predict.py --model_name_or_path {quote(str(folder))} --dataset_name {rows_file} --output predictions.csv
```

Plain `transformers` takes ids and dense numbers, which `schema.json` and `vocabulary/` define:

```python
import torch
from transformers import AutoModel

from dhen.model.modeling_dhen import SparseIds  # the import registers the architecture

model = AutoModel.from_pretrained("{folder}").eval()
ids = SparseIds(torch.zeros({len(config.lookups)}, dtype=torch.int64), num_features={len(config.lookups)})  # blanks
print(model(ids, torch.zeros(1, {len(schema.dense)})).logits.sigmoid())
```
"""


def _in_python(folder: Path, roles: ColumnRoles) -> str:
    columns = dict.fromkeys(column for feature in (*roles.dense, *roles.sparse) for column in feature.columns)
    return f"""In Python, for raw rows in a data frame, an Arrow table or dictionaries:

```python
from dhen.pipeline import DhenPipeline

rows = [{columns}]  # None is a blank
print(DhenPipeline.from_pretrained("{folder}").predict(rows))
```

"""


def _data(schema: Schema) -> str:
    """Sentences on the name of the data and how it was split."""
    source, settings = schema.source, schema.source.get("settings", {})
    names = as_tuple(settings.get("dataset_name")) or as_tuple(settings.get("train_file"))
    if not names:
        return "Another program prepared the data."
    how = f"split at random (seed {settings.get('split_seed')})"
    if len(source.get("files", {})) > 1:
        how = "with files of its own for each split"
    elif settings.get("split_order") == "sequential":
        how = f"split in the order of {settings.get('time_column') or 'its rows'}"
    return f"{', '.join(f'`{name}`' for name in names)} ({source.get('format')}), {how}."


def _test_file(schema: Schema) -> str:
    """A raw file with rows like those of the training data: of the test split, if it has one of its own."""
    files = list(schema.source.get("files", {}).values())
    return files[-1][-1] if files and schema.source.get("format") != "hub" else "rows.csv"


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
    """A line per split with the features of which training never saw some values, the largest shares first."""
    lines = []
    for name, values in splits.items():
        shares = sorted(((share, feature) for feature, share in values.get("unseen", {}).items()), reverse=True)
        shown = [f"{feature} {share:.1%}" for share, feature in shares[:_MOST_SHARES] if share]
        lines.append(f"- {name}: {', '.join(shown) or 'none'}")
    what = " Of these features, training never saw\nsome values (of hashed features, at least so many):\n\n"
    return what + "\n".join(lines) if lines else ""


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
