"""Distributed long-sequence training: planned context parallelism over block-sparse kernels."""
