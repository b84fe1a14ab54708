"""Tests: unit (no process group), distributed (gloo ranks), gpu and multigpu, e2e."""
