"""Tokens before and after a text, and ids that stop: as the tokenizer's files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.commands.generate import sampling_for
from deepseek.config.errors import UserError
from deepseek.config.schema import DataConfig, ModelConfig
from deepseek.data import documents
from deepseek.data.chat import prepare_chat
from deepseek.data.dataset import PackedDataset
from deepseek.data.indexed import IndexedDataset
from deepseek.data.open_data import open_data
from deepseek.data.prepare import prepare
from deepseek.data.tokenizer import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer
from deepseek.data.tokenizer_files import load_tokenizer
from deepseek.data.tokenizer_training import byte_tokenizer
from deepseek.inference.generation import Sampling

BYTE = byte_tokenizer()
BOS_ID, EOS_ID = 256, 257
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def template(*order: str) -> dict[str, Any]:
    """A post-processor that writes special tokens around the text, ``$``."""
    known = {name: {"id": name, "ids": [k], "tokens": [name]} for name, k in IDS.items()}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if name == "$"
        else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in order
    ]
    used = {name: known[name] for name in order if name != "$"}
    return {"type": "TemplateProcessing", "single": single, "pair": PAIR, "special_tokens": used}


IDS = {BOS: BOS_ID, EOS: EOS_ID}
PAIR = [{"Sequence": {"id": k, "type_id": 0}} for k in "AB"]


def written(folder: Path, post: Any = None, **config: Any) -> Path:
    """A folder with the byte tokenizer, another post-processor and ``tokenizer_config.json``."""
    BYTE.save(folder)
    file = folder / "tokenizer.json"
    content = {**json.loads(file.read_text()), "post_processor": post}
    file.write_text(json.dumps(content, ensure_ascii=False))
    file = folder / "tokenizer_config.json"
    told = {**json.loads(file.read_text()), **config}
    file.write_text(json.dumps({key: value for key, value in told.items() if value != "none"}))
    return folder


POSTS = {
    "none": (None, [], []),
    "bytes": (BYTES, [], []),
    "begins": (template(BOS, "$"), [BOS_ID], []),
    "ends": (template("$", EOS), [], [EOS_ID]),
    "both": (template(BOS, "$", EOS), [BOS_ID], [EOS_ID]),
    "two at the beginning": (template(EOS, BOS, "$"), [EOS_ID, BOS_ID], []),
    "nothing": (template("$"), [], []),
    "sequence": (
        {"type": "Sequence", "processors": [BYTES, template(BOS, "$")]},
        [BOS_ID],
        [],
    ),
    "Bert": (
        {"type": "BertProcessing", "cls": [BOS, BOS_ID], "sep": [EOS, EOS_ID]},
        [BOS_ID],
        [EOS_ID],
    ),
    "Roberta": (
        {
            "type": "RobertaProcessing",
            "cls": [BOS, BOS_ID],
            "sep": [EOS, EOS_ID],
            "trim_offsets": True,
            "add_prefix_space": False,
        },
        [BOS_ID],
        [EOS_ID],
    ),
}


@pytest.mark.parametrize("kind", POSTS)
@pytest.mark.parametrize("key", [None, False], ids=["no key", "key off"])
def test_the_post_processor_is_followed_as_by_transformers(
    tmp_path: Path, kind: str, key: bool | None
) -> None:
    transformers = pytest.importorskip("transformers")
    post, before, after = POSTS[kind]
    keys = {} if key is None else {"add_bos_token": key, "add_eos_token": key}
    folder = written(tmp_path, post, **keys)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.prefix_ids, ours.suffix_ids) == (before, after)
    for text in ("ab", "a\nü", f"{FIM_BEGIN}a{FIM_HOLE}b{FIM_END}", f"x{EOS}y"):
        assert theirs(text)["input_ids"] == [*ours.prompt_ids(text), *after]
    ours.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.prefix_ids, copy.suffix_ids) == (before, after)


@pytest.mark.parametrize("kind", ["none", "bytes", "begins"])
def test_the_configuration_asks_for_them_too(tmp_path: Path, kind: str) -> None:
    found = load_tokenizer(written(tmp_path, POSTS[kind][0], add_bos_token=True))
    assert (found.prefix_ids, found.suffix_ids) == ([BOS_ID], [])
    found = load_tokenizer(written(tmp_path, POSTS["ends"][0], add_eos_token=True))
    assert (found.prefix_ids, found.suffix_ids) == ([], [EOS_ID])


def test_prompts(tmp_path: Path) -> None:
    found = load_tokenizer(written(tmp_path, POSTS["both"][0]))
    assert found.prompt_ids("") == [BOS_ID], "an empty prompt is a text of no characters"
    assert found.prompt_ids(f"{BOS}a") == [BOS_ID, ord("a")], "not twice"
    assert BYTE.prompt_ids("") == [EOS_ID], "a document begins after the last one's end"


def test_a_token_that_is_asked_for_and_not_there(tmp_path: Path) -> None:
    folder = written(tmp_path, bos_token=None, eos_token=None, add_eos_token=True)
    text = (folder / "tokenizer.json").read_text().replace(EOS, "<x>").replace(BOS, "<y>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"add_eos_token is true, and there is no eos_token; name"):
        load_tokenizer(folder)


# -- documents --


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_begin_and_end_as_the_tokenizer_says(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 10_000)
    (tmp_path / "a.txt").write_text("one " * 3000)  # two chunks: one begins, one ends
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "c.txt").touch()
    texts = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    both = written(tmp_path / "both", POSTS["both"][0])

    def documents_of(name: str, folder: Path, **settings: Any) -> list[list[int]]:
        prepare(texts, tmp_path / name, folder, workers=workers, **settings)
        data = IndexedDataset(tmp_path / name)
        return [data.document(k).tolist() for k in range(data.num_documents)]

    one, two = list((tmp_path / "a.txt").read_bytes()), list(b"two")
    assert documents_of("p", both) == [[256, *one, 257], [256, *two, 257]]
    if workers > 1:
        return
    assert documents_of("q", both, bos=False) == [[*one, 257], [*two, 257]]
    assert documents_of("r", both, append_eos=False) == [[256, *one], [256, *two]]
    plain = written(tmp_path / "plain")
    assert documents_of("s", plain) == [[*one, 257], [*two, 257]]
    assert documents_of("t", plain, bos=True) == [[256, *one, 257], [256, *two, 257]]
    with pytest.raises(UserError, match=r"prepared differently \(begin: \[256\] -> None\)"):
        prepare(texts, tmp_path / "p", both, bos=False)
    with pytest.raises(UserError, match=r"--bos needs --tokenizer"):
        prepare(texts, tmp_path / "u", bos=True)


def test_an_end_token_is_needed_for_ends_only(tmp_path: Path) -> None:
    folder = written(tmp_path / "tokenizer", eos_token="none", bos_token="none")
    text = (folder / "tokenizer.json").read_text().replace(EOS, "<x>").replace(BOS, "<y>")
    (folder / "tokenizer.json").write_text(text)
    (tmp_path / "a.txt").write_text("text " * 20)
    arguments = ([tmp_path / "a.txt"], tmp_path / "p", folder)
    with pytest.raises(UserError, match=r"no token ends a document; .*--no-append-eos needs none"):
        prepare(*arguments)
    with pytest.raises(UserError, match=r"no token begins a text, as --bos asks"):
        prepare(*arguments, append_eos=False, bos=True)
    assert prepare(*arguments, append_eos=False).tokens == 100
    data = DataConfig(data_prefix=str(tmp_path / "p"), seq_length=16, validation_fraction=0.0)
    opened = open_data(ModelConfig(vocab_size=512, data=data), seed=0)
    assert opened.tokenizer is not None and opened.tokenizer.stop_ids == []
    with pytest.raises(UserError, match="no token ends a document"):
        opened.tokenizer.prompt_ids("")


def test_data_that_begin_otherwise_than_prompts_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text " * 20)
    folder = written(tmp_path / "tokenizer", POSTS["begins"][0])
    for name, bos in (("p", None), ("q", False)):
        prepare([tmp_path / "a.txt"], tmp_path / name, folder, bos=bos)
        data = DataConfig(data_prefix=str(tmp_path / name), seq_length=16, validation_fraction=0.0)
        open_data(ModelConfig(vocab_size=512, data=data), seed=0)
        assert ("do not begin as" in capsys.readouterr().err) == (bos is False)


def test_rearranged_documents_keep_their_beginning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh")
    prepare([tmp_path / "a.txt"], tmp_path / "p", written(tmp_path / "t", POSTS["both"][0]))
    data = PackedDataset(
        IndexedDataset(tmp_path / "p"),
        np.arange(1),
        seq_length=12,
        fim_rate=1.0,
        fim=BYTE.fim,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        endless=False,
    )
    ids = [int(data[0]["tokens"][0]), *data[0]["labels"].tolist()]
    assert BYTE.fim is not None and ids[:2] == [BOS_ID, BYTE.fim.begin] and ids[-1] == EOS_ID
    assert sorted(k for k in ids if k < 256) == list(b"abcdefgh")


# -- what stops --


@pytest.mark.parametrize(
    ("told", "stops"),
    [
        ({}, [257]),
        ({"eos_token_id": 257}, [257]),
        ({"eos_token_id": [257, 3]}, [257, 3]),
        ({"eos_token_id": [3, 4, 3]}, [3, 4, 257]),
        ({"eos_token_id": 5}, [5, 257]),
        ({"eos_token_id": None}, [257]),
        ({"eos_token_id": []}, [257]),
    ],
)
def test_all_ids_that_stop_are_kept(tmp_path: Path, told: dict[str, Any], stops: Any) -> None:
    BYTE.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    found = load_tokenizer(tmp_path)
    found.save(tmp_path / "copy")
    assert found.stop_ids == load_tokenizer(tmp_path / "copy").stop_ids == stops
    assert found.with_chat_template("{{ messages }}").stop_ids == stops


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"eos_token_id": "1"}, r"eos_token_id='1', expected an id or a list of ids"),
        ({"eos_token_id": [1, None, 2.5]}, r"eos_token_id=\[1, None, 2\.5\], expected an id or"),
        ({"eos_token_id": True}, r"eos_token_id=True, expected an id"),
        ({"temperature": "0.6"}, r"temperature='0\.6', expected a number; correct it there"),
        ({"top_k": 1.5}, r"top_k=1\.5, expected a whole number"),
        ({"do_sample": 1}, r"do_sample=1, expected true or false"),
    ],
)
def test_values_of_another_type(tmp_path: Path, told: dict[str, Any], message: str) -> None:
    BYTE.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=f"generation_config.json has {message}"):
        load_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a JSON list, expected an object"):
        load_tokenizer(tmp_path)


def test_how_tokens_are_drawn() -> None:
    def drawn(told: dict[str, Any], **given: Any) -> Sampling:
        unset = {"temperature": None, "top_k": None, "top_p": None}
        return sampling_for(BYTE.with_generation(told), **unset | given)

    file = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    assert drawn({}) == Sampling(0.8, 0, 0.95)
    assert drawn(file) == Sampling(0.6, 20, 0.9)
    assert drawn(file, temperature=0.0, top_p=0.5) == Sampling(0.0, 20, 0.5)
    assert drawn({"do_sample": False, "temperature": 0.6}) == Sampling(0.0, 0, 0.95)
    assert drawn({"temperature": 0.6}) == Sampling(0.8, 0, 0.95), "it does not sample"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("given", [False, True], ids=["of the data", "model.tokenizer.path"])
def test_a_run_on_conversations_stops_where_its_answers_end(tmp_path: Path, given: bool) -> None:
    new = {str(262 + k): {"content": f"<|im_{name}|>", "special": True}
           for k, name in enumerate(("start", "end"))}  # fmt: skip
    folder = written(tmp_path / "tok", chat_template=CHATML, added_tokens_decoder=new)
    row = {"prompt": "2 + 2?", "response": "4"}
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    prepare_chat([tmp_path / "c.jsonl"], tmp_path / "c", folder)
    data = DataConfig(
        data_prefix=str(tmp_path / "c"),
        seq_length=64,
        chat=True,
        isolate_documents=True,
        validation_fraction=0.0,
    )
    cfg = ModelConfig(vocab_size=512, data=data)
    if given:
        cfg.tokenizer.__dict__["path"] = str(folder)
    tokenizer = open_data(cfg, seed=0).tokenizer
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.stop_ids == [EOS_ID, 263]
    tokenizer.save(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").stop_ids == [EOS_ID, 263]
