"""Damaged and hostile versions of a file, drawn from a seed."""

from __future__ import annotations

import json
import random
from typing import Any

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    10**400,
    1.5,
    1e308,
    float("nan"),
    "",
    "x",
    "\x00\x1b[31m",
    "\ud800",
    "../../etc/passwd",
    "{{ 1/0 }}",
    "x" * 3000,
    [],
    [[]],
    [None],
    {},
    {"": None},
    {"a": {"b": []}},
]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """``content`` changed once or a few times, as bytes or, if it is JSON, as values."""
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        as_values = _of_values(content, draw) if draw.random() < 0.6 else None
        content = as_values if as_values is not None else _of_bytes(content, draw)
    return content


def _of_bytes(content: bytes, draw: random.Random) -> bytes:
    place, other = (draw.randrange(len(content) + 1) for _ in range(2))
    first, last = sorted((place, other))
    piece = content[first : min(last, first + 200)]
    kind = draw.randrange(8)
    if kind == 0 and content:
        place = draw.randrange(len(content))
        return (
            content[:place]
            + bytes([content[place] ^ 1 << draw.randrange(8)])
            + content[place + 1 :]
        )
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:first] + content[first + len(piece) :]
    if kind == 3:
        return content[:first] + piece + content[first:]
    if kind == 4:
        return content[:place] + draw.randbytes(draw.randrange(1, 20)) + content[place:]
    if kind == 5:
        return content[:first] + bytes(len(piece)) + content[first + len(piece) :]
    if kind == 6:
        return (
            content[:place]
            + draw.choice((b"[" * 5000, b'"', b"{", b"\n", b"\xff"))
            + content[place:]
        )
    return draw.choice((b"", b"null", b"[]", b"{}", b"0", bytes(len(content))))


def _of_values(content: bytes, draw: random.Random) -> bytes | None:
    """A value of the JSON, or of a line of it, replaced, removed, renamed or doubled."""
    lines = content.split(b"\n")
    number = draw.randrange(len(lines))
    for text in (content, lines[number]):
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(tree, (dict, list)) or not tree:
            continue
        _change(tree, draw)
        changed = json.dumps(tree).encode()
        if text is content:
            return changed
        return b"\n".join([*lines[:number], changed, *lines[number + 1 :]])
    return None


def _change(tree: Any, draw: random.Random) -> None:
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = draw.choice(keys)
        if isinstance(tree[key], (dict, list)) and tree[key] and draw.random() < 0.7:
            tree = tree[key]
            continue
        kind = draw.randrange(6)
        if kind == 0:
            del tree[key]
        elif kind == 1 and isinstance(tree, dict):
            tree[str(key) + "_"] = tree.pop(key)
        elif kind == 2 and isinstance(tree, dict):
            tree[draw.choice(keys)] = tree[key]
        elif kind == 3 and isinstance(tree, list):
            tree.insert(key, tree[key])
        else:
            tree[key] = draw.choice(ODD)
        return
