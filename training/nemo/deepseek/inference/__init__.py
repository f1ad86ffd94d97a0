"""Decoding: the latent cache, sampling, generation."""
