"""Who turns text into ids: the ``tokenizers`` library, or a few lines for plain bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from deepseek.config.errors import UserError


class Backend(Protocol):
    """Who turns text into ids."""

    def encode(self, texts: Sequence[str], parse_special: bool) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class HuggingFaceBackend:
    """Encodes with the ``tokenizers`` library."""

    def __init__(self, source: str, origin: str) -> None:
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError as error:
            raise UserError(
                f"{origin} needs the tokenizers library; pip install tokenizers"
            ) from error
        try:
            self._loaded = Loaded.from_str(source)
        except Exception as error:
            raise UserError(
                f"{origin} cannot be read by this version of tokenizers ({error}); "
                "pip install -U tokenizers, or give a tokenizer.json of a known model"
            ) from error
        self._loaded.no_truncation()
        self._loaded.no_padding()

    def encode(self, texts: Sequence[str], parse_special: bool) -> list[list[int]]:
        self._loaded.encode_special_tokens = not parse_special
        encoded = self._loaded.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return self._loaded.decode(list(ids), skip_special_tokens=False)


class ByteBackend:
    """Encodes bytes one by one; the twin of ``HuggingFaceBackend`` for a vocabulary of bytes."""

    def __init__(self, vocab: dict[str, int], added: dict[str, int]) -> None:
        self._ids = [vocab[character] for character in byte_characters()]
        self._added = added
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(longest_first)})") if added else None

    def encode(self, texts: Sequence[str], parse_special: bool) -> list[list[int]]:
        return [list(self._encode(text, parse_special)) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        raise AssertionError("a byte vocabulary is decoded by its table")

    def _encode(self, text: str, parse_special: bool) -> Iterator[int]:
        parts = self._pattern.split(text) if parse_special and self._pattern else [text]
        for part in parts:
            if parse_special and part in self._added:
                yield self._added[part]
            else:
                yield from map(self._ids.__getitem__, part.encode())


def tokenizers_installed() -> bool:
    """Whether the ``tokenizers`` library can be imported."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        return False
    return True


def is_bytes_only(parsed: dict[str, Any]) -> bool:
    """True if the vocabulary is the 256 bytes, so that nothing is left for a library to do."""
    model = parsed["model"]
    return (
        model.get("type") == "BPE"
        and not model.get("merges")
        and not parsed.get("normalizer")
        and set(model["vocab"]) == set(byte_characters())
    )


def byte_characters() -> list[str]:
    """The printable character that byte-level vocabularies write for each byte, [256] (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters, others = [], 0
    for value in range(256):
        if value in printable:
            characters.append(chr(value))
        else:
            characters.append(chr(256 + others))
            others += 1
    return characters
