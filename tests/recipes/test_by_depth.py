"""One ds_config for every depth: ds_configs/by_depth.json turns techniques on as the model gets deeper."""

import json

import pytest

from tests.recipes.launch import TINY, run_script, summary

FLAGS = (*TINY, "--per_device_train_batch_size=16", "--max_steps=3", "--eval_steps=3")
RUNGS = {2: "dhen.by_depth[0] (up to 4 layers)", 8: "dhen.by_depth[1] (up to 8 layers)",
         12: "dhen.by_depth[2] (up to 12 layers)", 16: "dhen.by_depth[3] (any depth)"}  # fmt: skip


@pytest.mark.parametrize("depth", RUNGS)
def test_each_depth_trains_with_its_rung(tmp_path, click_log, depth):
    run, flags = tmp_path / "run", (*FLAGS, f"--num_layers={depth}", f"--dataset_name={click_log}")
    done = run_script(
        "train.py", "--ds_config=ds_configs/by_depth.json", f"--output_dir={run}", *flags, ranks=4, nodes=2
    )
    assert done.status == 0, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("ds_config: dhen.by_depth")]
    assert line.startswith(f"ds_config: {RUNGS[depth]} for {depth} layers")
    taken = json.loads((run / "ds_config.json").read_text())
    assert '"auto"' not in json.dumps(taken)
    zero, dhen = taken["zero_optimization"], taken["dhen"]
    assert zero["stage"] == summary(run)["zero_stage"] == (0 if depth == 2 else 3)
    assert (dhen["shard_group"] == "node") == (depth > 2)
    assert (dhen["activation_checkpointing"] == "all") == (depth > 8)
    assert ("offload_param" in zero and "offload_optimizer" in zero) == (depth > 12)
