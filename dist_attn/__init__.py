"""Distributed long-sequence training: planned context parallelism over local block-sparse kernels."""
