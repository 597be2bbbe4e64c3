"""Train a DHEN model on a click log.

    deepspeed recipes/train.py --ds_config ds_configs/zero2.json --config recipes/configs/frappe.yaml
    deepspeed recipes/train.py --ds_config ds_configs/zero2.json --dataset_name log.csv --dataset_schema schema.yaml

The YAML of --config says what to train. The JSON of --ds_config says how the run fits the machine. Arguments on the
command line override the YAML. Without --config, --dataset_name and --train_file, the script trains the quickstart: a
click log that the project generates and whose best possible normalized entropy is known.

torchrun, accelerate launch and plain python (one rank) also start the script. Add --check before a long run: it prints
what the run would use and how long it would take, and trains nothing.
"""

import contextlib
import sys
from pathlib import Path

from dhen.config.arguments import Arguments, parse_arguments
from dhen.runtime import topology as job
from dhen.runtime.collectives import rank_zeros
from dhen.runtime.lost_ranks import naming_lost_ranks, training_begins
from dhen.runtime.messages import heartbeat, log_to_stderr, user_errors
from dhen.runtime.stopping import STATUS, StopRequest
from dhen.training.check import check
from dhen.training.dataset import open_data
from dhen.training.finish import finish
from dhen.training.reporting.run_folder import check_run_folder
from dhen.training.session import (
    build_model,
    given_ds_config,
    has_nothing_to_do,
    make_trainer,
    settle_resume,
    start_reporting,
)

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main() -> None:
    """Read the arguments, join the job and run it. Exit with status 75 if it was stopped on request."""
    log_to_stderr()
    stop = StopRequest()
    stop.listen()
    with user_errors(FloatingPointError):  # which means that the loss is not finite
        arguments = parse_arguments(quickstart=QUICKSTART, description=__doc__)
        topology = job.start(arguments.training.timeout_minutes)
        with naming_lost_ranks(topology):
            is_stopped = run(arguments, topology, stop)
    job.stop()
    if is_stopped:
        sys.exit(STATUS)


def run(arguments: Arguments, topology: job.Topology, stop: StopRequest) -> bool:
    """Open the data, build the model, train it, then test and export it. Returns whether it was stopped on request."""
    # Check all that needs no data first, because preparing the data may take hours.
    rank_zeros(topology, lambda: check_run_folder(arguments.training))
    settle_resume(arguments, topology)
    given_ds_config(arguments, topology)
    if arguments.check:
        check(arguments, topology)
        return False

    heartbeat.doing = "opening or preparing the data"
    data = open_data(arguments, topology)
    heartbeat.doing = "building the model"
    model = build_model(arguments, topology, data)
    trainer = make_trainer(arguments, data, model)
    if has_nothing_to_do(arguments, trainer):
        return False
    heartbeat.doing = "making the first step"
    training_begins()
    with contextlib.closing(start_reporting(arguments, data, trainer)) as progress:
        is_stopped = trainer.train(progress, stop)
    heartbeat.doing = "testing and exporting"
    if not is_stopped:
        finish(arguments, data, trainer, progress)
    return is_stopped


if __name__ == "__main__":
    main()
