"""Chat templates: conversations to ids, and which of the ids are answers.

The tokenizer's chat template, a Jinja text, turns a conversation into one text; a tokenizer without
one gets ``PLAIN_TEMPLATE``.

Which part of that text is an answer is found exactly, in one of two ways:

- the template marks it with ``{% generation %} ... {% endgeneration %}``;
- else by rendering prefixes: the answer of message k is what the text of messages 0 to k has beyond
  the text of messages 0 to k - 1 with its generation prompt, or with the part of that prompt, up to
  an added token, that it shares.

The whole text is encoded once, as everybody else encodes it who is asked the same; an id is an
answer's if it holds a character of an answer. Cut at the marks and encoded piece by piece, an
answer that begins with a space would get ids that no model is ever asked with.

The end token that a template without marks writes after an answer belongs to it, white space after
that does not.

What a message says is never read as a special token: a ``<｜end▁of▁sentence｜>`` that somebody
wrote becomes the characters it is made of. What a message says and the template leaves out is
refused where it is an answer, else counted and told.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, final

import numpy as np

from deepseek.config.errors import UserError
from deepseek.data.tokenizer import Tokenizer

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
        self._has_marks = any(
            template.environment.marks_answers for template in (self._template, self._tool_template)
        )
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
        """The token after an answer: what the template writes there, else the end of a document.

        Raises:
            ChatError: the template refuses a question with an answer.
            UserError: it writes no special token, and none ends a document.
        """
        asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        encoded = self.encode(Conversation(asked, None))
        said = encoded.ids[encoded.is_answer].tolist()
        ends = [token for token in said if self.tokenizer.is_special(token)]
        return ends[-1] if ends else self.tokenizer.required_eos()

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Ids and answers.

        Raises:
            ChatError: the template refuses the conversation, leaves an answer out, or renders an
                earlier answer otherwise once more messages follow, so that its tokens cannot be
                told.
        """
        (messages, tools), guard = self._guarded(conversation[:2])
        template = self._template if tools is None else self._tool_template
        marked = template.environment.marks_answers
        find = self._answers_by_marks if marked else self._answers_by_prefixes
        text, spans = find(messages, tools)
        lost = _lost(messages, tools, text)
        self._refuse_lost_calls(messages, tools)
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
            if not of_span.size:
                raise ChatError(
                    "an answer becomes no id at all: the chat template leaves it out, or the "
                    "tokenizer drops its characters; leave the line out"
                )
            length = self._answer_length([ids[k] for k in of_span])
            ended &= length > 0 and self.tokenizer.is_special(ids[of_span[length - 1]])
            if marked and (ends[of_span] >= end).any():
                # As transformers marks: of a last character of several ids the first alone counts.
                length = int(np.argmax(ends[of_span] >= end)) + 1
            is_answer[of_span[:length]] = True
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
            begin = len(before)
            if not after.startswith(before):  # R1's prompt opens <think>, its answers do not
                begin = self._shared_header(
                    self._rendered(messages[:k], False, tools), before, after
                )
                if not begin:
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
            spans.append((begin, len(after)))
        return whole, spans

    def _refuse_lost_calls(self, messages: list[Message], tools: list[Any] | None) -> None:
        """Raise ``ChatError`` if a call of a tool has no place in the text.

        Its name, such as f, may stand elsewhere, so it is looked for with a mark at its end.
        """
        if not any(message.get("tool_calls") for message in messages):
            return
        marks = [f"_mark{k}_" for k in range(len(messages))]  # no JSON escapes it
        marked = [
            {**message, "tool_calls": [_renamed(call, mark) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message, mark in zip(messages, marks, strict=True)
        ]
        try:
            text = self._rendered(marked, False, tools)
        except ChatError:  # it knows its tools by name
            return
        for k, message in enumerate(messages):
            if text.count(marks[k]) < len(message.get("tool_calls") or []):
                raise _no_place(k)

    def _shared_header(self, asked: str, prompt: str, answered: str) -> int:
        """Where an answer begins whose text leaves the generation prompt after one of its tokens,
        as ``<｜Assistant｜>``; 0 if there is none. ``asked`` is the text before both."""
        shared = os.path.commonprefix([prompt, answered])
        names = self.tokenizer.added_names
        end = max((shared.rfind(name) + len(name) for name in names if name in shared), default=0)
        return end if end > len(asked) and shared.startswith(asked) else 0

    def _rendered(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: list[Any] | None
    ) -> str:
        template = self._tool_template if tools is not None else self._template
        try:
            with time_limit(RENDER_SECONDS):
                text = "".join(
                    bounded(
                        template.generate(
                            messages=[_with_reasoning(message) for message in messages],
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
        from jinja2.exceptions import TemplateError
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
        except Exception as error:  # as well brackets that are too many for Python
            line = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
            what = getattr(error, "message", None) or str(error) or type(error).__name__
            raise UserError(
                f"the chat template of {self.tokenizer.origin} is not Jinja: {line}{what}; "
                "correct chat_template in tokenizer_config.json"
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


def texts_of(value: Any) -> Iterator[str]:
    """Every text inside a JSON value, keys of objects aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


_BOOKKEEPING = {"role", "tool_call_id", "name", "id"}
"""Keys of a message that templates may leave out without losing what it says."""


def _lost(messages: Sequence[Message], tools: list[Any] | None, text: str) -> tuple[str, ...]:
    """What messages say and the rendered text does not.

    Raises:
        ChatError: an answer, or a call of a tool, is left out.
    """
    lost: list[str] = []
    if tools and not any(name in text for name in texts_of(tools)):
        lost.append("tools")
    for k, message in enumerate(messages):
        for call in message.get("tool_calls") or []:
            called = call.get("function", call) if isinstance(call, Mapping) else {}
            name = called.get("name") if isinstance(called, Mapping) else None
            if not isinstance(name, str) or name not in text:
                raise _no_place(k)
        for key, value in message.items():
            if key in _BOOKKEEPING or key == "tool_calls" or value in (None, "", [], {}):
                continue
            if all(_is_told(said, text) for said in texts_of(value)):
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


def _no_place(number: int) -> ChatError:
    return ChatError(
        f"message {number}: the chat template has no place for its tool_calls, so what is to be "
        "learnt would be lost; use a tokenizer whose template writes them"
    )


def _renamed(call: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """A call of a tool with a mark at the end of its name."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _renamed(call["function"], mark)}
    return {**call, "name": f"{call.get('name')}{mark}"}


def _is_told(said: str, text: str) -> bool:
    """Whether a text stands in the rendered one, as it is or as JSON writes it."""
    said = said.strip()
    return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text


_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys that data sets give a message's reasoning, by precedence."""


def _with_reasoning(message: Message) -> Message:
    """A message with its reasoning under the two names that templates read, as transformers."""
    said = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if said is None:
        return message
    return {"thinking": said, **message, "reasoning_content": said}


def _generation_extension() -> type:
    """``{% generation %}`` puts marks around what it encloses, which is a scope of its own."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}
        environment: Any  # with an attribute of ours

        def __init__(self, environment: Any) -> None:
            super().__init__(environment)
            environment.extend(marks_answers=False)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            self.environment.marks_answers = True
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = [nodes.Output([nodes.TemplateData(mark)]) for mark in _MARKS]
            return nodes.Scope([marks[0], *body, marks[1]]).set_lineno(line)

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
