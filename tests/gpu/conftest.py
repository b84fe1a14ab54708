"""What tests on a GPU share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from dist_attn.training.runtime import Runtime


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A process group of this process, for several runs one after another."""
    before = dict(os.environ)
    # DeepSpeed reads its rank from here.
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    path = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("nccl", init_method=f"file://{path}", rank=0, world_size=1)
    yield Runtime(0, 1, 0, 1, device)
    dist.destroy_process_group()
    os.environ.clear()
    os.environ |= before
