"""Without a GPU Triton kernels run in Triton's interpreter, which is chosen before their import."""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes is the machine's business; pytest's timeout ends what hangs.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
