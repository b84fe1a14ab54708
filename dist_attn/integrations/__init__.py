"""The only files that import transformers, megatron.core or deepspeed."""

import logging
import warnings


def _says_something(record: logging.LogRecord) -> bool:
    """Whether a line of DeepSpeed is more than its greeting on machines without a GPU."""
    return "Setting accelerator to CPU" not in record.getMessage()


# Before any of them is imported: they log at import.
logging.getLogger("DeepSpeed").addFilter(_says_something)
# DeepSpeed calls collectives by names that torch has renamed.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
