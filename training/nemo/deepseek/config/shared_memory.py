"""How much memory the CPU ranks of one machine share, to exchange through."""

from __future__ import annotations

REGION_BYTES = 16 << 20
"""What a rank can write before the others read it, at most. Each time all wait for the slowest."""
GROUP_BYTES = 64 << 20
"""What all regions of a group take, about, however many ranks it has."""
ALIGNMENT = 4096
"""Regions begin on pages."""
HALVES = 2
"""Regions of each rank, used in turn: one is written while the other may still be read."""


def region_bytes(ranks: int) -> int:
    """Of each region of a group of so many."""
    return min(REGION_BYTES, GROUP_BYTES // (HALVES * ranks) // ALIGNMENT * ALIGNMENT)
