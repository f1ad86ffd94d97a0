"""Meshes, collectives, and how a single-device model is spread over ranks."""
