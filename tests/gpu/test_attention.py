"""Dense attention on one GPU: every backend, and several ranks that share the device."""

import numpy as np
import pytest
import torch

from dist_attn.attention import attention
from dist_attn.attention.accumulate import Rows, SoftmaxSum
from dist_attn.config_masks import LayerMaskConfig
from dist_attn.groups import single_rank_group
from dist_attn.layout import make_layout
from dist_attn.masks import BlockList, Causal, Documents, Mask, Predicate, Window, patterns
from dist_attn.masks.layers import document_mask
from dist_attn_kernels import dense_flash4
from dist_attn_kernels.dense import (
    CudaBackend,
    CudnnBackend,
    Flash4Backend,
    FlashBackend,
    Saved,
    Segments,
    choose_backend,
)
from dist_attn_kernels.dense_lists import ListsBackend
from tests.attention_cases import (
    NAMES,
    Case,
    assert_as_good_as_torch,
    attend,
    dense_mask,
    error,
    exact,
    mask_of,
    plain_torch,
    together,
)
from tests.mask_zoo import NUM_HEADS, SEQ_LEN
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHORT = (7, 0, 1, 41, 118, 1, 1, 230)
LONG = (2411, 3, 1600)


def check(case: Case, strategy: str, cp_size: int, mask_name: str = "causal documents") -> None:
    parts = run_ranks(attend, cp_size, case, mask_name, "zigzag", strategy, "cuda", timeout_s=120)
    whole = together(parts, case)
    allowed = dense_mask(mask_of(mask_name, case), case).cuda()
    assert_as_good_as_torch(whole, case, allowed)
    want = exact(case, allowed)["lse"].t().cpu()
    torch.testing.assert_close(whole["lse"].double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_documents(dtype, head_dim):
    check(Case(SHORT, 8, 2, head_dim, dtype), "local", 1)


@pytest.mark.parametrize("cp_size", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_long_documents(strategy, cp_size):
    check(Case(LONG, 8, 2, 128, torch.bfloat16), strategy, cp_size)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
@pytest.mark.parametrize("mask_name", ["documents", "full"])
def test_masks(mask_name, strategy):
    check(Case(SHORT, 6, 2, 64, torch.bfloat16), strategy, 3, mask_name)


def long_masks() -> dict[str, Mask]:
    """Masks over 1500 tokens and 8 query heads, 4 to a key/value head."""
    cu = [0, 700, 703, 1500]
    blocks = np.random.default_rng(0).integers(-1, 12, (8, 12, 3))
    return {
        "window and sinks": patterns.sliding_window(300, 5),
        "documents and window": patterns.causal_documents(cu) & Window(200, 0),
        "s2": patterns.s2(1500, 64, 3, 4, 8),
        # Shifted between key/value heads, whose lists serve all heads that read them.
        "s2 of a layer": document_mask(
            LayerMaskConfig(kind="s2", block_tokens=64, local_blocks=2, stride_blocks=4), cu, 8, 2
        ),
        "s2, a dense head": patterns.s2(1500, 64, 3, 4, 8, dense_heads=[3]) & Documents(cu),
        "power of two": patterns.power_of_two(1500, 64, 2),
        "shifted groups and sinks": patterns.shifted_groups(1500, 400, 8, 3),
        "anchor documents": patterns.anchor_documents(cu),
        "streaming heads": patterns.streaming_heads(8, [0, 5], 256, 4),
        "window per head": patterns.window_per_head([64, 100, 200, 200, 300, 700, 1500, 64], 4),
        "listed blocks": BlockList(128, 128, blocks),
        "predicate": Predicate(
            lambda q, k, h: (q + 3 * k + h) % 7 < 3, patterns.sliding_window(400)
        ),
    }


def attend_locally(dtype: torch.dtype, head_dim: int, mask: Mask) -> None:
    """Attention of one rank under a mask against the float64 reference."""
    case = Case((1500,), 8, 2, head_dim, dtype)
    x = {n: t.cuda() for n, t in case.tensors().items()}
    for n in "qkv":
        x[n].requires_grad_()
    layout, group = make_layout("contiguous", [0, 1500], 1), single_rank_group()
    out = attention(x["q"], x["k"], x["v"], mask=mask, layout=layout, group=group, strategy="local")
    out.backward(x["dout"])
    got = {"out": out.detach(), **{f"d{n}": x[n].grad for n in "qkv"}}
    assert_as_good_as_torch(got, case, dense_mask(mask, case).cuda())


@pytest.mark.parametrize("name", long_masks())
@pytest.mark.parametrize("head_dim", [64, 128])
def test_block_sparse_masks(name, head_dim):
    attend_locally(torch.bfloat16, head_dim, long_masks()[name])


@pytest.mark.parametrize(
    "strategy", ["ring+gather", "gather+ring", "gather+gather", "ring+ulysses", "ulysses+ulysses"]
)
def test_two_levels_on_four_ranks(strategy):
    case = Case((SEQ_LEN,), NUM_HEADS, 2, 64, torch.bfloat16)
    check(case, strategy, 4, "s2 and a dense head")


@pytest.mark.parametrize("mask_name", ["s2 and a dense head", "prefix lm documents", "predicate"])
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_block_sparse_masks_on_ranks(strategy, mask_name):
    check(Case((SEQ_LEN,), NUM_HEADS, 2, 64, torch.bfloat16), strategy, 2, mask_name)


def test_float32_is_computed_by_the_reference():
    choice = choose_backend(torch.device("cuda"), torch.float32, 64)
    assert choice.backend.name == "reference"
    assert "float16 and bfloat16" in choice.refused["cuda"]
    check(Case(SHORT, 4, 2, 64), "ring", 2)


def flash4(head_dim: int) -> Flash4Backend:
    found = dense_flash4.find_interface()
    if isinstance(found, str):
        pytest.skip(found)
    return Flash4Backend(found, torch.device("cuda"), torch.bfloat16, head_dim)


@pytest.mark.parametrize(
    "backend",
    [CudnnBackend(), FlashBackend(), ListsBackend(), "flash4"],
    ids=["cudnn", "flash", "lists", "flash4"],
)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_a_backend_obeys_a_foreign_normaliser(backend, kv_heads):
    """Keys in two calls, merged; the backward of each call with out and lse of both."""
    if backend == "flash4":
        backend = flash4(128)
    case = Case((1100,), 8, kv_heads, 128, torch.bfloat16)
    x = {n: t.cuda() for n, t in case.tensors().items()}
    scale, split, end = 128**-0.5, 700, 1100
    calls = [
        (slice(0, end), slice(0, split), Segments((0, end), (0, split), False)),
        (slice(0, end), slice(split, end), Segments((0, end), (0, end - split), False)),
    ]
    total = SoftmaxSum(x["q"], 128)
    for q, k, segments in calls:
        rows = Rows(np.array([[q.start, q.stop]]))
        total.add(rows, *backend.forward(x["q"][q], x["k"][k], x["v"][k], segments, scale))
    out, lse = total.result()
    got = {"out": out, "dq": torch.zeros_like(x["q"], dtype=torch.float32)}
    parts = []
    for q, k, segments in calls:
        saved = Saved(x["dout"][q], x["q"][q], x["k"][k], x["v"][k], out[q], lse[:, q])
        dq, *dkv = backend.backward(saved, segments, scale, False)
        got["dq"][q] += dq
        parts.append(dkv)
    got["dk"], got["dv"] = (torch.cat(p) for p in zip(*parts, strict=True))
    allowed = torch.ones(8, end, end, dtype=torch.bool, device="cuda")
    assert_as_good_as_torch(got, case, allowed)
    saved = Saved(x["dout"], x["q"], x["k"][:split], x["v"][:split], out, lse + 1.0)
    _, _, dv = backend.backward(saved, calls[0][2], scale, False)
    ratio = (dv.float() * got["dv"][:split].float()).sum() / got["dv"][
        :split
    ].float().square().sum()
    assert ratio.item() == pytest.approx(0.3679, abs=0.01)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [SHORT, LONG, (2048,)])
def test_documents_on_flash_attn_4(lengths, head_dim):
    """It passes its trial, takes the call, and is as close to float64 as torch."""
    case = Case(lengths, 8, 2, head_dim, torch.bfloat16)
    x = {n: t.cuda() for n, t in case.tensors().items()}
    chosen = CudaBackend({}, flash4(head_dim))
    cu = tuple(case.cu_seqlens.tolist())
    segments, scale = Segments(cu, cu, True), head_dim**-0.5
    assert chosen.why_not_flash4(segments, 4) is None
    out, lse = chosen.forward(x["q"], x["k"], x["v"], segments, scale)
    saved = Saved(x["dout"], x["q"], x["k"], x["v"], out, lse)
    dq, dk, dv = chosen.backward(saved, segments, scale, False)
    got = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    assert_as_good_as_torch(got, case, dense_mask(mask_of("causal documents", case), case).cuda())


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [SHORT, LONG])
def test_documents_on_block_lists(lengths, head_dim):
    """What the choice takes for documents once their lists have paid, on strided tensors."""
    case = Case(lengths, 8, 2, head_dim, torch.bfloat16)
    x = {
        n: t.cuda().transpose(0, 1).contiguous().transpose(0, 1) for n, t in case.tensors().items()
    }
    cuda = choose_backend(torch.device("cuda"), torch.bfloat16, head_dim).backend
    if "block_sparse" in cuda.refused:
        pytest.skip(f"the block-sparse kernels are not chosen: {cuda.refused['block_sparse']}")
    chosen = CudaBackend({})
    chosen.list_scores = 0
    cu = tuple(case.cu_seqlens.tolist())
    segments, scale = Segments(cu, cu, True), head_dim**-0.5
    assert chosen.why_not_lists(segments, 8) is None
    out, lse = chosen.forward(x["q"], x["k"], x["v"], segments, scale)
    saved = Saved(x["dout"], x["q"], x["k"], x["v"], out, lse)
    dq, dk, dv = chosen.backward(saved, segments, scale, True)
    got = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    assert_as_good_as_torch(got, case, dense_mask(mask_of("causal documents", case), case).cuda())
    again = chosen.backward(saved, segments, scale, False)
    assert all(torch.equal(a, b) for a, b in zip(again, (dq, dk, dv), strict=True))


def test_deterministic_means_bitwise_the_same():
    case = Case((2048, 1000), 8, 2, 128, torch.bfloat16)
    args = (attend, 1, case, "causal documents", "zigzag", "local", "cuda")
    first, second = (run_ranks(*args, deterministic=True)[0] for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in NAMES)


def test_the_wrong_mask_is_far_outside_the_tolerance():
    case = Case(SHORT, 4, 2, 64, torch.bfloat16)
    causal, documents = (
        dense_mask(m, case).cuda() for m in (Causal(), mask_of("causal documents", case))
    )
    wrong, right = plain_torch(case, causal), exact(case, documents)
    assert error(wrong["out"], right["out"]) > 0.1
