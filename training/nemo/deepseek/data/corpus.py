"""Which files are read: text, JSON lines, parquet, each also compressed; or Python's own library.

A ``Corpus`` is a sorted list of files, and a list of what its folders hold besides.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek.config.errors import UserError

_JSONL = (".jsonl", ".ndjson", ".json")
_COMPRESSED = {".zst": "zst", ".gz": "gz", ".bz2": "bz2", ".xz": "xz"}
_ARCHIVES = {".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar"}
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


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    name: str
    """Path below the folder that was given, "/" between parts: the same on every machine."""
    kind: str
    """``text`` (the file is a document), ``jsonl`` (each line is) or ``parquet`` (each row is)."""
    compressed: str
    """``zst``, ``gz``, ``bz2`` or ``xz``; empty: it is not."""
    size: int
    """Bytes on disk."""
    mtime_ns: int
    """When it was last changed, nanoseconds."""


@dataclass(frozen=True)
class Corpus:
    """Sorted input files."""

    sources: tuple[Source, ...]
    skipped: tuple[tuple[str, Path], ...] = ()
    """What was met in folders and left out, with its kind, such as ``binary files``."""

    @classmethod
    def from_paths(
        cls,
        inputs: Sequence[Path],
        exclude: Callable[[Path], bool] = lambda path: False,
        strict: bool = False,
    ) -> Corpus:
        """Files as given; of folders everything below, sorted, with links followed once.

        Left out are hidden and binary files, archives, and links that lead nowhere or back.

        Args:
            inputs: files and folders.
            exclude: files of folders to leave out without a word.
            strict: leave nothing else out.

        Raises:
            UserError: a path does not exist, a folder holds no text, a file is given twice, or
                something is left out and ``strict``.
        """
        sources: list[Source] = []
        skipped: list[tuple[str, Path]] = []
        for given in map(Path, inputs):
            if given.is_dir():
                files, others = _files_below(given)
                others = [(kind, path) for kind, path in others if not exclude(path)]
                texts = []
                for path in files:
                    if exclude(path):
                        continue
                    if kind := _no_text(path):
                        others.append((kind, path))
                    else:
                        texts.append(_source(path, path.relative_to(given).as_posix()))
                if not texts:
                    without = f" ({kinds(others)} left out)" if others else ""
                    raise UserError(
                        f"{given} holds no text{without}; give a folder with .txt, .md, .py, "
                        ".jsonl or .parquet files, each also .zst, .gz, .bz2 or .xz"
                    )
                sources += texts
                skipped += others
            elif given.is_file():
                if _is_archive(given):
                    raise UserError(f"{given} is an archive; unpack it and give the folder")
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
        if skipped and strict:
            raise UserError(
                f"--strict: {kinds(skipped, names=5)} would be left out; move them away, or do "
                "without --strict"
            )
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
        for path in _sources_of_python(root):
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
        # A name that is no UTF-8 counts as the bytes it is.
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def kinds(left_out: Sequence[tuple[str, Path]], names: int = 1) -> str:
    """How many there are of each kind, and some names, in words."""
    told = []
    for kind, count in sorted(Counter(kind for kind, _ in left_out).items()):
        of_kind = [str(path) for what, path in left_out if what == kind]
        shown = ", ".join(of_kind[:names]) + (", ..." if count > names else "")
        told.append(f"{kind}: {count} ({shown})")
    return "; ".join(told)


def _files_below(root: Path) -> tuple[list[Path], list[tuple[str, Path]]]:
    """Files below ``root``, in the order of their relative paths, and what else there is by kind.

    A link is followed unless it leads to what is read anyway; real files go before links to them.
    """
    files: list[Path] = []
    others: list[tuple[str, Path]] = []
    links: list[Path] = []
    real_root = os.path.realpath(root)
    read = {real_root}
    folders = [(root, real_root)]
    while folders or links:
        if not folders:
            links.sort(key=lambda path: path.as_posix(), reverse=True)
            link = links.pop()
            try:
                real = os.path.realpath(link, strict=True)
            except OSError as error:
                loop = error.errno == errno.ELOOP
                others.append(("links in a circle" if loop else "broken links", link))
                continue
            parent = os.path.realpath(link.parent)
            if os.path.commonpath([real, parent]) == real:
                others.append(("links that lead back", link))
            elif real in read:
                others.append(("links to what is read already", link))
            elif os.path.isdir(real):
                folders.append((link, real))
            elif os.path.isfile(real):
                files.append(link)
            else:
                others.append(("devices, pipes or sockets", link))
            read.add(real)
            continue
        folder, real = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:
            others.append(("unreadable folders", folder))
            continue
        for entry in entries:
            path, there = folder / entry.name, os.path.join(real, entry.name)
            if entry.name.startswith("."):
                others.append(("hidden", path))
            elif entry.is_symlink():
                links.append(path)
            elif there in read:
                others.append(("read already", path))
            elif entry.is_dir():
                read.add(there)
                folders.append((path, there))
            elif stat.S_ISREG(entry.stat().st_mode):
                read.add(there)
                files.append(path)
            else:
                others.append(("devices, pipes or sockets", path))
    by_name = sorted(files, key=lambda path: path.relative_to(root).as_posix())
    return by_name, sorted(others, key=lambda other: other[1].as_posix())


def _sources_of_python(root: Path) -> list[Path]:
    """Files below ``root`` that somebody wrote, in the order of their relative paths."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if not n.startswith(".") and n not in _STDLIB_SKIPPED]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(
        (path for path in found if path.is_file()),
        key=lambda path: path.relative_to(root).as_posix(),
    )


def _source(path: Path, name: str) -> Source:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = _COMPRESSED.get(suffixes[-1] if suffixes else "", "")
    suffix = suffixes[-2:-1] if compressed else suffixes[-1:]
    kind = "text"
    if suffix and suffix[0] in _JSONL:
        kind = "jsonl"
    elif suffix == [".parquet"]:
        kind = "parquet"
    status = path.stat()
    return Source(path, name, kind, compressed, status.st_size, status.st_mtime_ns)


def _is_archive(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    return bool(_ARCHIVES.intersection(suffixes[-2:] if packed else suffixes[-1:]))


def _no_text(path: Path) -> str | None:
    """The kind of a file that is not read; None: it is."""
    if _is_archive(path):
        return "archives"
    if path.suffix.lower() in (".parquet", *_COMPRESSED):
        return None
    with open(path, "rb") as stream:
        return "binary files" if b"\0" in stream.read(8192) else None


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; nor does the folder {path.parent}"
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, 1)
    return f"; nearest: {path.parent / near[0]}" if near else f"; look into {path.parent}"
