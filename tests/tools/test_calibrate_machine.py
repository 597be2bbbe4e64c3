"""tools/calibrate_machine.py at a tiny size."""

import torch
import yaml

from dhen.planner.machine import read_machine
from tests.tools.forked_python import call
from tools import calibrate_machine

LIKE, UNLIKE = ("h100", "cpu") if torch.cuda.is_available() else ("cpu", "h100")


def test_a_machine_is_measured_and_read_again(tmp_path):
    output = tmp_path / "machine.yaml"
    done = call("tools/calibrate_machine.py", "--size=128", "--batch_size=16", f"--like={LIKE}", f"--output={output}")
    assert done.status == 0, done.stderr
    machine = read_machine(str(output))
    assert machine.flops.keys() == {"fp32", "bf16"} | ({"tf32"} if torch.cuda.is_available() else set())
    assert machine.compute_efficiency > 0
    assert machine.local_bytes_per_second == read_machine(LIKE).local_bytes_per_second
    assert "links and host as in" in yaml.safe_load(output.read_text())["source"]


def test_a_machine_of_the_other_kind_is_refused(tmp_path):
    done = call("tools/calibrate_machine.py", f"--like={UNLIKE}", f"--output={tmp_path / 'machine.yaml'}")
    assert done.status == 2
    assert done.stderr.startswith(f"calibrate_machine: --like {UNLIKE} is ")


def test_products_that_take_long_are_not_made_longer(monkeypatch):
    """The rate rises with each size here, as it may on a busy machine."""
    seconds = iter([0.01, 0.06, 0.3])
    monkeypatch.setattr(calibrate_machine, "seconds_of", lambda _: next(seconds))
    assert calibrate_machine.product_rate("fp32", torch.device("cpu"), 8) == 2 * 32**3 / 0.3
