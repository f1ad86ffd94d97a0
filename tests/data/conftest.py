"""Small tokenizers and datasets for the tests of the data package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from deepseek.data.indexed import IndexedDataset, IndexedWriter
from deepseek.data.tokenizer import Tokenizer
from deepseek.data.tokenizer_training import byte_tokenizer, train_bpe
from support.sample_texts import TEXTS


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return train_bpe(TEXTS * 3, 400)


@pytest.fixture(scope="session")
def byte() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., IndexedDataset]:
    """Write documents and open them."""

    def make(
        documents: Sequence[Sequence[int]], name: str = "data", dtype: str = "uint16"
    ) -> IndexedDataset:
        with IndexedWriter(tmp_path / name, np.dtype(dtype)) as writer:
            for document in documents:
                writer.add_document(document)
        return IndexedDataset(tmp_path / name)

    return make
