"""One optimizer step as the plan says: forward and backward of every micro-batch of this rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_attn.attention.context import AttentionContext
from dist_attn.comm.ledger import Ledger
from dist_attn.comm.stopwatch import Stopwatch
from dist_attn.config import Config
from dist_attn.data import AnyCorpus, LocalBatch, build_local_batch, valid_weight
from dist_attn.data.indexed import IntArray
from dist_attn.groups import CommGroup, GroupPool, single_rank_group
from dist_attn.integrations.engine import Engine
from dist_attn.integrations.gradient_probe import GradientProbe
from dist_attn.masks import Causal, Documents
from dist_attn.masks.layers import LayerRules
from dist_attn.planner.plan import Group, MicroBatch, Plan
from dist_attn.training.runtime import Runtime
from dist_attn.training.slow_ranks import Work
from dist_attn.training.topology import Topology


@dataclass(frozen=True)
class StepResult:
    """What a step's forward and backward gave."""

    #: Mean over the valid tokens of the whole step, by their documents' weights; the same on every
    #: rank.
    loss: float
    #: This rank's forward seconds of each micro-batch.
    forward_s: list[float]
    #: This rank's tokens of documents, and its padding.
    tokens: int
    padding: int
    #: Of the micro-batch that has most, padding among them.
    most_tokens: int
    #: What this rank computed, to be held against what others did.
    work: Work
    #: Documents of this rank's groups whose loss is not finite.
    suspects: tuple[int, ...] = ()


class StepRunner:
    """Carries out plans on one rank."""

    def __init__(
        self,
        engine: Engine,
        corpus: AnyCorpus,
        config: Config,
        runtime: Runtime,
        pool: GroupPool,
        rules: LayerRules | None = None,
        node_of: tuple[int, ...] = (),
    ) -> None:
        self._engine = engine
        self._corpus = corpus
        self._config = config
        self._runtime = runtime
        self._pool = pool
        self._rules = rules
        #: Of the last step's micro-batches.
        self._probes: list[tuple[LocalBatch, Group | None, GradientProbe]] = []
        self._topology = Topology(
            runtime.world_size,
            runtime.rank,
            config.engine.tensor_parallel_degree,
            node_of,
            config.attention.inner_degree,
        )

    def accumulate(
        self, plan: Plan, document_ids: IntArray, mark: Callable[[str], None] = lambda _: None
    ) -> StepResult:
        """Forward and backward of the whole step; the gradients are then those of its mean loss.

        Tells `mark` what it is about to do.

        A rank that is in no group of a micro-batch runs one token of padding, whose loss and
        gradients are zero, because ZeRO-2 and 3 communicate in every micro-batch.

        Collective: by all ranks with the same plan.

        Raises:
            UserError: on every rank, when the tokens of any cannot be read.
        """
        # A step of one-token documents predicts nothing; its gradients are zero.
        total = valid_weight(self._corpus, document_ids) or 1.0
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._runtime.device)
        watch = Stopwatch(self._runtime.device)
        waits: list[tuple[Stopwatch, int]] = []
        losses: list[Tensor] = []
        tokens = padding = most = 0
        last = len(plan.micro_batches) - 1
        self._probes = []
        mark("reading the tokens")
        with self._runtime.together():
            batches = self._read(plan, document_ids)
        for index, micro_batch in enumerate(plan.micro_batches):
            mark(f"forward of micro-batch {index}")
            standing_still = Stopwatch(self._runtime.device)
            ledger = Ledger(waits=standing_still)
            batch, context = self._local(micro_batch, batches[index], ledger)
            probe = GradientProbe()
            self._probes.append((batches[index], self._group(micro_batch), probe))
            with watch:
                loss = self._forward(batch, context, probe)
            # The backward will add to them.
            waits.append((standing_still, len(standing_still)))
            losses.append(loss.detach())
            loss_sum += losses[-1].double()
            if index == last:
                mark("the sum of the losses")
                loss = loss * self._one_if_finite(loss_sum)
            mark(f"backward of micro-batch {index}")
            self._engine.backward(loss, total, last=index == last)
            tokens += batch.local_seq_len
            padding += batch.num_padding
            most = max(most, batch.local_seq_len + batch.num_padding)
        mean = float(loss_sum) / total
        suspects: tuple[int, ...] = ()
        if not math.isfinite(mean):
            suspects = self._suspects(plan, document_ids, losses)
        forward_s = watch.seconds()
        waited_s = [sum(stopwatch.seconds()[:count]) for stopwatch, count in waits]
        work = self._work(plan, forward_s, waited_s)
        return StepResult(mean, forward_s, tokens, padding, most, work, suspects)

    def _work(self, plan: Plan, forward_s: list[float], waited_s: list[float]) -> Work:
        seconds = planned_s = 0.0
        count = 0
        for micro_batch, forward, waited in zip(
            plan.micro_batches, forward_s, waited_s, strict=True
        ):
            group = self._group(micro_batch)
            if group is not None:
                seconds += forward - waited
                planned_s += group.compute_s
                count += 1
        return Work(seconds, planned_s, count)

    def _one_if_finite(self, loss_sum: Tensor) -> Tensor:
        """Add up the ranks' losses in place; 1, or NaN if the sum is not finite.

        The last micro-batch's loss is multiplied by it, so that a step whose loss is not finite has
        no finite gradients either and the engine leaves it out; the host need not wait for it.
        """
        # Ranks that hold one model between them have the same loss: one of them counts.
        if self._topology.tensor_rank:
            loss_sum.zero_()
        dist.all_reduce(loss_sum)
        return (1 + (loss_sum - loss_sum)).float()

    def _suspects(
        self, plan: Plan, document_ids: IntArray, losses: list[Tensor]
    ) -> tuple[int, ...]:
        found: list[int] = []
        for micro_batch, loss in zip(plan.micro_batches, losses, strict=True):
            group = self._group(micro_batch)
            if group is not None and not math.isfinite(float(loss)):
                found += [int(document_ids[d]) for d in group.documents]
        return tuple(found)

    def suspects_of_gradients(self, document_ids: IntArray) -> tuple[int, ...]:
        """Documents of this rank at whose tokens the last step's gradient is not finite.

        Args:
            document_ids: of that step.
        """
        found: set[int] = set()
        for batch, group, probe in self._probes:
            places = probe.not_finite().numpy()
            if group is None or not places.size:
                continue
            stream = batch.layout.positions(batch.cp_rank)
            stream = stream[places[places < len(stream)]]
            which = np.searchsorted(batch.cu_seqlens.numpy(), stream, side="right") - 1
            found.update(int(document_ids[group.documents[d]]) for d in np.unique(which))
        return tuple(sorted(found))

    def _group(self, micro_batch: MicroBatch) -> Group | None:
        plan_rank = self._topology.plan_rank
        return next((g for g in micro_batch.groups if plan_rank in g.ranks), None)

    def _forward(
        self, batch: LocalBatch, context: AttentionContext, probe: GradientProbe
    ) -> Tensor:
        return self._engine.forward(
            input_ids=batch.input_ids,
            shift_labels=batch.shift_labels,
            position_ids=batch.position_ids,
            document_tokens=batch.document_tokens,
            loss_weights=batch.loss_weights,
            attention_context=context,
            gradient_probe=probe,
        )

    def _read(self, plan: Plan, document_ids: IntArray) -> list[LocalBatch]:
        """This rank's tokens of every micro-batch.

        All at once and right after a look at the files: cutting a file short that is under a memory
        map ends the process that reads on.
        """
        self._corpus.check()
        batches = []
        for micro_batch in plan.micro_batches:
            group = self._group(micro_batch)
            batches.append(
                build_local_batch(
                    self._corpus,
                    document_ids,
                    group,
                    cp_rank=0 if group is None else group.ranks.index(self._topology.plan_rank),
                    layout_kind=self._layout_kind(group),
                    pad_to_multiple=self._config.data.pad_to_multiple,
                    rules=self._rules,
                )
            )
        return batches

    def _local(
        self, micro_batch: MicroBatch, batch: LocalBatch, ledger: Ledger
    ) -> tuple[LocalBatch, AttentionContext]:
        """This rank's tensors of a micro-batch, and how their attention is carried out."""
        topology = self._topology
        self._pool.ensure(
            s for g in micro_batch.groups for s in topology.rank_sets(g.ranks, g.strategy)
        )
        comm = self._comm_group(self._group(micro_batch))
        assert comm.cp_rank == batch.cp_rank
        context = local_context(
            batch,
            comm,
            self._rules,
            deterministic=self._config.attention.deterministic,
            ledger=ledger,
        )
        return batch.to(self._runtime.device, non_blocking=True), context

    def _comm_group(self, group: Group | None) -> CommGroup:
        if group is None:
            return single_rank_group(self._runtime.rank)
        inner_size = self._topology.inner_size(group.ranks, group.strategy)
        return self._pool.get(self._topology.members(group.ranks), inner_size)

    def _layout_kind(self, group: Group | None) -> str:
        # All-to-all gives each rank whole sequences of some heads: any layout is balanced.
        if group is None or group.strategy in ("local", "ulysses"):
            return "contiguous"
        return self._config.attention.ring_layout


def local_context(
    batch: LocalBatch,
    comm: CommGroup,
    rules: LayerRules | None = None,
    *,
    deterministic: bool = False,
    ledger: Ledger | None = None,
) -> AttentionContext:
    """How the attention of a batch is carried out: causal inside each document, or as rules say."""
    cu_seqlens = batch.cu_seqlens.numpy()
    whole = AttentionContext(
        mask=Documents(cu_seqlens) & Causal(),
        layout=batch.layout,
        group=comm,
        strategy=batch.strategy,
        deterministic=deterministic,
        num_padding=batch.num_padding,
        ledger=ledger,
    )
    if rules is None:
        return whole
    # Layers of one rule share a mask object, and with it everything that is worked out from it.
    by_rule = {rule: replace(whole, mask=rules.mask(rule, cu_seqlens)) for rule in rules.distinct}
    return replace(whole, layers=tuple(by_rule[rule] for rule in rules.of_layer))
