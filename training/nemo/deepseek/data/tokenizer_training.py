"""Tokenizers made here: a byte-level BPE, and one of bytes alone.

PyTorch Lightning is enough for the scripts. So where ``tokenizers`` is not installed the vocabulary
is the 256 bytes, in the same file format, and needs no library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from deepseek.config.errors import UserError
from deepseek.console import complain
from deepseek.data.tokenizer import SPECIAL, Tokenizer, byte_characters, tokenizers_installed


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; numbers are cut into groups of up to three digits, as DeepSeek does.

    The result depends on the texts only, not on threads. It has fewer ids than ``vocab_size`` if
    the texts have no more pairs to merge. Without ``tokenizers`` it complains and is that of bytes.

    Args:
        texts: to count pairs in.
        vocab_size: ids, special tokens included.

    Raises:
        UserError: ``vocab_size`` leaves no room for 256 bytes and the special tokens.
    """
    floor = 256 + len(SPECIAL)
    if vocab_size < floor:
        raise UserError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL)} special tokens "
            f"take {floor}; use at least {floor}"
        )
    if not tokenizers_installed():
        complain(
            f"tokenizers is not installed: every byte becomes a token ({floor} ids, about four "
            "times as many tokens). For a BPE: pip install tokenizers"
        )
        return byte_tokenizer()
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trained

    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return Tokenizer(trained.to_str(pretty=True), {}, "the trained BPE")


def byte_tokenizer() -> Tokenizer:
    """A BPE without merges, made without the library: id = byte, then the special tokens."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = False
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocab = {character: value for value, character in enumerate(byte_characters())}
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [
            {"id": 256 + k, "content": name, **flags, "special": True}
            for k, name in enumerate(SPECIAL)
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    return Tokenizer(json.dumps(content, indent=2, ensure_ascii=False), {}, "the byte tokenizer")
