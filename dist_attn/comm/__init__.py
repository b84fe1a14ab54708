"""Moving tensors between the ranks of a group, and counting what was moved."""
