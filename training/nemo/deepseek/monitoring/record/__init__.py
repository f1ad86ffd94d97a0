"""Callbacks that measure a run and write its log."""
