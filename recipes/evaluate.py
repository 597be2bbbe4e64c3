"""Evaluate a trained model: AUC, normalized entropy, log loss and calibration.

    deepspeed recipes/evaluate.py --model_name_or_path runs/frappe
    deepspeed recipes/evaluate.py --model_name_or_path runs/frappe/model --dataset_name more_rows.csv \\
        --dataset_schema recipes/configs/schemas/frappe.yaml --output metrics.json

Without --dataset_name, it evaluates the test split of the data that the run was trained on. It runs on any number of
ranks.
"""

from pathlib import Path

from dhen.runtime import topology as job
from dhen.runtime.messages import log_to_stderr, user_errors
from dhen.training.loop import evaluate
from dhen.training.reporting.run_folder import metrics_of, print_metrics, write_json
from dhen.training.saved.scoring import load_for_scoring, parse_scoring_arguments
from dhen.training.unseen import report_unseen


def main() -> None:
    """Read the arguments, join the job, evaluate."""
    log_to_stderr()
    with user_errors():
        arguments = parse_scoring_arguments(None, __doc__)
        topology = job.start()
        model, loader = load_for_scoring(arguments, topology)
        values = evaluate(model, loader)
        metrics = metrics_of(values, loader.schema.best_possible_ne.get(loader.split))
        if topology.is_main:
            print_metrics({loader.split: metrics})
            report_unseen(loader.split, values.unseen, loader.schema)
            if arguments.output:
                write_json(Path(arguments.output), metrics)
    job.stop()


if __name__ == "__main__":
    main()
