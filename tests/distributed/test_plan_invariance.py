"""The one invariant: a step's loss and gradients do not depend on the plan.

Every plan of the same real documents is compared with one process that holds everything and knows
no sharding, no plan and no DeepSpeed.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_attn.attention.context import AttentionContext
from dist_attn.config import Config, DataConfig, ModelConfig, OptimizerConfig, PlannerConfig
from dist_attn.data import build_local_batch, open_corpus, valid_tokens
from dist_attn.groups import GroupPool, single_rank_group
from dist_attn.integrations.deepspeed_engine import DeepSpeedEngine
from dist_attn.integrations.hf import build_model
from dist_attn.layout import shares_of_fractions
from dist_attn.masks.layers import LayerRules
from dist_attn.planner.cluster import local_cluster
from dist_attn.planner.cost import CostModel
from dist_attn.planner.fitting import layer_rules_of
from dist_attn.planner.free import plan_free
from dist_attn.planner.plan import Group, MicroBatch, Plan, SolverReport
from dist_attn.planner.shape import ModelShape
from dist_attn.planner.step_plan import plan_step
from dist_attn.training.runtime import Runtime
from dist_attn.training.step import StepRunner, local_context
from tests.ranks import run_ranks

#: Real documents: byte tokens of the shortest and some longer standard library files.
NUM_DOCUMENTS = 9
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
BF16_LOSS_TOLERANCE = 2e-3
BF16_GRADIENT_TOLERANCE = 4e-2

#: Micro-batches of groups of ranks; documents are dealt to the groups in turn.
PLANS: dict[str, list[list[tuple[int, ...]]]] = {
    "alone": [[(0,), (1,), (2,), (3,)]],
    "2+2": [[(0, 1), (2, 3)]],
    "4": [[(0, 1, 2, 3)]],
    "2+1+1": [[(0, 1), (2,), (3,)]],
    "3+1": [[(0, 1, 2), (3,)]],
    "4 | 2+2 | 1": [[(0, 1, 2, 3)], [(0, 3), (1, 2)], [(2,)]],
}
STRATEGIES = ("ring", "ulysses")

#: `free` placement: per micro-batch ranks, documents, and the ranks' parts of each of them. Chains
#: of documents that meet on a rank, whole ones beside them, and a rank without a share.
FREE_PLANS: dict[str, list[list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]]] = {
    "free chain": [
        [
            ((0, 1, 2), (0, 5), (3, 4, 1)),
            ((2, 3), (1,), (1, 5)),
            ((0,), (6, 7), (1,)),
            ((3,), (8,), (1,)),
        ],
        [((0, 1, 2, 3), (2, 3), (5, 0, 1, 2)), ((1,), (4,), (1,))],
    ],
    "free crossing": [
        [((0, 2), (0, 1), (2, 3)), ((1, 2, 3), (2, 4), (1, 1, 3)), ((0, 3), (3,), (4, 1))],
        [((1,), (5, 6), (1,)), ((1, 3), (7, 8), (1, 1))],
    ],
}


def config_of(
    stage: int,
    cache: str,
    pad: int = 1,
    dtype: str = "fp32",
    masks: tuple = (),
    attention: dict | None = None,
) -> Config:
    return Config(
        attention={"masks": list(masks), **(attention or {})},
        model=ModelConfig(dtype=dtype, num_heads=4, num_kv_heads=2),
        data=DataConfig(
            max_document_tokens=700, overlong="split", cache_dir=cache, pad_to_multiple=pad
        ),
        engine={"zero_stage": stage, "bucket_elements": 20_000},
        optimizer=OptimizerConfig(name="sgd", gradient_clipping=0.0),
    )


def documents_of(lengths: np.ndarray) -> np.ndarray:
    """One long, some middling, a tiny one: odd lengths among them."""
    order = np.argsort(lengths, kind="stable")
    wanted = np.array([700, 699, 431, 350, 257, 128, 64, 33, 7])
    return order[np.searchsorted(lengths[order], wanted).clip(max=len(order) - 1)]


def make_plan(name: str, strategy: str, lengths: tuple[int, ...], layouts: int = 0) -> Plan:
    shape = (PLANS | STEP_PLANS)[name]
    slots = [(m, g) for m, groups in enumerate(shape) for g in range(len(groups))]
    dealt: dict[tuple[int, int], list[int]] = {slot: [] for slot in slots}
    for document in range(len(lengths)):
        dealt[slots[(document + layouts) % len(slots)]].append(document)
    micro_batches = tuple(
        MicroBatch(
            tuple(
                Group(
                    ranks=ranks,
                    strategy=strategy if len(ranks) > 1 else "local",
                    documents=tuple(dealt[m, g]),
                    tokens=sum(lengths[d] for d in dealt[m, g]),
                    overhead_s=0.0,
                    compute_s=0.0,
                    communication_s=0.0,
                    memory_bytes=0,
                )
                for g, ranks in enumerate(groups)
            )
        )
        for m, groups in enumerate(shape)
    )
    return Plan(lengths, 4, micro_batches, 1.0, 1.0, SolverReport("test"), "", "")


def make_free_plan(name: str, strategy: str, lengths: tuple[int, ...]) -> Plan:
    if name == "free planned":
        cluster = local_cluster(4, ["cpu"] * 4, 4)
        shape = ModelShape.from_config(ModelConfig(dtype="fp32"), 257)
        cost = CostModel.derive(shape, cluster, 2, max_tokens_per_device=460)
        return plan_free(lengths, cluster, cost, PlannerConfig(time_limit_s=60.0), [strategy])
    micro_batches = []
    for groups in FREE_PLANS[name]:
        made = []
        for ranks, documents, parts in groups:
            fractions = np.tile(np.array(parts, dtype=np.float64), (len(documents), 1))
            own = [lengths[d] for d in documents]
            shares = shares_of_fractions(own, fractions)
            made.append(
                Group(
                    ranks, strategy if len(ranks) > 1 else "local", documents, sum(own),
                    0.0, 0.0, 0.0, 0,
                    shares=tuple(tuple(row) for row in shares.tolist()),
                    rank_s=(0.0,) * len(ranks),
                )
            )  # fmt: skip
        micro_batches.append(MicroBatch(tuple(made)))
    report = SolverReport("test")
    plan = Plan(lengths, 4, tuple(micro_batches), 1.0, 1.0, report, "", "", placement="free")
    plan.validate()
    return plan


#: `step` synchronisation: chains in which the last group of one rank is the first of another, and
#: ranks with one, two and three micro-batches.
STEP_PLANS: dict[str, list[list[tuple[int, ...]]]] = {
    "step chain": [[(0, 1), (2,)], [(1, 2), (3,)], [(2, 3)]],
    "step uneven": [[(0, 1, 2), (3,)], [(3,)], [(3,)], [(2, 3)]],
    "step idle": [[(0,), (1, 2)]],
}


def make_step_plan(name: str, strategy: str, lengths: tuple[int, ...]) -> Plan:
    if name == "step planned":
        cluster = local_cluster(4, ["cpu"] * 4, 4)
        shape = ModelShape.from_config(ModelConfig(dtype="fp32"), 257)
        cost = CostModel.derive(shape, cluster, 1, max_tokens_per_device=460)
        return plan_step(lengths, cluster, cost, PlannerConfig(time_limit_s=60.0), [strategy])
    return dataclasses.replace(make_plan(name, strategy, lengths), synchronisation="step")


def plan_of_case(name: str, strategy: str, lengths: tuple[int, ...]) -> Plan:
    """The plan that a case names, made on rank 0 as in a run. Collective: by all ranks."""
    make = {"free": make_free_plan, "step": make_step_plan}.get(
        name.split(maxsplit=1)[0], make_plan
    )
    box = [make(name, strategy, lengths) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]


def rules_of(config: Config) -> LayerRules | None:
    return layer_rules_of(config, ModelShape.from_config(config.model, 257))


def reference(cache: str, masks: tuple = ()) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by plain autograd over all documents, in this process alone."""
    config = config_of(0, cache, masks=masks)
    corpus = open_corpus(config.data, Path(cache))
    ids = documents_of(corpus.lengths)
    model = build_model(config.model, corpus.vocab_size, seed=3)
    lengths = corpus.lengths[ids]
    group = Group((0,), "local", tuple(range(len(ids))), int(lengths.sum()), 0.0, 0.0, 0.0, 0)
    batch = build_local_batch(corpus, ids, group)
    context: AttentionContext = local_context(batch, single_rank_group(0), rules_of(config))
    loss = model(batch.input_ids, batch.shift_labels, batch.position_ids, context)
    mean = loss / valid_tokens(lengths)
    mean.backward()
    return mean.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


def errors(
    loss: float, gradients: dict[str, Tensor], expected: tuple[float, dict[str, Tensor]]
) -> tuple[float, float]:
    """Relative error of the loss, and the worst parameter's relative error of its gradient."""
    loss_error = abs(loss - expected[0]) / abs(expected[0])
    worst = max(((gradients[name] - g).norm() / g.norm()).item() for name, g in expected[1].items())
    return loss_error, worst


def run_plans(
    cache: str,
    stage: int,
    cases: list[tuple[str, str]],
    expected: tuple,
    pad: int,
    device: str = "cpu",
    dtype: str = "fp32",
    masks: tuple = (),
    *,
    attention: dict | None = None,
) -> dict[tuple[str, str], tuple[float, float]]:
    """Errors of every case, on one engine; and of a control whose loss weight is wrong."""
    config = config_of(stage, cache, pad, dtype, masks, attention)
    rank, size = dist.get_rank(), dist.get_world_size()
    runtime = Runtime(rank, size, rank, size, torch.device(device))
    corpus = open_corpus(config.data, Path(cache))
    ids = documents_of(corpus.lengths)
    lengths = tuple(int(n) for n in corpus.lengths[ids])
    engine = DeepSpeedEngine(
        build_model(config.model, corpus.vocab_size, seed=3), config, runtime.device
    )
    pool = GroupPool()
    runner = StepRunner(engine, corpus, config, runtime, pool, rules_of(config))
    found = {}
    for name, strategy in cases:
        wrong = _WrongWeight(engine, rank) if name == "control" else None
        plan = plan_of_case("2+1+1" if wrong else name, strategy, lengths)
        if wrong:
            runner = StepRunner(wrong, corpus, config, runtime, pool, rules_of(config))
        result = runner.accumulate(plan, ids)
        gradients = {n: engine.full_gradient(n).cpu().clone() for n in expected[1]}
        found[name, strategy] = errors(result.loss, gradients, expected)
        engine.step(lr=0.0)
    pool.close()
    return found


class _WrongWeight:
    """The engine, but the group of ranks 0 and 1 counts 5% too much."""

    def __init__(self, engine: DeepSpeedEngine, rank: int) -> None:
        self._engine = engine
        self._weight = 1.05 if rank in (0, 1) else 1.0

    def forward(self, **inputs: object) -> Tensor:
        return self._engine.forward(**inputs) * self._weight

    def backward(self, loss_sum: Tensor, valid: int, *, last: bool) -> None:
        self._engine.backward(loss_sum, valid, last=last)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def expected(cache: str) -> tuple[float, dict[str, Tensor]]:
    return run_ranks(reference, 1, cache)[0]


CONTROL = ("control", "ring")
Found = list[dict[tuple[str, str], tuple[float, float]]]


def assert_right(found: Found) -> None:
    """On every rank each plan but the control has the loss and the gradients of one process."""
    for by_case in found:
        assert by_case.keys() - {CONTROL}
        for case, (loss_error, gradient_error) in by_case.items():
            if case != CONTROL:
                assert loss_error <= LOSS_TOLERANCE, case
                assert gradient_error <= GRADIENT_TOLERANCE, case


def assert_wrong(found: Found) -> None:
    """The control, in which some tokens weigh 5% too much, lands far outside."""
    for by_case in found:
        assert by_case[CONTROL][0] > 100 * LOSS_TOLERANCE
        assert by_case[CONTROL][1] > 10 * GRADIENT_TOLERANCE


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_loss_and_gradients_do_not_depend_on_the_plan(
    cache: str, expected: tuple[float, dict[str, Tensor]], stage: int
) -> None:
    cases = [(name, s) for name in PLANS for s in STRATEGIES]
    found = run_ranks(
        run_plans, 4, cache, stage, [*cases, ("control", "ring")], expected, 1, timeout_s=120
    )
    assert_right(found)
    assert_wrong(found)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_free_placement_changes_nothing(
    cache: str, expected: tuple[float, dict[str, Tensor]], stage: int
) -> None:
    """Uneven shares, several groups on a rank; the control weighs two ranks' tokens 5% too much."""
    cases = [(name, s) for name in FREE_PLANS for s in (*STRATEGIES, "gather")]
    cases += [("free planned", "gather"), ("free planned", "ulysses"), ("control", "ring")]
    found = run_ranks(run_plans, 4, cache, stage, cases, expected, 1, timeout_s=120)
    assert_right(found)
    assert_wrong(found)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_ranks_that_run_ahead_change_nothing(
    cache: str, expected: tuple[float, dict[str, Tensor]], stage: int
) -> None:
    """Different numbers of micro-batches and other partners in each, also after waiting plans."""
    cases = [(name, s) for name in STEP_PLANS for s in (*STRATEGIES, "gather")]
    cases += [("3+1", "ring"), ("step planned", "ring"), ("control", "ring")]
    found = run_ranks(run_plans, 4, cache, stage, cases, expected, 1, timeout_s=120)
    assert_right(found)
    assert_wrong(found)


def test_free_placement_with_padding_and_masks_of_layers(cache: str) -> None:
    masks = ({"kind": "window", "layers": [1], "window_tokens": 50, "sink_tokens": 3},)
    windowed = run_ranks(reference, 1, cache, masks)[0]
    cases = [("free chain", "gather"), ("free crossing", "ring")]
    found = run_ranks(run_plans, 4, cache, 2, cases, windowed, 64, "cpu", "fp32", masks)
    assert_right(found)


def test_padding_changes_nothing(cache: str, expected: tuple[float, dict[str, Tensor]]) -> None:
    cases = [("2+1+1", "ring"), ("4 | 2+2 | 1", "ulysses")]
    assert_right(run_ranks(run_plans, 4, cache, 2, cases, expected, 64, timeout_s=120))


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2)), 3])
def test_bf16(cache: str, expected: tuple[float, dict[str, Tensor]], stage: int) -> None:
    """Eight bits of mantissa through two layers; the control weighs a group 5% too much."""
    cases = [("2+1+1", "ring"), ("4 | 2+2 | 1", "ulysses"), ("control", "ring")]
    found = run_ranks(run_plans, 4, cache, stage, cases, expected, 1, "cpu", "bf16", timeout_s=120)
    for by_case in found:
        control = by_case.pop(("control", "ring"))
        for case, (loss_error, gradient_error) in by_case.items():
            assert loss_error <= BF16_LOSS_TOLERANCE, case
            assert gradient_error <= BF16_GRADIENT_TOLERANCE, case
        assert control[0] > 5 * BF16_LOSS_TOLERANCE


def test_masks_of_layers(cache: str, expected: tuple[float, dict[str, Tensor]]) -> None:
    """One S2 layer whose heads differ, one with a window and sinks, under every strategy."""
    masks = (
        {"kind": "s2", "block_tokens": 16, "local_blocks": 2, "stride_blocks": 4},
        {"kind": "window", "layers": [1], "window_tokens": 50, "sink_tokens": 3},
    )
    sparse = run_ranks(reference, 1, cache, masks)[0]
    cases = [(name, s) for name in ("2+1+1", "4 | 2+2 | 1") for s in (*STRATEGIES, "gather")]
    found = run_ranks(run_plans, 4, cache, 2, cases, sparse, 1, "cpu", "fp32", masks, timeout_s=120)
    assert_right(found)
    # The control: without the masks the gradients are others.
    _, different = errors(expected[0], expected[1], sparse)
    assert different > 100 * GRADIENT_TOLERANCE


@pytest.mark.parametrize("layout", ["balanced", pytest.param("striped", marks=pytest.mark.slow)])
def test_two_levels_and_layouts(
    cache: str, expected: tuple[float, dict[str, Tensor]], layout: str
) -> None:
    """Two nodes of two ranks; every strategy on tokens dealt out by chunks or one by one."""
    two_levels = ["ulysses+ring", "ulysses+gather", "ring+ring"]
    attention = {"strategies": two_levels, "inner_degree": 2, "ring_layout": layout}
    cases = [*(("4", s) for s in (*two_levels, "gather")), ("2+2", "ring")]
    args = (run_plans, 4, cache, 3, [*cases, ("control", "ring")], expected, 1, "cpu", "fp32")
    found = run_ranks(*args, attention=attention, timeout_s=120)
    assert all(len(by_case) == len(cases) + 1 for by_case in found)
    assert_right(found)
    assert_wrong(found)


def test_two_levels_under_masks_of_layers(
    cache: str, expected: tuple[float, dict[str, Tensor]]
) -> None:
    """S2 heads that differ, and a window, balanced by what all layers compute."""
    masks = (
        {"kind": "s2", "block_tokens": 16, "local_blocks": 2, "stride_blocks": 4},
        {"kind": "window", "layers": [1], "window_tokens": 50, "sink_tokens": 3},
    )
    sparse = run_ranks(reference, 1, cache, masks)[0]
    two_levels = ["ulysses+ring", "ulysses+gather", "ring+ring"]
    attention = {"strategies": two_levels, "inner_degree": 2, "ring_layout": "balanced"}
    others = ["ring+gather", "gather+gather", "gather+ring"]
    attention["strategies"] = [*two_levels, *others]
    cases = [("4", s) for s in (*two_levels, *others)]
    args = (run_plans, 4, cache, 2, cases, sparse, 64, "cpu", "fp32")
    assert_right(run_ranks(*args, masks, attention=attention, timeout_s=120))
    _, different = errors(expected[0], expected[1], sparse)
    assert different > 100 * GRADIENT_TOLERANCE


@pytest.mark.slow
def test_gradients_travel_in_the_configured_type(
    cache: str, expected: tuple[float, dict[str, Tensor]]
) -> None:
    """Rounded to bf16 on their way they differ by more than in float32; the loss does not."""
    args = (run_plans, 4, cache, 2, [("4", "ring")], expected, 1, "cpu", "fp32")
    found = run_ranks(*args, attention={"gradient_dtype": "bfloat16"}, timeout_s=120)
    for by_case in found:
        loss_error, gradient_error = by_case["4", "ring"]
        assert loss_error <= LOSS_TOLERANCE
        assert GRADIENT_TOLERANCE < gradient_error < 100 * GRADIENT_TOLERANCE


def test_the_reference_separates_documents(cache: str) -> None:
    """Without the document mask the loss would be another: the oracle is no leaking one."""
    separate, leaking = run_ranks(leak, 1, cache)[0]
    assert abs(separate - leaking) / separate > 20 * LOSS_TOLERANCE


def leak(cache: str) -> tuple[float, float]:
    config = config_of(0, cache)
    corpus = open_corpus(config.data, Path(cache))
    ids = documents_of(corpus.lengths)
    model = build_model(config.model, corpus.vocab_size, seed=3)
    total = int(corpus.lengths[ids].sum())
    group = Group((0,), "local", tuple(range(len(ids))), total, 0.0, 0.0, 0.0, 0)
    batch = build_local_batch(corpus, ids, group)
    one_document = copy.copy(batch)
    object.__setattr__(one_document, "cu_seqlens", torch.tensor([0, total], dtype=torch.int32))
    losses = []
    for each in (batch, one_document):
        context = local_context(each, single_rank_group(0))
        with torch.no_grad():
            loss = model(batch.input_ids, batch.shift_labels, batch.position_ids, context)
        losses.append(loss.item())
    return losses[0], losses[1]
