"""Callbacks, one concern each: what a run writes and shows."""
