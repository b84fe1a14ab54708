"""Dense attention on one GPU: every backend, and several ranks that share the device."""

import pytest
import torch
from dist_attn_kernels.dense import CudnnBackend, FlashBackend, Saved, Segments, choose_backend

from dist_attn.attention.accumulate import Rows, SoftmaxSum
from dist_attn.attention.staircase import _intervals
from dist_attn.masks import Causal
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


def test_float32_is_computed_by_the_reference():
    choice = choose_backend(torch.device("cuda"), torch.float32, 64)
    assert choice.backend.name == "reference"
    assert "float16 and bfloat16" in choice.refused["cuda"]
    check(Case(SHORT, 4, 2, 64), "ring", 2)


@pytest.mark.parametrize("backend", [CudnnBackend(), FlashBackend()], ids=lambda b: b.name)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_a_backend_obeys_a_foreign_normaliser(backend, kv_heads):
    """Keys in two calls, merged; the backward of each call with out and lse of both."""
    case = Case((1100,), 8, kv_heads, 128, torch.bfloat16)
    x = {n: t.cuda() for n, t in case.tensors().items()}
    scale, split, end = 128**-0.5, 700, 1100
    calls = [
        (slice(0, end), slice(0, split), Segments((0, end), (0, split), False)),
        (slice(0, end), slice(split, end), Segments((0, end), (0, end - split), False)),
    ]
    total = SoftmaxSum(x["q"], 128)
    for q, k, segments in calls:
        rows = Rows(_intervals(torch.tensor([q.start, q.stop]).numpy()))
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
