"""The files of a tokenizer: ``tokenizer.json`` and what Hugging Face puts beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepseek.config.errors import UserError
from deepseek.data.tokenizer import GENERATION, Tokenizer, parse_json

CHAT_TEMPLATE = "chat_template.jinja"
"""Where transformers 5 keeps the template; before, it was in ``tokenizer_config.json``."""
MORE_TEMPLATES = "additional_chat_templates"
"""Folder of templates with other names, such as ``tool_use.jinja``."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a ``tokenizer.json``, or the one in a Hugging Face folder.

    Raises:
        UserError: no such file, not a tokenizer, a token or value that is wrong, ``tokenizers``
            missing.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(_no_tokenizer(path, file))
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        beside = file.with_name(name)
        if beside.is_file():
            told = parse_json(_read_text(beside), str(beside))
            # A null says nothing: the token of the other file stands.
            config.update({key: value for key, value in told.items() if value is not None})
    templates = {path.stem: path for path in sorted(file.parent.glob(f"{MORE_TEMPLATES}/*.jinja"))}
    if (default := file.with_name(CHAT_TEMPLATE)).is_file():
        templates["default"] = default
    if templates.keys() == {"default"}:
        config["chat_template"] = _read_text(default)
    elif templates:
        config["chat_template"] = [
            {"name": name, "template": _read_text(path)} for name, path in templates.items()
        ]
    source = _with_added_tokens(_read_text(file), config, str(file))
    return Tokenizer(source, config, str(file), generation_config(file.parent))


def generation_config(folder: Path) -> dict[str, Any]:
    """The content of ``generation_config.json`` in a folder; {} without one.

    Raises:
        UserError: it is no JSON object.
    """
    file = folder / GENERATION
    return parse_json(_read_text(file), str(file)) if file.is_file() else {}


def _with_added_tokens(source: str, config: dict[str, Any], origin: str) -> str:
    """``tokenizer.json`` with the tokens that stand in ``tokenizer_config.json`` alone.

    transformers adds them too; without them a ``<|im_start|>`` would be read as its characters.

    Raises:
        UserError: an entry that cannot be read, an id that is another token's or leaves a gap, or
            the name of a special token that has no id.
    """
    entries = config.get("added_tokens_decoder") or {}
    parsed = parse_json(source, origin)
    model = parsed.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        return source  # told by Tokenizer
    vocab = model["vocab"]
    try:
        pairs = vocab if isinstance(vocab, dict) else {name: k for k, (name, _) in enumerate(vocab)}
        ids = {str(name): int(number) for name, number in pairs.items()}
        added = list(parsed.get("added_tokens") or [])
        listed = {token["content"] for token in added}
        ids.update({str(token["content"]): int(token["id"]) for token in added})
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{origin} is damaged: model.vocab or added_tokens has an entry that is no text with "
            f"an id ({type(error).__name__}: {error}); download or copy the file again"
        ) from error
    taken = {number: name for name, number in ids.items()}
    where = f"{origin}: added_tokens_decoder of tokenizer_config.json"
    if not isinstance(entries, dict):
        raise UserError(f"{where} is no object; write {{id: {{content: ...}}}}")
    new = []
    for key, entry in entries.items():
        if not str(key).isdecimal() or not isinstance(entry, dict):
            raise UserError(f"{where} has the entry {key!r}, which is no id with an object")
        content = entry.get("content")
        if not isinstance(content, str) or not content:
            raise UserError(f"{where} has an entry {key} without content; write its text")
        new.append((int(key), content, entry))
    for number, content, entry in sorted(new, key=lambda item: item[0]):
        if content in listed:
            if ids[content] != number:
                raise UserError(
                    f"{where} gives {content!r} the id {number}, and tokenizer.json {ids[content]};"
                    " correct one of them"
                )
            continue
        if taken.get(number, content) != content or ids.get(content, number) != number:
            raise UserError(
                f"{where} gives {content!r} the id {number}, which tokenizer.json gives to "
                f"{taken.get(number)!r}; correct one of them"
            )
        if number > len(taken) and content not in ids:
            raise UserError(
                f"{where} gives {content!r} the id {number}, but the ids end at {len(taken) - 1}; "
                f"use {len(taken)}"
            )
        flags = {flag: bool(entry.get(flag)) for flag in _FLAGS}
        added.append({"id": number, "content": content, **flags})
        ids[content], taken[number] = number, content
        listed.add(content)
    key = next((k for k in _MORE_TOKENS if config.get(k)), _MORE_TOKENS[0])
    more = config.get(key) or []
    if not isinstance(more, (dict, list)):
        raise UserError(f"{origin}: {key} beside it must be a list of tokens, and is {more!r}")
    for token in more.values() if isinstance(more, dict) else more:
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str) and name not in ids:
            raise UserError(
                f"{origin}: tokenizer_config.json names the special token {name!r}, which has no "
                "id; add it to added_tokens_decoder there"
            )
    if len(added) == len(parsed.get("added_tokens") or []):
        return source
    parsed["added_tokens"] = sorted(added, key=lambda token: token["id"])
    return json.dumps(parsed, ensure_ascii=False, indent=2)


_MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Of an added token."""


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 at byte {error.start}; give a tokenizer.json"
        ) from error


def _no_tokenizer(path: Path, file: Path) -> str:
    if not path.exists():
        return f"tokenizer {path} does not exist; give a tokenizer.json or a folder that holds one"
    for other in ("tiktoken.model", "tokenizer.model", "vocab.json"):
        if (path / other).is_file():
            return (
                f"{file} does not exist; {path} holds {other}, which must be converted first: "
                f"transformers' AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained(...) "
                "writes a tokenizer.json"
            )
    return f"{file} does not exist; give a tokenizer.json or a folder that holds one"
