"""The only files that import transformers, megatron.core or deepspeed."""
