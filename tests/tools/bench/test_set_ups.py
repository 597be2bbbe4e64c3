"""A change of a ds_config is measured beside the ds_config, on the same batches."""

import json

from tests.ranks import free_port
from tests.tools import forked_python


def test_set_ups_take_turns_on_the_same_batches(tmp_path):
    output = tmp_path / "set_ups.json"
    sgd = {"optimizer": {"type": "SGD", "params": {"torch_adam": None, "fused": None, "betas": None, "eps": None}}}
    changes = [{"optimizer": {"params": {"fused": False}}}, sgd | {"zero_allow_untested_optimizer": True}]
    done = forked_python.call(
        "tools/bench/set_ups.py",
        *(f"--change={json.dumps(change)}" for change in changes),
        *("--num_layers=1", "--batch_size=8", "--steps=3", f"--output={output}"),
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
    )  # fmt: skip
    assert done.status == 0, done.stderr
    base, unfused, other = json.loads(output.read_text())
    assert [each["change"] for each in (base, unfused, other)] == ["{}", *map(json.dumps, changes)]
    assert {len(each["seconds"]) for each in (base, unfused, other)} == {3}
    relative = [
        max(abs(a / b - 1) for a, b in zip(each["losses"], base["losses"], strict=True)) for each in (unfused, other)
    ]
    assert relative[0] < 1e-5 < relative[1]
    assert "largest difference of a loss" in done.stdout
