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
from pathlib import Path

from dhen.config.arguments import parse_arguments
from dhen.runtime import topology as job
from dhen.runtime.lost_ranks import naming_lost_ranks
from dhen.runtime.messages import log_to_stderr, user_errors
from dhen.training.check import check
from dhen.training.dataset import open_data
from dhen.training.finish import finish
from dhen.training.reporting.run_folder import check_run_folder
from dhen.training.session import build_model, given_ds_config, has_nothing_to_do, make_trainer, start_reporting

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main() -> None:
    """Read the arguments, join the job, open the data, build the model, train it, then test and export it."""
    log_to_stderr()
    with user_errors(FloatingPointError):  # which means that the loss is not finite
        arguments = parse_arguments(quickstart=QUICKSTART, description=__doc__)
        topology = job.start()

        # Check all that needs no data first, because preparing the data may take hours.
        check_run_folder(arguments.training)
        given_ds_config(arguments, topology)

        if arguments.check:
            check(arguments, topology)
            job.stop()
            return

        data = open_data(arguments, topology)
        model = build_model(arguments, topology, data)
        trainer = make_trainer(arguments, data, model)
        if has_nothing_to_do(arguments, trainer):
            job.stop()
            return
        progress = start_reporting(arguments, data, trainer)

    # If a rank dies from here on, the others say which one.
    with user_errors(FloatingPointError), naming_lost_ranks(topology):
        with contextlib.closing(progress):
            trainer.train(progress)
        finish(arguments, data, trainer, progress)
    job.stop()


if __name__ == "__main__":
    main()
