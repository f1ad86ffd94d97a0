"""Context parallelism: which tokens a rank has, and what they attend to."""

from __future__ import annotations

import pytest
import torch

from deepseek.config.errors import ConfigError
from deepseek.config.load import load_config
from deepseek.ops.causal_attention import causal_attention
from deepseek.parallel.context import attend_to_whole, in_order, sequence_part


def test_a_rank_has_a_chunk_and_its_counterpart_from_the_end() -> None:
    tokens_BS = torch.arange(24).view(2, 12)
    assert sequence_part(tokens_BS, 0, 3)[0].tolist() == [0, 1, 10, 11]
    assert sequence_part(tokens_BS, 2, 3)[1].tolist() == [16, 17, 18, 19]
    for size in (1, 2, 3, 6):
        whole_BSX = torch.randn(2, 12, 5)
        parts = [sequence_part(whole_BSX, rank, size) for rank in range(size)]
        assert torch.equal(in_order(torch.cat(parts, dim=1), size), whole_BSX)


@pytest.mark.parametrize("isolated", [False, True])
def test_the_attention_of_all_ranks_is_that_of_the_whole_sequence(isolated: bool) -> None:
    q, k, v = (torch.randn(2, 3, 12, dims, dtype=torch.float64) for dims in (6, 6, 4))
    documents_BS = torch.tensor([[0] * 3 + [1] * 9, [4] * 7 + [2] * 5]) if isolated else None
    whole = causal_attention(q, k, v, 0.5, documents_BS).transpose(1, 2)
    parts = []
    for rank in range(3):
        mine = sequence_part(q.transpose(1, 2), rank, 3).transpose(1, 2)
        parts.append(attend_to_whole(rank, 3, mine, k, v, 0.5, documents_BS).transpose(1, 2))
    torch.testing.assert_close(in_order(torch.cat(parts, dim=1), 3), whole)


def test_every_rank_computes_the_same_number_of_scores() -> None:
    size, chunk = 4, 2
    scores = [
        sum(place + 1 for place in sequence_part(torch.arange(16).view(1, 16), rank, size)[0])
        for rank in range(size)
    ]
    # exact but for the triangles inside a chunk, which are alike
    assert {int(number) for number in scores} == {sum(range(1, 17)) // size} and chunk == 16 // 8


def test_what_cannot_be_divided_is_refused() -> None:
    for settings, parts in (
        (
            ["trainer.devices=3"],
            ["3 processes is not a multiple of tensor 1 x pipeline 1 x context 2 = 2"],
        ),
        (
            ["trainer.devices=2", "model.data.seq_length=30"],
            ["2 x 2 chunks", "seq_length=30 is no multiple of 4", "28 or 32", "size 1 ["],
        ),
        (
            ["trainer.devices=8", "model.tensor_model_parallel_size=4", "model.data.seq_length=12"],
            ["2 x 2 chunks and those of a rank over tensor 4", "multiple of 8", "8 or 16"],
        ),
        (
            ["trainer.devices=4", "model.expert_model_parallel_size=8"],
            ["data-parallel x context x tensor ranks = 2 x 2 x 1 = 4"],
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config("deepseek_v3_tiny", ["model.context_parallel_size=2", *settings])
        for part in parts:
            assert part in str(caught.value), settings
