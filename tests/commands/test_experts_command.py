"""``deepseek experts`` on a finished run: figures, domains, comparison, and every refusal."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek.checkpoint.manager import CheckpointManager
from deepseek.checkpoint.manifest import step_name
from deepseek.commands import experts as module
from deepseek.commands.experts import experts
from deepseek.config import stored_config
from deepseek.config.errors import UserError
from deepseek.config.schema import RunConfig
from deepseek.experts.analysis import RoutingAnalysis
from deepseek.interop.open_weights import open_checkpoint, with_config
from deepseek.models.transformer import Transformer
from support.micro_runs import CONFIG, MicroRuns


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / step_name(number)


def analyse(run: Path, **more: Any) -> RoutingAnalysis:
    torch.set_num_threads(1)
    return experts(run, **{"output": run.parent / "out.json"} | more)


def test_the_runs_own_validation_data(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = analyse(copy)
    assert found.step == 12 and found.name.endswith(step_name(12))
    assert [layer.name for layer in found.layers] == ["layers.1", "mtp.0.block"]
    (domain,) = found.domains
    assert domain.name == "data" and "validation" in domain.source
    for layer in found.layers:
        assert layer.tokens_E.sum() == domain.tokens * 2
    out = capsys.readouterr().out
    assert "layers.1" in out and "mtp.0.block" in out
    assert "one domain: nothing to compare it with; give --data twice" in out
    assert "do not say how good the model is" in out
    written = json.loads((copy.parent / "out.json").read_text())
    assert written["step"] == 12 and written["tokens"] == domain.tokens
    assert written["layers"][0]["load"] == found.layers[0].tokens_E.tolist()


def test_what_is_counted_is_what_the_model_routes(copy: Path, tmp_path: Path) -> None:
    """Against one plain forward pass over the text, counted by loops."""
    word = "abc de fghij "
    (tmp_path / "t.txt").write_text(word * 4)
    found = analyse(copy, data=[f"t={tmp_path}/t.txt"], minimum=2)
    opened = open_checkpoint(copy)
    tokenizer = opened.tokenizer()
    assert tokenizer is not None
    ids = [*tokenizer.encode(word * 4), tokenizer.eos_id]
    length = opened.config.model.data.seq_length
    model, seen = opened.model(), []
    router = model.layers["1"].ffn.gate
    router.register_forward_hook(lambda m, args, out: seen.extend(out.expert_ids_TK.tolist()))
    with torch.no_grad():
        for start in range(0, len(ids), length):
            model(torch.tensor([ids[start : start + length]]))
    layer = found.layers[0]
    counts = [sum(e in chosen for chosen in seen) for e in range(8)]
    assert layer.tokens_E.tolist() == counts
    for i in range(8):
        for j in range(8):
            both = sum(i in chosen and j in chosen for chosen in seen)
            want = both / counts[i] if counts[i] else float("nan")
            assert layer.co_activation_EE[i, j] == pytest.approx(want, nan_ok=True)
    for expert, tokens in enumerate(layer.tokens):
        for token in tokens:
            mine = [c for i, c in zip(ids, seen, strict=True) if i == token.token]
            assert len(mine) == token.seen >= 2
            assert token.share == pytest.approx(sum(expert in c for c in mine) / len(mine))
    assert found.token_text(ids[0]) == tokenizer.decode(ids[:1])


def test_domains(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("aaa bbb " * 200)
    (tmp_path / "b.txt").write_text("jij " * 200)
    found = analyse(copy, data=[f"one={tmp_path}/a.txt", f"{tmp_path}/b.txt"], tokens=300)
    assert [(d.name, d.tokens <= 300) for d in found.domains] == [("one", True), ("b", True)]
    out = capsys.readouterr().out
    assert (
        "most particular domain" in " ".join(out.split()).replace("│ ", "") or "particular" in out
    )
    assert "one domain" not in out
    domain, expert, above = found.layers[0].most_particular
    shares = found.layers[0].domains_GE
    assert shares[domain, expert] == pytest.approx(shares[1 - domain, expert] + 2 * above)


def test_a_checkpoint_of_its_own(copy: Path) -> None:
    found = analyse(step(copy, 8), output=copy / "x.json")
    assert found.step == 8 and (copy / "x.json").is_file()


def test_against_the_rest_of_the_run(copy: Path) -> None:
    found = analyse(copy, against=[copy])
    assert [other.step for other in found.compared] == [8]
    assert found.compared_tokens == found.num_tokens
    assert all(0 < share <= 1 for share in found.compared[0].share_L)
    again = analyse(step(copy, 8), against=[step(copy, 12)], output=copy / "x.json")
    assert again.compared[0].share_L == pytest.approx(found.compared[0].share_L)


def test_against_the_same_weights(copy: Path, tmp_path: Path) -> None:
    """Another checkpoint with equal weights chooses the same."""
    other = Path(shutil.copytree(step(copy, 12), tmp_path / step_name(12)))
    found = analyse(copy, against=[other])
    assert found.compared[0].share_L == [1.0, 1.0]


def test_the_comparison_reads_the_beginning_of_each_domain(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMPARED_TOKENS", 200)
    (tmp_path / "a.txt").write_text("aaa bbb " * 200)
    (tmp_path / "b.txt").write_text("jij " * 9)
    other = Path(shutil.copytree(step(copy, 12), tmp_path / step_name(12)))
    found = analyse(copy, data=[f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"], against=[other])
    assert found.compared_tokens == 96 + min(96, found.domains[1].tokens)
    assert found.compared[0].share_L == [1.0, 1.0]


def test_frequent_words_only(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNTED_WORDS", 5)
    found = analyse(copy, minimum=1)
    listed = {t.token for tokens in found.layers[0].tokens for t in tokens}
    assert 1 <= len(listed) <= 5


def test_prepared_data_without_a_tokenizer(micro: MicroRuns, copy: Path) -> None:
    shutil.rmtree(copy / "tokenizer")
    found = analyse(copy, data=[f"d={micro.folder}/data"], minimum=1)
    token = found.layers[0].tokens[0][0].token
    assert found.token_text(token) == f"id {token}"


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Writes a checkpoint of an untrained model in a run folder of its own."""

    def make(name: str, **changes: Any) -> Path:
        run = stored_config(CONFIG)
        run = replace(run, model=replace(run.model, **changes))
        model = Transformer(run.model)
        model.init_weights(1)
        config = asdict(run)
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        with CheckpointManager(tmp_path / name / "checkpoints") as manager:
            manager.save(3, tensors, {"step": 3, "config": config})
        return tmp_path / name

    return make


def test_an_untrained_model(made: Any, micro: MicroRuns) -> None:
    found = analyse(made("new"), data=[f"d={micro.folder}/data"])
    assert found.step == 3 and np.isfinite(found.layers[0].variation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_routed_experts": 16}, "model.n_routed_experts is 16, not 8"),
        ({"num_experts_per_tok": 3}, "model.num_experts_per_tok is 3, not 2"),
        ({"num_nextn_predict_layers": 0}, "model.num_nextn_predict_layers is 0, not 1"),
        ({"vocab_size": 512}, "model.vocab_size is 512, not 300"),
    ],
)
def test_checkpoints_that_cannot_be_compared(
    copy: Path, made: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"cannot be compared with .*: {re.escape(message)}"):
        analyse(copy, against=[made("other", **changes)])


def test_other_tokenizers_cannot_be_compared(copy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    text = (other / "tokenizer" / "tokenizer.json").read_text()
    (other / "tokenizer" / "tokenizer.json").write_text(
        text.replace('"fuse_unk": false', '"fuse_unk": true')
    )
    with pytest.raises(UserError, match="were trained with different tokenizers"):
        analyse(copy, against=[step(other, 12)])


def test_a_dense_model(made: Any, micro: MicroRuns) -> None:
    run = made("dense", first_k_dense_replace=2, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="has no experts: all 2 blocks are dense"):
        analyse(run, data=[f"d={micro.folder}/data"])


def test_a_run_without_validation_data(made: Any, micro: MicroRuns) -> None:
    data = replace(RunConfig().model.data, data_prefix=str(micro.folder / "data"))
    run = made("none", data=replace(data, validation_fraction=0.0))
    with pytest.raises(UserError, match="the run has no validation data .* give --data"):
        analyse(run)


def test_the_built_in_corpus_needs_a_tokenizer(made: Any) -> None:
    with pytest.raises(UserError, match="does not lie in a run folder with a tokenizer"):
        analyse(made("new"))


def test_the_built_in_corpus(copy: Path, made: Any) -> None:
    run = made("new")
    shutil.copytree(copy / "tokenizer", run / "tokenizer")
    found = analyse(run, tokens=64)
    assert {"asyncio", "single modules"} <= {domain.name for domain in found.domains}


def test_parts_of_a_blend_are_domains(micro: MicroRuns, made: Any, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(micro.folder / f"data{suffix}", tmp_path / f"second{suffix}")
    shutil.copytree(micro.folder / "data.tokenizer", tmp_path / "second.tokenizer")
    blend = [0.5, str(micro.folder / "data"), 0.5, str(tmp_path / "second")]
    data = replace(RunConfig().model.data, data_prefix=blend, seq_length=16)
    found = analyse(made("blend", data=data))
    assert [domain.name for domain in found.domains] == ["data", "second"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"run": "nowhere"}, "nowhere does not exist; give a run folder, or a checkpoint"),
        ({"run": ""}, "is neither a run folder (it has no config.yaml) nor a checkpoint"),
        ({"run": "void"}, "void/checkpoints holds no checkpoint yet; train first"),
        ({"against": ["copy/checkpoints/step_00000012"]}, "this is the checkpoint that is"),
        ({"against": ["single"]}, "the run has no other sound checkpoint than"),
        ({"against": ["nowhere"]}, "nowhere does not exist"),
        ({"tokens": 0}, "--tokens 0: give at least 1"),
        ({"minimum": 0}, "--minimum 0: give at least 1"),
        ({"output": "out.pdf"}, "out.pdf: end it in .html for a page or .json for the data"),
        ({"output": "none/out.json"}, "its folder does not exist"),
        ({"data": ["x=none.txt"]}, "there is no file or folder none.txt"),
    ],
)  # fmt: skip
def test_what_cannot_be_done(copy: Path, words: dict[str, Any], message: str) -> None:
    root = copy.parent
    (root / "void" / "checkpoints").mkdir(parents=True)
    step(root / "single", 12).parent.mkdir(parents=True)
    for key in ("output", "run"):
        if key in words:
            words = words | {key: root / words[key]}
    if "single" in words.get("against", ()):
        words = words | {"run": step(root / "single", 12)}
        shutil.copytree(step(copy, 12), step(root / "single", 12))
    words = words | {"against": [root / name for name in words.get("against", ())]}
    with pytest.raises(UserError, match=re.escape(message)):
        analyse(**{"run": copy} | words)


def test_a_damaged_checkpoint(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next(step(copy, 12).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert analyse(copy).step == 8
    assert "is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="is damaged"):
        analyse(step(copy, 12), output=copy / "x.json")


def test_a_checkpoint_of_another_version(copy: Path, made: Any) -> None:
    run = made("new")
    opened = open_checkpoint(run)
    state = opened.checkpoint.state()
    state["config"]["model"]["unheard_of"] = 1
    with pytest.raises(UserError, match="its configuration is not of this version"):
        with_config(opened.checkpoint)
