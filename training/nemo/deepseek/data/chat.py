"""Chat data: the lines of a file as conversations; ``prepare_chat`` writes their ids to files.

A line of chat data is an object of one of the forms of ``_messages``. A message's ``weight``,
``trainable``, ``train``, ``training`` or ``loss`` tells whether its answer is learnt.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.config.errors import UserError, shown
from deepseek.console import complain
from deepseek.data.chat_template import ChatError, ChatTemplate, Conversation, Message
from deepseek.data.corpus import Corpus
from deepseek.data.digests import FileDigest
from deepseek.data.documents import json_lines, json_type
from deepseek.data.indexed import IndexedDataset, IndexedWriter, dtype_for
from deepseek.data.prepared import (
    PreparedData,
    Progress,
    Report,
    already_there,
    corpus_for,
    input_sha256,
    one_writer,
)
from deepseek.data.tokenizer_files import load_tokenizer
from deepseek.files import add_suffix, atomic_open, disk_errors, require_room

ANSWERS = ".answers"
"""Suffix of the file that tells which ids are answers: one byte for each id of ``P.bin``, 1 if a
model is to say it, else 0."""


def conversation_of(row: Any) -> Conversation:
    """Checks one line of chat data.

    Raises:
        ChatError: what is wrong with it, and the way out.
    """
    if not isinstance(row, Mapping):
        raise ChatError(f'a JSON {json_type(row)}, expected an object: {{"messages": [...]}}')
    for key in _SWITCHES:
        value = row.get(key)
        if value is not None and (value != 1 if key == "weight" else value in (0, False)):
            raise ChatError(
                f"{key}={shown(value)} of a whole line is not read here; give it to each message, "
                "or leave the line out"
            )
    for key in _UNREAD_OF_LINES:
        if row.get(key):
            raise ChatError(
                f"{key} is not read here, and the text, or what is learnt of it, would be another "
                "with it; remove it, or leave the line out"
            )
    messages = _messages(row)
    told = [_message(k, message) for k, message in enumerate(messages)]
    answers = [k for k, message in enumerate(told) if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(dict.fromkeys(shown(message["role"]) for message in told)) or "none"
        raise ChatError(
            f"no message has the role assistant, so there is nothing to learn (roles: {roles})"
        )
    if answers[0] == 0:
        raise ChatError("message 0 is the assistant's: an answer needs something before it")
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ChatError(f"tools is a JSON {json_type(tools)}, expected a list")
    _check_unicode("tools", tools)
    learnt = [_is_learnt(k, messages[k]) for k in answers]
    for k, on in zip(answers, learnt, strict=True):
        content = told[k].get("content")
        if on and not (content or "").strip() and not told[k].get("tool_calls"):
            raise ChatError(
                f"message {k}: the answer is empty, so a model would learn to say nothing; write "
                "the answer or leave the line out"
            )
    return Conversation(told[: answers[-1] + 1], tools, learnt)


def _messages(row: Mapping[str, Any]) -> list[Any]:
    """The messages of a line, whichever form data sets give them in.

    - ``messages``, or ``conversations`` (ShareGPT), of ``role`` and ``content``, or of ``from`` and
      ``value``; roles as the chat template knows them; beside it ``system``;
    - ``prompt`` with ``completion`` or ``response``, each a text or a list of messages: what the
      prompt's assistant says is not learnt;
    - ``instruction`` with ``output`` (Alpaca), ``input`` on a line of its own after the
      instruction; ``system``; ``history``, a list of earlier ``[question, answer]``.

    Raises:
        ChatError: none of these.
    """
    system = row.get("system")
    first = [{"role": "system", "content": system}] if system not in (None, "") else []
    for one, other in (("messages", "conversations"), ("completion", "response")):
        if row.get(one) is not None and row.get(other) is not None:
            raise ChatError(f"has both {one} and {other}, of which one would be lost; keep one")
    for key in ("messages", "conversations"):
        if key in row:
            return [*first, *(_share_gpt(k, m) for k, m in enumerate(_list(key, row[key])))]
    for answer in ("completion", "response"):
        if {"prompt", answer} <= row.keys():
            asked = [
                {**{k: v for k, v in message.items() if k not in _SWITCHES}, "weight": 0}
                if isinstance(message, Mapping) and message.get("role") == "assistant"
                else message
                for message in _side(row["prompt"], "user")
            ]
            return [*first, *asked, *_side(row[answer], "assistant")]
    if {"instruction", "output"} <= row.keys():
        earlier = []
        for k, pair in enumerate(_list("history", row.get("history") or [])):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ChatError(f"history: entry {k} is no [question, answer]")
            earlier += [*_side(pair[0], "user"), *_side(pair[1], "assistant")]
        task, more = row["instruction"], row.get("input") or ""
        if not isinstance(more, str):
            raise ChatError(f"input is a JSON {json_type(more)}, expected text")
        if isinstance(task, str) and more:
            task = f"{task}\n{more}" if task else more
        return [*first, *earlier, *_side(task, "user"), *_side(row["output"], "assistant")]
    raise ChatError(
        f"has the keys {', '.join(map(str, row)) or '(none)'}, expected messages, conversations, "
        "prompt and completion (or response), or instruction and output; write "
        '{"messages": [{"role": "user", "content": "..."}, ...]}'
    )


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ChatError(f"{key} is a JSON {json_type(value)}, expected a list of messages")
    return value


def _side(value: Any, role: str) -> list[Any]:
    """A list of messages as it is, anything else as what one role says."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


_SHARE_GPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
"""Roles under other names."""


def _share_gpt(number: int, message: Any) -> Any:
    """A message of ``from`` and ``value`` as one of ``role`` and ``content``; others unchanged.

    Raises:
        ChatError: both, or a call of a tool, whose form is each data set's own.
    """
    if not isinstance(message, Mapping) or not {"from", "value"} & message.keys():
        return message
    if {"role", "content"} & message.keys():
        raise ChatError(f"message {number}: has from or value beside role or content; keep one")
    told = {key: value for key, value in message.items() if key not in ("from", "value")}
    for key, name in (("from", "role"), ("value", "content")):
        if key not in message:
            raise ChatError(f"message {number}: {key} is missing, expected text")
        told[name] = message[key]
    if told["role"] in ("function_call", "observation"):
        raise ChatError(
            f"message {number}: from={told['role']} is not read here; write the call as tool_calls "
            "of the assistant and what came back as role tool"
        )
    if isinstance(told["role"], str):
        told["role"] = _SHARE_GPT.get(told["role"], told["role"])
    return told


_SWITCHES = ("weight", "trainable", "train", "training", "loss")
"""Keys by which data sets say whether an answer is learnt."""
_UNREAD = {
    **dict.fromkeys(
        ("train_detail", "mask", "masked", "loss_mask", "loss_weight", "ignore_loss", "train_on"),
        "use weight 0 or 1 on the whole message",
    ),
    "function_call": "write OpenAI's newer form, tool_calls",
}
"""Keys of a message that are not done here, and the way out."""
_UNREAD_OF_LINES = (
    "images", "image", "videos", "audios", "functions", "documents", "chat_template_kwargs", "mask",
    "loss_mask", "loss_weight", "train_on_inputs",
)  # fmt: skip
"""Keys of a line that change the text or what is learnt of it, and are not done here."""


def _message(number: int, message: Any) -> Message:
    """Checks a message; text in parts becomes one text, and switches are taken out."""
    if not isinstance(message, Mapping):
        raise ChatError(f"message {number} is a JSON {json_type(message)}, expected an object")
    told = {key: value for key, value in message.items() if key not in _SWITCHES}
    role, content = told.get("role"), told.get("content")
    if not isinstance(role, str):
        found = f"a JSON {json_type(role)}" if "role" in told else "missing"
        raise ChatError(f"message {number}: role is {found}, expected text")
    for key, way_out in _UNREAD.items():
        if told.get(key) is not None:
            raise ChatError(f"message {number}: {key} is not read here; {way_out}")
    calls = told.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise ChatError(
            f"message {number}: tool_calls is a JSON {json_type(calls)}, expected a list"
        )
    if isinstance(content, list):
        told["content"] = _joined(number, content)
    elif content is None and role == "assistant" and told.get("tool_calls"):
        told["content"] = None  # OpenAI's form: the call is all that is said
    elif not isinstance(content, str):
        found = f"a JSON {json_type(content)}" if "content" in told else "missing"
        raise ChatError(f"message {number}: content is {found}, expected text")
    _check_unicode(f"message {number}", told)
    return told


def _check_unicode(what: str, said: Any) -> None:
    """Raise ``ChatError`` for half a character, keys included."""
    try:
        json.dumps(said, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half, before = error.object[error.start], error.object[: error.start][-20:]
        raise ChatError(
            f"{what}: holds half of a surrogate pair ({half!a} after {before!a}), which no "
            "tokenizer can read; write the whole character"
        ) from error


_TEXTS = ("text", "input_text", "output_text")
"""Types of parts that are text, in OpenAI's two interfaces."""


def _joined(number: int, parts: list[Any]) -> str:
    """OpenAI's list of parts as one text."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else json_type(part)
        text = part.get("text") if kind in _TEXTS else part if isinstance(part, str) else None
        if not isinstance(text, str):
            raise ChatError(
                f"message {number}: content has a part of type {kind}, and this model reads text "
                'alone; write {"type": "text", "text": "..."} or leave the line out'
            )
        texts.append(text)
    return "".join(texts)


def _is_learnt(number: int, message: Mapping[str, Any]) -> bool:
    """What a message's own switch says; no switch: learnt."""
    given = {key: message[key] for key in _SWITCHES if message.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):  # True and False among them
            raise ChatError(
                f"message {number}: {key}={value!r:.60} must be 0 or 1, false or true: an answer "
                "is learnt or not"
            )
    if len({bool(value) for value in given.values()}) > 1:
        told = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ChatError(f"message {number}: {told} contradict each other; keep one")
    return all(given.values())


# -- files --


def prepare_chat(
    inputs: Sequence[Path],
    output_prefix: Path,
    tokenizer: Path,
    *,
    answers: str = "all",
    overwrite: bool = False,
    strict: bool = False,
    progress: Report | None = None,
) -> PreparedData:
    """Turn conversations into ``P.bin``, ``P.idx``, ``P.answers``, ``P.json`` and ``P.tokenizer/``.

    A document is a conversation. Nothing is cut here: how long a sequence may be is the run's to
    say. If the same data is already there it returns at once.

    Args:
        inputs: ``.jsonl`` files, or folders of them, also compressed.
        output_prefix: ``P``.
        tokenizer: of the model that is to be fine-tuned.
        answers: ``all`` messages of the assistant are learnt, or the ``last`` of each conversation.
        overwrite: replace other data under the same prefix.
        strict: refuse folders of which something would be left out.
        progress: called as the work goes on.

    Raises:
        UserError: a line that is no conversation (with file and line), unreadable input, no room on
            the disk, other data under the prefix.
    """
    prefix = Path(output_prefix)
    template = ChatTemplate(load_tokenizer(tokenizer), answers)
    with disk_errors(f"preparing {prefix}"):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        corpus = corpus_for(prefix, inputs, strict)
        for source in corpus.sources:
            if source.kind != "jsonl":
                raise UserError(
                    f"{source.path}: conversations are read from .jsonl files (also .jsonl.zst), "
                    "one on each line; convert it, or leave out --chat to read it as text"
                )
        settings = {
            "inputs": "conversations",
            "chat_template": template.fingerprint,
            "answers": answers,
            "tokenizer": f"given {template.tokenizer.fingerprint}",
        }
        with one_writer(prefix):
            done = already_there(prefix, corpus, settings, overwrite)
            if done is not None and answers_of(done) is not None:
                return done
            report = progress or (lambda state: None)
            return _write(prefix, corpus, settings, template, report)


def answers_of(record: PreparedData) -> np.ndarray | None:
    """Which ids of ``P.bin`` are answers.

    Returns:
        uint8 [tokens], mapped from the file; None if it is missing or of another size.
    """
    path = add_suffix(record.prefix, ANSWERS)
    if not path.is_file() or path.stat().st_size != record.tokens:
        return None
    return np.memmap(path, np.uint8, "r")


def _write(
    prefix: Path,
    corpus: Corpus,
    settings: dict[str, str],
    template: ChatTemplate,
    report: Report,
) -> PreparedData:
    tokenizer = template.tokenizer
    dtype = dtype_for(tokenizer.vocab_size)
    packed = sum(source.size for source in corpus.sources if source.compressed)
    # English has 3 to 5 bytes an id, and each id takes a byte in the answers as well.
    needed = (corpus.total_bytes + 3 * packed) * (dtype.itemsize + 1) // 2
    require_room(prefix.parent, needed, f"{prefix.name}.bin")
    digests: list[str] = []
    counts: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    answers_digest = hashlib.sha256()
    # Without a record nothing of this prefix is taken for whole.
    add_suffix(prefix, ".json").unlink(missing_ok=True)
    with (
        atomic_open(add_suffix(prefix, ANSWERS)) as answers,
        IndexedWriter(prefix, dtype) as writer,
    ):
        for ids, is_answer, ends, said, done in _encoded(corpus, template, digests, lost):
            writer.add_document(ids)
            answers.write(is_answer.tobytes())
            answers_digest.update(is_answer.tobytes())
            counts["documents"] += 1
            counts["tokens"] += len(ids)
            counts["answer_tokens"] += int(is_answer.sum())
            counts["text_bytes"] += said
            counts["unended"] += not ends
            counts["longest"] = max(counts["longest"], len(ids))
            counts["max_id"] = max(counts["max_id"], int(ids.max()))
            if counts["documents"] % 256 == 0:
                report(_progress(corpus, counts, done))
        if not counts["documents"]:
            raise UserError(
                f"{prefix}: the input holds no conversation: {len(corpus.sources)} empty files"
            )
    report(_progress(corpus, counts, corpus.total_bytes))
    for what, times in lost.most_common():
        complain(
            f"note: in {times:,} of {counts['documents']:,} conversations the chat template leaves "
            f"out {what}, so it is not learnt"
        )
    files = {suffix: FileDigest.of(add_suffix(prefix, suffix)) for suffix in (".bin", ".idx")}
    prepared = PreparedData(
        prefix=prefix,
        documents=counts["documents"],
        empty_documents=0,
        tokens=counts["tokens"],
        text_bytes=counts["text_bytes"],
        max_id=counts["max_id"],
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bin_sha256=files[".bin"].sha256,
        settings=settings,
        input_stat=corpus.stat_digest(),
        input_sha256=input_sha256(corpus, digests),
        chat={
            "answer_tokens": counts["answer_tokens"],
            "longest": counts["longest"],
            "without_end": counts["unended"],
            "answers_sha256": answers_digest.hexdigest(),
        },
        files=files,
    )
    if template.is_plain:  # runs on these data are asked as they were taught
        tokenizer = tokenizer.with_chat_template(template.source)
    tokenizer.save(prepared.tokenizer_folder)
    IndexedDataset(prefix)
    prepared.save()
    return replace(prepared, note="prepared")


def _encoded(
    corpus: Corpus, template: ChatTemplate, digests: list[str], lost: Counter[str]
) -> Iterator[tuple[np.ndarray, np.ndarray, bool, int, int]]:
    """Ids, answers (uint8), whether all answers end, bytes said, and input bytes done."""
    before = 0
    for source in corpus.sources:
        digest = hashlib.sha256()
        for where, row, position in json_lines(source, digest):
            try:
                conversation = conversation_of(row)
                encoded = template.encode(conversation)
            except ChatError as error:
                raise UserError(f"{where}: {error}") from error
            lost.update(encoded.lost)
            said = sum(
                len((message["content"] or "").encode()) for message in conversation.messages
            )
            yield (
                encoded.ids,
                encoded.is_answer.astype(np.uint8),
                encoded.ends,
                said,
                before + position,
            )
        before += source.size
        digests.append(digest.hexdigest())


def _progress(corpus: Corpus, counts: Counter[str], done: int) -> Progress:
    total = corpus.total_bytes
    return Progress("tokenizing", done, total, counts["documents"], counts["tokens"])
