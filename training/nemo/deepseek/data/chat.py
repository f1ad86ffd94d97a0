"""Conversations to ids, and which of the ids are answers; ``prepare_chat`` writes both to files.

A line of chat data is an object with ``messages`` (a list of ``{"role", "content"}``, roles as the
chat template knows them) or with ``prompt`` and ``response``. The tokenizer's chat template, a
Jinja text, turns a conversation into one text; a tokenizer without one gets ``PLAIN_TEMPLATE``.

Which part of that text is an answer is found exactly, in one of two ways:

- the template marks it with ``{% generation %} ... {% endgeneration %}``;
- else by rendering prefixes: the answer of message k is what the text of messages 0 to k has beyond
  the text of messages 0 to k - 1 with its generation prompt.

Answers and what lies between them are encoded piece by piece, as they are when a model is asked:
the prompt is encoded alone, and the answer's tokens come after it. The end token that the template
writes after an answer belongs to it, white space after that does not.

What a message says is never read as a special token: a ``<｜end▁of▁sentence｜>`` that somebody
wrote becomes the characters it is made of.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from deepseek.config.errors import UserError
from deepseek.data.corpus import Corpus, json_lines, json_type
from deepseek.data.indexed import IndexedDataset, IndexedWriter, dtype_for
from deepseek.data.prepare import (
    PreparedData,
    Progress,
    Report,
    already_there,
    input_sha256,
    is_output,
    one_writer,
)
from deepseek.data.tokenizer import Tokenizer, load_tokenizer
from deepseek.files import add_suffix, atomic_open, disk_errors, require_room

ANSWERS = ".answers"
"""Suffix of the file that tells which ids are answers: one byte for each id of ``P.bin``, 1 if a
model is to say it, else 0."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the roles are system, user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For tokenizers without a chat template: roles in plain words, an end token after each answer."""

_MARKS = ("\ue0f0", "\ue0f1")
"""Written by ``{% generation %}`` and ``{% endgeneration %}``."""

Message = dict[str, Any]


class ChatError(UserError):
    """What is wrong with one conversation; the caller adds file and line."""


class Conversation(NamedTuple):
    """What a line of chat data holds."""

    messages: list[Message]
    """Up to the last answer."""
    tools: list[Any] | None
    """Handed to the template, if given."""


@dataclass(frozen=True)
class EncodedConversation:
    """The ids of a conversation."""

    ids: np.ndarray
    """int64 [n]."""
    is_answer: np.ndarray
    """bool [n]: which ids a model is to say itself."""
    ends: bool
    """Every answer ends with a special token, so that a model learns to stop."""


@final
class ChatTemplate:
    """Renders and encodes conversations.

    Args:
        tokenizer: has the template, or none.
        answers: ``all``: every message of the assistant; ``last``: only the last.

    Raises:
        UserError: the template is not Jinja, or there are several and none is called ``default``.
    """

    def __init__(self, tokenizer: Tokenizer, answers: str = "all") -> None:
        if answers not in ("all", "last"):
            raise UserError(f"answers={answers} must be all or last; use all")
        self.tokenizer, self.answers = tokenizer, answers
        self.source = tokenizer.chat_template or PLAIN_TEMPLATE
        """The Jinja text."""
        self.is_plain = tokenizer.chat_template is None
        self._template = self._compiled()
        self._special = re.compile(
            "|".join(map(re.escape, sorted(tokenizer.special_names, key=len, reverse=True)))
            or r"(?!)"
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of the template and of which answers are taken."""
        return hashlib.sha256(f"{self.source}\nanswers={self.answers}".encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: list[Any] | None = None,
    ) -> str:
        """The text of a conversation, without marks around its answers.

        Raises:
            ChatError: the template refuses it.
        """
        text = self._rendered(messages, add_generation_prompt, tools)
        return re.sub(f"[{''.join(_MARKS)}]", "", text) if self._has_marks else text

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids that a model is asked to go on from. Raises ``ChatError`` as ``render``."""
        (guarded, _), guard = self._guarded((list(messages), None))
        return self._ids(self.render(guarded, True), guard)

    def end_id(self) -> int:
        """The token after an answer: what the template writes there, else the end of a document."""
        asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        encoded = self.encode(Conversation(asked, None))
        last = int(encoded.ids[encoded.is_answer][-1])
        return last if self.tokenizer.is_special(last) else self.tokenizer.eos_id

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Ids and answers.

        Raises:
            ChatError: the template refuses the conversation, or renders an earlier answer otherwise
                once more messages follow, so that its tokens cannot be told.
        """
        (messages, tools), guard = self._guarded(conversation)
        find = self._parts_by_marks if self._has_marks else self._parts_by_prefixes
        parts = find(messages, tools)
        if self.answers == "last":
            last = max(k for k, (_, is_answer) in enumerate(parts) if is_answer)
            parts = [(text, is_answer and k == last) for k, (text, is_answer) in enumerate(parts)]
        ids: list[int] = []
        is_answer: list[bool] = []
        ends = True
        for text, answer in parts:
            found = self._ids(text, guard)
            length = len(found)
            if answer:
                length = self._answer_length(found)
                ends &= length > 0 and self.tokenizer.is_special(found[length - 1])
            ids += found
            is_answer += [answer and k < length for k in range(len(found))]
        return EncodedConversation(np.array(ids, np.int64), np.array(is_answer, bool), ends)

    # -- text --

    @property
    def _has_marks(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    def _parts_by_marks(
        self, messages: list[Message], tools: list[Any] | None
    ) -> list[tuple[str, bool]]:
        """(text, is it an answer), from the template's own marks."""
        text = self._rendered(messages, False, tools)
        pieces = re.split(f"[{''.join(_MARKS)}]", text)
        parts = [(piece, k % 2 == 1) for k, piece in enumerate(pieces) if piece]
        if not any(is_answer for _, is_answer in parts):
            raise ChatError("the chat template marks no answer in this conversation")
        return parts

    def _parts_by_prefixes(
        self, messages: list[Message], tools: list[Any] | None
    ) -> list[tuple[str, bool]]:
        """(text, is it an answer), from the texts of the first messages."""
        whole = self._rendered(messages, False, tools)
        parts: list[tuple[str, bool]] = []
        done = 0
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if self.answers == "last" and k < len(messages) - 1:
                continue
            before = self._rendered(messages[:k], True, tools)
            after = self._rendered(messages[: k + 1], False, tools)
            if not after.startswith(before):
                raise ChatError(
                    f"the chat template writes message {k} (assistant) otherwise than its "
                    "generation prompt begins, so the answer's first token cannot be told; add "
                    "{% generation %} marks to the template"
                )
            if not whole.startswith(after):
                raise ChatError(
                    f"the chat template writes message {k} (assistant) otherwise once other "
                    "messages follow (some drop earlier reasoning); use --answers last, or add "
                    "{% generation %} marks to the template"
                )
            parts += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
            done = len(after)
        return [part for part in [*parts, (whole[done:], False)] if part[0]]

    def _rendered(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: list[Any] | None
    ) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self._template.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_texts,
            )
        except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
            raise ChatError(f"the chat template refuses this conversation: {error}") from error

    def _compiled(self) -> Any:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _generation_extension()],
        )

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template of {self.tokenizer.origin} is not Jinja: line {error.lineno}: "
                f"{error.message}; correct chat_template in tokenizer_config.json"
            ) from error

    # -- ids --

    def _guarded(
        self, said: tuple[list[Message], list[Any] | None]
    ) -> tuple[tuple[list[Message], list[Any] | None], str]:
        """Messages and tools in which no special token can be read, and what sees to it.

        That is a character which the conversation does not have, put into every special token that
        is spelt out in it; "" if none is.
        """
        text = json.dumps(said, ensure_ascii=False)
        if self._has_marks and not {*text}.isdisjoint(_MARKS):
            raise ChatError("holds the private characters U+E0F0 or U+E0F1; remove them")
        if not self._special.search(text):
            return (said[0], said[1]), ""
        taken = {*text, *_MARKS}
        guard = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in taken)

        def guarded(value: Any) -> Any:
            if isinstance(value, str):
                return self._special.sub(lambda match: match[0][0] + guard + match[0][1:], value)
            if isinstance(value, list):
                return [guarded(item) for item in value]
            if isinstance(value, Mapping):
                return {key: guarded(item) for key, item in value.items()}
            return value

        return (guarded(said[0]), guarded(said[1])), guard

    def _ids(self, text: str, guard: str) -> list[int]:
        if not guard:
            return self.tokenizer.encode(text, parse_special=True)
        ids: list[int] = []
        start = 0
        for match in self._special.finditer(text):
            ids += self.tokenizer.encode(text[start : match.start()].replace(guard, ""))
            ids += self.tokenizer.encode(match[0], parse_special=True)
            start = match.end()
        return ids + self.tokenizer.encode(text[start:].replace(guard, ""))

    def _answer_length(self, ids: list[int]) -> int:
        """Without white space after the last special token."""
        for k in range(len(ids), 0, -1):
            if self.tokenizer.is_special(ids[k - 1]):
                blank = not self.tokenizer.decode(ids[k:]).strip()
                return k if blank else len(ids)
        return len(ids)


def conversation_of(row: Any) -> Conversation:
    """Checks one line of chat data.

    Raises:
        ChatError: what is wrong with it, and the way out.
    """
    if not isinstance(row, Mapping):
        raise ChatError(f'a JSON {json_type(row)}, expected an object: {{"messages": [...]}}')
    if "messages" in row:
        messages = row["messages"]
    elif "prompt" in row and "response" in row:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
    else:
        raise ChatError(
            f"has the keys {', '.join(map(str, row)) or '(none)'}, expected messages, or prompt "
            'and response; write {"messages": [{"role": "user", "content": "..."}, ...]}'
        )
    if not isinstance(messages, list):
        raise ChatError(f"messages is a JSON {json_type(messages)}, expected a list of messages")
    for k, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatError(f"message {k} is a JSON {json_type(message)}, expected an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = f"a JSON {json_type(message[key])}" if key in message else "missing"
                raise ChatError(f"message {k}: {key} is {found}, expected text")
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    for k in answers:
        if not messages[k]["content"].strip() and not messages[k].get("tool_calls"):
            raise ChatError(
                f"message {k}: the answer is empty, so a model would learn to say nothing; write "
                "the answer or leave the line out"
            )
    if not answers:
        raise ChatError("no message has the role assistant, so there is nothing to learn")
    if answers[0] == 0:
        raise ChatError("message 0 is the assistant's: an answer needs something before it")
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ChatError(f"tools is a JSON {json_type(tools)}, expected a list")
    return Conversation([dict(message) for message in messages[: answers[-1] + 1]], tools)


# -- files --


def prepare_chat(
    inputs: Sequence[Path],
    output_prefix: Path,
    tokenizer: Path,
    *,
    answers: str = "all",
    overwrite: bool = False,
    progress: Report | None = None,
) -> PreparedData:
    """Turn conversations into ``P.bin``, ``P.idx``, ``P.answers``, ``P.json`` and ``P.tokenizer/``.

    A document is a conversation. Nothing is cut here: how long a sequence may be is the run's to
    say. If the same data is already there it returns at once.

    Args:
        inputs: ``.jsonl`` files, or folders of them, also ``.zst``.
        output_prefix: ``P``.
        tokenizer: of the model that is to be fine-tuned.
        answers: ``all`` messages of the assistant are learnt, or the ``last`` of each conversation.
        overwrite: replace other data under the same prefix.
        progress: called as the work goes on.

    Raises:
        UserError: a line that is no conversation (with file and line), unreadable input, no room on
            the disk, other data under the prefix.
    """
    prefix = Path(output_prefix)
    template = ChatTemplate(load_tokenizer(tokenizer), answers)
    with disk_errors(f"preparing {prefix}"):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        answer_file = add_suffix(prefix, ANSWERS)
        corpus = Corpus.from_paths(
            inputs, exclude=lambda path: is_output(path, prefix) or path == answer_file
        )
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
    bin_digest, answers_digest = hashlib.sha256(), hashlib.sha256()
    # Without a record nothing of this prefix is taken for whole.
    add_suffix(prefix, ".json").unlink(missing_ok=True)
    with (
        atomic_open(add_suffix(prefix, ANSWERS)) as answers,
        IndexedWriter(prefix, dtype) as writer,
    ):
        for ids, is_answer, ends, said, done in _encoded(corpus, template, digests):
            writer.add_document(ids)
            answers.write(is_answer.tobytes())
            bin_digest.update(ids.astype(writer.dtype).tobytes())
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
    prepared = PreparedData(
        prefix=prefix,
        documents=counts["documents"],
        empty_documents=0,
        tokens=counts["tokens"],
        text_bytes=counts["text_bytes"],
        max_id=counts["max_id"],
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bin_sha256=bin_digest.hexdigest(),
        settings=settings,
        input_stat=corpus.stat_digest(),
        input_sha256=input_sha256(corpus, digests),
        chat={
            "answer_tokens": counts["answer_tokens"],
            "longest": counts["longest"],
            "without_end": counts["unended"],
            "answers_sha256": answers_digest.hexdigest(),
        },
    )
    if template.is_plain:  # runs on these data are asked as they were taught
        tokenizer = tokenizer.with_chat_template(template.source)
    tokenizer.save(prepared.tokenizer_folder)
    IndexedDataset(prefix)
    prepared.save()
    return replace(prepared, note="prepared")


def _encoded(
    corpus: Corpus, template: ChatTemplate, digests: list[str]
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
            said = sum(len(message["content"].encode()) for message in conversation.messages)
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


# -- templates --


def _generation_extension() -> type:
    """``{% generation %}`` puts marks around what it encloses."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = [nodes.Output([nodes.TemplateData(mark)]) for mark in _MARKS]
            return [marks[0].set_lineno(line), *body, marks[1].set_lineno(line)]

    return Generation


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
