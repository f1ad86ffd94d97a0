"""Batches of documents to ids: in this process, or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import Any

import numpy as np

from deepseek.config.errors import UserError
from deepseek.data.documents import Chunk
from deepseek.data.partial import Batch, Encoded, Partial
from deepseek.data.tokenizer import Tokenizer
from deepseek.data.tokenizer_files import load_tokenizer

Around = tuple[list[int], list[int]]
"""Ids before and after every document."""


def encoded_here(
    batches: Iterable[Batch], tokenizer: Tokenizer, dtype: np.dtype, around: Around
) -> Iterator[tuple[Batch, Encoded]]:
    """Batches in order with their ids."""
    for batch in batches:
        yield batch, _encode(tokenizer, batch.parts, dtype.str, around)


def encoded_by_workers(
    batches: Iterable[Batch], partial: Partial, dtype: np.dtype, around: Around, workers: int
) -> Iterator[tuple[Batch, Encoded]]:
    """The same, computed by ``workers`` processes."""
    folder = str(partial.tokenizer_folder)
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    # spawn: a fork would copy the locks of other threads in whatever state they are.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        for batch in batches:
            task = (folder, batch.parts, dtype.str, around)
            waiting.append((batch, pool.submit(_encode_in_worker, *task)))
            if len(waiting) > 2 * workers:
                first, job = waiting.popleft()
                yield first, job.result()
        while waiting:
            first, job = waiting.popleft()
            yield first, job.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"{partial.prefix}: a worker process died (out of memory?); run again, it goes on "
            f"from where it is; fewer than {workers} workers need less memory"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode(tokenizer: Tokenizer, parts: list[Chunk], dtype: str, around: Around) -> Encoded:
    counts, arrays = [], []
    for part, ids in zip(parts, tokenizer.encode_chunks(parts), strict=True):
        if part.text and not part.before:  # the first of its document
            ids = around[0] + ids
        if part.last and part.text:
            ids = ids + around[1]
        counts.append(len(ids))
        arrays.append(np.array(ids, dtype))
    joined = np.concatenate(arrays) if arrays else np.array([], dtype)
    text_bytes = sum(len(part.text.encode()) for part in parts)
    return Encoded(joined.tobytes(), counts, text_bytes, int(joined.max(initial=0)))


def _encode_in_worker(folder: str, *arguments: Any) -> Encoded:
    return _encode(_worker_tokenizer(folder), *arguments)


@lru_cache(1)
def _worker_tokenizer(folder: str) -> Tokenizer:
    return load_tokenizer(folder)


def _start_worker() -> None:
    """In a worker: one thread, no Ctrl-C of its own, and no life after its parent's."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
