"""The training loop: steps, evaluations and checkpoints, until the last step or early stopping."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dhen.config.training_arguments import TrainingArguments
from dhen.data.loading.batches import Batch, BatchLoader
from dhen.model.modeling_dhen import DhenOutput
from dhen.model.tasks import LABEL_TASK, TaskWeights, loss_of_tasks
from dhen.runtime.stopping import StopRequest
from dhen.tables.id_exchange import SentIds
from dhen.training.divergence import ADVICE, KeptMicroStep, where_it_began
from dhen.training.evaluation.group_metrics import GroupMetrics
from dhen.training.evaluation.metrics import ClickMetrics, MetricValues, RunningLoss
from dhen.training.evaluation.openness import GateOpenness
from dhen.training.evaluation.unseen import UnseenValues, unseen_values
from dhen.training.learning_rate import BestMetric, LearningRateSchedule, batch_size_scale
from dhen.training.parallel_model import ParallelDhen, ScoringDhen
from dhen.training.reporting.progress import ProgressReporter
from dhen.training.saved.checkpoint import Save, TrainerState, load_checkpoint, start_save
from dhen.training.saved.checkpoint_folder import checkpoint_of, checkpoints, damage, delete_old_checkpoints
from dhen.training.self_ensemble import self_ensemble_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a split, the values that training never saw, by feature, and this rank's scores.

    tasks, task_scores: of the further tasks for which the split has labels. gates: the mean openness of the gate of
    each layer that has one.
    """

    metrics: MetricValues
    unseen: dict[str, UnseenValues]
    scores: ClickMetrics | None = None
    tasks: dict[str, MetricValues] = field(default_factory=dict)
    task_scores: dict[str, ClickMetrics] = field(default_factory=dict)
    gates: dict[int, float] = field(default_factory=dict)

    def mean(self, name: str, weights: TaskWeights) -> float:
        """The mean of a metric over all tasks, weighted as their losses are; NaN without a task that defines it."""
        weights = weights if isinstance(weights, dict) else {}
        of_tasks = {LABEL_TASK: self.metrics} | self.tasks
        values = {task: getattr(metrics, name) for task, metrics in of_tasks.items()}
        shares = {task: weights.get(task, 1.0) for task, value in values.items() if not math.isnan(value)}
        total = sum(shares.values())
        return sum(share * values[task] for task, share in shares.items()) / total if total else math.nan


def evaluate(model: ScoringDhen, loader: BatchLoader, groups: Sequence[GroupMetrics] = ()) -> Evaluation:
    """Score all examples of all ranks, and add them to `groups`. Communicates; all ranks call it.

    Raises ValueError if a row has no weight.
    """
    loader.schema.check_weights(loader.split)
    world, tasks = model.topology.world, {name: ClickMetrics() for name in loader.schema.task_names}
    gates = GateOpenness()
    metrics = score_batches(model, loader.epoch(0), groups, tasks, gates)
    return Evaluation(
        metrics.compute(world),
        unseen_values(model, loader),
        metrics,
        {name: of_task.compute(world) for name, of_task in tasks.items()},
        tasks,
        gates.mean(world),
    )


def score_batches(
    model: ScoringDhen,
    batches: Iterator[Batch],
    groups: Sequence[GroupMetrics] = (),
    tasks: Mapping[str, ClickMetrics] | None = None,
    gates: GateOpenness | None = None,
) -> ClickMetrics:
    """Score this rank's batches; every rank has equally many. Communicates; all ranks call it.

    groups: get the label's scores. tasks: metrics of the further tasks, in the order of the batches' columns. gates:
    gets the openness of the layers' gates.
    """
    metrics, gates = ClickMetrics(), gates or GateOpenness()
    places = {name: place for place, name in enumerate(model.config.tasks)}
    with model.evaluating(), gates.watching(model.dense):
        for batch, ids in with_ids_ahead(model, batches):
            output = model.forward(model.look_up(ids), batch.dense_BN, batch.sparse)
            metrics.update(output.logits, batch.labels_B, batch.weights_B)
            gates_BL = gates.take()
            for each in groups:
                each.update(batch.sparse, output.logits, batch.labels_B, batch.weights_B, gates_BL)
            for column, (name, of_task) in enumerate((tasks or {}).items()):
                labels_B, logits_B = batch.tasks_BT[:, column], output.task_logits[:, places[name]]
                has_label_B = ~labels_B.isnan()
                weights_B = None if batch.weights_B is None else batch.weights_B[has_label_B]
                of_task.update(logits_B[has_label_B], labels_B[has_label_B], weights_B)
    return metrics


class Trainer:
    """Trains `model` on `train`, evaluates it on `validation`, and saves checkpoints in `output_dir`.

    train_rows: the rows of an epoch, if `train` reads only the head of them.
    """

    def __init__(
        self,
        model: ParallelDhen,
        arguments: TrainingArguments,
        train: BatchLoader,
        validation: BatchLoader | None,
        output_dir: Path,
        train_rows: int | None = None,
    ) -> None:
        self.model, self.arguments, self.output_dir = model, arguments, output_dir
        self.train_loader, self.validation_loader = train, validation
        self.steps_per_epoch = train.steps_of(train_rows or train.num_rows)
        epochs, most = arguments.num_train_epochs, arguments.max_steps
        self.total_steps = most if most > 0 else epochs * self.steps_per_epoch
        world_size = model.topology.world_size
        self._shares = world_size * arguments.gradient_accumulation_steps
        global_batch = arguments.per_device_train_batch_size * self._shares
        scale = batch_size_scale(arguments, global_batch)
        rates = (arguments.learning_rate, arguments.table_learning_rate, arguments.new_row_learning_rate)
        self._rates = [None if rate is None else rate * scale for rate in rates]
        self._schedule = LearningRateSchedule(arguments, self.total_steps)
        self._best = BestMetric(arguments.metric_for_best_model, of_average=arguments.ema_decay > 0)
        self.running_loss = RunningLoss(model.topology.device)
        self._broken: KeptMicroStep | None = None
        self._writing: Save | None = None
        self._saved: Path | None = None
        self._num_saves = 0
        self.state = TrainerState()

    def restore(self, state: TrainerState, folder: Path) -> None:
        """Continue from `state`, the trainer state of the checkpoint in `folder` that the model was loaded from."""
        self.state, self._saved = state, folder
        self._schedule.load_state_dict(state.schedule)
        self._best.load_state_dict(state.best_metric)
        if self._best.value is None:
            state.best_step = None

    @property
    def data_order(self) -> dict[str, Any]:
        """Everything that determines which rows each step trains on, and how the model sees them."""
        arguments = self.arguments
        return {
            "seed": arguments.seed,
            "global batch": arguments.per_device_train_batch_size * self._shares,
            "rows": self.train_loader.num_rows,
            "dataloader_drop_last": arguments.dataloader_drop_last,
            "lanes": self.train_loader.lanes,
            "shuffle": arguments.shuffle,
            "dense features": [column.name for column in self.train_loader.schema.dense],
            "data": self.train_loader.digest,
        }

    def train(self, progress: ProgressReporter, stop: StopRequest) -> bool:
        """Train until the last step, early stopping, or a request to stop. Communicates; all ranks call it.

        Returns whether it stopped on request, before all was done, and saved.
        """
        with stop.deferred(self.model.topology):
            self._progress = progress
            self._train(stop)
            self._finish_save()
            is_stopped = stop.is_agreed(is_last=True)
            if is_stopped:
                self._save_for(stop.cause)
        return is_stopped

    def _save_for(self, cause: str) -> None:
        """Save, unless this step is saved already, and say so."""
        here = checkpoint_of(self.output_dir, self.state.step)
        if self._saved is None or self._saved.resolve() != here.resolve():
            self._save(at_once=True)
        logger.info(
            "stopped by %s at step %d of %d, which is saved in %s. To go on, use the same command with "
            "--resume_from_checkpoint auto.",
            cause, self.state.step, self.total_steps, self._saved,
        )  # fmt: skip

    def _train(self, stop: StopRequest) -> None:
        if self.model.tables is not None and self.model.tables.is_frozen:
            self.model.tables.fill_unused()
        self.model.start_training_mode()
        is_new = self.state.step == 0 and self._best.value is None  # else a checkpoint has this evaluation
        starts_trained = is_new and self.arguments.model_name_or_path is not None
        if starts_trained and self.validation_loader is not None and self._evaluate() and self._keeps_best:
            self._save()  # fine-tuning never ends with a model that is worse on validation than it was
        accumulation = self.arguments.gradient_accumulation_steps
        is_stopped = False
        while not (self.is_done or is_stopped):
            micro_steps = 0
            batches = self.train_loader.epoch(self.state.epoch, first_step=self.state.step_in_epoch)
            for batch, sent_ids in with_ids_ahead(self.model, batches):
                if micro_steps == 0:
                    factor = self._schedule.factor(self.state.step)
                    self.model.set_learning_rates(*(None if rate is None else rate * factor for rate in self._rates))
                self.micro_step(batch, sent_ids)
                micro_steps = (micro_steps + 1) % accumulation
                if micro_steps == 0:
                    self._finish_step(batch.global_rows, factor)
                    is_written = self._writing is not None and self._writing.is_written
                    is_stopped = stop.is_agreed(self._num_saves - (self._writing is not None) + is_written)
                    if self._writing is not None and stop.done_by_all == self._num_saves:
                        self._finish_save()
                    if self.is_done or is_stopped:
                        break
        self.model.settle()

    @property
    def is_done(self) -> bool:
        return self.state.step >= self.total_steps or self._best.has_stalled(self.arguments.early_stopping_patience)

    def micro_step(self, batch: Batch, sent_ids: SentIds | None) -> None:
        """Take one micro step with the model's present learning rates. Communicates; all ranks call it."""
        embeddings_BFD = self.model.look_up(sent_ids)
        output = self.model.forward(embeddings_BFD, batch.dense_BN, batch.sparse, self.arguments.num_passes)
        if (kept := self.arguments.negative_sampling_rate) < 1:  # the odds of a click are 1 / kept times as high
            output.logits = output.logits - math.log(kept)
        loss, logits_B = summed_loss(output, batch.labels_B, self.arguments.num_passes, batch.weights_B, batch.tasks_BT)
        if self.arguments.looked_up_l2 and embeddings_BFD is not None:
            loss = loss + self.arguments.looked_up_l2 / 2 * embeddings_BFD().square().sum()
        # DeepSpeed and the tables average gradients over ranks, and DeepSpeed divides by the accumulation steps. With
        # this factor the result is the mean over the rows of the step, even if ranks have different numbers of rows.
        inspected = self._broken or KeptMicroStep(batch, embeddings_BFD, loss)
        try:
            self.model.step(loss * (self._shares / batch.global_rows))
        except FloatingPointError as error:
            found = where_it_began(self.model, inspected, self.train_loader.schema)
            self._refuse(self.state.step + 1, f"{error}. {found}")
        self._broken = inspected if inspected.is_broken() else None
        self.running_loss.update(logits_B.detach(), batch.labels_B, batch.weights_B)

    def _refuse(self, step: int, what: str) -> NoReturn:
        """Raise FloatingPointError, so that no broken weights are saved or exported. All ranks call it."""
        self._finish_save()
        saved = checkpoints(self.output_dir)
        newest = f"The newest checkpoint is {saved[-1]}." if saved else f"{self.output_dir} has no checkpoint yet."
        raise FloatingPointError(f"step {step}: {what} {newest}") from None

    def _finish_step(self, rows: int, factor: float) -> None:
        """Count the step and end it, then log, evaluate and save if each is due."""
        state, arguments = self.state, self.arguments
        is_epoch_end = self._count_step(rows)
        self.model.end_step(state.step)
        is_last = state.step == self.total_steps
        if is_last or self._is_due(arguments.logging_steps):
            loss, ne = self.running_loss.take(self.model.topology.world)
            self._progress.log_step(state.step, state.samples_seen, loss, ne, self._rates[0] * factor)
        improved = False
        evaluates = is_last or self._is_due(arguments.eval_steps, otherwise=is_epoch_end)
        if evaluates and self.validation_loader is not None:
            improved = self._evaluate()
        saves = is_last or self._is_due(arguments.save_steps, otherwise=evaluates)
        if saves or (improved and self._keeps_best):
            self._save()

    @property
    def _keeps_best(self) -> bool:
        return self.arguments.load_best_model_at_end or self.arguments.plateau_restores_best

    def _count_step(self, rows: int) -> bool:
        """Count a step on `rows` examples. Returns whether it was the last of its epoch."""
        state = self.state
        state.step += 1
        state.step_in_epoch += 1
        state.samples_seen += rows
        self._progress.advance(state.step, rows)
        is_epoch_end = state.step_in_epoch == len(self.train_loader)
        if is_epoch_end:
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
        return is_epoch_end

    def _is_due(self, every: int, otherwise: bool = False) -> bool:
        """Whether this step is a multiple of `every`; `otherwise` if `every` is 0."""
        return self.state.step % every == 0 if every else otherwise

    def _evaluate(self) -> bool:
        """Evaluate on the validation split. Returns whether the result is the best so far."""
        with self._progress.paused():
            self.model.average_buffers()
            values = evaluate(self.model, self.validation_loader)
        if not math.isfinite(values.metrics.logloss):
            self._refuse(self.state.step, f"the validation loss is {values.metrics.logloss}. {ADVICE}")
        metric = values.mean(self._best.name, self.model.config.task_weights)
        improved = self._best.update(metric)
        if improved:
            self.state.best_step = self.state.step
        for task, metrics in (("", values.metrics), *values.tasks.items()):
            split = f"validation {task}".strip()
            self._progress.log_evaluation(split, self.state.step, self.state.samples_seen, asdict(metrics))
        # auc and ne do not exist if validation has one class
        drops = math.isfinite(metric) and self._schedule.after_evaluation(improved)
        if drops and self.arguments.plateau_restores_best:
            with self._progress.paused():
                step = self.load_best("Training goes on from")
            if step < self.state.step:
                logger.info("the learning rates drop: training goes on from the weights of step %d, the best", step)
        return improved

    def load_best(self, otherwise: str) -> int:
        """Load the best checkpoint's weights, tables and optimizer states, and return its step. Steps, data order and
        random state stay. If it is damaged or gone, warn; otherwise: what then happens to the last weights.

        Communicates; all ranks call it.
        """
        state = self.state
        if state.best_step in (None, state.step):
            return state.step
        self._finish_save()
        folder = checkpoint_of(self.output_dir, state.best_step)
        if fault := damage(folder, self.model.topology):  # it may not be there: a run may resume from another folder
            if self.model.topology.is_main:
                logger.warning("the best checkpoint, %s: %s. %s the last weights instead", folder, fault, otherwise)
            return state.step
        load_checkpoint(self.model, folder, with_random_state=False)
        return state.best_step

    def _save(self, *, at_once: bool = False) -> None:
        """Save this step, in the background unless `at_once` or the arguments say otherwise."""
        self._finish_save()
        if not self.model.tables_are_finite():  # a gradient that is finite in the dense part need not be here
            self._refuse(self.state.step, f"the values of a table are out of range. {ADVICE}")
        state = self.state
        state.schedule = self._schedule.state_dict()
        state.best_metric = self._best.state_dict()
        in_background = self.arguments.async_save == "on" and not at_once
        with self._progress.paused():
            order, arguments, sums = self.data_order, asdict(self.arguments), self.running_loss.sums
            self._num_saves += 1
            self._writing = start_save(
                self.model, self.output_dir, state, sums, order, arguments, in_background=in_background
            )
            if not in_background:
                self._finish_save()

    def _finish_save(self) -> None:
        """Complete the checkpoint that is being written, if there is one. Waits for it; all ranks call it."""
        if self._writing is None:
            return
        best_step = self._writing.facts["best_step"]
        self._saved, self._writing = self._writing.finish(self.model.topology), None
        if self.model.topology.is_main:
            delete_old_checkpoints(self.output_dir, self.arguments.save_total_limit, best_step)


def summed_loss(
    output: DhenOutput,
    labels_B: Tensor,
    num_passes: int,
    weights_B: Tensor | None = None,
    tasks_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The training loss, summed over this rank's examples, and the label's logits_B by which they are judged.

    weights_B: of the examples; None: 1. tasks_BT: labels of the further tasks, as in `Batch`.
    """
    size = len(labels_B)

    def loss_of(logits: Tensor, labels_B: Tensor, weights_B: Tensor | None) -> tuple[Tensor, Tensor]:
        if num_passes > 1:
            return self_ensemble_loss(logits.view(num_passes, size), labels_B, weights_B)
        return binary_cross_entropy_with_logits(logits, labels_B, weights_B, reduction="sum"), logits

    loss, logits_B = loss_of(output.logits, labels_B, weights_B)
    if output.task_logits is not None:
        of_tasks = output.task_logits, tasks_BT, output.task_weights
        loss = loss_of_tasks(loss, *of_tasks, weights_B, lambda *each: loss_of(*each)[0])
    return loss if output.auxiliary_loss is None else loss + size * output.auxiliary_loss, logits_B


def with_ids_ahead(model: ScoringDhen, batches: Iterator[Batch]) -> Iterator[tuple[Batch, SentIds | None]]:
    """Yield each batch on the device with its ids in flight: the next batch's ids are sent before this one is used."""
    ahead = None
    for batch in batches:
        on_device = batch.to(model.topology.device)
        following = on_device, model.send_ids(on_device.sparse)
        if ahead is not None:
            yield ahead
        ahead = following
    if ahead is not None:
        yield ahead
