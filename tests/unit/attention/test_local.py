"""Attention of one rank, without torch.distributed."""

import pytest
import torch

from dist_attn.attention import attention, explain_kernel, tile_step
from dist_attn.groups import single_rank_group
from dist_attn.layout import make_layout
from dist_attn.masks import Causal, Window
from tests.attention_cases import NAMES, Case, assert_as_good_as_torch, dense_mask, error, exact
from tests.mask_zoo import NUM_HEADS, SEQ_LEN, zoo

CASE = Case((SEQ_LEN,), NUM_HEADS, 2)


def attend(mask, case=CASE, **kwargs):
    x = case.tensors()
    for name in "qkv":
        x[name].requires_grad_()
    out = attention(
        x["q"], x["k"], x["v"], mask=mask, layout=make_layout("contiguous", [0, case.seq_len], 1),
        group=single_rank_group(), strategy="local", **kwargs,
    )  # fmt: skip
    out.backward(x["dout"])
    return {"out": out.detach(), **{f"d{n}": x[n].grad for n in "qkv"}}


@pytest.mark.parametrize("name", zoo())
@pytest.mark.parametrize("kept", [False, True])
def test_every_mask_on_tiles(name, kept, monkeypatch):
    monkeypatch.setattr(tile_step, "TILE", 16)
    if not kept:
        monkeypatch.setattr(tile_step, "MAX_KEPT_SCORES", 0)
    mask = zoo()[name]
    assert_as_good_as_torch(attend(mask), CASE, dense_mask(mask, CASE))


def test_the_control_is_far_outside():
    got, want = attend(Causal()), exact(CASE, dense_mask(zoo()["s2"], CASE))
    assert all(error(got[n], want[n]) > 0.1 for n in NAMES)


def test_the_scale_is_obeyed():
    case = Case((20,), dtype=torch.float64)
    doubled = Case((20,), dtype=torch.float64, scale_of_q=2.0)
    scaled = attend(Causal(), case, softmax_scale=2 * case.head_dim**-0.5)
    torch.testing.assert_close(scaled["out"], attend(Causal(), doubled)["out"])
    assert not torch.allclose(scaled["out"], attend(Causal(), case)["out"])


@pytest.mark.parametrize(
    ("mask", "device", "dtype", "says"),
    [
        (Causal(), "cpu", torch.float32, "'cpu_flash' (cuda runs on cuda, not on cpu)"),
        (Window(3, 0), "cpu", torch.float32, "slow (block-sparse kernels run on cuda, not on cpu)"),
        (Window(3, 0), "cuda", torch.bfloat16, "block-sparse kernels; the dense ones"),
        (Window(3, 0), "cuda", torch.float64, "not torch.float64"),
    ],
)
def test_the_choice_of_kernels_is_explained(mask, device, dtype, says):
    assert says in explain_kernel(mask, 10, torch.device(device), dtype, 64)
