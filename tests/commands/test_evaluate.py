"""``deepseek eval`` on a finished run: transformers' numbers, domains, the report, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from deepseek.commands.convert import export_hf
from deepseek.commands.evaluate import DomainScore, _texts, evaluate
from deepseek.commands.experts import experts
from deepseek.commands.report import report
from deepseek.config.errors import UserError
from deepseek.data.corpus import Corpus
from deepseek.data.prepare import prepare
from deepseek.data.tokenizer import Tokenizer
from deepseek.interop.open_weights import open_checkpoint
from deepseek.monitoring.run_log import read_run

TEXTS = ["abc de fghij " * 9, "jij ab", "a", "", "hei ja cab " * 30]


@pytest.fixture
def run(copy: Path) -> Path:
    torch.set_num_threads(1)
    return copy


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@torch.no_grad()
def of_transformers(folder: Path, text: str, size: int, stride: int) -> tuple[float, int]:
    """Sum of losses and predicted ids, as transformers' guide to perplexity computes them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    total, count, seen = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + size, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : max(0, seen - begin)] = -100
        logits = theirs(ids[:, begin:end]).logits[0, :-1]
        total += float(F.cross_entropy(logits.double(), labels[0, 1:], reduction="sum"))
        count += int((labels[0, 1:] != -100).sum())
        seen = end
        if end == ids.shape[1]:
            break
    return total, count


def test_every_document_has_the_loss_that_transformers_finds(
    run: Path, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_hf(run, tmp_path / "hf", mtp="drop")
    capsys.readouterr()
    (found,) = evaluate(run, [f"some={lines}"], window=24, stride=7, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    (domain,) = printed["domains"]
    assert (printed["step"], printed["window"], printed["stride"]) == (12, 24, 7)
    assert [row["name"] for row in domain["documents"]] == [f"some.jsonl {i}" for i in range(5)]
    nats = tokens = text_bytes = 0.0
    for text, (_, score), row in zip(TEXTS, found.documents, domain["documents"], strict=True):
        if len(text) < 2:
            assert row["tokens"] == 0 and row["loss"] is None
            continue
        wanted, count = of_transformers(tmp_path / "hf", text, 24, 7)
        assert score.tokens == count
        assert row["loss"] == pytest.approx(wanted / count, abs=1e-6)
        assert row["perplexity"] == pytest.approx(np.exp(wanted / count), rel=1e-6)
        bits = wanted / np.log(2) / row["bytes"]
        assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
        assert 0 <= len(text) - row["bytes"] < 8  # all but the first id's
        nats, tokens, text_bytes = nats + wanted, tokens + count, text_bytes + row["bytes"]
    assert domain["loss"] == pytest.approx(nats / tokens, abs=1e-6)
    assert domain["bytes"] == text_bytes


TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
"""


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")  # those of the peer's own libraries
def test_lm_eval_finds_the_same_on_the_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of a local file, without network; and continuations after a context."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install '.[peers]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # lm-eval reads a text after this token; so that the model does too:
    file = run / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "add_bos_token": True}))
    lines = tmp_path / "text.jsonl"
    texts = ["abc de fghij abc", "jij ab", "hei ja cab"]
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    export_hf(run, tmp_path / "hf", mtp="drop")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_text.yaml").write_text(TASK % lines)
    options = {"device": "cpu", "dtype": "float32", "batch_size": 2, "add_bos_token": False}
    theirs = HFLM(pretrained=str(tmp_path / "hf"), **options)
    found = lm_eval.simple_evaluate(
        model=theirs,
        tasks=["local_text"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks")),
        bootstrap_iters=0,
    )
    (ours,) = evaluate(run, [f"text={lines}"])
    bits = found["results"]["local_text"]["bits_per_byte,none"]
    assert bits == pytest.approx(ours.total.bits_per_byte, rel=1e-5)
    pairs = [("abc de", " fghij"), ("a", "bc de"), ("hei", " ja cab")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    opened = open_checkpoint(run)
    model, tokenizer = opened.model(), opened.tokenizer()
    assert tokenizer is not None
    for pair, (nats, _) in zip(pairs, theirs.loglikelihood(asked, disable_tqdm=True), strict=True):
        ids = torch.tensor([tokenizer.encode("".join(pair))])
        kept = len(tokenizer.encode(pair[0]))
        with torch.no_grad():
            logs = model(ids)[0, :-1].log_softmax(-1)
        wanted = logs.gather(1, ids[0, 1:, None])[kept - 1 :].sum()
        assert nats == pytest.approx(float(wanted), abs=1e-4)


def test_text_and_what_is_prepared_of_it_are_the_same(
    run: Path, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare([lines], tmp_path / "some", tokenizer=run / "tokenizer")
    text, prepared = evaluate(run, [f"text={lines}", f"ids={tmp_path / 'some'}"])
    assert text.total.nats == pytest.approx(prepared.total.nats, rel=1e-6)
    assert text.total.tokens == prepared.total.tokens
    assert text.total.text_bytes == prepared.total.text_bytes
    out = capsys.readouterr().out
    assert "together" in out and "windows of 32 ids, 16 apart" in out


def test_data_that_are_not_what_was_prepared_are_refused(
    run: Path, lines: Path, tmp_path: Path
) -> None:
    """One id is another, which no other check can see."""
    prepare([lines], tmp_path / "some", tokenizer=run / "tokenizer")
    content = bytearray((tmp_path / "some.bin").read_bytes())
    content[:2] = content[2:4]
    (tmp_path / "some.bin").write_bytes(content)
    for command in (evaluate, experts):
        with pytest.raises(UserError, match=r"some.bin is not what prepare-data wrote: block 1"):
            command(run, [f"ids={tmp_path / 'some'}"])
    assert not (run / "evaluations.jsonl").exists() and not (run / "routing.html").exists()


def test_the_runs_own_validation_data_and_its_report(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = evaluate(run, tokens=100)
    assert found.name == "data" and "validation" in found.source
    assert found.total.tokens + len(found.documents) == 100
    evaluate(run / "checkpoints" / "step_00000008", tokens=50)
    assert [row["step"] for row in read_run(run).evaluations] == [12, 8]
    page = report([run]).read_text()
    assert "Evaluations" in page and f"{found.total.loss:.4f}" in page
    assert "bits per byte" in capsys.readouterr().out


def test_where_ids_are_no_fixed_bytes_those_of_the_text_are_counted(tmp_path: Path) -> None:
    names = ["</s>", "<unk>", "abc", "déf"]
    model = models.WordLevel({name: k for k, name in enumerate(names)}, unk_token="<unk>")
    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "t.txt").write_text("abc déf abc")
    sources = Corpus.from_paths([tmp_path / "t.txt"]).sources
    (document,) = _texts(sources, Tokenizer(library.to_str(), {}, "test"), "text")
    assert document.ids.tolist() == [2, 3, 2]
    assert document.text_bytes == len(" déf abc".encode())


def domains(run: Path, *data: str, **more: Any) -> list[DomainScore]:
    return evaluate(run, list(data), **more)


def test_wrong_sizes_and_data_are_refused(run: Path, tmp_path: Path, lines: Path) -> None:
    (tmp_path / "one.txt").write_text("a")
    some = f"some={lines}"
    for words, more, message in (
        ([some], {"window": 1}, "--window 1: give 2 to 256"),
        ([some], {"window": 257}, "--window 257: give 2 to 256, model.max_position_embeddings"),
        ([some], {"stride": 0}, "--stride 0: give 1 to 31"),
        ([some], {"stride": 32}, "--stride 32: give 1 to 31, less than the window of 32"),
        ([some], {"tokens": 1}, "--tokens 1: give at least 2"),
        ([some, some], {}, "there are two domains called some.*--data some2="),
        ([f"no={tmp_path}/none"], {}, "there is no file or folder"),
        ([f"one={tmp_path}/one.txt"], {}, "no document with an id to predict"),
        ([some], {"json_key": "body"}, "body"),
        (["=x"], {}, "write name=path"),
    ):
        with pytest.raises(UserError, match=message):
            domains(run, *words, **more)


def test_what_cannot_be_kept_is_said(
    run: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "evaluations.jsonl").mkdir()
    evaluate(run, [f"some={lines}"])
    assert "the result is not kept for the report" in capsys.readouterr().err
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(UserError, match="has no tokenizer beside it to read text with"):
        evaluate(run, [f"some={lines}"])
