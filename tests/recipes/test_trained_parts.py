"""Fine-tuning part by part: frozen parts keep every bit, layers and new rows have rates of their own, a new head."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dhen.data.schema import Schema
from dhen.dense.trained_parts import ANCHOR
from dhen.model.features import init_table
from dhen.model.parts import part_of
from dhen.training.saved.fine_tuning import start_from
from dhen.training.saved.trained_model import TrainedModel
from tests.recipes.launch import TINY, losses, run_script
from tests.recipes.test_fine_tuning import NEW, OLD, SEED, Log, keys_of, table_of, train, write_log

LAYERS, STEPS, RATE, DECAY = 2, 4, 0.01, 0.5
RATES = (f"--layer_learning_rate_decay={DECAY}", "--table_learning_rate=0", "--new_row_learning_rate=0.1")
ALL = {"features", "layers.0", "layers.1", "head"}
CASES = {
    "zero0": (1, "dense", ALL, "--weight_decay=0.1", *RATES),
    "zero1": (2, "features, layers:0", {"features", "layers.0"}, *RATES),
    "zero2": (2, "tables,layers:1", {"layers.1"}),
    "zero3": (2, "dense", ALL, "--weight_decay=0.1", *RATES),
    "hsdp_ckpt": (4, "layers:0-0", {"layers.0"}, *RATES),
}
"""By ds_config: ranks, --freeze, the dense parts that it names, and more flags."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trained_parts")


@pytest.fixture(scope="module")
def old_run(place) -> Path:
    run = place / "old_run"
    log = write_log(place, "old", OLD, range(40), seed=1)
    more = [f"--num_layers={LAYERS}", "--norm_position=pre", "--dropout=0.1"]
    train(log.flags, run, "--batch_norm", "--max_steps=10", *more)
    return run


@pytest.fixture(scope="module")
def new_log(place) -> Log:
    return write_log(place, "new", NEW, range(20, 70), seed=2)


@pytest.fixture(scope="module")
def start(old_run, new_log, place) -> dict[str, Tensor]:
    """The dense weights that a run starts from."""
    prepared = new_log.prepared(place / "cache")
    return start_from(TrainedModel.open(old_run), prepared, Schema.load(prepared)).dense_weights


def after_step(run: Path) -> list[Path]:
    return [run.with_suffix(f".{step}") for step in range(1, STEPS + 1)]


def print_states(run: Path) -> None:
    """A patch: ranks print how many numbers of optimizer state they have. `run`.1, `run`.2, … get the dense weights
    after each step.
    """
    from dhen.training import parallel_model
    from dhen.training.loop import Trainer
    from dhen.training.parallel_model import ParallelDhen

    train_as_before, step_as_before = Trainer.train, ParallelDhen.step

    def step(self: ParallelDhen, loss: Tensor) -> None:
        step_as_before(self, loss)
        assert all(weight.grad is None for weight in self.engine.module.parameters() if not weight.requires_grad)
        if anchor := [weight for name, weight in self.engine.module.named_parameters() if name == ANCHOR]:
            assert not parallel_model._whole_weight(*anchor).any(), "the anchor is added to the logits"
        state = self.dense_state_dict()
        if self.topology.is_main:
            torch.save(state, next(path for path in after_step(run) if not path.exists()))

    def train(self: Trainer, *arguments: object) -> bool:
        is_stopped = train_as_before(self, *arguments)
        outer = self.model.engine.optimizer
        states = getattr(outer, "optimizer", outer).state.values()
        print(f"states: {sum(state['exp_avg'].numel() for state in states)}")
        return is_stopped

    Trainer.train, ParallelDhen.step = train, step


def fine_tune(data: Log, old: Path, run: Path, case: str, *more: str, ranks: int | None = None) -> str:
    """Fine-tune by a case; returns what was printed."""
    its_ranks, freeze, _, *flags = CASES[case]
    ranks = ranks or its_ranks
    nodes = 2 if ranks == 4 else 1
    flags += [f"--freeze={freeze}", f"--model_name_or_path={old}"]
    done = run_script(
        "train.py", *data.flags, *TINY, f"--output_dir={run}", f"--ds_config=ds_configs/{case}.json", f"--seed={SEED}",
        f"--per_device_train_batch_size={32 // ranks}", f"--learning_rate={RATE}", f"--max_steps={STEPS}",
        "--save_steps=2", "--eval_steps=2", "--ema_decay=0.9", "--load_best_model_at_end=false",
        *flags, *more, ranks=ranks, nodes=nodes, patch=partial(print_states, run),
    )  # fmt: skip
    assert done.status == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def tuned(old_run, new_log, place) -> Callable[[str], tuple[Path, str]]:
    """Makes the run of a case, once: its folder and what it printed."""
    runs: dict[str, tuple[Path, str]] = {}

    def run_of(case: str) -> tuple[Path, str]:
        if case not in runs:
            runs[case] = place / case, fine_tune(new_log, old_run, place / case, case)
        return runs[case]

    return run_of


@pytest.mark.parametrize("case", CASES)
def test_a_frozen_part_keeps_every_bit_and_has_no_optimizer_state(tuned, start, case):
    run, output = tuned(case)
    after = TrainedModel.open(run).dense_weights()
    assert after.keys() == start.keys()
    parts = {name: part_of(name, LAYERS) for name in start}
    assert [n for n, part in parts.items() if part in CASES[case][2] and not torch.equal(start[n], after[n])] == []
    assert any("running_mean" in name for name, part in parts.items() if part == "layers.1")
    for part in set(parts.values()) - CASES[case][2]:
        assert any(not torch.equal(start[name], after[name]) for name in parts if parts[name] == part), part
    trained = sum(
        start[name].numel() for name, part in parts.items() if part not in CASES[case][2] and "running" not in name
        and "num_batches" not in name
    )  # fmt: skip
    shards = 1 if case == "zero0" else 2
    sizes = [int(line.split()[1]) for line in output.splitlines() if line.startswith("states: ")]
    assert trained / shards <= sizes[0] <= trained / shards * 1.02 + 40, "padding aside, the trained weights' only"


@pytest.mark.parametrize("case", ["zero0", "zero1", "zero3", "hsdp_ckpt"])
def test_new_rows_train_and_kept_rows_stay_if_their_rate_is_0(tuned, old_run, case):
    assert_only_new_rows_trained(tuned(case)[0], old_run)


def assert_only_new_rows_trained(run: Path, old_run: Path) -> None:
    for feature in ("city", "app"):
        before, after = table_of(old_run, feature), table_of(run, feature)
        old_keys, new_keys = keys_of(old_run, feature), keys_of(run, feature)
        kept = [new_keys.index(key) for key in old_keys]
        assert torch.equal(after[1:][kept], before[1:])
        new = [row for row, key in enumerate(new_keys) if key not in old_keys]
        uses = TrainedModel.open(run).uses(feature)[1:][new]
        untrained = init_table(feature, len(after), after.shape[1], range(after.shape[1]), SEED)
        has_moved = (after != untrained).any(1)[1:][new]
        assert has_moved[uses > 0].all()
        assert int((uses > 0).sum()) > 10
    assert table_of(run, "new").any()


@pytest.mark.parametrize("case", ["zero1", "hsdp_ckpt"])
def test_each_layer_has_its_learning_rate(tuned, start, case):
    """Adam's first step is as long as the learning rate, in each direction."""
    run, _ = tuned(case)
    after, moved = torch.load(after_step(run)[0]), {}
    for name in [name for name in start if "running" not in name and "num_batches" not in name]:
        part = part_of(name, LAYERS)
        moved[part] = max(moved.get(part, 0.0), float((after[name] - start[name]).abs().max()))
    for part, share in {"head": 1.0, "layers.1": DECAY, "layers.0": DECAY**2, "features": DECAY**3}.items():
        warm_up = 0.5
        expected = 0.0 if part in CASES[case][2] else warm_up * share * RATE
        assert moved[part] == pytest.approx(expected, rel=0.01), part


@pytest.fixture(scope="module")
def other_model(old_run, place) -> Path:
    """The trained model with other weights."""
    other = Path(shutil.copytree(old_run / "model", place / "other_model"))
    for file in other.glob("*.safetensors"):
        tensors = {
            name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    return other


@pytest.mark.parametrize("case", ["zero1", "zero3", "hsdp_ckpt"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tuned, other_model, new_log, tmp_path, case):
    """It has frozen weights and new rows from the checkpoint: the model that it names has other weights."""
    run, resumed = resume(*tuned(case), new_log, other_model, tmp_path, case)
    before, after = TrainedModel.open(run).dense_weights(), TrainedModel.open(resumed).dense_weights()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    for feature in ("city", "app", "new"):
        assert torch.equal(table_of(run, feature), table_of(resumed, feature))
    assert losses(run) == losses(resumed)


@pytest.mark.parametrize(("case", "ds_config"), [("zero1", "zero1"), ("hsdp_ckpt", "zero3")])
def test_a_run_resumes_on_one_rank(tuned, other_model, old_run, new_log, tmp_path, case, ds_config):
    """With learning rate 0, so that a step shows the weights that were loaded."""
    more = ["--learning_rate=0", f"--ds_config=ds_configs/{ds_config}.json"]
    run, resumed = resume(*tuned(case), new_log, other_model, tmp_path, case, *more, ranks=1)
    before, after = torch.load(after_step(run)[1]), torch.load(after_step(resumed)[0])
    weights = [name for name in before if "running" not in name and "num_batches" not in name]
    assert [name for name in weights if not torch.equal(before[name], after[name])] == []
    assert_only_new_rows_trained(resumed, old_run)


def resume(
    run: Path, output: str, new_log: Log, model: Path, folder: Path, case: str, *more: str, ranks: int | None = None
) -> tuple[Path, Path]:
    """The run, and a copy that was resumed after two steps."""
    resumed = Path(shutil.copytree(run, folder / "run"))
    checkpoint = f"--resume_from_checkpoint={resumed / 'checkpoint-2'}"
    assert "at step 2 of 4" in fine_tune(new_log, model, resumed, case, checkpoint, *more, ranks=ranks), output
    return run, resumed


def test_a_run_with_other_frozen_parts_is_not_resumed(tuned, new_log, old_run, tmp_path):
    run = Path(shutil.copytree(tuned("zero1")[0], tmp_path / "run"))
    flags = [f"--model_name_or_path={old_run}", "--resume_from_checkpoint=true", f"--output_dir={run}", "--max_steps=9"]
    flags += [*new_log.flags, *TINY, f"--seed={SEED}", "--ds_config=ds_configs/zero1.json"]
    done = run_script("train.py", *flags, "--per_device_train_batch_size=16", "--freeze=layers:1", ranks=2)
    assert done.status == 1
    assert (
        "saved with optimizer states for head, layers.1, each with a learning rate, but this run trains features, "
        "head, layers.0. Use the same freeze" in done.output
    )


def test_a_new_head_starts_anew_and_all_else_is_kept(old_run, new_log, start, tmp_path):
    frozen = f"--freeze=tables,features,layers:0-{LAYERS - 1}"
    more = ["--new_head", "--head_mlp", "8", "6", "--head_inputs=all", "--max_steps=2", frozen]
    output = train(new_log.flags, tmp_path / "run", f"--model_name_or_path={old_run}", *more)
    assert "  head_mlp was [64], is now [8, 6]\n  head_inputs was last, is now all\n" in output
    assert "head_mlp [8, 6] has no effect" not in output
    assert "freeze tables,features,layers:0-1 leaves new features without effect on these parts: new\n" in output
    before, after = TrainedModel.open(old_run), TrainedModel.open(tmp_path / "run")
    assert (after.config.head_mlp, after.config.head_inputs) == ([8, 6], "all")
    kept = after.dense_weights()
    assert kept["head.0.weight"].shape[0] == 8
    assert [n for n in start if not n.startswith("head.") and not torch.equal(start[n], kept[n])] == []
    # A head of the same form starts anew, too.
    prepared = new_log.prepared(tmp_path / "cache")
    again = start_from(before, prepared, Schema.load(prepared), new_head=before.config)
    assert set(start) - set(again.dense_weights) == {name for name in start if name.startswith("head.")}


@pytest.mark.parametrize(
    ("freeze", "words"),
    [
        ("layers:0-2", "freeze is 'layers:0-2', but the model has 2 layers. Use a layer or a range of layers, "),
        ("dense,tables", "freeze is 'dense,tables', which leaves nothing to train. Leave a part out"),
    ],
)
def test_what_cannot_be_frozen_is_refused(old_run, new_log, tmp_path, freeze, words):
    flags = [*new_log.flags, *TINY, f"--model_name_or_path={old_run}", f"--freeze={freeze}"]
    done = run_script("train.py", *flags, f"--output_dir={tmp_path / 'run'}", "--ds_config=ds_configs/zero0.json")
    assert done.status == 1
    assert f"error: {words}" in done.output
