"""Checkpoints: the weights and state of a run, and how other projects name them."""
