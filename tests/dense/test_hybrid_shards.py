"""Hybrid shards of any model train like plain torch: by DeepSpeed alone, the Trainer and Accelerate."""

import contextlib
import copy
import functools
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from deepspeed.comm.torch import TorchBackend
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dhen.dense.hsdp import HsdpEngine, hybrid_shards
from dhen.dense.replica_reduction import ReplicaReduction
from dhen.runtime.topology import Topology
from tests import ROOT
from tests.ranks import run_ranks
from tests.recipes.test_documentation import blocks

STEPS, SAVED_AT = 20, 10
PER_RANK, ACCUMULATION, RANKS = 2, 2, 4
GLOBAL_BATCH = PER_RANK * ACCUMULATION * RANKS
LEARNING_RATE, MAX_GRAD_NORM = 5e-3, 0.5
TOLERANCE = 1e-5
CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=16, tie_word_embeddings=True,
)  # fmt: skip
BF16 = {"bf16": {"enabled": True}}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "deepspeed, stage 1": ("deepspeed", 1, {}),
    "deepspeed, stage 2": ("deepspeed", 2, {}),
    "deepspeed, stage 3": ("deepspeed", 3, {}),
    "trainer, stage 2": ("trainer", 2, {}),
    "trainer, stage 3": ("trainer", 3, {}),
    "accelerate, stage 2": ("accelerate", 2, {}),
    "accelerate, stage 3": ("accelerate", 3, {}),
}
IN_BF16 = {
    "accelerate, stage 3, bf16": ("accelerate", 3, BF16),
}
"""Who calls deepspeed.initialize, the ZeRO stage, and further settings."""
SCRIPTS = [block for page, block in blocks("python") if page == "recipes/HSDP.md"]


def ds_config(stage: int, **others: Any) -> dict[str, Any]:
    # Buckets smaller than a layer, and large weights that are sharded between their uses.
    zero = {"stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 300}
    return {
        "train_micro_batch_size_per_gpu": PER_RANK, "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": MAX_GRAD_NORM, "zero_optimization": zero, **others,
    }  # fmt: skip


def rows() -> list[dict[str, Tensor]]:
    """Sequences that count up from a random token."""
    generator = torch.Generator().manual_seed(5)
    starts = torch.randint(0, CONFIG.vocab_size, (STEPS * GLOBAL_BATCH, 1), generator=generator)
    tokens = (starts + torch.arange(8) * (1 + starts % 3)) % CONFIG.vocab_size
    return [{"input_ids": sequence, "labels": sequence} for sequence in tokens]


def new_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), dtype=torch.float32)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)


@functools.cache
def plain() -> tuple[list[float], dict[str, Tensor]]:
    """The losses of plain torch in one process, and the weights at the step at which the others save theirs."""
    model, losses, saved = new_model(), [], {}
    optimizer = adam(model)
    for batch in DataLoader(rows(), GLOBAL_BATCH):
        if len(losses) == SAVED_AT:
            saved = copy.deepcopy(model.state_dict())
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, saved


# The same on four ranks. Each way saves a checkpoint in the middle, and goes on in new objects that load it.


def mean_over_ranks(losses: list[Tensor]) -> list[float]:
    """By step, of the losses of this rank's micro batches."""
    by_step = torch.stack(losses).float().view(-1, ACCUMULATION).mean(1)
    dist.all_reduce(by_step)
    return (by_step / RANKS).tolist()


def by_deepspeed(folder: Path, stage: int, **others: Any) -> list[float]:
    losses = []
    data = list(DataLoader(rows(), PER_RANK))[dist.get_rank() :: RANKS]
    for part, seed in enumerate((dist.get_rank(), 9)):
        with hybrid_shards(2):
            model = new_model(seed)  # the engine takes rank 0's weights
            engine, *_ = deepspeed.initialize(model=model, optimizer=adam(model), config=ds_config(stage, **others))
        if part == 1:
            engine.load_checkpoint(folder)
        for batch in data[part * SAVED_AT * ACCUMULATION :][: SAVED_AT * ACCUMULATION]:
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        if part == 0:
            engine.save_checkpoint(folder)
    return mean_over_ranks(losses)


class NotedTrainer(Trainer):
    """Keeps the loss of every micro step, which the Trainer has divided by their number."""

    noted: list[Tensor]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *arguments, **options)
        self.noted.append(loss.detach() * ACCUMULATION)
        return loss


def by_trainer(folder: Path, stage: int) -> list[float]:
    losses: list[Tensor] = []
    for steps, checkpoint in ((SAVED_AT, None), (STEPS, folder / f"checkpoint-{SAVED_AT}")):
        with hybrid_shards("node"):
            arguments = TrainingArguments(
                folder, deepspeed=ds_config(stage), max_steps=steps, save_steps=SAVED_AT, report_to=[],
                per_device_train_batch_size=PER_RANK, gradient_accumulation_steps=ACCUMULATION,
                max_grad_norm=MAX_GRAD_NORM, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
                logging_steps=1, disable_tqdm=True, train_sampling_strategy="sequential",
            )  # fmt: skip
            model = AutoModelForCausalLM.from_pretrained(folder.parent / "start")
            trainer = NotedTrainer(model, arguments, train_dataset=rows())
            trainer.noted = losses
            trainer.train(resume_from_checkpoint=checkpoint)
    means = mean_over_ranks(losses)
    logged = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    assert logged == pytest.approx(means, rel=1e-3), "the Trainer logs another mean"
    return means


def by_accelerate(folder: Path, stage: int, **others: Any) -> list[float]:
    losses: list[Tensor] = []
    for part in (0, 1):
        AcceleratorState._reset_state(reset_partial_state=True)
        with hybrid_shards(2):
            plugin = DeepSpeedPlugin(hf_ds_config=ds_config(stage, **others))
            accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=ACCUMULATION)
            model = AutoModelForCausalLM.from_pretrained(folder.parent / "start")
            model, optimizer, data = accelerator.prepare(model, adam(model), DataLoader(rows(), PER_RANK))
        if part == 1:
            accelerator.load_state(folder)
            data = accelerator.skip_first_batches(data, SAVED_AT * ACCUMULATION)
        for batch in data:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if len(losses) == SAVED_AT * ACCUMULATION:
                break
        if part == 0:
            accelerator.save_state(folder)
    return mean_over_ranks(losses)


@dataclass
class Trained:
    """gathering: groups of ranks that gathered or scattered. sent: messages between replicas, by whether the micro
    step was the last.
    """

    losses: list[float] = field(default_factory=list)
    gathering: set[tuple[int, ...]] = field(default_factory=set)
    sent: Counter[bool] = field(default_factory=Counter)


@contextlib.contextmanager
def watched(trained: Trained):
    """Note the messages of DeepSpeed's engines."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "reduce_scatter"):
            call = getattr(TorchBackend, name)

            def noted(self, *tensors, call=call, group=None, **options):
                trained.gathering.add(tuple(dist.get_process_group_ranks(group)))
                return call(self, *tensors, group=group, **options)

            patch.setattr(TorchBackend, name, noted)
        messages, send, backward = [], ReplicaReduction._send, HsdpEngine.backward

        def noted_backward(engine, *arguments, **options):
            messages.clear()
            result = backward(engine, *arguments, **options)
            trained.sent[engine.is_gradient_accumulation_boundary()] += len(messages)
            return result

        patch.setattr(ReplicaReduction, "_send", lambda *arguments: (messages.append(1), send(*arguments))[1])
        patch.setattr(HsdpEngine, "backward", noted_backward)
        yield


def let_accelerate_use_gloo() -> None:
    """Accelerate names no backend for DeepSpeed on a CPU, and would train each rank alone."""
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.NO)


def train_all(topology: Topology, folder: Path) -> dict[str, Trained]:
    let_accelerate_use_gloo()
    results = {}
    for name, (caller, stage, others) in (CASES | IN_BF16).items():
        unset_hf_deepspeed_config()
        results[name] = Trained()
        with watched(results[name]):
            results[name].losses = globals()[f"by_{caller}"](folder / name, stage, **others)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the initial model and all checkpoints."""
    folder = tmp_path_factory.mktemp("hybrid_shards")
    new_model().save_pretrained(folder / "start")
    return folder


@pytest.fixture(scope="module")
def trained(folder) -> list[dict[str, Trained]]:
    return run_ranks(RANKS, train_all, folder, local_size=2)


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_plain_torch_across_a_resume(trained, name):
    assert trained[0][name].losses == pytest.approx(plain()[0], abs=TOLERANCE)


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_stays_near_plain_torch(trained, name):
    assert trained[0][name].losses == pytest.approx(plain()[0], rel=0.03)


@pytest.mark.parametrize("name", CASES | IN_BF16)
def test_gathers_stay_in_the_shard_group_and_only_the_last_micro_step_leaves_it(trained, name):
    for rank, results in enumerate(trained):
        assert results[name].gathering == {(0, 1) if rank < 2 else (2, 3)}
        assert results[name].sent[False] == 0
        assert results[name].sent[True] > STEPS


@pytest.mark.parametrize("name", ["deepspeed, stage 2", "deepspeed, stage 3"])
def test_a_checkpoint_converts_to_the_weights_of_plain_torch(trained, folder, name):
    weights = get_fp32_state_dict_from_zero_checkpoint(folder / name)
    assert set(weights) == set(plain()[1])
    for key, weight in weights.items():
        torch.testing.assert_close(weight, plain()[1][key], atol=1e-4, rtol=0)


# Faults, refusals and the page's scripts.


REFUSED: dict[str, dict[str, Any]] = {
    "stage is 0, which shards nothing": {"zero_optimization": {"stage": 0}},
    "fp16.enabled is not supported": {"fp16": {"enabled": True}},
    "torch_autocast.enabled is not": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
    "ZenFlow and SuperOffload are": {"zero_optimization": {"stage": 3, "zenflow": {"topk_ratio": 0.1}}},
    "zero_hpz_partition_size is another way": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
    "zero_quantized_gradients is not": {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
    "offload_optimizer to NVMe": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
    "reduce_scatter is false": {"zero_optimization": {"stage": 2, "reduce_scatter": False}},
    "grad_accum_dtype is fp32": BF16 | {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    "managed_gradient_accumulation is false": {"managed_gradient_accumulation": False},
    "deepcompile is not supported": {"compile": {"deepcompile": True}},
    "optimizer.type is Muon": {"optimizer": {"type": "Muon", "params": {"lr": 0.1}}},
    "DeepSpeedHybridEngine": {"hybrid_engine": {"enabled": True}},
}


def message_of(config: dict[str, Any]) -> str:
    with hybrid_shards(2), pytest.raises(ValueError, match="Hybrid shards") as caught:
        deepspeed.initialize(model=nn.Linear(4, 4), config=config)
    return str(caught.value)


def refuse(topology: Topology) -> tuple[list[str], float]:
    """The messages, and the first loss of an engine without an optimizer, which is for evaluation only."""
    messages = [message_of(ds_config(2) | config) for config in REFUSED.values()]
    with pytest.raises(ValueError, match="shard_group is 3") as caught, hybrid_shards(3):
        pass
    messages.append(str(caught.value))
    with deepspeed.zero.Init(config_dict_or_path=ds_config(3)):
        sharded = nn.Linear(4, 4)
    with hybrid_shards(2), pytest.raises(ValueError, match="sharded weight over other ranks") as caught:
        deepspeed.initialize(model=sharded, optimizer=adam(sharded), config=ds_config(3))
    messages.append(str(caught.value))
    with hybrid_shards(2):
        engine, *_ = deepspeed.initialize(model=new_model(topology.rank), config=ds_config(3))
    batch = next(iter(DataLoader(rows(), GLOBAL_BATCH)))
    return messages, engine(**batch).loss.item()


def test_what_cannot_work_is_refused_in_a_line():
    for messages, loss in run_ranks(RANKS, refuse, local_size=2):
        for message, words in zip(messages, REFUSED, strict=False):
            assert words in message
        assert not any("\n" in message for message in messages)
        assert loss == pytest.approx(plain()[0][0], abs=TOLERANCE)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)])

    def forward(self, x: Tensor, num_heads: int) -> Tensor:
        return torch.cat([head(x) for head in self.heads[:num_heads]], dim=1).sum()


def two_heads(topology: Topology, stage: int) -> str:
    """The message about a head that is used in the first micro step only."""
    with hybrid_shards(2):
        model = TwoHeads()
        engine, *_ = deepspeed.initialize(model=model, optimizer=adam(model), config=ds_config(stage))
    engine.backward(engine(torch.ones(2, 4), 2))
    engine.step()
    with pytest.raises(RuntimeError, match="gradient in an earlier micro step") as caught:
        engine.backward(engine(torch.ones(2, 4), 1))
    return str(caught.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_weight_that_the_last_micro_step_does_not_use_is_refused(stage):
    for message in run_ranks(RANKS, two_heads, stage, local_size=2):
        assert "(3, 4)" in message
        assert "(4, 4)" not in message


def without_the_all_reduce(topology: Topology, folder: Path) -> list[float]:
    ReplicaReduction._send = lambda self, on_wire, put_away: put_away()
    return by_deepspeed(folder / "broken", 2)


def test_without_the_all_reduce_between_replicas_the_losses_are_others(folder):
    for losses in run_ranks(RANKS, without_the_all_reduce, folder, local_size=2):
        assert losses[-1] != pytest.approx(plain()[0][-1], abs=100 * TOLERANCE)


def run_the_scripts(topology: Topology, folder: Path) -> list[int]:
    """Numbers of ranks in the groups that the scripts of HSDP.md shard over."""
    let_accelerate_use_gloo()
    os.chdir(folder)
    sizes = []
    for script in SCRIPTS:
        names = {"dataset": rows()}
        exec(script, names)
        engine = names["engine"] if "engine" in names else names["trainer"].model_wrapped
        sizes.append(dist.get_world_size(engine.optimizer.dp_process_group))
    return sizes


def test_the_scripts_of_the_page_run(folder):
    auto = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3}}
    (folder / "ds_config.json").write_text(json.dumps(auto))
    assert len(SCRIPTS) == 2
    assert run_ranks(RANKS, run_the_scripts, folder, local_size=2) == [[2, 2]] * RANKS
    assert (folder / "out/checkpoint-4").is_dir()


def test_the_page_names_the_versions_that_are_tested():
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    page = (ROOT / "recipes/HSDP.md").read_text().replace("\n", " ")
    for package in ("torch", "deepspeed", "transformers", "accelerate"):
        assert f"{package} {pins[package]}" in page
