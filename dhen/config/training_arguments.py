"""The arguments that say how the model is trained."""

from dataclasses import dataclass
from typing import Literal

from dhen.config.command_line import Paths, Text
from dhen.config.dhen_section import TableOptimizer
from dhen.model import ranges
from dhen.model.configuration_dhen import option
from dhen.model.parts import Freeze

ScheduleKind = Literal["constant", "linear", "cosine", "inverse_sqrt", "reduce_lr_on_plateau"]
ScalingRule = Literal["none", "linear", "sqrt"]
MetricName = Literal["auc", "ne", "logloss"]
LEARNING_RATES = {"learning_rate": 1e-3, "table_learning_rate": 0.05}
ADAM_TABLE_LEARNING_RATE = 1e-3
"""The defaults, without a trained model to start from."""


@dataclass
class TrainingArguments:
    """How the model is trained. Names that Hugging Face's TrainingArguments also have mean the same there.

    A step is one update of the dense part: `gradient_accumulation_steps` micro steps.
    """

    output_dir: Text | None = option(
        None, "Run folder for checkpoints, metrics and the trained model. Default: runs/<name of the data>."
    )
    per_device_train_batch_size: ranges.Batch | None = option(
        None,
        "Examples per rank in each micro step (one forward and backward pass). Default: a step has about 1/200 of the "
        "training rows, over all ranks: a power of two, at least 64, and at most 2048 per rank.",
    )
    per_device_eval_batch_size: ranges.Batch = option(
        4096, "Examples per rank in each evaluation step. Lower it if evaluation runs out of memory."
    )
    gradient_accumulation_steps: ranges.Size = option(
        1, "Micro steps per step. The dense part is updated once per step, the tables once per micro step."
    )
    num_train_epochs: ranges.Count | None = option(
        None, "Passes over the training split. Default: as many as it takes to make 500 steps, and 1 for large data."
    )
    max_steps: ranges.MaxSteps = option(-1, "Total number of steps. Overrides --num_train_epochs, unless it is -1.")
    learning_rate: ranges.NotNegative | None = option(
        None,
        "Peak learning rate of the dense part: all weights except the tables. Default: 1e-3, and a third of it with "
        "--model_name_or_path, so that the model keeps what it knows.",
    )
    table_learning_rate: ranges.NotNegative | None = option(
        None,
        "Peak learning rate of the embedding tables. Default: 0.05, or 1e-3 with --table_optimizer adam; a third of it "
        "with --model_name_or_path.",
    )
    table_optimizer: TableOptimizer | None = option(
        None,
        'Optimizer of the embedding tables, where the ds_config leaves dhen.table_optimizer "auto". Default: '
        "rowwise_adagrad. adam is for small tables, often with --whole_table_l2.",
    )
    table_epsilon: ranges.Epsilon | None = option(
        None,
        "Epsilon of the tables' optimizer. With Adagrad, a larger value makes the updates of rarely seen rows smaller, "
        "which helps against overfitting; for large data, try 1e-8. Default: 1e-3, and 1e-8 for adam.",
    )
    learning_rate_scaling: ScalingRule = option(
        "none",
        "Multiply both learning rates by global batch / base_batch_size (linear), or by its square root (sqrt).",
    )
    base_batch_size: ranges.Count = option(
        2048, "Global batch size, in examples, that the learning rates were tuned for. Used by --learning_rate_scaling."
    )
    warmup_steps: ranges.CountFrom0 = option(0, "Steps over which the learning rates rise linearly to their peak.")
    lr_scheduler_type: ScheduleKind = option(
        "cosine",
        "Learning rates after warm-up. constant: stay at the peak. linear, cosine: fall to min_lr_ratio at the end. "
        "inverse_sqrt: fall as 1 / sqrt(steps). reduce_lr_on_plateau: drop when the validation metric stops improving.",
    )
    min_lr_ratio: ranges.Share = option(0.0, "Lower bound of the learning rates, as a fraction of their peak.")
    plateau_factor: ranges.ShareBetween = option(
        0.1, "With reduce_lr_on_plateau, multiply the learning rates by this at each drop."
    )
    plateau_patience: ranges.Count = option(
        1, "With reduce_lr_on_plateau, drop after this many evaluations in a row without improvement."
    )
    plateau_restores_best: bool = option(
        False,
        "With reduce_lr_on_plateau, go back to the best checkpoint at each drop: its weights, tables and optimizer "
        "states. Steps and data go on.",
    )
    weight_decay: ranges.NotNegative = option(0.0, "Decoupled weight decay (AdamW), for the dense part.")
    adam_beta1: ranges.ShareBelowOne = option(0.9, "Adam's beta1, for the dense part and for tables under adam.")
    adam_beta2: ranges.ShareBelowOne = option(0.999, "Adam's beta2, for the dense part and for tables under adam.")
    adam_epsilon: ranges.Epsilon = option(1e-8, "Adam's epsilon, for the dense part.")
    max_grad_norm: ranges.NotNegative = option(
        0.0, "Clip the gradient norm of the dense part to this value. 0 turns clipping off. Tables are not clipped."
    )
    self_ensemble: bool = option(
        False,
        "Score each training batch twice, with different dropout, and train the mean prediction on the label and both "
        "predictions on their mean. The layers work on twice the rows.",
    )
    whole_table_l2: ranges.NotNegative = option(
        0.0,
        "L2 regularization of all rows of the tables. With adam it is coupled, as in the CTR benchmarks: a step adds "
        "this value * weight to the gradient. With the other optimizers it is decoupled: each step multiplies every "
        "row by (1 - table learning rate * this value). Its cost grows with the number of rows, so use it for small "
        "tables.",
    )
    looked_up_l2: ranges.NotNegative = option(
        0.0,
        "L2 penalty on the looked-up embeddings: adds this value / 2 * their squared norm, averaged over examples, to "
        "the loss.",
    )
    negative_sampling_rate: ranges.ShareAbove0 = option(
        1.0,
        "Share of the rows without a click that the training split still has, because the others were left out before. "
        "The loss corrects the logits by it, so predictions are right for all rows.",
    )
    ema_decay: ranges.ShareBelowOne = option(
        0.0,
        "Evaluate and export an exponential moving average of all weights instead of the last ones; checkpoints have "
        "both. Each step t keeps min(this value, (1 + t) / (10 + t)) of it; .99 and .999 are usual. It takes memory "
        "for a second copy of the weights. 0: no average.",
    )
    freeze: Freeze = option(
        "none",
        "Parts of the model that stay as they are, separated by commas: tables, features (the MLP of the dense "
        "features), layers:0-3 or layers:2, dense (all weights except the tables). Requires --model_name_or_path or "
        "--resume_from_checkpoint.",
    )
    layer_learning_rate_decay: ranges.ShareAbove0 = option(
        1.0,
        "Train each part of the dense part with this share of the learning rate of the part above it: the head with "
        "learning_rate, the last layer with this share of it, and so on, down to the features. 1: all alike.",
    )
    new_row_learning_rate: ranges.NotNegative | None = option(
        None,
        "Peak learning rate of the table rows that the model of --model_name_or_path never trained: new ids and new "
        "features. Default: table_learning_rate, which all other rows keep.",
    )
    new_head: bool = option(
        False,
        "Fine-tune with a head that starts anew, with the head_mlp, head_inputs and task_layers of this run, instead "
        "of the trained model's.",
    )
    keep_optimizer: bool = option(
        False,
        "Fine-tune with the optimizer states of the run of --model_name_or_path too: those of the tables, row by row, "
        "and of the dense part. For a model that is trained further every day. Needs that run's checkpoints.",
    )
    write_delta: bool = option(
        False,
        "Also write delta/: what fine-tuning changed in the model of --model_name_or_path, for tools/apply_deltas.py.",
    )
    dataloader_drop_last: bool = option(False, "Skip the last step of each epoch if its batch is incomplete.")
    shuffle: Literal["window", "none"] = option(
        "window",
        "Order of the training rows. window: shuffled row groups, and shuffled rows in windows of them. none: as in "
        "the files, for logs in time order; each rank then reads all rows.",
    )
    overwrite_output_dir: bool = option(
        False, "Delete the earlier run in output_dir and start a new one. Other files in the folder stay."
    )
    model_name_or_path: Text | None = option(
        None, "Fine-tune this trained model: a run folder or an exported model. The run keeps its architecture."
    )
    resume_from_checkpoint: Text | None = option(
        None,
        "Checkpoint folder to continue from; 'true' for the newest checkpoint in output_dir; 'auto' for the same, or a "
        "new run if output_dir has none.",
    )
    timeout_minutes: ranges.Positive = option(
        30.0, "How long ranks wait for another one in a step or a save before they name it and end the job."
    )
    logging_steps: ranges.Count = option(20, "Steps between progress lines.")
    report_to: Paths = option(
        ["tensorboard"],
        "Where the numbers of the progress lines also go: one or more of tensorboard, wandb (Weights & Biases) and "
        "mlflow, or none.",
    )
    eval_steps: ranges.CountFrom0 = option(
        0, "Steps between evaluations on the validation split. 0: evaluate after each epoch."
    )
    metrics_by: list[Text] = option(
        [],
        "Sparse features with one id per row, such as user and site: the last evaluations also measure the grouped AUC "
        "and the metrics of the 1,000 largest groups.",
    )
    save_steps: ranges.CountFrom0 = option(0, "Steps between checkpoints. 0: save after each evaluation.")
    async_save: Literal["auto", "on", "off"] = option(
        "auto",
        "Copy the states to host memory, and write the checkpoint while training goes on: on, off, or auto for on if "
        "the copy fits.",
    )
    save_total_limit: ranges.Count = option(2, "Number of newest checkpoints to keep. The best one is kept as well.")
    metric_for_best_model: MetricName = option(
        "ne", "Validation metric that decides which checkpoint is best: the highest auc, or the lowest ne or logloss."
    )
    load_best_model_at_end: bool = option(True, "Test and export the best checkpoint instead of the last weights.")
    skip_test: bool = option(False, "Leave the test split alone: do not score it. For a search over arguments.")
    calibrate: bool = option(
        False,
        "After training, multiply the logits of each task by one number, fitted on the validation split. Use "
        "it with dropout, which makes predictions too extreme and too low on average.",
    )
    early_stopping_patience: ranges.CountFrom0 = option(
        0, "Stop after this many evaluations in a row without improvement. 0 turns early stopping off."
    )
    seed: ranges.Seed = option(0, "Random seed of the initial weights, the order of the rows, and dropout.")
    interaction_files: list[Text] = option([], "Python files that register your own interactions.")

    @property
    def num_passes(self) -> int:
        """How often a training batch goes through the layers."""
        return 2 if self.self_ensemble else 1

    def freezes(self, word: str) -> bool:
        """Whether `freeze` has this word."""
        return word in map(str.strip, self.freeze.split(","))

    def without_effect(self) -> list[str]:
        """A sentence for each value that the user changed but that another value leaves without effect."""
        of_plateau = ("plateau_factor", "plateau_patience", "plateau_restores_best")
        has_no_plateau = ("lr_scheduler_type", self.lr_scheduler_type != "reduce_lr_on_plateau")
        is_unused = dict.fromkeys(of_plateau, has_no_plateau) | {
            "base_batch_size": ("learning_rate_scaling", self.learning_rate_scaling == "none"),
            "self_ensemble": ("freeze", self.freezes("dense")),
            "layer_learning_rate_decay": ("freeze", self.freezes("dense")),
            "table_epsilon": ("table_optimizer", self.table_optimizer == "sgd"),
        }
        default = TrainingArguments.__dataclass_fields__
        return [
            f"{name} has no effect: {other} is {getattr(self, other)}"
            for name, (other, unused) in is_unused.items()
            if unused and getattr(self, name) != default[name].default
        ]
