"""One optimizer step as the plan says: forward and backward of every micro-batch of this rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_attn.attention.context import AttentionContext
from dist_attn.comm.ledger import Ledger
from dist_attn.comm.stopwatch import Stopwatch
from dist_attn.config import Config
from dist_attn.data import AnyCorpus, LocalBatch, build_local_batch, join_batches, valid_weight
from dist_attn.data.indexed import IntArray
from dist_attn.groups import CommGroup, GroupPool, single_rank_group
from dist_attn.integrations.engine import Engine
from dist_attn.integrations.gradient_probe import GradientProbe
from dist_attn.masks.layers import LayerRules
from dist_attn.planner.plan import Group, Plan
from dist_attn.training.contexts import Lists, Stream, Streams, joined_context, local_context
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


@dataclass(frozen=True)
class _Share:
    """What a rank runs in one micro-batch: its groups, none where it idles.

    There is at most one, but with `free` placement. `batch` is all `parts` together.
    """

    groups: list[Group]
    parts: list[LocalBatch]
    batch: LocalBatch
    #: Layout and masks of each part.
    streams: list[Stream]

    @property
    def by_part(self) -> Sequence[Group | None]:
        """The group of each part; None where the rank idles."""
        return self.groups or [None]


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
        self._probes: list[tuple[_Share, GradientProbe]] = []
        self._topology = Topology(
            runtime.world_size,
            runtime.rank,
            config.engine.tensor_parallel_degree,
            node_of,
            config.attention.inner_degree,
        )
        self._streams = Streams(rules)
        self._lists = Lists(config, self._topology, runtime.device)

    def forget_streams(self) -> None:
        """Begin anew with masks and what was made of them, as if all documents were new."""
        self._streams.forget()

    def accumulate(
        self, plan: Plan, document_ids: IntArray, mark: Callable[[str], None] = lambda _: None
    ) -> StepResult:
        """Forward and backward of the whole step; the gradients are then those of its mean loss.

        Tells `mark` what it is about to do.

        A rank that is in no group of a micro-batch runs one token of padding, whose loss and
        gradients are zero, because ZeRO-2 and 3 communicate in every micro-batch. Under `step`
        synchronisation a rank runs its own micro-batches only, and every rank one of padding in
        the end: in its backward the ranks reduce their gradients.

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
        self._probes = []
        todo = self._todo(plan)
        mark("reading the tokens")
        with self._runtime.together():
            shares = self._read(todo, document_ids)
        for index, share in enumerate(shares):
            last = index == len(shares) - 1
            mark(f"forward of micro-batch {index}")
            if plan.synchronisation == "micro_batch":
                self._ensure(plan.micro_batches[index].groups)
            standing_still = Stopwatch(self._runtime.device)
            context = self._context(share, Ledger(waits=standing_still))
            batch = share.batch.to(self._runtime.device, non_blocking=True)
            probe = GradientProbe()
            self._probes.append((share, probe))
            self._lists.take(share.streams)
            with watch:
                loss = self._forward(batch, context, probe)
            if not last:
                following = shares[index + 1]
                self._lists.begin(following.by_part, following.parts, following.streams)
            # The backward will add to them.
            waits.append((standing_still, len(standing_still)))
            losses.append(loss.detach())
            loss_sum += losses[-1].double()
            if last:
                self._catch_up(plan, len(shares), mark)
                mark("the sum of the losses")
                loss = loss * self._one_if_finite(loss_sum)
            mark(f"backward of micro-batch {index}")
            self._engine.backward(loss, total, last=last)
            tokens += batch.local_seq_len
            padding += batch.num_padding
            most = max(most, batch.local_seq_len + batch.num_padding)
        mean = float(loss_sum) / total
        suspects: tuple[int, ...] = ()
        if not math.isfinite(mean):
            suspects = self._suspects(shares, document_ids, losses)
        forward_s = watch.seconds()
        waited_s = [sum(stopwatch.seconds()[:count]) for stopwatch, count in waits]
        work = _work(shares, forward_s, waited_s)
        return StepResult(mean, forward_s, tokens, padding, most, work, suspects)

    def _catch_up(self, plan: Plan, done: int, mark: Callable[[str], None]) -> None:
        """Mark as often as the rank with the most micro-batches.

        Who waits for whom is told by how often each has marked.
        """
        if plan.synchronisation == "micro_batch":
            return
        ranks = range(plan.world_size)
        most = max(
            sum(any(r in g.ranks for g in m.groups) for m in plan.micro_batches) for r in ranks
        )
        for _ in range(2 * (most + 1 - done)):
            mark("waiting for ranks with more micro-batches")

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
        self, shares: list[_Share], document_ids: IntArray, losses: list[Tensor]
    ) -> tuple[int, ...]:
        found: list[int] = []
        for share, loss in zip(shares, losses, strict=True):
            if not math.isfinite(float(loss)):
                found += [int(document_ids[d]) for g in share.groups for d in g.documents]
        return tuple(found)

    def suspects_of_gradients(self, document_ids: IntArray) -> tuple[int, ...]:
        """Documents of this rank at whose tokens the last step's gradient is not finite.

        Args:
            document_ids: of that step.
        """
        found: set[int] = set()
        for share, probe in self._probes:
            places = probe.not_finite().numpy()
            first = 0
            for group, part in zip(share.groups, share.parts, strict=False):
                stream = part.layout.positions(part.cp_rank)
                mine = places[(places >= first) & (places < first + len(stream))] - first
                first += len(stream)
                bounds = part.cu_seqlens.numpy()
                which = np.searchsorted(bounds, stream[mine], side="right") - 1
                found.update(int(document_ids[group.documents[d]]) for d in np.unique(which))
        return tuple(sorted(found))

    def _todo(self, plan: Plan) -> list[list[Group]]:
        """This rank's groups in each micro-batch that it runs."""
        plan_rank = self._topology.plan_rank
        mine = [[g for g in m.groups if plan_rank in g.ranks] for m in plan.micro_batches]
        if plan.synchronisation == "micro_batch":
            return mine
        # All make the process groups together, before any of them runs ahead.
        self._ensure(g for m in plan.micro_batches for g in m.groups)
        return [*(groups for groups in mine if groups), []]

    def _ensure(self, groups: Iterable[Group]) -> None:
        self._pool.ensure(s for g in groups for s in self._topology.rank_sets(g.ranks, g.strategy))

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

    def _read(self, todo: list[list[Group]], document_ids: IntArray) -> list[_Share]:
        """This rank's tokens of every micro-batch.

        All at once and right after a look at the files: cutting a file short that is under a memory
        map ends the process that reads on.
        """
        self._corpus.check()
        multiple = self._config.data.pad_to_multiple
        shares = []
        for groups in todo:
            if len(groups) > 1:
                parts = [self._part(document_ids, g, 0) for g in groups]
                batch = join_batches(parts, multiple)
            else:
                batch = self._part(document_ids, groups[0] if groups else None, multiple)
                parts = [batch]
            streams = [self._streams.of(part) for part in parts]
            shares.append(_Share(groups, parts, batch, streams))
        return shares

    def _part(self, document_ids: IntArray, group: Group | None, multiple: int) -> LocalBatch:
        return build_local_batch(
            self._corpus,
            document_ids,
            group,
            cp_rank=0 if group is None else group.ranks.index(self._topology.plan_rank),
            layout_kind=self._layout_kind(group),
            pad_to_multiple=multiple,
            rules=self._rules,
        )

    def _context(self, share: _Share, ledger: Ledger) -> AttentionContext:
        """How the attention of a micro-batch is carried out."""
        contexts = []
        attention = self._config.attention
        travels = attention.gradient_dtype and getattr(torch, attention.gradient_dtype)
        for group, part, stream in zip(share.by_part, share.parts, share.streams, strict=True):
            comm = self._comm_group(group)
            assert comm.cp_rank == part.cp_rank
            context = local_context(
                part,
                comm,
                stream=stream,
                deterministic=attention.deterministic,
                gradient_dtype=travels,
                ledger=ledger,
            )
            contexts.append(context)
        return contexts[0] if len(contexts) == 1 else joined_context(share.batch, contexts)

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


def _work(shares: list[_Share], forward_s: list[float], waited_s: list[float]) -> Work:
    seconds = planned_s = 0.0
    count = 0
    for share, forward, waited in zip(shares, forward_s, waited_s, strict=True):
        if share.groups:
            seconds += forward - waited
            planned_s += sum(g.compute_s for g in share.groups)
            count += 1
    return Work(seconds, planned_s, count)
