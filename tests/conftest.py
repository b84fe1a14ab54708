"""How tests run: Triton's interpreter where no GPU is, one thread, and workers side by side.

`make test` lets two workers share the tests. Tests in ranks stay on one of them, which keeps its
ranks from test to test, whole runs on one of them, perhaps the other; everything else goes file by
file to whichever worker is free.
"""

import os
from typing import Any

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # chosen before the import of kernels

# More would wait for each other: workers, ranks and a run's own processes share few cores.
torch.set_num_threads(1)

# How long an example takes is the machine's business; pytest's timeout ends what hangs.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

#: Folders that a worker takes as a whole.
TOGETHER = {"distributed": "ranks", "gpu": "ranks", "multigpu": "ranks", "e2e": "runs"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return worker_group(nodeid)

    return ByFile(config, log)


def worker_group(nodeid: str) -> str:
    """What a worker takes as a whole: a file, or everything that shares ranks, or whole runs."""
    file = nodeid.partition("::")[0]
    return next((TOGETHER[part] for part in file.split("/") if part in TOGETHER), file)
