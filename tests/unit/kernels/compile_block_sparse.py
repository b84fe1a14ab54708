"""Compile the block-sparse kernels for a GPU that is not there; run as a program by its test.

    python compile_block_sparse.py 80|90

Ampere gets the Triton kernels, Hopper those in Gluon. Prints one line a kernel: name, whether
items are pairs of blocks, matrix unit, shared memory, what the assembler complains of.
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dist_attn_kernels import block_sparse, rules
from dist_attn_kernels.lists import BlockLists, build_lists, num_blocks


class NoDevice:
    """As much of a driver as compilation asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def report(kernel: JITFunction, arch: int, args: tuple, names: dict[str, Any]) -> None:
    """Compile as a launch would and say what the assembler has against it."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        made = kernel.warmup(*args, grid=(1,), **names)
        made = made.result() if hasattr(made, "result") else made
    ptx, log = made.asm["ptx"], said.getvalue()
    # Without the assembler's log there would be no complaints.
    assert f"for 'sm_{arch}" in log, log
    complaints = [line.split(":")[1].strip() for line in log.splitlines() if "(C75" in line]
    unit = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "none"
    items = "single" if names.get("NARROW") else "pairs"
    sys.stdout.write(f"{kernel.__name__} {items} {unit} {made.metadata.shared} {complaints}\n")


def main() -> None:
    arch = int(sys.argv[1])
    knobs.nvidia.dump_ptxas_log = True
    driver.set_active(NoDevice(arch))
    JITFunction.__getitem__ = lambda self, grid: lambda *a, **k: report(self, arch, a, k)  # type: ignore[method-assign]
    launch = {"num_warps": 8, "num_stages": 2}
    block_sparse._launch = lambda call, q, kind: launch  # type: ignore[assignment]
    for tiles in (
        rules.s2_tiles(2048, 2, local_blocks=8, stride_blocks=4),
        rules.random_tiles(900, 2, density=0.1, block=64, generator=torch.Generator()),
    ):
        compile_all(build_lists(tiles), arch)


def compile_all(lists: BlockLists, arch: int) -> None:
    """Compile the kernels of a GPU's generation as these lists would launch them."""
    dim, length = 128, lists.q_len
    q, k, v, out = (torch.zeros(length, 2, dim, dtype=torch.bfloat16) for _ in range(4))
    lse = torch.zeros(2, length)
    call = block_sparse._Call(2, 2, dim, dim**-0.5, hopper=False)
    if arch == 90:
        from dist_attn_kernels import block_sparse_hopper as forward
        from dist_attn_kernels import block_sparse_hopper_dkv as dkv
        from dist_attn_kernels import block_sparse_hopper_dq as dq

        for module in (forward, dkv, dq):
            module.num_multiprocessors = lambda index: 132
        forward.forward((q, k, v), (out, lse), lists, call.scale)
        stats = torch.zeros(2, 2, num_blocks(length) * 64)
        tensors = (q, k, v, out, stats[0], stats[1])
        dkv.key_gradients(tensors, k, v, lists, call.scale)
        dq.query_gradient(tensors, q, lists, call.scale)
    elif lists.narrow is None:
        block_sparse._triton_forward((q, k, v), (out, lse), lists, call)
        block_sparse._triton_backward((q, k, v, out, lse, lse), (q, k, v), lists, call)


if __name__ == "__main__":
    assert triton.__version__
    main()
