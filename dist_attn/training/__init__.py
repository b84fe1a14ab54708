"""The training loop and what surrounds it: runtime, plans, checkpoints, metrics, launcher."""
