"""The choice of a dense kernel: by capability, and on CUDA by what a plan costs."""

import pytest
import torch

from dist_attn_kernels.dense import (
    CpuFlashBackend,
    CudaBackend,
    ReferenceBackend,
    Saved,
    Segments,
    choose_backend,
    cpu_kernel_groups_heads,
)


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
    cuda = CudaBackend(None)
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
    cuda = CudaBackend("too old a device")
    cuda.flash = Recorder()
    cuda.plan_scores = 1
    q = torch.randn(1500, 1, 4)
    cuda.forward(q, q, q, Segments((0, 1500), (0, 1500), True), 0.5)
    assert cuda.flash.lengths == [1500]


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
