"""Kernels in C for CPUs, of which every one has a slow twin in PyTorch; ``build.py`` makes them."""
