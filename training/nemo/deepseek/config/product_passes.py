"""Bytes that one product makes on its way, beside what it is given, keeps for its backward pass and
hands on: copies in FP8 and taken out of it (``ops/fp8_linear.py``), packed rows taken out
(``ops/packed.py``). A plain product makes none.

Of a product of numbers R given, O made and a matrix of W; n: bytes of a number. Line by line what
the functions there hold at a time.
"""

from __future__ import annotations

from typing import NamedTuple

from deepseek.config.weights import UNPACKED_AT_ONCE

_UNPACKS = {"nf4": 9, "fp8": 8}
"""Bytes of a number that is unpacked: its code, if it has one, and two fp32 copies."""
_TILE = 128


class Beside(NamedTuple):
    """Most bytes beside what is given and kept; results are among them."""

    forward: int = 0
    backward: int = 0


class Product(NamedTuple):
    """Numbers, and whether the matrix is a stack of experts."""

    given: int
    made: int
    matrix: int
    stack: bool = False


def in_fp8(product: Product, number: int, trained: bool = True) -> Beside:
    """Both passes of a product of FP8 numbers.

    Args:
        product: its sizes.
        number: bytes of one in the dtype of products.
        trained: the matrix has a gradient.
    """
    given, made, matrix, stack = product
    wide = number * given, number * made, number * matrix
    kept = made + number * made // _TILE  # a gradient in FP8 and its scales
    kept_given = given + number * given // _TILE

    def multiplied(left: int, right: int, result: int) -> int:
        """Numbers taken out, a copy of each side and, meanwhile, two more of one of them."""
        return max(3 * left, left + 3 * right, left + right + result)

    rounded = 2 * wide[2] + matrix  # padded, divided, in FP8
    forward = max(rounded, matrix + multiplied(wide[0], wide[2], wide[1]))
    backward = max(
        rounded,
        matrix + 3 * wide[1],
        matrix + kept + multiplied(wide[1], wide[2], wide[0]),
    )
    if trained:  # beside the gradient of what was given
        by_columns = wide[1] + max(4 * wide[0], wide[0] + wide[2])
        by_rows = kept + max(4 * wide[0], kept_given + multiplied(wide[1], wide[0], wide[2]))
        backward = max(
            backward, matrix + wide[0] + max(3 * wide[1], by_columns if stack else by_rows)
        )
    return Beside(forward, backward)


def of_packed(product: Product, number: int, kind: str) -> Beside:
    """Both passes of a product with a frozen matrix in packed rows, ``kind`` as in the schema."""
    given, made, matrix, _ = product
    unpacking = _UNPACKS[kind] * min(matrix, UNPACKED_AT_ONCE)
    return Beside(*(number * matrix + max(unpacking, number * result) for result in (made, given)))
