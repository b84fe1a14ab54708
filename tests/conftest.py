"""How tests run: Triton's interpreter where no GPU is, one thread, and workers side by side.

`make test` lets two workers share the tests. Tests in ranks stay on one of them, which keeps its
ranks from test to test; everything else goes file by file to whichever worker is free.
"""

import os
from pathlib import Path

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

TESTS = Path(__file__).parent
IN_RANKS = ("distributed", "e2e", "gpu", "multigpu")


@pytest.hookimpl(tryfirst=True)  # before workers write the groups into the names of tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            folder, *rest = item.path.relative_to(TESTS).parts
            group = "ranks" if folder in IN_RANKS else "/".join((folder, *rest))
            item.add_marker(pytest.mark.xdist_group(group))
