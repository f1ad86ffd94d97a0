"""Fine-tuning through the command line: all weights, adapters, and what becomes of adapters."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from support.forked import FORK_WORKERS
from support.micro_runs import MicroRuns

STEPS = 20
TARGETS = "model.peft.target_modules=[attention, feed_forward, experts]"
PEFT = ["model.peft.dim=4", "model.peft.alpha=8", TARGETS, "model.moe_router_bias_update_rate=0"]


@pytest.fixture(scope="module")
def base(micro: MicroRuns) -> str:
    """A pretrained run, and conversations to fine-tune it on."""
    micro.train("tuned_base", f"trainer.max_steps={STEPS}").assert_done()
    colours = ["red", "blue", "green", "grey"]
    rows = [
        {"prompt": f"colour of {k % 7}?", "response": f"it is {colours[k % 7 % 4]}"}
        for k in range(60)
    ]
    rows.append({"prompt": "?" * 60, "response": "never seen"})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (micro.folder / "chat.jsonl").write_text(text)
    words = ["--tokenizer", "tuned_base/tokenizer", "--output", "chat"]
    ran = micro.cli("prepare-data", "--chat", "chat.jsonl", *words).assert_done()
    assert "61 conversations" in ran.out and "cuts none" in ran.out
    return "tuned_base"


def settings(micro: MicroRuns, *more: str) -> list[str]:
    return [
        f"model.data.data_prefix={micro.folder / 'chat'}",
        "model.data.chat=true",
        "model.data.isolate_documents=true",
        "model.data.seq_length=48",
        "model.data.validation_fraction=0.1",
        "model.restore_from=tuned_base",
        f"trainer.max_steps={STEPS}",
        "model.optim.sched.max_steps=20",
        *more,
    ]


def losses(micro: MicroRuns, run: str) -> list[float]:
    return [row["loss"] for row in micro.rows(run) if "loss" in row]


@pytest.fixture(scope="module")
def adapted(micro: MicroRuns, base: str) -> str:
    ran = micro.train("adapted", *settings(micro, *PEFT, "model.optim.lr=2e-2")).assert_done()
    assert "of adapters are trained" in ran.out
    assert "adapters on the weights of tuned_base" in ran.out
    return "adapted"


def test_full_fine_tuning_lowers_the_loss_of_answers(micro: MicroRuns, base: str) -> None:
    ran = micro.train("tuned_full", *settings(micro)).assert_done()
    assert "lose the end of an answer; 1 of them lose every answer and are left out" in ran.out
    found = losses(micro, "tuned_full")
    assert found[-1] < 0.7 * found[0]
    validated = [row["val_loss"] for row in micro.rows("tuned_full") if "val_loss" in row]
    assert validated[-1] < 0.8 * validated[0]
    assert all(row.get("val_bits_per_byte") is None for row in micro.rows("tuned_full"))
    first = ("model.restore_from=null", "trainer.max_steps=1")
    micro.train("scratch", *settings(micro, *first)).assert_done()
    assert losses(micro, "scratch")[0] > found[0]


@pytest.mark.framework
def test_adapters_lower_the_loss_of_answers(micro: MicroRuns, adapted: str) -> None:
    found = losses(micro, adapted)
    assert found[-1] < 0.9 * found[0]
    tensors, weights = micro.tensors(adapted), micro.tensors("tuned_base")
    assert all("lora_" in name for name in tensors)
    size = lambda found: sum(t.numel() for t in found.values())  # noqa: E731
    assert size(tensors) < size(weights)
    ran = micro.cli("generate", adapted, "--prompt", "User: x", "--max-new-tokens", 3).assert_done()
    assert ran.out.startswith("> User: x\n")


def test_questions_are_answered_as_they_were_taught(micro: MicroRuns, adapted: str) -> None:
    """--chat puts the template around a prompt; the answer alone is printed."""
    words = ["--temperature", 0, "--max-new-tokens", 12]
    ask = ["generate", adapted, "--chat", "--prompt", "colour of 1?", *words]
    answer = micro.cli(*ask).assert_done().out.rstrip("\n")
    by_hand = "User: colour of 1?\n\nAssistant:"
    ran = micro.cli("generate", adapted, "--prompt", by_hand, *words).assert_done()
    quoted = "> User: colour of 1?\n> \n> Assistant:\n"
    assert answer and ran.out.startswith(quoted + answer)
    both = micro.cli(*ask, "--prompt", "colour of 2?").assert_done().out
    assert both.startswith(f"> colour of 1?\n{answer}\n") and "\n> colour of 2?\n" in both
    micro.cli("generate", adapted, "--chat").assert_refused("--chat answers a question")
    ask[1] = "tuned_base"
    micro.cli(*ask).assert_refused("tuned_base/tokenizer has no chat template", "leave out --chat")


def test_merging_changes_nothing_but_what_has_adapters(micro: MicroRuns, adapted: str) -> None:
    micro.cli("lora", "merge", adapted, "merged").assert_done()
    assert re.search(r"^merged +no log ", micro.cli("ls", ".").out, re.MULTILINE)
    merged, weights, adapters = (micro.tensors(name) for name in ("merged", "tuned_base", adapted))
    touched = {
        name.replace(".lora_a", ".weight").replace("_lora_a", "")
        for name in adapters
        if name.endswith("lora_a")
    }
    names = {name for name in weights if name.startswith("model.")}
    assert merged.keys() == names and touched < names
    for name in names:
        assert torch.equal(merged[name], weights[name]) == (name not in touched), name
    words = ["--prompt", "User: colour of 1?", "--temperature", 0, "--max-new-tokens", 8]
    ran = [micro.cli("generate", run, *words).assert_done().out for run in (adapted, "merged")]
    assert ran[0] == ran[1]
    micro.cli("lora", "merge", adapted, "merged").assert_refused("exists already")
    micro.cli("hf", "export", adapted, "other").assert_refused("lora merge", "lora export")
    micro.cli("lora", "merge", "tuned_base", "other").assert_refused("holds no adapters")
    first = ("model.restore_from=merged", "trainer.max_steps=1")
    micro.train("tuned_again", *settings(micro, *first)).assert_done()
    assert losses(micro, "tuned_again")[0] < losses(micro, adapted)[0]


@pytest.mark.framework
def test_adapters_go_on_where_they_were(micro: MicroRuns, adapted: str) -> None:
    given = settings(micro, *PEFT, "model.optim.lr=2e-2")
    micro.train("halves", *given, "trainer.max_steps=9").assert_done()
    ran = micro.train("halves", *given).assert_done()
    assert "resumed from" in ran.out and "adapters on the weights of" in ran.out
    assert micro.differences("halves", adapted) == []
    ran = micro.train("halves", *given, "model.peft.alpha=9", "trainer.max_steps=21")
    ran.assert_refused("model.peft.alpha 8.0 -> 9.0")


def test_adapters_are_not_put_on_other_weights(micro: MicroRuns, adapted: str) -> None:
    given = settings(micro, *PEFT)
    micro.train("below", "trainer.max_steps=4").assert_done()
    micro.train("above", *given, "model.restore_from=below", "trainer.max_steps=2").assert_done()
    (checkpoint,) = (micro.folder / "below" / "checkpoints").glob("step_*")
    manifest = checkpoint / "manifest.json"
    kept = manifest.read_bytes()
    manifest.write_bytes(kept + b"\n")
    for words in (["generate", "above"], ["lora", "export", "above", "x"]):
        micro.cli(*words).assert_refused("is not the checkpoint that the adapters were trained on")
    manifest.write_bytes(kept)
    micro.cli("lora", "export", "above", "x").assert_done()
    # Elsewhere in the folder that model.restore_from names it is found again, and nowhere else.
    checkpoint = checkpoint.rename(checkpoint.with_name("step_00000009"))
    micro.cli("lora", "export", "above", "y").assert_done()
    checkpoint.rename(micro.folder / "moved")
    micro.cli("lora", "export", "above", "z").assert_refused("there is no checkpoint there; put")
    # Base and adapters may move together.
    place = micro.folder / "else" / "below" / "checkpoints"
    place.mkdir(parents=True)
    (micro.folder / "moved").rename(place / "step_00000004")
    shutil.copytree(micro.folder / "above", micro.folder / "else" / "above")
    elsewhere = micro.folder / "else" / "above"
    micro.cli("generate", elsewhere, "--max-new-tokens", 2, cwd=Path("/")).assert_done()
    full = settings(micro, f"model.restore_from={adapted}", "model.data.seq_length=48")
    for more in ([], PEFT):
        micro.train("x", *full, *more).assert_refused("holds adapters; `deepseek lora merge")


def test_adapters_on_two_processes(micro: MicroRuns, adapted: str) -> None:
    layout = [
        "trainer.devices=2",
        "model.tensor_model_parallel_size=2",
        "model.expert_model_parallel_size=2",
    ]
    given = settings(micro, *PEFT, "model.optim.lr=2e-2", "trainer.max_steps=4", *layout)
    micro.train("two", *given, before=FORK_WORKERS).assert_done()
    assert losses(micro, "two") == pytest.approx(losses(micro, adapted)[:4], rel=1e-4)
    assert micro.tensors("two").keys() == micro.tensors(adapted).keys()
    micro.cli("generate", "two", "--max-new-tokens", 2).assert_done()


@pytest.mark.framework
def test_adapters_on_packed_weights(micro: MicroRuns, adapted: str) -> None:
    """Nearly as on the weights themselves, the same on two processes, and merged into what was
    never packed."""
    nf4 = "model.peft.base_dtype=nf4"
    given = settings(micro, *PEFT, "model.optim.lr=2e-2", "trainer.max_steps=4", nf4)
    micro.train("packed", *given, "trainer.max_steps=2").assert_done()
    ran = micro.train("packed", *given).assert_done()
    assert "resumed from" in ran.out and "adapters on the weights of" in ran.out
    layout = ["trainer.devices=2", "model.expert_model_parallel_size=2"]
    micro.train("packed_two", *given, *layout, before=FORK_WORKERS).assert_done()
    found, wide = losses(micro, "packed"), losses(micro, adapted)[:4]
    assert losses(micro, "packed_two") == pytest.approx(found, rel=1e-5)
    assert found == pytest.approx(wide, rel=0.1) and found != pytest.approx(wide, rel=1e-4)
    fp8 = ("model.peft.base_dtype=fp8", "trainer.max_steps=2")
    micro.train("packed_fp8", *given, *fp8).assert_done()
    assert losses(micro, "packed_fp8") == pytest.approx(wide[:2], rel=0.02)
    assert micro.tensors("packed").keys() == micro.tensors(adapted).keys()
    micro.cli("lora", "merge", "packed", "packed_merged").assert_done()
    merged, weights = micro.tensors("packed_merged"), micro.tensors("tuned_base")
    (norm, embed, wo) = "layers.0.attn_norm.weight", "embed.weight", "layers.0.attn.wo.weight"
    for name in (norm, embed):
        assert torch.equal(merged[f"model.{name}"], weights[f"model.{name}"])
    moved = merged[f"model.{wo}"] - weights[f"model.{wo}"]
    assert 0 < torch.linalg.matrix_rank(moved) <= 4, "all but the adapter is the weight itself"
    two = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
    micro.train("x", *given, *two).assert_refused(
        "a scale for each 64 numbers",
        "tensor_model_parallel_size=2 would cut",
        "no multiple of 128",
    )


def test_peft_reads_the_adapters(micro: MicroRuns, adapted: str) -> None:
    """The same logits as the merged model, from transformers with peft."""
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from deepseek.interop.open_weights import open_checkpoint

    micro.cli("hf", "export", "tuned_base", "hf", "--mtp", "drop").assert_done()
    for run, targets in (
        (adapted, TARGETS),
        ("some", "model.peft.target_modules=[wo, w2, experts.w1]"),
    ):
        if run != adapted:
            given = settings(micro, *PEFT, targets, "trainer.max_steps=4", "model.optim.lr=2e-2")
            micro.train(run, *given).assert_done()
        micro.cli("lora", "export", run, f"peft_{run}", "--base", "hf").assert_done()
        theirs = AutoModelForCausalLM.from_pretrained(micro.folder / "hf", dtype=torch.float32)
        tokens = torch.arange(3, 43).reshape(2, 20)
        plain = theirs.eval()(tokens).logits
        folder = micro.folder / f"peft_{run}"
        with_adapters = peft.PeftModel.from_pretrained(theirs, folder).eval()
        loaded = with_adapters(tokens).logits
        ours = open_checkpoint(Path(micro.folder / run))
        wanted = ours.model().cpu()(tokens)
        assert (loaded - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert (plain - wanted).abs().max() > 1e-2 * wanted.abs().max()
        merged = with_adapters.merge_and_unload()(tokens).logits
        assert (merged - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.restore_from=null", "adapters are trained on top of weights that exist"),
        ("model.optim.qk_clip_threshold=100", "would scale weights of queries and keys, which are"),
        ("model.moe_router_bias_update_rate=1e-3", "would change the router, which is frozen"),
        ("model.peft.target_modules=[q_a_proj]", "there is no matrix q_a_proj; use wq_a"),
        ("model.peft.target_modules=[wq]", "this model has no wq"),
        ("model.peft.target_modules=[mtp]", "MTP modules get no adapters, since peft and"),
        ("model.peft.target_modules=[]", "would train nothing"),
        ("model.peft.dim=0", "must be at least 1"),
        ("model.fp8_recipe=blockwise", "adapters beside them, whose products are not in FP8"),
        ("model.peft.peft_scheme=dora", "must be lora"),
        ("model.peft.dropout=0.1", "there is no dropout"),
        ("model.peft.target_modules=[1]", "must be a list of names"),
    ],
)
def test_settings_of_adapters_that_are_refused(
    micro: MicroRuns, base: str, setting: str, message: str
) -> None:
    ran = micro.cli("validate", micro.config, *settings(micro, *PEFT, setting))
    assert ran.code == 2
    assert message in " ".join((ran.out + ran.err).replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chat"], "--chat needs .jsonl files"),
        (["--chat", "chat.jsonl"], "--chat needs --tokenizer"),
        (["--chat", "chat.jsonl", "--json-key", "x"], "--json-key would be ignored with --chat"),
        (["chat.jsonl", "--answers", "last"], "--answers would be ignored without --chat"),
        (
            ["--chat", "chat.jsonl", "--tokenizer", "tuned_base/tokenizer", "--answers", "some"],
            "must be all or last",
        ),
    ],
)
def test_options_of_chat_data_that_are_refused(
    micro: MicroRuns, base: str, words: list[str], message: str
) -> None:
    micro.cli("prepare-data", *words, "--output", "unused").assert_refused(message)
