"""The documents in a file: text, JSON lines or parquet, each also compressed, in constant memory.

Long texts come in several chunks. They are cut where nothing joins: where byte-level tokenizers
never do, and for others where the tokenizer says so. What is around a cut goes with the chunk, so
that a tokenizer whose ids depend on it gives those of the whole text.
"""

from __future__ import annotations

import bz2
import codecs
import difflib
import hashlib
import json
import lzma
import shlex
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from deepseek.config.errors import UserError
from deepseek.data.corpus import Source
from deepseek.files import megabytes

CHUNK = 1 << 20
"""Characters after which a text is cut into another chunk."""
CONTEXT = 64
"""Characters before and after a chunk that go with it."""
_BLOCK = 1 << 20
_ZST_BITE = 1 << 11
"""Bytes of a .zst file unpacked at once: four of them may hold 128 kB."""
_TRIES = 256
"""Places in a window at which a tokenizer is asked: they all may be refused."""
_XZ_MEMORY = 1 << 30
"""Bytes that unpacking may take: the strongest level of xz takes 65 MB, its option -e no more."""
_LONGEST = 1 << 26
"""Bytes in a line, and characters in a chunk: what a small file that unpacks to gigabytes may
take."""

Apart = Callable[[str, str], bool]
"""Whether a tokenizer joins nothing between the characters before a place and those after it."""


class Chunk(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    last: bool
    """Nothing of the document follows."""
    position: int
    """Bytes of the file consumed, for progress."""
    before: str = ""
    """The ``CONTEXT`` characters of the document before it."""
    after: str = ""
    """The same after it."""


def chunks(
    source: Source,
    json_key: str = "text",
    digest: hashlib._Hash | None = None,
    apart: Apart | None = None,
) -> Iterator[Chunk]:
    """Stream the documents of a file; an empty document is one empty chunk.

    Args:
        source: the file.
        json_key: the key of a JSON line, or the column of a parquet file, that holds the text.
        digest: updated with every byte of the file.
        apart: where the tokenizer allows a cut; None: where byte-level ones do.

    Raises:
        UserError: not UTF-8, not JSON, no such key, damaged or truncated compression, a library
            missing, the file changed while it was read; with file, and line or byte.
    """
    if source.kind == "parquet":
        yield from _parquet_chunks(source, json_key, digest, apart)
    else:
        blocks = _blocks(source, digest)
        if source.kind == "jsonl":
            yield from _jsonl_chunks(source, blocks, json_key, apart)
        else:
            yield from _text_chunks(source, blocks, apart)
    _refuse_change(source)


def cut(text: str, final: bool, limit: int, apart: Apart | None = None) -> tuple[list[str], str]:
    """Cut a text into chunks of about ``limit`` characters.

    Cuts lie after a newline, or else before a space, between visible characters: places where
    byte-level tokenizers never join, so the ids are those of the whole text. With ``apart`` it
    decides about each of them. A text without such a place is cut after 16 times the limit, with
    ``apart`` never.

    Args:
        text: what is known of the document.
        final: nothing follows; else no cut lies in the last ``CONTEXT`` characters.
        limit: characters.
        apart: whether the tokenizer allows a cut.

    Returns:
        The chunks, and the rest that is not yet one, "" with ``final``.
    """
    found = []
    start = window = 0
    while len(text) > window + limit + (0 if final else CONTEXT):
        place = _cut_place(text, start, window, window + limit, apart)
        window += limit
        if place is None and apart is None and window == start + 16 * limit:
            place = window
        if place is not None:
            found.append(text[start:place])
            start = window = place
    rest = text[start:]
    return ([*found, rest], "") if final else (found, rest)


def _cut_place(text: str, begin: int, start: int, stop: int, apart: Apart | None) -> int | None:
    """The last place in (start, stop] to cut the chunk from ``begin`` at, None if there is none."""
    tries = _TRIES
    for mark, behind in (("\n", 1), (" ", 0)):
        place = stop
        while (place := text.rfind(mark, start + 1, place)) >= 0 and tries:
            around = text[place - 1 : place + 2 : 2]
            if len(around) < 2 or around[0].isspace() or around[1].isspace():
                continue
            here = place + behind
            before = text[max(begin, here - CONTEXT) : here]
            if apart is None or apart(before, text[here : here + CONTEXT]):
                return here
            tries -= 1
    return None


def _parts(
    texts: Iterable[str], where: str, apart: Apart | None
) -> Iterator[tuple[str, bool, str, str]]:
    """Text, whether it is the last, and what is around it, of the chunks of a document.

    Args:
        texts: the document in pieces of any size; "" tells its end.
        where: for the message about a text that cannot be cut.
        apart: whether the tokenizer allows a cut.
    """
    before = rest = ""
    for text in texts:
        rest += text
        found, rest = cut(rest, not text, CHUNK, apart)
        if len(rest) > _LONGEST:
            raise UserError(
                f"{where}: {len(rest):,} characters in a row without a line or a word at whose end "
                "this tokenizer could be given a part; break the text into lines"
            )
        for k, part in enumerate(found):
            after = ""
            for piece in (*found[k + 1 :], rest):
                after += piece[: CONTEXT - len(after)]
            yield part, not text and k == len(found) - 1, before, after
            before = (before + part)[-CONTEXT:]


def _text_chunks(
    source: Source, blocks: Iterable[tuple[bytes, int]], apart: Apart | None
) -> Iterator[Chunk]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0

    def texts() -> Iterator[str]:
        nonlocal position
        offset, begun = 0, False
        for block, at in blocks:
            position = at
            text = _decode(source, decoder, block, offset, final=False)
            offset += len(block)
            if text:
                text, begun = text if begun else text.removeprefix("\ufeff"), True
            if text:
                yield text
        if text := _decode(source, decoder, b"", offset, final=True):
            yield text
        yield ""

    for part, last, before, after in _parts(texts(), str(source.path), apart):
        yield Chunk(part, last, position, before, after)


def json_lines(
    source: Source, digest: hashlib._Hash | None = None
) -> Iterator[tuple[str, Any, int]]:
    """Every line of a JSON lines file.

    Args:
        source: the file.
        digest: updated with every byte of the file.

    Yields:
        file:line, the value, and the bytes of the file consumed.

    Raises:
        UserError: as ``chunks``.
    """
    yield from _json_rows(source, _blocks(source, digest), "as a conversation is")
    _refuse_change(source)


def _refuse_change(source: Source) -> None:
    now = source.path.stat()
    if (now.st_size, now.st_mtime_ns) != (source.size, source.mtime_ns):
        raise UserError(
            f"{source.path} changed while it was read ({source.size} -> {now.st_size} bytes); "
            "wait until it is complete and run again"
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ``KeyError`` if it names a key twice, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise KeyError(twice)
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _json_rows(
    source: Source, blocks: Iterable[tuple[bytes, int]], expected: str
) -> Iterator[tuple[str, Any, int]]:
    for number, (line, offset, position) in enumerate(_lines(blocks, source.path), 1):
        if not line.strip():
            continue
        where = f"{source.path}:{number}"
        try:
            row = _DECODER.decode(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except KeyError as twice:
            raise UserError(f"{where}: {twice} stands there twice; leave one of the two") from twice
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: not UTF-8 at byte {offset + error.start} of the file "
                f"({error.reason}){_encoding_hint(line)}"
            ) from error
        except (ValueError, RecursionError) as error:
            start = line.removeprefix(codecs.BOM_UTF8).lstrip()
            hint = "every line must be one JSON object"
            if number == 1 and start.startswith(b"["):
                # A bracket alone on its line mostly begins an array of objects.
                hint = _array_hint(b"{" in start or b'"' not in start, source)
            elif number == 1 and start.rstrip() == b"{":
                hint = f"each object must stand on one line: jq -c . {_lines_of(source)}"
            raise UserError(f"{where}: not JSON ({error}); {hint}") from error
        if isinstance(row, list):
            hint = _array_hint(any(isinstance(item, dict) for item in row), source)
            raise UserError(f"{where}: a JSON array, expected an object {expected}; {hint}")
        yield where, row, position


def _array_hint(of_objects: bool, source: Source) -> str:
    program = ".[]" if of_objects else ".[] | {text: .}"
    return f"the file is one JSON array, make it lines: jq -c '{program}' {_lines_of(source)}"


def _lines_of(source: Source) -> str:
    """Arguments of jq after its program."""
    name = source.path.name
    return f"{shlex.quote(name)} > {shlex.quote(name.partition('.')[0] + '.jsonl')}"


def _jsonl_chunks(
    source: Source, blocks: Iterable[tuple[bytes, int]], key: str, apart: Apart | None
) -> Iterator[Chunk]:
    for where, row, position in _json_rows(source, blocks, f"with the key {key!r}"):
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: a JSON {json_type(row)}, expected an object with the key {key!r}"
            )
        if key not in row:
            inside = [f"{name}.{key}" for name in row if _holds(row[name], key)]
            raise UserError(f"{where}: {_no_key('key', key, list(row), inside)}")
        text = row[key]
        if not isinstance(text, str):
            raise UserError(
                f"{where}: {key!r} holds a JSON {json_type(text)}, expected a string; "
                "choose another --json-key or mend the line"
            )
        yield from _whole(text, where, position, apart)


def _holds(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value


def _parquet_chunks(
    source: Source, column: str, digest: hashlib._Hash | None, apart: Apart | None
) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{source.path} needs pyarrow; pip install pyarrow") from error
    with tempfile.TemporaryFile() as unpacked, open(source.path, "rb") as raw:
        stream: IO[bytes] = raw
        if source.compressed:
            # Parquet is read from its end, so it must be unpacked first.
            for block, _ in _blocks(source, digest):
                unpacked.write(block)
            unpacked.seek(0)
            stream = unpacked
        elif digest is not None:
            while block := raw.read(_BLOCK):
                digest.update(block)
            raw.seek(0)
        try:
            file = pyarrow.parquet.ParquetFile(stream)
        except (pyarrow.ArrowException, OSError) as error:
            raise _bad_parquet(source, error) from error
        names = file.schema_arrow.names
        if column not in names:
            inside = [
                f"{field.name}.{column}"
                for field in file.schema_arrow
                if pyarrow.types.is_struct(field.type) and field.type.get_field_index(column) >= 0
            ]
            raise UserError(f"{source.path}: {_no_key('column', column, names, inside)}")
        if names.count(column) > 1:
            raise UserError(
                f"{source.path}: {names.count(column)} columns are called {column!r}; rename all "
                "but one, or choose another --json-key"
            )
        kind = file.schema_arrow.field(column).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not any(
            is_kind(kind)
            for is_kind in (
                pyarrow.types.is_string,
                pyarrow.types.is_large_string,
                pyarrow.types.is_string_view,
            )
        ):
            told = str(kind) if len(str(kind)) < 80 else f"{str(kind)[:77]}..."
            raise UserError(
                f"{source.path}: column {column!r} holds {told}, expected strings; "
                "choose another --json-key"
            )
        rows, total = 0, max(1, file.metadata.num_rows)
        batches = file.iter_batches(batch_size=256, columns=[column])
        while True:
            try:
                batch = next(batches, None)
                texts = None if batch is None else batch.column(0).to_pylist()
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise _bad_parquet(source, error) from error
            if texts is None:
                return
            for text in texts:
                rows += 1
                where = f"{source.path}: row {rows}"
                yield from _whole(text or "", where, source.size * rows // total, apart)


def _whole(text: str, where: str, position: int, apart: Apart | None) -> Iterator[Chunk]:
    """The chunks of a document that is in memory."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of the text is half of a surrogate pair, which no "
            "UTF-8 can hold; mend or drop it"
        ) from error
    texts = (text, "") if text else ("",)
    for part, last, before, after in _parts(texts, where, apart):
        yield Chunk(part, last, position, before, after)


def _lines(blocks: Iterable[tuple[bytes, int]], path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Lines without their newline, the byte each begins at, and the position of the block."""
    pending: list[bytes] = []
    number, offset, position, length = 1, 0, 0, 0
    for block, position in blocks:
        *complete, tail = block.split(b"\n")
        number += len(complete)
        length = len(tail) + (0 if complete else length)
        if length > _LONGEST:
            raise UserError(
                f"{path}:{number}: the line is longer than {megabytes(_LONGEST)}; write the text "
                "as several lines, or as a .txt file"
            )
        for part in complete:
            line = b"".join([*pending, part])
            pending = []
            yield line, offset, position
            offset += len(line) + 1
        pending.append(tail)
    line = b"".join(pending)
    if line:
        yield line, offset, position


def _blocks(source: Source, digest: hashlib._Hash | None) -> Iterator[tuple[bytes, int]]:
    """Decompressed content in blocks, each with the bytes of the file consumed."""
    with open(source.path, "rb") as stream:
        if source.compressed:
            yield from _unpacked(source, stream, digest)
            return
        position = 0
        while block := stream.read(_BLOCK):
            if digest is not None:
                digest.update(block)
            position += len(block)
            yield block, position


def _unpacked(
    source: Source, stream: IO[bytes], digest: hashlib._Hash | None
) -> Iterator[tuple[bytes, int]]:
    # Frame by frame: the libraries' own readers take a truncated file for a complete one.
    path, new_frame, errors, bounded = source.path, *_decompressor(source)
    frame: Any = None
    begun = False
    position = unpacked = 0
    while block := stream.read(_BLOCK >> 6 if bounded else _ZST_BITE):
        if digest is not None:
            digest.update(block)
        position += len(block)
        if frame is None and begun and not block.strip(b"\0"):
            continue  # padding after the last frame
        while block or (frame is not None and bounded and not frame.needs_input):
            frame, begun = frame or new_frame(), True
            try:
                content = frame.decompress(block, _BLOCK) if bounded else frame.decompress(block)
            except errors as error:
                raise UserError(
                    f"{path} is damaged near byte {position - len(block)} ({error}); copy it again"
                ) from error
            block = b""
            if frame.eof:
                block, frame = frame.unused_data, None
                block = block if block.strip(b"\0") else b""
            if content:
                unpacked += len(content)
                yield content, position
    if frame is not None or position == 0:
        raise UserError(
            f"{path} is truncated: it ends inside a compressed frame after {position} bytes "
            f"({unpacked} unpacked); copy it again"
        )


class _Gzip:
    """A gzip member with the interface of the other decompressors."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(31)
        self.needs_input = True

    def decompress(self, block: bytes, most: int) -> bytes:
        content = self._zlib.decompress(self._zlib.unconsumed_tail + block, most)
        # A full answer may not be all: what is left needs no input.
        self.needs_input = not self._zlib.unconsumed_tail and len(content) < most
        return content

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


def _decompressor(source: Source) -> tuple[Callable[[], Any], tuple[type[Exception], ...], bool]:
    """What unpacks a frame, what it raises, and whether it can bound what it gives."""
    if source.compressed == "gz":
        return _Gzip, (zlib.error,), True
    if source.compressed == "bz2":
        return bz2.BZ2Decompressor, (OSError, ValueError), True
    if source.compressed == "xz":
        return partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, _XZ_MEMORY), (lzma.LZMAError,), True
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{source.path} needs zstandard; pip install zstandard") from error
    unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
    return unpacker.decompressobj, (zstandard.ZstdError,), False


def _decode(
    source: Source, decoder: codecs.IncrementalDecoder, block: bytes, offset: int, final: bool
) -> str:
    held = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        place = offset - held + error.start
        raise UserError(
            f"{source.path}: not UTF-8 at byte {place} ({error.reason}){_encoding_hint(block)}"
        ) from error


def _encoding_hint(start: bytes) -> str:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "; it looks like UTF-16: iconv -f UTF-16 -t UTF-8"
    if start.startswith(b"\x1f\x8b"):
        return "; it is gzip-compressed: unpack it with gunzip (perhaps twice), or name it .gz"
    return "; convert it with iconv -t UTF-8, or leave it out"


def _no_key(noun: str, key: str, present: list[str], inside: list[str]) -> str:
    if inside:
        return (
            f"no {noun} {key!r}, but {inside[0]} inside another; bring it to the top, with "
            f"jq -c '{{{key}: .{inside[0]}}}' or pyarrow's Table.flatten()"
        )
    near = difflib.get_close_matches(key, present, 1, 0.4)
    hint = f"pass --json-key {near[0]}" if near else "choose one with --json-key"
    shown = ", ".join(present[:20]) + (", ..." if len(present) > 20 else "")
    return f"no {noun} {key!r}; present: {shown or 'none'}; {hint}"


def json_type(value: Any) -> str:
    """What JSON calls the type of ``value``, for messages."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _bad_parquet(source: Source, error: Exception) -> UserError:
    return UserError(f"{source.path} is not a readable parquet file ({error}); copy it again")
