"""A run of a mixture of experts: its metrics, its export and its summary."""

import json

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from dhen.data.loading.batches import BatchLoader
from dhen.model.modeling_dhen import DhenForClickPrediction
from tests import ROOT
from tests.recipes.launch import TINY, losses, run_script, summary

EXPERTS = {"kind": "advanced_dlrm", "num_experts": 4, "balance_loss": 100.0, "use_dense": True}


def test_a_run_exports_a_model_with_its_metrics_in_which_the_balancing_loss_has_no_part(tmp_path, click_log):
    """2 ranks, ZeRO stage 3, recomputed. The balancing loss would be about 100."""
    run, ds_config = tmp_path / "run", tmp_path / "ds_config.json"
    settings = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    ds_config.write_text(json.dumps(settings | {"dhen": {"activation_checkpointing": "all"}}))
    flags = [f"--dataset_name={click_log}", f"--output_dir={run}", *TINY, "--max_steps=4", f"--ds_config={ds_config}"]
    done = run_script("train.py", *flags, "--interactions", json.dumps([EXPERTS]), "--z_loss=0.5", ranks=2)
    assert done.status == 0, done.output
    assert "z_loss has no effect in layers whose experts is not interactions or ensembles" in done.output
    assert max(float(loss) for loss in losses(run).values()) < 2
    model = AutoModel.from_pretrained(run / "model").eval()
    assert isinstance(model, DhenForClickPrediction)
    (batch,) = BatchLoader(click_log, "validation", batch_size=200).epoch(0)
    with torch.no_grad():
        output = model(batch.sparse, batch.dense_BN, batch.labels_B)
    assert output.auxiliary_loss is None
    assert output.loss.item() == pytest.approx(summary(run)["eval"]["logloss"], rel=1e-5)
    assert output.loss.item() == pytest.approx(
        binary_cross_entropy_with_logits(output.logits, batch.labels_B).item(), rel=1e-6
    )
    with FlopCounterMode(display=False) as counter:
        embeddings_BFD = model.tables(batch.sparse).detach().requires_grad_()
        logits_B = model.train()(inputs_embeds=embeddings_BFD, dense=batch.dense_BN).logits
        logits_B.sum().backward()
    assert summary(run)["training_flops_per_sample"] == counter.get_total_flops() / 200


def test_a_run_of_layers_of_experts_resumes_to_the_bit_counts_what_it_drops_and_can_be_fine_tuned(tmp_path, click_log):
    """2 ranks, ZeRO stage 3."""
    experts = ["--experts=ensembles", "--num_experts=3", "--capacity_factor=1", "--batch_norm=true", "--dropout=0.1"]
    flags = [
        f"--dataset_name={click_log}",
        *TINY,
        "--ds_config=ds_configs/zero3.json",
        "--save_steps=2",
        "--eval_steps=2",
    ]
    straight, broken, tuned = (tmp_path / name for name in ("straight", "broken", "tuned"))
    runs = [
        (straight, *experts, "--max_steps=4"),
        (broken, *experts, "--max_steps=2"),
        (broken, *experts, "--max_steps=4", "--resume_from_checkpoint=true"),
        (tuned, "--max_steps=1", f"--model_name_or_path={straight}"),
    ]
    for run, *more in runs:
        done = run_script("train.py", *flags, *more, f"--output_dir={run}", ranks=2)
        assert done.status == 0, done.output
        assert "experts were full for" in done.output
    assert losses(broken) == losses(straight)
    assert summary(broken)["test"] == summary(straight)["test"]
    assert 0 < summary(straight)["dropped_share"] < 0.9
    assert ", concat, 3 experts, 2 per example" in (straight / "model/README.md").read_text()
    state = AutoModel.from_pretrained(straight / "model").state_dict()
    dense = sum("tables." not in name for name in state)
    assert f"dense weights: {dense} of {dense} kept" in done.output
    assert summary(tuned)["training_flops_per_sample"] == summary(straight)["training_flops_per_sample"]
