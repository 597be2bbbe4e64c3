"""tools/canary.py: the installed DeepSpeed has every private name; one that is gone or has changed is named."""

from tests import ROOT
from tests.tools import forked_python
from tools import canary

GONE = {
    "micro_step_id": "dhen/dense/hsdp.py: DeepSpeed has no micro_step_id",
    "ds_process_group": "dhen/dense/hsdp.py: DeepSpeed has no ds_process_group",
    "__release_param": "dhen/dense/lean_stage3.py: DeepSpeed has no __release_param",
    "_get_param_coordinator": "dhen/dense/lean_stage3.py: DeepSpeed has no _get_param_coordinator",
    "update_lp_params": "dhen/dense/averaged_weights.py: DeepSpeed has no update_lp_params",
    "copy_grads_in_partition": "HsdpStages1And2.copy_grads_in_partition: DeepSpeed has no such method",
    "_configure_zero_optimizer": "HsdpEngine._configure_zero_optimizer: DeepSpeed has no such method",
}
SOURCE = canary.source_of_deepspeed()


def faults_of(source: str, monkeypatch) -> list[str]:
    monkeypatch.setattr(canary, "source_of_deepspeed", lambda: source)
    return list(canary.find_faults())


def test_the_installed_deepspeed_has_every_name():
    done = forked_python.call("tools/canary.py")
    assert (done.status, done.stdout.count("\n")) == (0, 1), done.stdout
    assert done.stdout.endswith(": 0 faults\n")


def test_a_name_that_is_gone_is_named(monkeypatch):
    for name, line in GONE.items():
        assert line in faults_of(SOURCE.replace(name, "renamed"), monkeypatch)


def test_a_method_with_other_arguments_is_named(monkeypatch):
    old, new = "def partition_grads(self, params_to_release", "def partition_grads(self, stream, params_to_release"
    ours, inherited = sorted(faults_of(SOURCE.replace(old, new), monkeypatch))
    words = "partition_grads: DeepSpeed's takes (self, stream, params_to_release, grad_partitions), not (self, params"
    assert f"HsdpStage3.{words}" in ours
    assert f"LeanStage3.{words}" in inherited


def test_a_module_that_is_gone_is_named(monkeypatch):
    monkeypatch.setattr(canary, "MODULES", ("runtime.elsewhere",))
    assert list(canary.find_faults()) == ["ModuleNotFoundError: No module named 'deepspeed.runtime.elsewhere'"]


def test_every_file_that_says_it_uses_private_names_is_checked():
    said = {str(p.relative_to(ROOT)) for p in (ROOT / "dhen").rglob("*.py") if "are private" in p.read_text()}
    assert said == set(canary.FILES)
