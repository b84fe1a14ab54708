"""The choice of a dense kernel: by capability, and on CUDA by what a plan costs."""

import itertools
import timeit

import pytest
import torch

from dist_attn_kernels import dense_cuda
from dist_attn_kernels.dense import (
    CpuFlashBackend,
    CudaBackend,
    ReferenceBackend,
    Saved,
    Segments,
    choose_backend,
    cpu_kernel_groups_heads,
)
from dist_attn_kernels.dense_cuda import active_flash
from dist_attn_kernels.dense_lists import ListsBackend, key_intervals

NO_LISTS = {"block_sparse": "no Hopper"}


class Recorder(ReferenceBackend):
    """Computes, and notes the lengths it was given."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def forward(self, q_LHD, k_LKD, v_LKD, segments, softmax_scale):
        self.lengths += [q.stop - q.start for q, _ in segments]
        return super().forward(q_LHD, k_LKD, v_LKD, segments, softmax_scale)


def test_the_cpu_kernel_is_chosen_and_the_cuda_one_refused_with_a_reason():
    choice = choose_backend(torch.device("cpu"), torch.bfloat16, 64)
    assert choice.backend.name == "cpu_flash"
    assert choice.refused == {"cuda": "runs on cuda, not on cpu"}


def test_integers_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        choose_backend(torch.device("cpu"), torch.int64, 64)


def test_long_segments_go_to_cudnn_once_they_have_paid_for_its_plan():
    cuda = CudaBackend(NO_LISTS)
    cuda.cudnn, cuda.flash = Recorder(), Recorder()
    cuda.plan_scores = 2 * 1100 * 1100 * 2
    cu = (0, 30, 1130, 2230, 2250)
    segments = Segments(cu, cu, False)
    q, k = torch.randn(2250, 2, 4), torch.randn(2250, 2, 4)
    outs = [cuda.forward(q, k, k, segments, 0.5) for _ in range(2)]
    # The second segment of 1100 has paid; in the second call both go there.
    assert cuda.flash.lengths == [30, 1100, 20, 30, 20]
    assert cuda.cudnn.lengths == [1100, 1100, 1100]
    want = ReferenceBackend().forward(q, k, k, segments, 0.5)
    for got in outs:
        torch.testing.assert_close(got, want)


def test_refused_cudnn_is_never_used():
    cuda = CudaBackend(NO_LISTS | {"cudnn": "too old a device"})
    cuda.flash = Recorder()
    cuda.plan_scores = 1
    q = torch.randn(1500, 1, 4)
    cuda.forward(q, q, q, Segments((0, 1500), (0, 1500), True), 0.5)
    assert cuda.flash.lengths == [1500]


def test_a_call_goes_to_the_lists_once_it_has_paid_for_them():
    cuda = CudaBackend({"cudnn": "not here"})
    cuda.lists, cuda.flash = Recorder(), Recorder()
    cu = (0, 30, 100)
    segments, others = Segments(cu, cu, True), Segments(cu, cu, True)
    scores = 30 * 31 // 2 + 70 * 71 // 2
    assert segments.num_scores == scores
    cuda.list_scores = 2 * 3 * scores
    q, k = torch.randn(100, 3, 4), torch.randn(100, 3, 4)
    outs = [cuda.forward(q, k, k, segments, 0.5) for _ in range(3)]
    assert (cuda.flash.lengths, cuda.lists.lengths) == ([30, 70], [30, 70] * 2)
    for got in outs[1:]:
        torch.testing.assert_close(got, outs[0])
    # Lists are a call's own; a backward may take what a forward of another backend left.
    cuda.forward(q, k, k, others, 0.5)
    assert cuda.flash.lengths == [30, 70] * 2
    saved = Saved(q, q, k, k, *outs[0])
    grads = cuda.backward(saved, segments, 0.5, True)
    torch.testing.assert_close(grads, ReferenceBackend().backward(saved, segments, 0.5, True))


@pytest.mark.parametrize(
    ("change", "cu", "says"),
    [
        ({}, (0, 40), None),
        ({"refused": NO_LISTS}, (0, 40), "no Hopper"),
        ({"list_scores": 10**6}, (0, 40), "lists pay from 1.0e+06 scores"),
        ({"max_list_scores": 100}, (0, 40), "would be large"),
        ({}, (0, 0), "nothing to compute"),
    ],
)
def test_the_refusal_of_lists_is_explained(change, cu, says):
    cuda = CudaBackend({})
    cuda.list_scores = 1
    for name, value in change.items():
        setattr(cuda, name, value)
    got = cuda.why_not_lists(Segments(cu, cu, True), 2)
    assert (got is None) if says is None else (says in got)


def test_an_activated_flash_attention_goes_first(monkeypatch):
    cuda = CudaBackend({})
    cuda.list_scores = 1
    monkeypatch.setattr(dense_cuda, "active_flash", lambda: "FA4")
    assert "flash attention is FA4" in cuda.why_not_lists(Segments((0, 40), (0, 40), True), 2)
    assert active_flash() is None


@pytest.mark.parametrize("with_lists", [True, False])
def test_choosing_takes_less_than_20_microseconds(with_lists):
    cuda = CudaBackend({} if with_lists else NO_LISTS)
    cuda.list_scores = 1
    cu = tuple(range(0, 33 * 2000, 2000))
    segments, device = Segments(cu, cu, True), torch.device("cpu")

    def choose():
        choose_backend(device, torch.bfloat16, 128)
        assert cuda.why_not_flash4(segments, 4)
        return cuda._runs(segments, 32, False)

    assert choose()[0][0] is (cuda.lists if with_lists else cuda.flash)
    # The fastest of many: other processes run beside the tests.
    assert min(timeit.repeat(choose, number=20, repeat=50)) / 20 < 20e-6


def test_key_intervals_of_segments():
    causal = key_intervals(Segments((0, 2, 2, 5), (0, 2, 2, 5), True), torch.device("cpu"))
    assert causal.tolist() == [[[0, 0, 2, 2, 2], [1, 2, 3, 4, 5]]]
    full = key_intervals(Segments((0, 2, 3), (0, 4, 4), False), torch.device("cpu"))
    assert full.tolist() == [[[0, 0, 4], [4, 4, 4]]]


@pytest.mark.parametrize("causal", [True, False])
def test_lists_of_segments(causal):
    """The Triton kernels on the same lists, in the interpreter or on a GPU without Hopper's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    cu_q, cu_k = ((0, 3, 3, 150), (0, 3, 3, 150)) if causal else ((0, 3, 9, 150), (0, 70, 70, 170))
    segments = Segments(cu_q, cu_k, causal)
    q, dout = (torch.randn(150, 4, 16, generator=generator).to(device) for _ in range(2))
    k, v = (torch.randn(cu_k[-1], 2, 16, generator=generator).to(device) for _ in range(2))
    results = []
    for b in (ListsBackend(), ReferenceBackend()):
        # Rows of another stride are copied.
        out, lse = b.forward(q.transpose(0, 1).contiguous().transpose(0, 1), k, v, segments, 0.5)
        saved = Saved(dout, q, k, v, out, lse)
        results.append((out, lse, *b.backward(saved, segments, 0.5, False)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    lists = segments.kept["lists", q.device]
    assert ListsBackend().lists(segments, q.device) is lists


@pytest.mark.parametrize("groups_heads", sorted({False, cpu_kernel_groups_heads()}))
def test_the_cpu_kernel_reads_the_right_heads(groups_heads):
    backend = CpuFlashBackend(groups_heads)
    generator = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(9, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(7, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    segments = Segments((0, 4, 9), (0, 5, 7), False)
    results = []
    for b in (backend, ReferenceBackend()):
        out, lse = b.forward(q, k, v, segments, 0.5)
        saved = Saved(dout, q, k, v, out, lse)
        results.append((out, lse, *b.backward(saved, segments, 0.5, False)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("lengths", "deterministic", "taken_by"),
    [((1100,), False, "cudnn"), ((1100, 1200), False, "cudnn"), ((1100, 30), False, "lists"),
     ((1100,), True, "lists")],
)  # fmt: skip
def test_the_backward_of_long_segments_goes_to_cudnn(lengths, deterministic, taken_by):
    cuda = CudaBackend({})
    cuda.lists, cuda.cudnn, cuda.flash = (RecorderOfBackwards() for _ in range(3))
    cuda.list_scores, cuda.plan_scores, cuda.long_tokens = 0, 0, 1024
    cu = (0, *itertools.accumulate(lengths))
    segments = Segments(cu, cu, False)
    q, k = torch.randn(cu[-1], 2, 4), torch.randn(cu[-1], 1, 4)
    out, lse = ReferenceBackend().forward(q, k, k, segments, 0.5)
    saved = Saved(torch.randn_like(out), q, k, k, out, lse)
    got = cuda.backward(saved, segments, 0.5, deterministic)
    assert getattr(cuda, taken_by).num_backwards == 1
    assert sum(b.num_backwards for b in (cuda.lists, cuda.cudnn, cuda.flash)) == 1
    want = ReferenceBackend().backward(saved, segments, 0.5, False)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


class RecorderOfBackwards(ReferenceBackend):
    """Computes, and counts the backwards that it was asked for."""

    num_backwards = 0

    def backward(self, saved, segments, softmax_scale, deterministic):
        self.num_backwards += 1
        return super().backward(saved, segments, softmax_scale, deterministic)
