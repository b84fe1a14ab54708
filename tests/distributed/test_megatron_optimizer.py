"""Megatron's own distributed optimizer computes what ours does, and resumes to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_attn.config import OptimizerConfig
from dist_attn.data import open_corpus
from dist_attn.groups import GroupPool
from dist_attn.integrations.hf import build_model
from dist_attn.integrations.megatron_engine import MegatronEngine
from dist_attn.integrations.megatron_shards import DistributedOptimizer
from dist_attn.training.checkpoint import load_checkpoint, save_checkpoint
from dist_attn.training.checkpoint_files import TrainState
from dist_attn.training.regions import regions
from dist_attn.training.step import StepRunner
from tests.distributed.test_megatron import config_of, documents_of, make_plan, runtime_here
from tests.megatron_shim import cuda_is_cpu
from tests.ranks import run_ranks

ADAMW = OptimizerConfig(lr=0.01, eps=1e-4, weight_decay=0.3, gradient_clipping=0.5)


class Training:
    """An engine on three micro-batches of real documents, with either optimizer."""

    def __init__(self, cache: str, degree: int, dtype: str, megatrons_own: bool, seed: int) -> None:
        base = config_of("megatron", cache, degree, dtype=dtype)
        self.config = base.model_copy(update={"optimizer": ADAMW})
        self.corpus = open_corpus(base.data, Path(cache))
        self.ids = documents_of(self.corpus.lengths)[3:]
        model = build_model(base.model, self.corpus.vocab_size, seed=seed)
        self.engine = MegatronEngine(model, self.config, torch.device("cpu"))
        if megatrons_own:
            self.engine._sharding.close()
            self.engine._sharding = DistributedOptimizer(
                self.engine._model, ADAMW, self.engine._groups, bucket_elements=5000
            )
        self.pool = GroupPool()
        self.plan_size = dist.get_world_size() // degree

    def steps(self, count: int) -> list[tuple[float, float]]:
        """Loss and norm of some steps."""
        every = tuple(range(self.plan_size))
        # All but one rank idle in the last micro-batch, behind which gradients are reduced.
        shape = [[every], [(p,) for p in every], [(0,)]]
        lengths = tuple(int(n) for n in self.corpus.lengths[self.ids])
        plan = make_plan(shape, "ring", lengths)
        runner = StepRunner(self.engine, self.corpus, self.config, runtime_here(), self.pool)
        found = []
        for _ in range(count):
            loss = runner.accumulate(plan, self.ids).loss
            found.append((loss, self.engine.step(lr=0.01)))
        return found

    def state(self) -> dict[str, Tensor]:
        """Copies of this rank's part of the state."""
        return {
            f"{f.name}|{f.start}|{key}": tensor.clone()
            for f in self.engine.fragments()
            for key, tensor in f.tensors.items()
        }

    def missing(self) -> int:
        """Elements that no rank would save, or several would."""
        counts: dict[str, Tensor] = {}
        for f in self.engine.fragments():
            whole = counts.setdefault(f.name, torch.zeros(torch.Size(f.shape)))
            if f.owned:
                for part in regions(f.shape, f.start, f.numel, f.run):
                    matrix = whole if whole.dim() > 1 else whole.unsqueeze(0)
                    matrix[part.first_row : part.last_row, part.first_col : part.last_col] += 1
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, counts)
        names = {name for found in everyone for name in found}
        return sum(
            int((sum(found[name] for found in everyone if name in found) != 1).sum())
            for name in names
        )

    def close(self) -> None:
        self.pool.close()
        self.engine.close()


def both(cache: str, degree: int, dtype: str) -> list[list[tuple[float, float]]]:
    found = []
    for megatrons_own in (False, True):
        with cuda_is_cpu():
            training = Training(cache, degree, dtype, megatrons_own, seed=3)
            found.append(training.steps(4))
            training.close()
    return found


def resume(cache: str, folder: str, degree: int, dtype: str) -> list[bool]:
    with cuda_is_cpu():
        first = Training(cache, degree, dtype, True, seed=3)
        first.steps(2)
        state = TrainState(step=2, epoch=0, offset=0, tokens=0, identity={})
        path = save_checkpoint(Path(folder), first.engine, state, runtime_here(), keep=1)
        losses = first.steps(2)
        expected = first.state()
        complete = first.missing() == 0
        first.close()

        second = Training(cache, degree, dtype, True, seed=4)
        fresh = second.state()
        load_checkpoint(path, second.engine, runtime_here())
        same = second.steps(2) == losses
        found = second.state()
        second.close()
    return [
        same and complete and expected.keys() == found.keys(),
        all(torch.equal(expected[k], found[k]) for k in expected),
        # The control: another seed's weights are others.
        not any(torch.equal(expected[k], fresh[k]) for k in expected if "proj.weight" in k),
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("corpus"))


CASES: list[Any] = [(1, 4, "fp32"), (2, 4, "fp32"), (2, 4, "bf16")]


@pytest.mark.parametrize(("degree", "ranks", "dtype"), CASES)
def test_same_losses_and_norms_as_ours(cache: str, degree: int, ranks: int, dtype: str) -> None:
    tolerance = 1e-5 if dtype == "fp32" else 2e-3
    for ours, megatrons in run_ranks(both, ranks, cache, degree, dtype):
        for a, b in zip(ours, megatrons, strict=True):
            assert b == pytest.approx(a, rel=tolerance)
        # The controls: the norm was above the limit, and the steps moved the loss.
        assert ours[0][1] > 2 * ADAMW.gradient_clipping
        assert ours[0][0] - ours[-1][0] > 0.05


@pytest.mark.parametrize(("degree", "ranks", "dtype"), CASES[1:])
def test_resumes_bit_for_bit(
    cache: str, tmp_path: Path, degree: int, ranks: int, dtype: str
) -> None:
    assert run_ranks(resume, ranks, cache, str(tmp_path), degree, dtype) == [[True] * 3] * ranks
