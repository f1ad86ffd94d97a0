"""How long torch's own products take in the shapes of a step: what a machine's library makes of it.

Every product that the model needs, forward and both gradients: of a matrix with rows of tokens
(``x w^T``, ``dy w``, ``dy^T x``) by ``torch.mm``; of a stack of experts one ``torch.mm`` each, with
the rows that this expert has; of attention's scores and the sums that they weigh by ``torch.bmm``
over heads, at half of its time, since a causal model needs half of them. The head goes chunk by
chunk, as in the step. Results lie in memory that is there already, and matrices of different layers
take turns, so that they come from where they come from in a step. What a step does besides, such as
padding, recomputation, or adding gradients up, is not in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from cases import Case
from torch import Tensor

from deepseek.config.cost import CHUNK_TOKENS
from deepseek.models.transformer import Transformer

DENSE, EXPERTS, ATTENTION = "dense products", "routed experts", "attention"
TRIES = 2
"""Of which the better one counts."""
ROOM = 1 << 30
"""Bytes of operands that take turns."""

Work = Callable[[], None]


@dataclass(frozen=True)
class Matrices:
    """Of one shape, each with its rows; one matrix, or a stack of experts."""

    component: str
    rows: tuple[tuple[int, ...], ...]
    """Of each layer, of each expert."""
    outputs: int
    inputs: int

    @property
    def flop(self) -> float:
        """Forward and backward."""
        return 6.0 * sum(map(sum, self.rows)) * self.outputs * self.inputs

    @property
    def numbers(self) -> int:
        """Of one layer's operands and results."""
        rows, experts = max(map(sum, self.rows)), len(self.rows[0])
        return 2 * (rows * (self.outputs + self.inputs) + experts * self.outputs * self.inputs)

    def passes(self, rows: tuple[int, ...], dtype: torch.dtype) -> Iterator[Work]:
        """Forward, gradient of the rows, gradient of the matrices: of one layer."""
        total, shape = sum(rows), (len(rows), self.outputs, self.inputs)
        x, y, by_x, by_y = (
            [part for part in torch.ones(total, width, dtype=dtype).split(rows) if len(part)]
            for width in (self.inputs, self.outputs, self.inputs, self.outputs)
        )
        used = [expert for expert, count in enumerate(rows) if count]
        w, by_w = ([t[e] for e in used] for t in torch.ones(2, *shape, dtype=dtype).unbind())
        yield _each(torch.mm, x, [m.t() for m in w], y)
        yield _each(torch.mm, by_y, w, by_x)
        yield _each(torch.mm, [part.t() for part in by_y], x, by_w)


@dataclass(frozen=True)
class Heads:
    """Of attention: scores and their weighted sums, of all layers."""

    layers: int
    heads: int
    """Of all sequences."""
    length: int
    key: int
    value: int
    component: str = ATTENTION

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Of each layer."""
        return ((self.heads * self.length,),) * self.layers

    @property
    def flop(self) -> float:
        """Forward and backward, of the half that is needed."""
        return 3.0 * self.layers * self.heads * self.length**2 * (self.key + self.value)

    @property
    def numbers(self) -> int:
        """Of one layer's operands and results."""
        return self.heads * self.length * (2 * self.length + 4 * self.key + 3 * self.value)

    def passes(self, rows: tuple[int, ...], dtype: torch.dtype) -> Iterator[Work]:
        """Both products, and the two gradients of each."""
        sizes = self.heads, self.length
        q, k, by_q, by_k = torch.ones(4, *sizes, self.key, dtype=dtype).unbind()
        v, y, by_v = torch.ones(3, *sizes, self.value, dtype=dtype).unbind()
        p, by_p = torch.ones(2, *sizes, self.length, dtype=dtype).unbind()
        products = [(q, k.mT, p), (p, v, y)]
        products += [(y, v.mT, by_p), (p.mT, y, by_v), (by_p, k, by_q), (by_p.mT, q, by_k)]
        for a, b, out in products:
            yield _each(torch.bmm, [a], [b], [out])


def _each(
    product: Callable[..., Tensor], a: Sequence[Tensor], b: Sequence[Tensor], out: Sequence[Tensor]
) -> Work:
    together = list(zip(a, b, out, strict=True))

    def run() -> None:
        for x, y, into in together:
            product(x, y, out=into)

    return run


def of_step(case: Case, counts: Sequence[Sequence[int]] | None = None) -> list[Matrices | Heads]:
    """All that a step multiplies.

    Args:
        counts: rows of each expert, of each layer that has experts; None: as many for each.
    """
    model, tokens = case.model, case.batch * case.length
    if counts is None:
        count = tokens * model.num_experts_per_tok // model.n_routed_experts
        counts = [[count] * model.n_routed_experts] * model.num_moe_layers
    chunks = [(min(CHUNK_TOKENS, tokens - at),) for at in range(0, tokens, CHUNK_TOKENS)]
    with torch.device("meta"):
        weights = dict(Transformer(model).named_parameters())
    rows = defaultdict[tuple[str, int, int], list[tuple[int, ...]]](list)
    for name, weight in weights.items():
        if weight.dim() == 3:
            layer = int(name.split(".")[1]) - model.first_k_dense_replace
            rows[EXPERTS, *weight.shape[1:]].append(tuple(counts[layer]))
        elif weight.dim() == 2 and name != "embed.weight":
            rows[DENSE, *weight.shape] += chunks if name == "head.weight" else [(tokens,)]
    heads = Heads(
        model.num_hidden_layers,
        case.batch * model.num_attention_heads,
        case.length,
        model.qk_head_dim,
        model.v_head_dim,
    )
    return [*(Matrices(kind, tuple(mine), *shape) for (kind, *shape), mine in rows.items()), heads]


def seconds(
    products: Sequence[Matrices | Heads], dtype: torch.dtype, clock: Callable[[], float]
) -> dict[str, float]:
    """What the library takes for each component, by this clock."""
    found = dict.fromkeys((DENSE, EXPERTS, ATTENTION), 0.0)
    for each in products:
        found[each.component] += _taken(each, dtype, clock)
    found[ATTENTION] /= 2
    return found


def _taken(each: Matrices | Heads, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Of all layers, of which as many take turns as there is room for."""
    at_once = min(len(each.rows), max(2, ROOM // (each.numbers * dtype.itemsize)))
    layers = [list(each.passes(rows, dtype)) for rows in each.rows[:at_once]]
    took = 0.0
    for turn in zip(*layers, strict=True):
        tries = []
        for _ in range(TRIES + 1):  # the first finds memory and library cold
            begin = clock()
            for work in turn:
                work()
            tries.append(clock() - begin)
        took += min(tries[1:])
    return took * len(each.rows) / at_once
