"""The training step, the optimiser and its schedule."""
