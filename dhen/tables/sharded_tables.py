"""Model-parallel embedding tables on FBGEMM, and the bridge to the data-parallel batch (paper 3.1, figure 4).

The paper shards the tables across a pod of GPUs. Here they are sharded over all ranks, or over those of each table
group, where the groups hold replicas (see replicas.py).

Each rank has the ids of all features for its own examples, but holds only a few tables, or some columns of them. An
all-to-all sends the ids to the tables' owners, each owner looks up its tables for the global batch, and a second
all-to-all returns the pooled embeddings. In the backward pass the gradients travel to the owners, where FBGEMM applies
the tables' optimizer as part of the backward.

With `overlap`, all three exchanges run in the background. The ids of the next batch leave when this batch's embeddings
have arrived, and travel while it computes. Embeddings travel during the MLP of the dense features, and gradients during
the backward of that MLP.

A table may serve several features. Each of these looks it up on its own, as if it were a shard of its own; the rows,
their states and their counts of uses are the table's.

Shapes: B examples of this rank, F sparse features, D embedding dimension, S lookups of this rank, W ranks.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dhen.config.dhen_section import TableDtype, TableRounding
from dhen.model.features import SparseIds, draw_table
from dhen.model.sparse_feature import SparseFeature, features_of_tables
from dhen.runtime.topology import ShardGroups, Topology
from dhen.runtime.two_hops import TwoHops
from dhen.tables.averaged_tables import AveragedTables
from dhen.tables.id_exchange import IdExchange, OwnIds, SentIds
from dhen.tables.lookup import make_lookup
from dhen.tables.placement.beyond_device import beyond_device
from dhen.tables.placement.plan import Placement, TableShard
from dhen.tables.pooled_exchange import PooledExchange, PooledLayout, Wires
from dhen.tables.replicas import Moves, ReplicaGroup, SummedGradients
from dhen.tables.row_uses import RowUses, UnseenIds, fill_unused, mean_row
from dhen.tables.stochastic_rounding import round_stochastically
from dhen.tables.updated_tables import TableUpdate, UpdatedTables
from dhen.tables.wire import Wire

STATES = {"sgd": (), "rowwise_adagrad": ("sum",), "adagrad": ("sum",), "adam": ("exp_avg", "exp_avg_sq")}
"""The states of each optimizer, as `shard_tensors` names them."""
_DECAYED_ROWS = 1 << 16
"""Rows that are converted to float32 at a time."""


PendingEmbeddings = Callable[[], Tensor]
"""Looked-up embeddings in transit. Call it to get embeddings_BFD, as often as you like; the first call waits."""


class ShardedTables(nn.Module):
    """All embedding tables of the model. This rank holds the shards that `placement` assigns to it.

    Called like `PlainTables`: SparseIds of this rank's examples -> embeddings_BFD, float32. The backward updates the
    tables with the learning rate that was set before the forward. Forward and backward communicate over
    `topology.world`: all ranks must call them together, but their batches may differ in size.

    `look_up` does the same without waiting; `send_ids` sends the ids of a later lookup ahead of time.

    table_rounding: how updates of fp16 tables are rounded. wires: dtypes of the all-to-all. overlap: whether
    communication overlaps with computation; results are the same either way.
    groups: the table groups; None: one group of all ranks. sync_steps: 1 adds up the gradients of rows over replicas;
    with more, they add up how far they moved their rows after so many steps, with weights in the format `sync_wire`.
    sync_overlap: moves are exchanged, even with 1, and arrive a step later.
    update: the optimizer. Adagrad's update is learning rate * g / (sqrt(sum of g^2) + epsilon): a larger epsilon makes
    the first updates of a row smaller, so rows that are rarely seen stay close to their initial values.

    Never pass this module to DeepSpeed: it would overwrite every rank's shards with rank 0's.
    """

    def __init__(
        self,
        features: Sequence[SparseFeature],
        embedding_dim: int,
        placement: Placement,
        topology: Topology,
        *,
        groups: ShardGroups | None = None,
        sync_steps: int = 1,
        sync_wire: Wire | None = None,
        sync_overlap: bool = False,
        update: TableUpdate | None = None,
        table_dtype: TableDtype = "fp32",
        table_rounding: TableRounding = "stochastic",
        seed: int | None = 0,
        init_std: float | None = None,
        wires: Wires | None = None,
        overlap: bool = True,
    ) -> None:
        """Communicates: all ranks must construct it together. seed None: the values are not drawn; load them."""
        super().__init__()
        self._all_ranks = topology.world_size
        self.replica_index = 0
        if groups is not None:
            topology, self.replica_index = topology.within(groups), groups.replica_index
        self.features = tuple(features)
        self.embedding_dim = embedding_dim
        self.placement = placement
        self.update, self.table_dtype = update or TableUpdate(), table_dtype
        self.optimizer = self.update.optimizer
        self.average: AveragedTables | None = None
        self.is_frozen, self._is_averaged, self._rates = False, False, (0.0, 0.0)
        self._frozen: Tensor | None = None
        self._overlap = overlap
        self._device, self._world_size = topology.device, topology.world_size
        # NCCL runs one stream per group. In ZeRO-3's group, the world, embeddings would queue behind its weights.
        on_gpu = self._device.type == "cuda"
        self._group = topology.another_group() if on_gpu else topology.world
        self._hops = TwoHops(topology) if placement.hops == 2 else None
        of_ranks = map(placement.of_rank, range(topology.world_size))
        # Shards of equal width are adjacent on a rank.
        by_rank = [tuple(sorted(shards, key=lambda shard: shard.num_columns)) for shards in of_ranks]
        self.shards = by_rank[topology.rank]
        places = list(features_of_tables(self.features).values())
        lookups_by_rank = [
            [replace(shard, table=place) for shard in shards for place in places[shard.table]] for shards in by_rank
        ]
        self.lookups = lookups_by_rank[topology.rank]
        self._table_of_lookup = [index for index, shard in enumerate(self.shards) for _ in places[shard.table]]
        self._layout = PooledLayout(
            lookups_by_rank, len(self.features), embedding_dim, topology.rank, wires or Wires(), self._device
        )
        self._ids = IdExchange(self.features, lookups_by_rank, topology, overlap=overlap)
        self._lookup, self._updated = None, None
        self._replicas: ReplicaGroup | None = None
        self._moves: Moves | None = None
        rows = [shard.num_embeddings for shard in self.shards]
        self.uses = RowUses(rows, self._device, self._table_of_lookup)
        self._unseen: UnseenIds | None = None
        self._is_new = torch.zeros_like(self.uses.counts, dtype=torch.bool) if self.update.has_new_rows else None
        self._sync_steps, self._sync_overlap, self._step, self._sent_at = sync_steps, sync_overlap, 0, 0
        sums_gradients = sync_steps == 1 and not sync_overlap
        rounds = table_dtype == "fp16" and table_rounding == "stochastic"
        if self.shards:
            self._make_lookup(None if groups is None else groups.replica, sums_gradients, rounds=rounds)
        if self._replicas is not None and not sums_gradients:
            states = zip(*self._lookup.split_optimizer_states(), strict=True) if STATES[self.optimizer] else ()
            self._moves = Moves(self._replicas, list(states), sync_wire or Wire("fp32"), rounds=rounds)
        if seed is not None:
            cores = len(os.sched_getaffinity(0)) // topology.local_size  # torchrun sets OMP_NUM_THREADS to 1
            threads = max(1, cores) if on_gpu else torch.get_num_threads()
            for shard, weight in zip(self.shards, self._weights(), strict=True):
                columns = range(shard.first_column, shard.last_column)
                draw_table(weight, shard.name, columns, seed, init_std, threads=threads)

    def _make_lookup(self, replicas: dist.ProcessGroup | None, sums_gradients: bool, *, rounds: bool) -> None:
        """replicas: the ranks with the same shards, which may add up their gradients; None without table groups."""
        on_cpu, update = self._device.type == "cpu", self.update
        cached = beyond_device(self.shards, self.placement.device_bytes)
        if replicas is not None and (cached or update.l2):
            why = "the tables do not fit on the GPUs of a table group" if cached else "whole_table_l2 changes all rows"
            raise ValueError(
                f"{why}, but replicas exchange only rows that were used, on the GPU. Set dhen.table_group to "
                f'"world"{", or use more ranks per group" if cached else ", or whole_table_l2 to 0"}.'
            )
        sums_gradients &= replicas is not None
        if cached and (update.touches_all_rows or update.has_new_rows):
            raise ValueError(
                "the tables do not fit on the GPUs, but Adam with whole_table_l2 updates all rows in each step, and "
                "new_row_learning_rate updates rows where they lie. Use more ranks, or leave these options out."
            )
        is_updated_here = on_cpu or update.touches_all_rows or update.has_new_rows or sums_gradients
        is_adam_here = update.optimizer == "adam" and is_updated_here
        self._lookup = make_lookup(
            [(shard.num_embeddings, shard.num_columns) for shard in self.shards],
            self._device,
            "sgd" if is_adam_here else update.optimizer,
            self.table_dtype,
            update.epsilon,
            update.betas,
            rounds_stochastically=rounds,
            cached=cached,
            table_of_lookup=self._table_of_lookup,
        )
        if replicas is not None:
            self._replicas = ReplicaGroup(self._weights(), self.uses, replicas)
        if is_adam_here or (rounds and on_cpu) or update.has_new_rows or sums_gradients:
            summed = SummedGradients(self._replicas) if sums_gradients else None
            self._updated = UpdatedTables(self._lookup, update, rounds=rounds, is_new=self._is_new, replicas=summed)

    def forward(self, sparse: SparseIds | SentIds) -> Tensor:
        """Look up and pool: SparseIds of this rank's B examples -> embeddings_BFD.

        Raises IndexError if an id is outside its table (on CUDA, a device-side assertion).
        """
        return self.look_up(sparse)()

    def look_up(self, sparse: SparseIds | SentIds) -> PendingEmbeddings:
        """Like `forward`, but does not wait for the embeddings of the other ranks."""
        with torch.no_grad() if self.is_frozen else contextlib.nullcontext():
            own = self._ids.receive(self.send_ids(sparse) if isinstance(sparse, SparseIds) else sparse)
            if self._lookup is None:
                rows = self._world_size * own.padded_batch
                pooled = torch.empty(rows, 0, device=self._device, requires_grad=torch.is_grad_enabled())
            else:
                pooled = self._look_up_own(own)
            exchange = PooledExchange(
                self._layout,
                own.batch_size,
                own.padded_batch,
                self._group,
                hops=self._hops,
                averaged_over=self._all_ranks,
                overlap=self._overlap,
            )
            ticket = exchange.start(pooled)

        def finish() -> Tensor:
            embeddings_BFD = exchange.finish(ticket)
            if self._frozen is not None and embeddings_BFD.requires_grad:
                embeddings_BFD.register_hook(lambda grad_BFD: grad_BFD.index_fill(1, self._frozen, 0.0))
            # A fixed point of the step. Every rank has announced its next batch before it looked up this one, so the
            # host hardly waits here.
            self._ids.depart()
            if self._replicas is not None:
                self._replicas.go_on()
            return embeddings_BFD

        return functools.cache(finish)

    def _look_up_own(self, own: OwnIds) -> Tensor:
        """Pool the rows of this rank's shards, and count the uses in training or, in an evaluation, the unseen ids."""
        look_up, weights, missing_SR = self._updated or self._lookup, own.weights, None
        lengths_SR = own.offsets.diff().view(len(self.lookups), self._world_size * own.padded_batch)
        if torch.is_grad_enabled():
            rows = self.uses.rows_at(own.ids, lengths_SR.sum(1))
            if self._moves is not None:
                self._moves.before_update(rows)
            if self._replicas is None or self._moves is not None:  # otherwise counted with those of the replicas
                self.uses.add_rows(rows)
            if self.average is not None and self._replicas is None:  # replicas do it when they exchange rows
                self.average.before_update(rows)
        elif self._unseen is not None:
            weights, missing_SR = self._unseen.split(own.ids, lengths_SR, weights)
        if self._is_averaged:
            look_up = self.average.lookup
        pooled = look_up(own.ids, own.offsets, per_sample_weights=weights)
        return pooled if missing_SR is None else pooled + self._unseen.mean_parts(missing_SR)

    @contextlib.contextmanager
    def watching_unseen(self, *, uses_means: bool) -> Iterator[UnseenIds]:
        """Count the ids whose rows training never used, inside this context, where gradients must be off.

        uses_means: let the mean of its shard stand for such a row. False for an exported model, whose rows hold it.
        """
        self._unseen = UnseenIds(self.uses, self.means if uses_means else None)
        try:
            yield self._unseen
        finally:
            self._unseen = None

    def means(self) -> list[Tensor]:
        """For each shard of this rank, the mean of its rows, weighted by their uses: float32, (columns,).

        It is rounded to the dtype of the weights, as in an exported model.
        """
        weights = enumerate(self._weights())
        return [mean_row(weight, self.uses.of(index)).to(weight.dtype).float() for index, weight in weights]

    def fill_unused(self) -> None:
        """Let the rows that training never used hold the mean of their table, for tables that are not trained."""
        for (_, tensors), mean in zip(self.shard_tensors(), self.means(), strict=True):
            fill_unused(tensors["weight"], tensors["uses"], mean)

    def freeze(self, names: Collection[str]) -> None:
        """Let the tables of these names stay as they are. Call it after optimizer states are loaded.

        Their gradients become 0. This leaves a row as it is, to the bit, if Adam has no momentum of before.
        """
        places = [place for place, feature in enumerate(self.features) if feature.table in names]
        self._frozen = torch.tensor(places, device=self._device) if places else None
        for shard, tensors in self.shard_tensors() if places else ():
            if shard.name in names and "exp_avg" in tensors:
                tensors["exp_avg"].zero_()

    def send_ids(self, sparse: SparseIds) -> SentIds:
        """Announce a batch to its tables' owners. Its ids leave when the embeddings of the batch before have arrived.

        Communicates over all ranks. Raises IndexError as `forward` does.
        """
        return self._ids.send(sparse)

    def settle(self) -> None:
        """Wait until no ids are in transit. Communicates over all ranks."""
        self._ids.settle()

    def mark_new_rows(self) -> None:
        """Let the rows that training has not used yet be the new ones, if `update` tells them apart."""
        if self._is_new is not None:
            self._is_new.copy_(self.uses.counts == 0)

    def set_learning_rate(self, learning_rate: float, of_new_rows: float | None = None) -> None:
        """Set the learning rate of the next updates. Call it before the forward; a backward uses its forward's rate.

        of_new_rows: by default the same.
        """
        if self._lookup is not None:
            self._lookup.set_learning_rate(learning_rate)
        self._rates = (learning_rate, learning_rate if of_new_rows is None else of_new_rows)
        if self._updated is not None:
            self._updated.learning_rates = self._rates

    def end_step(self, step: int, average_decay: float) -> None:
        """Do what comes after the updates of step number `step`: exchange between replicas if it is due, L2 decay of
        whole tables, and the moving average. Communicates over the replicas.

        average_decay: share of the average that stays.
        """
        self._step = step
        if self._moves is not None and not self.is_frozen:
            self._moves.end()
            if step % self._sync_steps == 0:
                self._send_moves()
                if not self._sync_overlap:
                    self._moves.end()
        if self.update.l2 and self.update.optimizer != "adam":
            self._decay_whole_tables(*(1.0 - rate * self.update.l2 for rate in self._rates))
        if self.average is not None:
            self.average.after_step(average_decay)

    def synchronize(self) -> None:
        """Let all replicas of the tables be equal. Communicates over the replicas, if a step has set them apart."""
        if self._moves is None or self.is_frozen:
            return
        self._moves.end()
        if self._step != self._sent_at:
            self._send_moves()
            self._moves.end()

    def _send_moves(self) -> None:
        self._moves.start()
        self._sent_at = self._step

    @property
    def bytes_to_replicas(self) -> int:
        """Bytes of rows that this rank has sent to each of its replicas."""
        return self._replicas.bytes_sent if self._replicas is not None else 0

    @torch.no_grad()
    def _decay_whole_tables(self, share: float, of_new_rows: float) -> None:
        """Multiply every weight by `share`. For small tables: it touches every row.

        fp16 weights are rounded stochastically; rounded to nearest, most would never change.
        """
        for index, weight in enumerate(self._weights()):
            of_rows = torch.full((1, 1), share, device=weight.device).expand(len(weight), 1)
            if self._is_new is not None:
                of_rows = of_rows.where(~self.uses.rows_of(self._is_new, index)[:, None], of_new_rows)
            if weight.dtype == torch.float16:
                for rows, shares in zip(weight.split(_DECAYED_ROWS), of_rows.split(_DECAYED_ROWS), strict=True):
                    rows.copy_(round_stochastically(rows.float() * shares))
            else:
                weight.mul_(of_rows)

    def shard_tensors(self) -> list[tuple[TableShard, dict[str, Tensor]]]:
        """This rank's shards and their tensors, which may be read or overwritten in place; then call `reloaded`.

        "weight" is (rows, columns). "uses" is (rows,), int32: how often training used each row. The Adagrad optimizers
        add "sum": (rows, columns), or (rows,) for row-wise Adagrad. Adam adds "exp_avg" and "exp_avg_sq", (rows,
        columns), and "steps", (1,). "average" is (rows, columns), if there is one, with "settled_at" and "log_decay"
        (see AveragedTables). "is_new" is (rows,), bool, if new rows have a learning rate of their own.
        """
        if self._lookup is None:
            return []
        tensors = [{"weight": weight, "uses": self.uses.of(index)} for index, weight in enumerate(self._weights())]
        for index, of_shard in enumerate(tensors if self._is_new is not None else ()):
            of_shard["is_new"] = self.uses.rows_of(self._is_new, index)
        if names := STATES[self.optimizer]:
            has_states = self._updated if self.optimizer == "adam" and self._updated else self._lookup
            for of_shard, states in zip(tensors, has_states.split_optimizer_states(), strict=True):
                of_shard |= zip(names, states, strict=True)
                if self.optimizer == "adam":
                    of_shard["steps"] = self._updated.steps if self._updated else self._lookup.iter
        if self.average is not None and not self._is_averaged:
            behind = zip(self.average.weights, self.average.settled_at, strict=True)
            for of_shard, (average, settled_at) in zip(tensors, behind, strict=True):
                log_decay = self.average.log_decay
                of_shard |= {"average": average, "settled_at": settled_at, "log_decay": log_decay}
        return list(zip(self.shards, tensors, strict=True))

    def reloaded(self) -> None:
        """Go on from tensors of `shard_tensors` that were overwritten."""
        self.uses.halve()
        if self.optimizer == "adam" and self._lookup is not None and self._updated is None:
            self._lookup.iter_cpu.copy_(self._lookup.iter)

    def start_average(self) -> None:
        """Begin a moving average of the tables at their present weights. Raises ValueError if memory is missing."""
        if self._lookup is not None:
            weights = self._weights()
            if any(weight.device != self._device for weight in weights):
                raise ValueError(
                    "the tables do not fit on the GPUs, so an average of them does not either. Set it to 0."
                )
            self.average = AveragedTables(
                weights, all_rows_change=self.update.l2 > 0, table_of_lookup=self._table_of_lookup
            )
            if self._replicas is not None:
                self._replicas.average = self.average

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside this context, lookups without gradients and `shard_tensors` use the averages, if there are any."""
        if self.average is not None:
            self.average.settle()
        before, self._is_averaged = self._is_averaged, self.average is not None
        try:
            yield
        finally:
            self._is_averaged = before

    def _weights(self) -> list[Tensor]:
        """The weights of all shards. On a GPU, first writes the cache back to host memory and empties it."""
        if self._lookup is None:
            return []
        if self._is_averaged:
            return self.average.weights
        self._lookup.flush()
        self._lookup.reset_cache_states()
        return self._lookup.split_embedding_weights()
