"""Random numbers and permutations that are functions of integers: nothing to store or restore."""

from __future__ import annotations

_ROUNDS = 4


def permuted(place: int, size: int, *key: int) -> int:
    """Where ``place`` goes in a permutation of ``range(size)`` that ``key`` decides.

    A Feistel network over the next even number of bits, walked until it lands inside (fewer than
    four times on average): no table, however large the data.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix(*key, number, right) & mask)
        place = left << half | right
        if place < size:
            return place


def mix(*numbers: int) -> int:
    """64 random bits that depend on integers only (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state
