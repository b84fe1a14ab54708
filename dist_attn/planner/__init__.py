"""Which ranks work on which documents of a batch: cluster, cost model, program, plan, preview.

Nothing here imports torch, so that a plan is solved in a light process beside the training step.
"""
