"""Conversations to ids, and which of the ids are answers; ``prepare_chat`` writes both to files.

A line of chat data is an object with ``messages`` (a list of ``{"role", "content"}``, roles as the
chat template knows them) or with ``prompt`` and ``response``. The tokenizer's chat template, a
Jinja text, turns a conversation into one text; a tokenizer without one gets ``PLAIN_TEMPLATE``.

Which part of that text is an answer is found exactly, in one of two ways:

- the template marks it with ``{% generation %} ... {% endgeneration %}``;
- else by rendering prefixes: the answer of message k is what the text of messages 0 to k has beyond
  the text of messages 0 to k - 1 with its generation prompt.

The whole text is encoded once, as everybody else encodes it who is asked the same; an id is an
answer's if it holds a character of an answer. Cut at the marks and encoded piece by piece, an
answer that begins with a space would get ids that no model is ever asked with.

A message's ``weight``, ``trainable``, ``train``, ``training`` or ``loss`` tells whether its answer
is learnt. The end token that a template without marks writes after an answer belongs to it, white
space after that does not.

What a message says is never read as a special token: a ``<｜end▁of▁sentence｜>`` that somebody
wrote becomes the characters it is made of. What a message says and the template leaves out is
refused where it is an answer, else counted and told.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from deepseek.config.errors import UserError
from deepseek.console import complain
from deepseek.data.corpus import Corpus
from deepseek.data.digests import FileDigest
from deepseek.data.documents import json_lines, json_type
from deepseek.data.indexed import IndexedDataset, IndexedWriter, dtype_for
from deepseek.data.prepare import (
    PreparedData,
    Progress,
    Report,
    already_there,
    corpus_for,
    input_sha256,
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
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
RENDER_SECONDS = 5.0
"""How long a chat template may take for one conversation."""
MOST_CHARACTERS = 1 << 26
"""That a chat template may write for one conversation."""
Span = tuple[int, int]
"""Characters [start, end) of a rendered text."""

Message = dict[str, Any]


class ChatError(UserError):
    """What is wrong with one conversation; the caller adds file and line."""


class Conversation(NamedTuple):
    """What a line of chat data holds."""

    messages: list[Message]
    """Up to the last answer."""
    tools: list[Any] | None
    """Handed to the template, if given."""
    learnt: list[bool] | None = None
    """For each answer, in order, whether it is learnt; None: all are."""


@dataclass(frozen=True)
class EncodedConversation:
    """The ids of a conversation."""

    ids: np.ndarray
    """int64 [n]."""
    is_answer: np.ndarray
    """bool [n]: which ids a model is to say itself."""
    ends: bool
    """Every answer ends with a special token, so that a model learns to stop."""
    lost: tuple[str, ...] = ()
    """What the messages say and the text does not, such as ``reasoning_content of assistant``."""


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
        self._template = self._compiled(self.source)
        # A template called tool_use is taken where a conversation has tools, as transformers does.
        self._tool_source = tokenizer.tool_chat_template or self.source
        self._tool_template = self._compiled(self._tool_source)
        self._eos = tokenizer.eos_id
        self._special = re.compile(
            "|".join(map(re.escape, sorted(tokenizer.special_names, key=len, reverse=True)))
            or r"(?!)"
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of the template and of which answers are taken."""
        tools = "" if self._tool_source == self.source else f"\ntools={self._tool_source}"
        text = f"{self.source}{tools}\nanswers={self.answers}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

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
        return self._ids(self.render(guarded, True), guard)[0]

    def end_id(self) -> int:
        """The token after an answer: what the template writes there, else the end of a document."""
        asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        encoded = self.encode(Conversation(asked, None))
        said = encoded.ids[encoded.is_answer].tolist()
        return next((id_ for id_ in reversed(said) if self.tokenizer.is_special(id_)), self._eos)

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Ids and answers.

        Raises:
            ChatError: the template refuses the conversation, leaves an answer out, or renders an
                earlier answer otherwise once more messages follow, so that its tokens cannot be
                told.
        """
        (messages, tools), guard = self._guarded(conversation[:2])
        find = self._answers_by_marks if self._has_marks else self._answers_by_prefixes
        text, spans = find(messages, tools)
        lost = _lost(messages, tools, text)
        if self.answers == "last":
            spans = spans[-1:]
        spans = self._learnt(spans, conversation)
        ids, places = self._ids(text, guard)
        starts, ends = places[:, 0], places[:, 1]
        is_answer = np.zeros(len(ids), bool)
        ended = True
        for start, end in spans:
            # An id of no width is white space that the tokenizer cuts off: it stands at its start.
            of_span = np.flatnonzero((starts < end) & (np.maximum(ends, starts + 1) > start))
            length = self._answer_length([ids[k] for k in of_span])
            ended &= length > 0 and self.tokenizer.is_special(ids[of_span[length - 1]])
            # As transformers marks: of a last character of several ids the first alone counts.
            marked = of_span[: int(np.argmax(ends[of_span] >= end)) + 1]
            is_answer[marked if self._has_marks else of_span[:length]] = True
        return EncodedConversation(np.array(ids, np.int64), is_answer, ended, lost)

    def _learnt(self, spans: list[Span], conversation: Conversation) -> list[Span]:
        """The answers that the conversation's own switches leave on."""
        learnt = conversation.learnt
        if learnt is None or all(learnt):
            return spans
        if self.answers == "last":
            learnt = learnt[-1:]
        if len(learnt) != len(spans):
            raise ChatError(
                f"switches off some of {len(learnt)} answers, but the chat template marks "
                f"{len(spans)}, so which is meant cannot be told; give the template one "
                "{% generation %} block for each answer"
            )
        kept = [span for span, on in zip(spans, learnt, strict=True) if on]
        if not kept:
            raise ChatError("no answer is to be learnt: all are switched off; leave the line out")
        return kept

    # -- text --

    @property
    def _has_marks(self) -> bool:
        return _GENERATION.search(self.source + self._tool_source) is not None

    def _answers_by_marks(
        self, messages: list[Message], tools: list[Any] | None
    ) -> tuple[str, list[Span]]:
        """The text and where its answers are, from the template's own marks."""
        pieces = re.split(f"[{''.join(_MARKS)}]", self._rendered(messages, False, tools))
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        spans = [(ends[k - 1], ends[k]) for k in range(1, len(pieces), 2) if pieces[k]]
        if not spans:
            raise ChatError("the chat template marks no answer in this conversation")
        return "".join(pieces), spans

    def _answers_by_prefixes(
        self, messages: list[Message], tools: list[Any] | None
    ) -> tuple[str, list[Span]]:
        """The text and where its answers are, from the texts of the first messages."""
        whole = self._rendered(messages, False, tools)
        spans: list[Span] = []
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
            spans.append((len(before), len(after)))
        return whole, spans

    def _rendered(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: list[Any] | None
    ) -> str:
        template = self._tool_template if tools is not None else self._template
        try:
            with time_limit(RENDER_SECONDS):
                text = "".join(
                    bounded(
                        template.generate(
                            messages=list(messages),
                            tools=tools,
                            documents=None,
                            add_generation_prompt=add_generation_prompt,
                            **self.tokenizer.special_texts,
                        )
                    )
                )
        except Exception as error:  # a template is a program of somebody else's
            what = str(error) or type(error).__name__
            raise ChatError(f"the chat template refuses this conversation: {what}") from error
        if not text:
            raise ChatError("the chat template renders this conversation as no text at all")
        return text

    def _compiled(self, source: str) -> Any:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Bounded(ImmutableSandboxedEnvironment):
            """Refuses products and powers that would not end or not fit."""

            intercepted_binops = frozenset({"*", "**"})

            def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
                sizes = [len(x) if hasattr(x, "__len__") else x for x in (left, right)]
                power = operator == "**" and max(map(abs, sizes)) > 1000
                if power or abs(sizes[0] * sizes[1]) > MOST_CHARACTERS:
                    raise OverflowError(f"{sizes[0]} {operator} {sizes[1]} is too large")
                return super().call_binop(context, operator, left, right)

        environment = Bounded(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _generation_extension()],
        )

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(source)
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

    def _ids(self, text: str, guard: str) -> tuple[list[int], np.ndarray]:
        """Ids of a rendered text, and the characters [start, end) of each, int64 [n, 2]."""
        if not guard:
            return self.tokenizer.encode_with_places(text, parse_special=True)
        ids: list[int] = []
        places: list[np.ndarray] = [np.zeros((0, 2), np.int64)]
        start = 0

        def add(piece: str, special: bool) -> None:
            kept = np.array([k for k, c in enumerate(piece) if c != guard], np.int64)
            found, where = self.tokenizer.encode_with_places(piece.replace(guard, ""), special)
            last = len(kept) - 1
            if found:
                begin, end = kept[where[:, 0].clip(0, last)], kept[(where[:, 1] - 1).clip(0, last)]
                places.append(np.stack([begin, end + 1], axis=1) + start)
            ids.extend(found)

        for match in self._special.finditer(text):
            add(text[start : match.start()], False)
            start = match.start()
            add(match[0], True)
            start = match.end()
        add(text[start:], False)
        return ids, np.concatenate(places)

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
    told = [_message(k, message) for k, message in enumerate(messages)]
    answers = [k for k, message in enumerate(told) if message["role"] == "assistant"]
    if not answers:
        raise ChatError("no message has the role assistant, so there is nothing to learn")
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


_SWITCHES = ("weight", "trainable", "train", "training", "loss")
"""Keys by which data sets say whether an answer is learnt."""
_UNREAD = ("train_detail", "mask", "loss_mask", "loss_weight")
"""Keys of finer switches, which are not done here and so are refused."""


def _message(number: int, message: Any) -> Message:
    """Checks a message; text in parts becomes one text, and switches are taken out."""
    if not isinstance(message, Mapping):
        raise ChatError(f"message {number} is a JSON {json_type(message)}, expected an object")
    told = {key: value for key, value in message.items() if key not in _SWITCHES}
    role, content = told.get("role"), told.get("content")
    if not isinstance(role, str):
        found = f"a JSON {json_type(role)}" if "role" in told else "missing"
        raise ChatError(f"message {number}: role is {found}, expected text")
    for key in _UNREAD:
        if key in told:
            raise ChatError(
                f"message {number}: {key} is not read here; use weight 0 or 1 on the whole message"
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


def _check_unicode(what: str, value: Any) -> None:
    for text in _texts(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ChatError(
                f"{what}: character {error.start} of the text is half of a surrogate pair, which "
                "no tokenizer can read; write the whole character"
            ) from error


def _joined(number: int, parts: list[Any]) -> str:
    """OpenAI's list of parts as one text."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else json_type(part)
        text = part.get("text") if kind == "text" else part if isinstance(part, str) else None
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
                f"message {number}: {key}={value!r} must be 0 or 1, false or true: an answer is "
                "learnt or not"
            )
    if len({bool(value) for value in given.values()}) > 1:
        told = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ChatError(f"message {number}: {told} contradict each other; keep one")
    return all(given.values())


def _texts(value: Any) -> Iterator[str]:
    """Every text inside a JSON value, keys of objects aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


_BOOKKEEPING = {"role", "tool_call_id", "name", "id"}
"""Keys of a message that templates may leave out without losing what it says."""


def _lost(messages: Sequence[Message], tools: list[Any] | None, text: str) -> tuple[str, ...]:
    """What messages say and the rendered text does not.

    Raises:
        ChatError: an answer, or a call of a tool, is left out.
    """
    lost: list[str] = []
    if tools and not any(name in text for name in _texts(tools)):
        lost.append("tools")
    for k, message in enumerate(messages):
        for call in message.get("tool_calls") or []:
            called = call.get("function", call) if isinstance(call, Mapping) else {}
            name = called.get("name") if isinstance(called, Mapping) else None
            if not isinstance(name, str) or name not in text:
                raise ChatError(
                    f"message {k}: the chat template has no place for its tool_calls, so what is "
                    "to be learnt would be lost; use a tokenizer whose template writes them"
                )
        for key, value in message.items():
            if key in _BOOKKEEPING or key == "tool_calls" or value in (None, "", [], {}):
                continue
            if all(_is_told(said, text) for said in _texts(value)):
                continue
            if key == "content" and message["role"] == "assistant":
                answer = str(value).rpartition("</think>")[2]
                if answer == value or not _is_told(answer, text):
                    raise ChatError(
                        f"message {k}: the chat template leaves the answer out of its text; use a "
                        "template that writes it, or leave the line out"
                    )
                lost.append("reasoning before </think> in content of assistant")
            else:
                lost.append(f"{key} of {message['role']}")
    return tuple(sorted(set(lost)))


def _is_told(said: str, text: str) -> bool:
    """Whether a text stands in the rendered one, as it is or as JSON writes it."""
    said = said.strip()
    return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text


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


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def bounded(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text, as long as they are no more than ``MOST_CHARACTERS`` together."""
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MOST_CHARACTERS:
            raise OverflowError(f"it writes more than {MOST_CHARACTERS:,} characters")
        yield piece


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends what takes longer, in the main thread; elsewhere there is no such means."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"it does not end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
