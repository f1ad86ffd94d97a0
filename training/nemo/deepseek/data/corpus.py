"""Input documents: text, JSON lines and parquet files, each also ``.zst``; or Python's own library.

A ``Corpus`` is a sorted list of files. ``chunks`` streams one of them in constant memory: long
texts come in several chunks, cut where byte-level tokenizers join nothing.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from deepseek.config.errors import UserError

CHUNK = 1 << 20
"""Characters after which a text is cut into another chunk."""
_BLOCK = 1 << 20
_JSONL = (".jsonl", ".ndjson", ".json")
# Not text that somebody wrote: tests, tables of character sets, builds of this machine.
_STDLIB_SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


class Chunk(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    last: bool
    """Nothing of the document follows."""
    position: int
    """Bytes of the file consumed, for progress."""


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    name: str
    """Path below the folder that was given, "/" between parts: the same on every machine."""
    kind: str
    """``text`` (the file is a document), ``jsonl`` (each line is) or ``parquet`` (each row is)."""
    compressed: bool
    """Whether it is a ``.zst`` file."""
    size: int
    """Bytes on disk."""
    mtime_ns: int
    """When it was last changed, nanoseconds."""


@dataclass(frozen=True)
class Corpus:
    """Sorted input files."""

    sources: tuple[Source, ...]
    skipped: tuple[Path, ...] = ()
    """Binary files met in folders and left out."""

    @classmethod
    def from_paths(
        cls, inputs: Sequence[Path], exclude: Callable[[Path], bool] = lambda path: False
    ) -> Corpus:
        """Files as given; of folders everything below, sorted, but hidden and binary files.

        Args:
            inputs: files and folders.
            exclude: files of folders to leave out.

        Raises:
            UserError: a path does not exist, a folder holds no text, a file is given twice.
        """
        sources: list[Source] = []
        skipped: list[Path] = []
        for given in map(Path, inputs):
            if given.is_dir():
                found = 0
                for path in _walk(given):
                    if exclude(path):
                        continue
                    if _is_binary(path):
                        skipped.append(path)
                        continue
                    sources.append(_source(path, path.relative_to(given).as_posix()))
                    found += 1
                if not found:
                    binary = f" ({len(skipped)} binary files left out)" if skipped else ""
                    raise UserError(
                        f"{given} holds no text{binary}; give a folder with .txt, .md, .py, .jsonl "
                        "or .parquet files, each also .zst"
                    )
            elif given.is_file():
                sources.append(_source(given, given.name))
            else:
                raise UserError(f"{given} does not exist{_nearest_file(given)}")
        if not sources:
            raise UserError("no input was given; give files or folders")
        seen: set[Path] = set()
        for source in sources:
            real = source.path.resolve()
            if real in seen:
                raise UserError(f"{source.path} is given twice; give each file once")
            seen.add(real)
        return cls(tuple(sources), tuple(skipped))

    @classmethod
    def stdlib(cls) -> Corpus:
        """The Python standard library of this interpreter: its ``.py`` files, a document each.

        Without tests, installed packages and tables of character sets; the same for one build of
        Python, about 9.6 MB for 3.11.

        Raises:
            UserError: this Python comes without its sources.
        """
        root = Path(sysconfig.get_paths()["stdlib"])
        sources = []
        for path in _walk(root, _STDLIB_SKIPPED):
            name = path.relative_to(root).as_posix()
            if path.suffix != ".py" or name.startswith(("_sysconfigdata", "config-")):
                continue
            try:
                path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            sources.append(_source(path, name))
        if not sources:
            raise UserError(
                f"the built-in corpus is Python's own library, but {root} holds no .py files; "
                "give input files instead"
            )
        return cls(tuple(sources))

    @property
    def total_bytes(self) -> int:
        """Size of all files on disk."""
        return sum(source.size for source in self.sources)

    def stat_digest(self) -> str:
        """sha256 of names, sizes and times: a quick sign that nothing has changed."""
        return digest_lines(f"{s.name}\0{s.size}\0{s.mtime_ns}" for s in self.sources)


def digest_lines(lines: Iterable[str]) -> str:
    """sha256 of lines, each ended by a newline."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def chunks(
    source: Source, json_key: str = "text", digest: hashlib._Hash | None = None
) -> Iterator[Chunk]:
    """Stream the documents of a file; an empty document is one empty chunk.

    Args:
        source: the file.
        json_key: the key of a JSON line, or the column of a parquet file, that holds the text.
        digest: updated with every byte of the file.

    Raises:
        UserError: not UTF-8, not JSON, no such key, damaged or truncated compression, a library
            missing, the file changed while it was read; with file, and line or byte.
    """
    if source.kind == "parquet":
        yield from _parquet_chunks(source, json_key, digest)
    else:
        blocks = _blocks(source, digest)
        if source.kind == "jsonl":
            yield from _jsonl_chunks(source, blocks, json_key)
        else:
            yield from _text_chunks(source, blocks)
    _refuse_change(source)


def cut(text: str, final: bool, limit: int) -> tuple[list[str], str]:
    """Cut a text into chunks of about ``limit`` characters.

    Cuts lie after a newline, or else before a space, between visible characters: places where
    byte-level tokenizers never join, so the ids are those of the whole text. A text without such a
    place is cut after 16 times the limit.

    Args:
        text: what is known of the document.
        final: nothing follows.
        limit: characters.

    Returns:
        The chunks, and the rest that is not yet one, "" with ``final``.
    """
    found = []
    start = window = 0
    while len(text) > window + limit:
        place = _cut_place(text, window, window + limit)
        window += limit
        if place is None and window == start + 16 * limit:
            place = window
        if place is not None:
            found.append(text[start:place])
            start = window = place
    rest = text[start:]
    return ([*found, rest], "") if final else (found, rest)


def _cut_place(text: str, start: int, stop: int) -> int | None:
    """The last place in (start, stop] to cut at, None if there is none."""
    place = stop
    while (newline := text.rfind("\n", start + 1, place)) >= 0:
        around = text[newline - 1 : newline + 2 : 2]
        if len(around) == 2 and not around[0].isspace() and not around[1].isspace():
            return newline + 1
        place = newline
    place = stop
    while (space := text.rfind(" ", start + 1, place)) >= 0:
        around = text[space - 1 : space + 2 : 2]
        if len(around) == 2 and not around[0].isspace() and not around[1].isspace():
            return space
        place = space
    return None


def _text_chunks(source: Source, blocks: Iterable[tuple[bytes, int]]) -> Iterator[Chunk]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, offset, position = "", 0, 0
    first = True
    for block, position in blocks:
        text = _decode(source, decoder, block, offset, final=False)
        offset += len(block)
        if first:
            text, first = text.removeprefix("\ufeff"), False
        found, rest = cut(rest + text, final=False, limit=CHUNK)
        for part in found:
            yield Chunk(part, False, position)
    rest += _decode(source, decoder, b"", offset, final=True)
    found, _ = cut(rest, final=True, limit=CHUNK)
    for k, part in enumerate(found):
        yield Chunk(part, k == len(found) - 1, position)


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
    yield from _json_rows(source, _blocks(source, digest))
    _refuse_change(source)


def _refuse_change(source: Source) -> None:
    now = source.path.stat()
    if (now.st_size, now.st_mtime_ns) != (source.size, source.mtime_ns):
        raise UserError(
            f"{source.path} changed while it was read ({source.size} -> {now.st_size} bytes); "
            "wait until it is complete and run again"
        )


def _json_rows(
    source: Source, blocks: Iterable[tuple[bytes, int]]
) -> Iterator[tuple[str, Any, int]]:
    for number, (line, offset, position) in enumerate(_lines(blocks), 1):
        if not line.strip():
            continue
        where = f"{source.path}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: not UTF-8 at byte {offset + error.start} of the file "
                f"({error.reason}){_encoding_hint(line)}"
            ) from error
        except (ValueError, RecursionError) as error:
            hint = (
                "the file is one JSON array, make it lines: jq -c '.[]'"
                if number == 1 and line.lstrip().startswith(b"[")
                else "every line must be one JSON object"
            )
            raise UserError(f"{where}: not JSON ({error}); {hint}") from error
        yield where, row, position


def _jsonl_chunks(source: Source, blocks: Iterable[tuple[bytes, int]], key: str) -> Iterator[Chunk]:
    for where, row, position in _json_rows(source, blocks):
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: a JSON {json_type(row)}, expected an object with the key {key!r}"
            )
        if key not in row:
            raise UserError(f"{where}: {_no_key('key', key, list(row))}")
        text = row[key]
        if not isinstance(text, str):
            raise UserError(
                f"{where}: {key!r} holds a JSON {json_type(text)}, expected a string; "
                "choose another --json-key or mend the line"
            )
        yield from _whole(text, where, position)


def _parquet_chunks(source: Source, column: str, digest: hashlib._Hash | None) -> Iterator[Chunk]:
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
            raise UserError(f"{source.path}: {_no_key('column', column, names)}")
        kind = file.schema_arrow.field(column).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UserError(
                f"{source.path}: column {column!r} holds {kind}, expected strings; "
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
                yield from _whole(text or "", where, source.size * rows // total)


def _whole(text: str, where: str, position: int) -> Iterator[Chunk]:
    """The chunks of a document that is in memory."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of the text is half of a surrogate pair, which no "
            "UTF-8 can hold; mend or drop it"
        ) from error
    found, _ = cut(text, final=True, limit=CHUNK)
    for k, part in enumerate(found):
        yield Chunk(part, k == len(found) - 1, position)


def _lines(blocks: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int, int]]:
    """Lines without their newline, the byte each begins at, and the position of the block."""
    pending: list[bytes] = []
    offset, position = 0, 0
    for block, position in blocks:
        *complete, tail = block.split(b"\n")
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
            yield from _zst_blocks(source.path, stream, digest)
            return
        position = 0
        while block := stream.read(_BLOCK):
            if digest is not None:
                digest.update(block)
            position += len(block)
            yield block, position


def _zst_blocks(
    path: Path, stream: IO[bytes], digest: hashlib._Hash | None
) -> Iterator[tuple[bytes, int]]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path} needs zstandard; pip install zstandard") from error
    # Frame by frame: zstandard's own reader takes a truncated file for a complete one.
    frame = None
    position = unpacked = 0
    # In small bites: text may grow a hundredfold when unpacked.
    while block := stream.read(_BLOCK >> 6):
        if digest is not None:
            digest.update(block)
        position += len(block)
        while block:
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                content = frame.decompress(block)
            except zstandard.ZstdError as error:
                raise UserError(
                    f"{path} is damaged near byte {position - len(block)} ({error}); copy it again"
                ) from error
            block = b""
            if frame.eof:
                block, frame = frame.unused_data, None
            if content:
                unpacked += len(content)
                yield content, position
    if frame is not None or position == 0:
        raise UserError(
            f"{path} is truncated: it ends inside a compressed frame after {position} bytes "
            f"({unpacked} unpacked); copy it again"
        )


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
        return "; it is gzip-compressed: unpack it with gunzip"
    return "; convert it with iconv -t UTF-8, or leave it out"


def _walk(root: Path, skipped: Iterable[str] = ()) -> Iterator[Path]:
    """Regular files below ``root`` in the order of their relative paths, hidden ones left out."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".") and name not in skipped]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    yield from sorted(
        (path for path in found if path.is_file()),
        key=lambda path: path.relative_to(root).as_posix(),
    )


def _source(path: Path, name: str) -> Source:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes[-1:] == [".zst"]
    suffix = suffixes[-2:-1] if compressed else suffixes[-1:]
    kind = "text"
    if suffix and suffix[0] in _JSONL:
        kind = "jsonl"
    elif suffix == [".parquet"]:
        kind = "parquet"
    stat = path.stat()
    return Source(path, name, kind, compressed, stat.st_size, stat.st_mtime_ns)


def _is_binary(path: Path) -> bool:
    if path.suffix.lower() in (".zst", ".parquet"):
        return False
    with open(path, "rb") as stream:
        return b"\0" in stream.read(8192)


def _no_key(noun: str, key: str, present: list[str]) -> str:
    near = difflib.get_close_matches(key, present, 1, 0.4)
    hint = f"pass --json-key {near[0]}" if near else "choose one with --json-key"
    return f"no {noun} {key!r}; present: {', '.join(present) or 'none'}; {hint}"


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; nor does the folder {path.parent}"
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, 1)
    return f"; nearest: {path.parent / near[0]}" if near else f"; look into {path.parent}"


def json_type(value: Any) -> str:
    """What JSON calls the type of ``value``, for messages."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _bad_parquet(source: Source, error: Exception) -> UserError:
    return UserError(f"{source.path} is not a readable parquet file ({error}); copy it again")
