"""Every strategy, layout and number of ranks gives the attention of one process."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from dist_attn.attention import attention, dispatch
from dist_attn.attention.strategy import Local
from dist_attn.attention.ulysses import HeadSplit, Ulysses, split_heads
from dist_attn.attention.workload import workload
from dist_attn.errors import PlanError
from dist_attn.layout import make_layout
from dist_attn.masks import Causal, Documents
from tests.attention_cases import (
    NAMES,
    Case,
    assert_as_good_as_torch,
    attend,
    dense_mask,
    error,
    exact,
    mask_of,
    together,
    world_group,
)
from tests.mask_zoo import CU, NUM_HEADS, SEQ_LEN, zoo
from tests.ranks import run_ranks

ZOO_CASE = Case((SEQ_LEN,), num_heads=NUM_HEADS, num_kv_heads=2)
KINDS = ("ring", "gather", "ulysses")
TWO_LEVELS = [f"{inner}+{outer}" for inner in KINDS for outer in KINDS]
OFTEN_USED = ["ring+ring", "ulysses+ring", "ulysses+gather"]
STRATEGIES = ["ring", "gather", "ulysses", *OFTEN_USED]
LAYOUTS = ["contiguous", "zigzag", "striped", "balanced", "placed", "scattered"]
ODD = Case((7, 0, 1, 41, 18, 1, 1, 30))


def check(
    case: Case, mask_name: str, layout_kind: str, strategy: str, cp_size: int, **kwargs: Any
) -> None:
    parts = run_ranks(attend, cp_size, case, mask_name, layout_kind, strategy, **kwargs)
    whole = together(parts, case)
    allowed = dense_mask(mask_of(mask_name, case), case)
    assert_as_good_as_torch(whole, case, allowed)
    tolerance = max(1e-5, torch.finfo(case.dtype).eps)
    torch.testing.assert_close(
        whole["lse"].double(), exact(case, allowed)["lse"].t(), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout_kind", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_causal_documents(strategy, layout_kind, cp_size):
    check(ODD, "causal documents", layout_kind, strategy, cp_size)


@pytest.mark.parametrize("layout_kind", ["zigzag", "scattered"])
@pytest.mark.parametrize("strategy", [s for s in TWO_LEVELS if s not in OFTEN_USED])
def test_causal_documents_in_two_levels(strategy, layout_kind):
    check(ODD, "causal documents", layout_kind, strategy, 4)


@pytest.mark.slow
@pytest.mark.parametrize("layout_kind", ["contiguous", "zigzag", "scattered"])
@pytest.mark.parametrize("strategy", TWO_LEVELS)
@pytest.mark.parametrize("mask_name", ["causal documents", "s2 and a dense head"])
def test_nodes_of_two_and_of_three(mask_name, strategy, layout_kind):
    case = Case(tuple(np.diff(CU).tolist()), num_heads=NUM_HEADS, num_kv_heads=2)
    for inner_size in (2, 3):
        check(case, mask_name, layout_kind, strategy, 6, inner_size=inner_size)


@pytest.mark.parametrize("mask_name", ["full", "causal", "documents"])
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_masks(strategy, mask_name):
    check(ODD, mask_name, "zigzag", strategy, 3)


@pytest.mark.parametrize("mask_name", zoo())
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_masks_of_the_field(strategy, mask_name):
    check(ZOO_CASE, mask_name, "zigzag", strategy, 3)


@pytest.mark.parametrize("mask_name", ["s2 and a dense head", "shared question", "listed blocks"])
@pytest.mark.parametrize("strategy", TWO_LEVELS)
def test_masks_in_two_levels(strategy, mask_name):
    check(ZOO_CASE, mask_name, "zigzag", strategy, 4)


@pytest.mark.parametrize("layout_kind", ["contiguous", "scattered"])
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_per_head_masks_on_any_layout(strategy, layout_kind):
    check(ZOO_CASE, "s2 and a dense head", layout_kind, strategy, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_dtypes(strategy, dtype):
    check(Case((5, 50, 33), dtype=dtype, head_dim=16), "causal documents", "zigzag", strategy, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_name", ["causal documents", "window and sinks"])
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_scores_up_to_1e4(strategy, mask_name, dtype):
    case = Case((40, 49), scale_of_q=4e3, dtype=dtype)
    x = case.tensors()
    k = x["k"].repeat_interleave(2, 1)
    scores = torch.einsum("qhd,khd->hqk", x["q"].float(), k.float()) * case.head_dim**-0.5
    assert scores.abs().max() > 1e4
    check(case, mask_name, "zigzag", strategy, 3)


@pytest.mark.parametrize("strategy", ["ulysses", "ulysses+ring", "ulysses+ulysses", "ring+ulysses"])
@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (6, 2), (6, 6), (5, 5), (2, 1), (8, 4)])
def test_head_counts_that_do_not_divide(heads, strategy):
    case = Case((13, 20), num_heads=heads[0], num_kv_heads=heads[1])
    check(case, "causal documents", "zigzag", strategy, 4)


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
@pytest.mark.parametrize("lengths", [(), (0,), (1,), (2, 0, 1), (7,)])
def test_few_tokens(lengths, strategy):
    check(Case(lengths), "causal documents", "zigzag", strategy, 3)


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses", "ring+ring"])
def test_gradients_may_travel_in_16_bits(strategy):
    case = Case((50, 33), 4, 1, dtype=torch.bfloat16, head_dim=16)
    args = (attend, 4, case, "causal documents", "zigzag", strategy)
    wide = run_ranks(*args, gradient_dtype=torch.float32)
    narrow = run_ranks(*args, gradient_dtype=torch.bfloat16)
    by_default = run_ranks(*args)
    for a, b in zip(wide, narrow, strict=True):
        assert torch.equal(a["out"], b["out"])
        assert torch.equal(a["dq"], b["dq"])
        if strategy != "ulysses":
            assert a["all_bytes"]["dkv"] == 2 * b["all_bytes"]["dkv"]
    # What one kernel call returned is rounded already, so nothing is lost in its own type; sums of
    # several ranks travel in float32.
    for a, b, c in zip(wide, narrow, by_default, strict=True):
        assert torch.equal(a["dk"], c["dk"])
        assert torch.equal(a["dv"], c["dv"])
        if strategy == "gather":
            assert c["all_bytes"] == b["all_bytes"]
        elif strategy == "ulysses":
            assert c["all_bytes"] == a["all_bytes"]
        else:
            assert b["all_bytes"]["dkv"] <= c["all_bytes"]["dkv"] <= a["all_bytes"]["dkv"]
    allowed = dense_mask(mask_of("causal documents", case), case)
    assert_as_good_as_torch(together(wide, case), case, allowed)
    want, got = exact(case, allowed), together(narrow, case)
    assert 0 < error(got["dk"], want["dk"]) < 4 * torch.finfo(torch.bfloat16).eps
    # The kernel's own parts have 16 bits anyway; only sums that travel lose some.
    same = all(torch.equal(a["dk"], b["dk"]) for a, b in zip(wide, narrow, strict=True))
    assert same == (not strategy.startswith("ring"))


def test_the_error_does_not_grow_with_the_ranks():
    case = Case((300,), dtype=torch.bfloat16, head_dim=16)
    want = exact(case, dense_mask(Causal(), case))
    errors = {}
    for cp_size in (1, 2, 4):
        parts = run_ranks(attend, cp_size, case, "causal", "zigzag", "ring")
        got = together(parts, case)
        errors[cp_size] = {n: error(got[n], want[n]) for n in NAMES}
    for name in NAMES:
        assert errors[4][name] <= 1.5 * errors[1][name]


def test_the_wrong_mask_is_far_outside_the_tolerance():
    parts = run_ranks(attend, 3, ODD, "causal", "zigzag", "ring")
    whole = together(parts, ODD)
    allowed = dense_mask(mask_of("causal documents", ODD), ODD)
    with pytest.raises(AssertionError, match="error"):
        assert_as_good_as_torch(whole, ODD, allowed)


def test_ring_sends_each_block_as_far_as_it_is_needed():
    case = Case((64,))
    parts = run_ranks(attend, 4, case, "causal", "zigzag", "ring")
    kv_bytes = 2 * 16 * case.num_kv_heads * case.head_dim * 4
    for part in parts:
        assert part["forward_bytes"] == {"kv": 3 * kv_bytes}
        # Gradients travel as often as keys and values did, one step later.
        assert part["all_bytes"] == {"kv": 6 * kv_bytes, "dkv": 3 * kv_bytes}
        assert part["calls"] == {"kv": 12, "dkv": 6}  # keys and values are sent separately


def test_a_double_ring_crosses_nodes_once_a_round():
    case = Case((64,))
    parts = run_ranks(attend, 4, case, "causal", "zigzag", "ring+ring")
    kv_bytes = 2 * 16 * case.num_kv_heads * case.head_dim * 4
    for part in parts:
        # Two rounds of one hop, and one hop between the nodes.
        assert part["forward_bytes"] == {"kv": 2 * kv_bytes, "kv_between_nodes": kv_bytes}
        # Home from each node, and one hop inside the other node.
        assert part["all_bytes"]["dkv"] == 3 * kv_bytes


def test_gather_between_nodes_brings_a_key_to_a_node_once():
    case = Case((64,))
    parts = run_ranks(attend, 4, case, "causal", "contiguous", "gather+gather")
    a_block = 2 * 16 * case.num_kv_heads * case.head_dim * 4
    # The second node needs both blocks of the first one, each rank the one at its own place.
    between = [part["forward_bytes"].get("kv_between_nodes", 0) for part in parts]
    assert between == [a_block, a_block, 0, 0]
    # Inside: to the neighbour of the own block what it sees; of the visitors to each other.
    assert [p["forward_bytes"].get("kv", 0) for p in parts] == [a_block, 0, 2 * a_block, a_block]
    home = [part["all_bytes"].get("dkv_between_nodes", 0) for part in parts]
    assert home == [0, 0, a_block, a_block]
    plain = run_ranks(attend, 4, case, "causal", "contiguous", "gather")
    # Each rank of the second node would fetch the first one's blocks itself.
    assert [p["forward_bytes"].get("kv", 0) for p in plain] == [
        3 * a_block,
        2 * a_block,
        a_block,
        0,
    ]


@pytest.mark.parametrize("strategy", ["ring+gather", "gather+gather"])
@pytest.mark.parametrize("mask_name", ["s2", "causal window"])
def test_what_crosses_between_nodes_is_what_the_mask_needs(mask_name, strategy):
    parts = run_ranks(attend, 4, ZOO_CASE, mask_name, "zigzag", strategy)
    mask = mask_of(mask_name, ZOO_CASE)
    heads = np.stack([mask.materialize(SEQ_LEN, h) for h in range(NUM_HEADS)])
    by_kv_head = heads.reshape(2, 2, SEQ_LEN, SEQ_LEN).any(axis=1)
    for holding, part in enumerate(parts):
        k, others = part["positions"].numpy(), [2, 3] if holding < 2 else [0, 1]
        q = np.concatenate([parts[r]["positions"].numpy() for r in others])
        needed = int(by_kv_head[:, q][:, :, k].any(axis=1).sum())
        sent = part["forward_bytes"].get("kv_between_nodes", 0)
        assert sent == needed * 2 * ZOO_CASE.head_dim * 4


def test_ring_sends_nothing_between_documents_on_single_ranks():
    case = Case((16, 16, 16, 16))
    for part in run_ranks(attend, 4, case, "causal documents", "contiguous", "ring"):
        assert part["all_bytes"] == {}


def test_ring_stops_where_nobody_needs_the_block():
    case = Case((16, 32, 16))
    parts = run_ranks(attend, 4, case, "causal documents", "contiguous", "ring")
    kv_bytes = 2 * 16 * case.num_kv_heads * case.head_dim * 4
    sent = [part["forward_bytes"].get("kv", 0) for part in parts]
    assert sent == [0, kv_bytes, 0, 0]
    everything = [part["all_bytes"] for part in parts]
    assert everything == [{}, {"kv": 2 * kv_bytes}, {"dkv": kv_bytes}, {}]


@pytest.mark.parametrize(
    ("mask_name", "layout_kind"),
    [
        ("s2", "contiguous"),
        ("causal window", "contiguous"),
        ("shared question", "contiguous"),
        ("streaming heads", "contiguous"),
        ("causal window", "zigzag"),
        ("top variable blocks", "balanced"),
        ("causal documents", "striped"),
    ],
)
def test_gather_moves_exactly_what_the_mask_needs(mask_name, layout_kind):
    cp_size = 3
    parts = run_ranks(attend, cp_size, ZOO_CASE, mask_name, layout_kind, "gather")
    mask = mask_of(mask_name, ZOO_CASE)
    heads = np.stack([mask.materialize(SEQ_LEN, h) for h in range(NUM_HEADS)])
    by_kv_head = heads.reshape(2, 2, SEQ_LEN, SEQ_LEN).any(axis=1)
    sent = [part["forward_bytes"].get("kv", 0) for part in parts]
    wanted = [0] * cp_size
    for needing, holding in itertools.permutations(range(cp_size), 2):
        q, k = parts[needing]["positions"].numpy(), parts[holding]["positions"].numpy()
        needed = by_kv_head[:, q][:, :, k].any(axis=1).sum()
        wanted[holding] += int(needed) * 2 * ZOO_CASE.head_dim * 4
    assert sent == wanted
    for part in parts:
        # The backward fetches again; float32 gradients of what came go back.
        assert part["all_bytes"].get("kv", 0) == 2 * part["forward_bytes"].get("kv", 0)
    returned = sum(part["all_bytes"].get("dkv", 0) for part in parts)
    assert returned == sum(wanted)


def sent_for_a_window(seq_len: int, strategy: str) -> dict[str, int]:
    case = Case((seq_len,), head_dim=4)
    return attend(case, "causal window", "contiguous", strategy)["all_bytes"]


def test_a_window_moves_the_same_however_long_the_sequence():
    short, long = (run_ranks(sent_for_a_window, 4, n, "gather") for n in (80, 640))
    assert short == long
    # Of 12 tokens keys and values of 2 heads, forward and backward, and their gradients.
    each = 12 * 2 * 2 * 4 * 4
    assert short == [{"kv": 2 * each}, *[{"kv": 2 * each, "dkv": each}] * 2, {"dkv": each}]
    # A ring moves whole blocks, but only to the neighbour.
    block = 20 * 2 * 2 * 4 * 4
    ring = run_ranks(sent_for_a_window, 4, 80, "ring")
    assert ring == [{"kv": 2 * block}, *[{"kv": 2 * block, "dkv": block}] * 2, {"dkv": block}]


def test_ulysses_replicates_heads_only_as_far_as_needed():
    case = Case((64,), num_heads=4, num_kv_heads=2)
    parts = run_ranks(attend, 4, case, "causal", "contiguous", "ulysses")
    per_head = 16 * case.head_dim * 4
    for part in parts:
        # Forward: to each of 3 others one query head and one head each of keys and values; back
        # the output; and the normaliser, which was asked for.
        assert part["forward_bytes"] == {"all_to_all": 3 * (3 + 1) * per_head + 3 * 16 * 4}


class ChunkedUlysses(Ulysses):
    """Trades heads in chunks, which on a CPU it would not."""

    def num_chunks(self, split: HeadSplit, scores: int, device: torch.device) -> int:
        return min(3, split.divisible)


def test_chunks_are_made_where_each_has_work_enough():
    split, gpu = split_heads(32, 32, 2), torch.device("cuda")
    long, short = (
        workload(Causal(), make_layout("contiguous", [0, n], 2), 0, tuple(range(32)), 32)
        for n in (32768, 8192)
    )
    ulysses = Ulysses(Local(), max_chunks=4)
    assert long.expected_scores == 32 * 32768**2 // 2
    assert ulysses.num_chunks(split, long.expected_scores, gpu) == 4
    assert ulysses.num_chunks(split, short.expected_scores, gpu) == 1
    assert ulysses.num_chunks(split, long.expected_scores, torch.device("cpu")) == 1
    assert ulysses.num_chunks(split_heads(32, 2, 2), long.expected_scores, gpu) == 1


def attend_in_chunks(case: Case, mask_name: str, layout_kind: str) -> tuple[dict, dict]:
    whole = attend(case, mask_name, layout_kind, "ulysses")
    before = dispatch.STRATEGIES["ulysses"]
    dispatch.STRATEGIES["ulysses"] = ChunkedUlysses(Local())
    try:
        return whole, attend(case, mask_name, layout_kind, "ulysses")
    finally:
        dispatch.STRATEGIES["ulysses"] = before


@pytest.mark.parametrize("layout_kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    ("mask_name", "heads"), [("causal documents", (12, 6)), ("causal documents", (10, 10)),
                             ("causal documents", (4, 2)), ("s2", (4, 4))],
)  # fmt: skip
def test_heads_traded_in_chunks_change_nothing(mask_name, heads, layout_kind):
    lengths = (SEQ_LEN,) if mask_name == "s2" else (40, 0, 23, 7)
    case = Case(lengths, *heads)
    for whole, chunked in run_ranks(attend_in_chunks, 2, case, mask_name, layout_kind):
        for name in ("out", "lse", "dq", "dk", "dv"):
            torch.testing.assert_close(chunked[name], whole[name], rtol=0, atol=1e-6)
        assert chunked["all_bytes"] == whole["all_bytes"]
        chunks = min(3, heads[1] // 2)
        assert chunked["calls"]["all_to_all"] == chunks * whole["calls"]["all_to_all"]


def refused_calls() -> list[str]:
    group = world_group()
    layout = make_layout("zigzag", [0, 8], 2)
    q = torch.zeros(4, 2, 8)
    good = {"mask": Causal(), "layout": layout, "group": group, "strategy": "ring"}
    messages = []
    for tensors, change in (
        ((q, q, q), {"strategy": "local"}),
        ((q, q, q), {"strategy": "magic"}),
        ((q, q, q), {"strategy": "ulysses+ring"}),
        ((q[:3], q[:3], q[:3]), {}),
        ((q, q.double(), q), {}),
        ((q, q[:, :1].expand(4, 3, 8), q[:, :1].expand(4, 3, 8)), {}),
        ((q, q, q), {"layout": make_layout("zigzag", [0, 8], 3)}),
        ((q, q, q), {"mask": Documents([0, 7])}),
    ):
        with pytest.raises(PlanError) as refusal:
            attention(*tensors, **{**good, **change})
        messages.append(str(refusal.value))
    return messages


def test_what_does_not_fit_is_refused():
    wanted = [
        "'local' is for one rank",
        "unknown strategy 'magic'",
        "takes a group with inner and outer ones",
        "the layout gives 4 tokens",
        "one dtype and device",
        "multiple of key/value heads",
        "the layout is for 3 ranks",
        "documents hold 7 tokens, the stream 8",
    ]
    for messages in run_ranks(refused_calls, 2):
        assert all(w in m for w, m in zip(wanted, messages, strict=True)), messages
