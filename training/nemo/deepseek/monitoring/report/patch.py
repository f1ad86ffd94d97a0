"""What has changed between two JSON values, in few bytes: for a page that has the older one.

A patch is one of these; ``page.js`` applies it:

* ``{"=": value}``: this value instead;
* ``{"~": [start, end, text]}``: of a string the first ``start`` and the last ``end`` characters,
  and this text between them;
* ``{"k": {key: patch, ...}, "-": [key, ...]}``: the members of an object that differ or are new,
  and those that are gone;
* ``{"i": {index: patch, ...}, "n": length}``: the same of an array.
"""

from __future__ import annotations

from typing import Any

Patch = dict[str, Any]
SHORT = 40
"""Characters of a string that is sent whole."""


def difference(old: Any, new: Any) -> Patch | None:
    """The patch that makes ``new`` of ``old``; None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        members, gone = _members(old, new), [key for key in old if key not in new]
        patch = {"k": members} | ({"-": gone} if gone else {})
        return patch if members or gone else None
    if isinstance(old, list) and isinstance(new, list):
        members = _members(dict(enumerate(old)), dict(enumerate(new)))
        return {"i": members, "n": len(new)} if members or len(old) != len(new) else None
    if old == new and type(old) is type(new):
        return None
    if isinstance(old, str) and isinstance(new, str) and len(new) > SHORT:
        start = _shared(old, new)
        end = _shared(old[start:][::-1], new[start:][::-1])
        return {"~": [start, end, new[start : len(new) - end]]}
    return {"=": new}


def patched(old: Any, patch: Patch | None) -> Any:
    """The new value; what has not changed is the same object."""
    if patch is None:
        return old
    if "=" in patch:
        return patch["="]
    if "~" in patch:
        start, end, text = patch["~"]
        return old[:start] + text + old[len(old) - end :]
    if "n" in patch:
        kept = old[: patch["n"]] + [None] * (patch["n"] - len(old))
        for index, change in patch["i"].items():
            kept[int(index)] = patched(kept[int(index)], change)
        return kept
    changed = {key: patched(old.get(key), change) for key, change in patch["k"].items()}
    return {key: value for key, value in (old | changed).items() if key not in patch.get("-", ())}


def _members(old: dict[Any, Any], new: dict[Any, Any]) -> dict[str, Patch]:
    found = {
        str(key): difference(old[key], value) if key in old else {"=": value}
        for key, value in new.items()
    }
    return {key: patch for key, patch in found.items() if patch is not None}


def _shared(old: str, new: str) -> int:
    """Length of the longest common beginning."""
    least, most = 0, min(len(old), len(new))
    while least < most:
        middle = (least + most + 1) // 2
        if old[least:middle] == new[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
