"""Forward and backward pass of one block, tensor by tensor: the most bytes that exist at a time.

What a block keeps in between is told by ``activations.py``; here is what comes and goes beside it.
The order is that of ``models/components/``, whose frames hold what they have made till they return.

Sizes are bytes of R rows of experts, P slots that these are padded to, T tokens of all TP ranks, D
model, F experts' hidden values.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from deepseek.config.product_passes import Beside


class Most(NamedTuple):
    """Bytes beside what waits: of the block itself its input, or all that it keeps."""

    forward: int
    backward: int
    in_turn: int
    """Of two passes, each of which goes on while the other's rows are under way."""
    till_experts: int
    """Of ``forward``, till experts give back weights that have been gathered."""


class Sizes(NamedTuple):
    """Bytes of the tensors of a block. Where there is no such thing: 0."""

    hidden: int
    """The block's input, output, and their gradients: S/tp tokens."""
    gathered: int
    """The same of all TP ranks; 0: there is one."""
    copied: int
    """Of ``gathered``, what the exchange lays out anew: nothing of a single sequence."""
    attention: int
    """Kept by attention and its norm."""
    heads: int
    """Queries before they are rotated, and rotated parts."""
    head_gradients: int
    """Of queries, keys, values and the result, while attention goes back."""
    norm: int
    """What a norm's backward pass makes, in fp32."""
    between: int
    """Kept by the second norm and the router."""
    wide: int
    """Hidden values of a dense or the shared experts' SwiGLU, one of three."""
    wide_kept: int
    """Kept by it, its input included."""
    wide_matrix: int
    """Gradient of one of its matrices as products make it; 0: none is trained."""
    wide_hidden: int
    """Of ``wide_kept``, what the last product keeps: hidden values, in FP8 where it computes so."""
    attention_matrix: int
    """Such a gradient of attention's last matrix."""
    rows: int
    """R x D."""
    packed: int
    """The same with weights behind the rows, as they travel; 0: they do not."""
    tiled: int
    """The same in FP8, as rows travel to the experts; 0: they do not."""
    pairs: int
    """Rows that travel between machines first, one for each that has experts of a token; 0: none
    do."""
    pairs_packed: int
    """The same as they travel."""
    copies: int
    """What they are added up from: a row for every choice of each."""
    homecoming: int
    """A row for every machine of each token."""
    slots: int
    """P x D."""
    narrow: int
    """P x F."""
    narrow_kept: int
    """Of ``experts_kept``, hidden values: in FP8 where products are, none if frozen."""
    experts_kept: int
    """Kept by the routed experts."""
    matrix: int
    """Gradient of one stack of experts as products make it; 0: none is trained."""
    sent: int
    """Of the experts' gradients, what is on its way to other ranks while attention goes back."""
    adapted: bool
    """Products have adapters beside them: each makes three results."""
    narrow_adapted: bool
    """So has the experts' last one."""
    stays: int
    """Of what waits, what a recomputation is given and does not keep: rows that have arrived."""
    recomputes: bool
    ahead: bool
    """A norm comes after it, as in MTP: for that one's input all is made again, and first."""
    waits: int
    """What waits for the backward pass: all that is kept, or if it recomputes, its share."""
    apart: bool
    """Experts hand their gradients on before the rest of the block goes back."""
    normed: int
    """What a norm gives, where frames alone hold it: products keep it in FP8."""
    slots_held: int
    """Of ``slots``, likewise, what experts are given: in FP8, or frozen."""
    whole_products: bool
    """A recomputation computes the last product too, which keeps what it is given afterwards."""
    wide_inputs: int
    """Of ``wide_kept``, what the first two products keep."""
    experts_inputs: int
    """The same of ``experts_kept``."""
    wide_products: tuple[Beside, Beside]
    """What one of the first two products makes besides, and the last one."""
    experts_products: tuple[Beside, Beside]
    attention_product: Beside
    """Attention's last."""


class _Tape:
    """Bytes that exist, and the most that did."""

    def __init__(self) -> None:
        self.now = self.most = self.till_experts = self._since = 0
        self.legs: list[int] = []
        self.waits: list[int] = []

    def take(self, *sizes: int) -> None:
        self.now += sum(sizes)
        self._note(self.now)

    def give(self, *sizes: int) -> None:
        self.now -= sum(sizes)

    def wait(self, *sizes: int) -> None:
        """For rows, with these taken and given back: there ends a leg of the way."""
        self.brief(*sizes)
        self.legs.append(self._since)
        self.waits.append(self.now + sum(sizes))
        self._since = 0

    def brief(self, *sizes: int) -> None:
        """Taken and given back."""
        self._note(self.now + sum(sizes))

    def end(self) -> None:
        """The last leg's."""
        self.legs.append(self._since)

    def _note(self, size: int) -> None:
        self.most, self._since = max(self.most, size), max(self._since, size)


@lru_cache(maxsize=1 << 14)  # a search over layouts asks for the same thousands of times
def passes(size: Sizes) -> Most:
    """The most of a block's two passes."""
    first = _Tape()
    first.take(size.waits if size.recomputes else 0)
    _forward(first, size, again=False)
    again = _Tape()
    again.take(size.hidden, size.waits)  # the gradient of what it gave
    _backward(again, size)
    first.end()
    again.end()
    return Most(
        first.most - size.waits,
        again.most - size.waits,
        max(_in_turn(first, again) - 2 * size.waits, first.most - size.waits),
        first.till_experts - size.waits,
    )


def _in_turn(forward: _Tape, backward: _Tape) -> int:
    """Of both blocks. The backward pass begins; if both wait as often, they keep step."""
    if len(forward.waits) != len(backward.waits):
        return max(
            forward.most + max(backward.waits, default=0),
            backward.most + max(forward.waits, default=0),
        )
    legs = zip(forward.legs, backward.waits, backward.legs[1:], forward.waits, strict=False)
    return max((max(one + w, other + v) for one, w, other, v in legs), default=0)


def _forward(tape: _Tape, size: Sizes, again: bool) -> None:
    """``again``: a recomputation, which ends with the last tensor that is kept."""
    tape.take(size.attention, size.normed)
    tape.brief(size.heads)
    tape.brief(size.attention_product.forward)
    tape.give(size.normed)
    tape.brief(size.gathered, size.copied, size.hidden)
    tape.take(size.hidden, size.between)  # the sum after attention
    if size.recomputes and not again:  # frames have returned, and nothing else holds it
        tape.give(size.attention, size.between)
        tape.take(size.hidden)  # normed
        normed = 0
    else:
        normed = size.normed
    tape.take(normed)
    if not size.slots:
        _wide_forward(tape, size, results=not again or size.whole_products)
        tape.give(normed)
        return
    # rows on their way, and what is computed meanwhile
    there = size.tiled or size.packed
    if size.pairs:
        tape.take(size.pairs, 2 * size.pairs_packed)
    else:
        tape.take(size.rows)
        tape.brief(3 * size.rows * (size.tiled > 0))  # rounded
        tape.take(2 * there)
    if size.wide:
        _wide_forward(tape, size, results=True)
        tape.take(size.hidden)
    if size.pairs:
        tape.wait()
        tape.give(size.pairs_packed)
        tape.take(size.rows, 2 * there)
    if size.packed:
        tape.wait()
        tape.give(there)
        tape.brief(size.rows)
        if size.tiled:
            _taken_out_of_fp8(tape, size)
            tape.brief(2 * size.rows)  # as it arrived, and sorted
        tape.give(there, size.pairs, size.pairs_packed)
    # experts
    first, last = size.experts_products
    tape.take(size.slots_held)
    tape.brief(size.narrow, size.experts_inputs, first.forward)  # up, beside gate
    tape.take(size.experts_kept)
    held = size.narrow - size.narrow_kept
    tape.take(held)
    tape.brief(size.narrow)  # SiLU of the gate
    stops = again and not size.ahead
    if not stops or size.whole_products:
        tape.brief(size.slots * (3 if size.narrow_adapted and not again else 1))
        tape.brief(last.forward)
    if not stops:
        if not again and size.recomputes:
            tape.give(size.experts_kept)
        tape.take(size.slots)
        tape.take(size.rows)
        tape.till_experts = tape.most
        tape.give(size.slots, size.slots_held, held)
        if size.pairs:
            tape.wait(2 * size.rows)
            tape.brief(3 * size.rows, size.copies, size.pairs)
            tape.wait(2 * size.rows, 2 * size.pairs)
            tape.brief(2 * size.rows, 3 * size.pairs, size.homecoming, size.hidden)
        else:
            tape.wait(2 * size.rows * (size.packed > 0))
            tape.brief((3 if size.packed else 1) * size.rows, size.hidden)
        tape.give(size.rows)
    else:
        tape.give(size.slots_held, held)
    if again:
        tape.give(size.rows, size.hidden, size.hidden if size.wide else 0)
    tape.give(normed)


def _taken_out_of_fp8(tape: _Tape, size: Sizes) -> None:
    """Rows in FP8: their numbers; these, their scales, and what they give, as products take it."""
    tape.brief(size.tiled, 3 * size.rows)


def _wide_forward(tape: _Tape, size: Sizes, results: bool) -> None:
    """``results``: those of the last product are made too."""
    first, last = size.wide_products
    gathered = size.gathered if size.normed else 0
    tape.take(gathered)
    tape.brief(size.wide, size.wide_inputs, first.forward)  # up, beside gate
    tape.take(size.wide_kept)
    held = size.wide - size.wide_hidden
    tape.brief(held, size.wide)  # SiLU of the gate
    if results:
        tape.take(held)
        tape.brief(last.forward)
        _wide_result(tape, size)
        tape.give(held)
    tape.give(gathered)


def _wide_result(tape: _Tape, size: Sizes) -> None:
    results = size.gathered or size.hidden
    tape.brief(results * (3 if size.adapted else 1), size.hidden if size.gathered else 0)
    tape.brief(results, size.copied, size.hidden if size.gathered else 0)


def _backward(tape: _Tape, size: Sizes) -> None:
    if not size.slots:
        _wide_backward(tape, size, recomputes=size.recomputes)
        _attention_backward(tape, size)
        return
    if size.recomputes and size.ahead:
        _again(tape, size)
        tape.take(2 * size.hidden)  # what the norms before it have made, joined
    # results back to the experts
    tape.wait(2 * size.rows)
    if size.tiled:
        tape.brief(4 * size.rows)
        tape.take(size.rows, size.tiled)
        _taken_out_of_fp8(tape, size)
        tape.give(size.rows, size.tiled)
    tape.brief(size.rows, size.slots)
    gradients = size.slots * (2 if size.narrow_adapted else 1)  # an adapter has a scaled one
    tape.take(gradients)
    if size.recomputes and not size.ahead:
        _again(tape, size)
    # last product, SwiGLU, first products
    first, last = size.experts_products
    tape.brief(last.backward)
    tape.take(size.narrow, size.matrix)
    tape.give(gradients, size.narrow_kept)
    tape.brief(4 * size.narrow)
    tape.take(2 * size.narrow)
    tape.give(size.narrow, 2 * size.narrow)  # of hidden values; gate and up
    tape.brief(first.backward)
    tape.brief(size.slots - size.narrow - size.experts_inputs // 2, first.backward)  # the other one
    tape.take(2 * size.slots, 2 * size.matrix)
    tape.give(2 * size.narrow, size.slots, size.experts_kept - 2 * size.narrow - size.narrow_kept)
    # rows back to their tokens, beside the shared experts
    tape.brief(size.rows)
    tape.give(size.slots)
    if size.apart:
        tape.give(3 * size.matrix)
    tape.take(size.rows)
    if size.packed:
        tape.brief(size.rows)
        tape.take(2 * size.packed)
        tape.give(size.rows)
    if size.pairs:
        tape.wait()
        tape.give(size.packed)
        tape.brief(size.rows, size.copies, size.pairs)
        tape.take(size.pairs)
        tape.give(size.packed)
        tape.take(2 * size.pairs_packed)
        tape.give(size.pairs)
    if size.wide:
        _wide_backward(tape, size, recomputes=False)
    if size.packed:
        tape.wait()
    if size.pairs:
        tape.give(size.pairs_packed)
        tape.brief(size.pairs, size.homecoming, size.hidden)
        tape.give(size.pairs_packed)
    elif size.packed:
        tape.give(size.packed)
        tape.brief(size.rows, size.hidden)
        tape.give(size.packed)
    else:
        tape.brief(size.rows, size.hidden)
        tape.give(size.rows)
    _attention_backward(tape, size)


def _again(tape: _Tape, size: Sizes) -> None:
    """All that is kept, but for what waits already."""
    tape.give(size.waits - size.stays)
    _forward(tape, size, again=True)


def _wide_backward(tape: _Tape, size: Sizes, recomputes: bool) -> None:
    if size.gathered:
        tape.brief(size.gathered, size.copied)
    gradient = size.gathered or 0
    tape.take(gradient)
    if recomputes:
        _again(tape, size)
    first, last = size.wide_products
    tape.brief(last.backward)
    tape.take(size.wide, size.wide_matrix)
    tape.give(size.wide_hidden, gradient)
    tape.brief(4 * size.wide)
    tape.take(2 * size.wide)
    tape.give(3 * size.wide)
    results = size.gathered or size.hidden
    tape.brief(first.backward)
    tape.brief(results - size.wide - size.wide_inputs // 2, first.backward)  # the other one
    tape.take(2 * results, 2 * size.wide_matrix)
    tape.give(2 * size.wide, results, size.wide_kept - 2 * size.wide - size.wide_hidden)
    tape.brief(size.copied, size.hidden)
    tape.give(results)


def _attention_backward(tape: _Tape, size: Sizes) -> None:
    """Of the second norm too."""
    tape.brief(size.norm)
    tape.give(size.between)
    tape.take(size.sent)
    tape.brief(size.gathered, size.copied, size.attention_product.backward)
    tape.brief(size.attention_matrix, size.head_gradients)
