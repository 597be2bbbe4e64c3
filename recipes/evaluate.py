"""Evaluate a trained model: AUC, normalized entropy, log loss and calibration.

    deepspeed recipes/evaluate.py --model_name_or_path runs/frappe
    deepspeed recipes/evaluate.py --model_name_or_path runs/frappe/model --dataset_name more_rows.csv \\
        --dataset_schema recipes/configs/schemas/frappe.yaml --output metrics.json
    deepspeed recipes/evaluate.py --model_name_or_path runs/frappe --metrics_by user --output metrics.json

Without --dataset_name, it evaluates the test split of the data that the run was trained on. It runs on any number of
ranks.
"""

from dataclasses import dataclass
from pathlib import Path

from dhen.config.command_line import ArgumentError
from dhen.model.configuration_dhen import option
from dhen.runtime import topology as job
from dhen.runtime.messages import log_to_stderr, user_errors
from dhen.training.evaluation.group_metrics import groups_by
from dhen.training.evaluation.unseen import report_unseen
from dhen.training.loop import evaluate
from dhen.training.reporting.by_group import report_groups, summary_of_groups
from dhen.training.reporting.run_folder import metrics_of, print_metrics, write_json
from dhen.training.saved.scoring import ScoringArguments, load_for_scoring, parse_scoring_arguments


@dataclass
class EvaluationArguments(ScoringArguments):
    """Which rows to evaluate, with which model, and by which groups."""

    metrics_by: list[str] = option(
        [],
        "Sparse features with one id per row, such as user and site: the grouped AUC, and the metrics of each of the "
        "1,000 largest groups. With --output, also as CSV files and plots beside it.",
    )


def main() -> None:
    """Read the arguments, join the job, evaluate."""
    log_to_stderr()
    with user_errors():
        arguments = parse_scoring_arguments(None, __doc__, EvaluationArguments)
        if arguments.output == "-":
            raise ArgumentError("--output -: the metrics are a file. Name it, or leave it out: a table is printed too.")
        topology = job.start()
        model, loader = load_for_scoring(arguments, topology)
        groups = groups_by(arguments.metrics_by, loader.schema)
        values = evaluate(model, loader, list(groups.values()))
        by_group = {name: each.compute(topology) for name, each in groups.items()}
        metrics = metrics_of(values, loader.schema.best_possible_ne.get(loader.split))
        if by_group:
            metrics["by"] = summary_of_groups(by_group)
        if topology.is_main:
            print_metrics({loader.split: metrics})
            report_unseen(loader.split, values.unseen, loader.schema)
            output = Path(arguments.output) if arguments.output else None
            if output is not None:
                write_json(output, metrics)
            for name, each in by_group.items():
                report_groups(name, each, loader, output)
    job.stop()


if __name__ == "__main__":
    main()
