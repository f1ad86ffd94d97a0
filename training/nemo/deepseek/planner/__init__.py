"""Arithmetic on a configuration: parameters, FLOPs, memory. No torch here."""
