"""What a run folder accepts and refuses, and the settings of the trainer, through the command."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from deepseek.config.changes import with_new_keys
from deepseek.config.schema import FIELDS
from deepseek.frameworks import USES_NEMO
from deepseek.locks import Lock
from support.log_rows import latest_rows
from support.micro_runs import MicroRuns, by_step

framework = pytest.mark.framework  # settings of its trainer, and what it writes


@pytest.fixture(scope="module")
def short(micro: MicroRuns) -> str:
    """A run of five steps that wants to go on."""
    micro.train("short", "trainer.max_steps=5").assert_done()
    return "short"


# -- the run folder --


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=5", "seed 1234 -> 5; add --resume-with-changes"),
        ("model.n_routed_experts=16", "model.n_routed_experts 8 -> 16; set it back (--config"),
        ("model.data.seq_length=16", "model.data.seq_length 32 -> 16; add --resume-with-changes"),
        ("model.optim.name=muon", "model.optim.name adamw -> muon"),
        ("model.global_batch_size=8", "global_batch_size 4 -> 8; add --resume-with-changes"),
        ("model.optim.lr=1e-4", "model.optim.lr 0.003 -> 0.0001; add --resume-with-changes"),
        ("model.optim.sched.min_lr=1e-5", "model.optim.sched.min_lr 0.0 -> 1e-05; add"),
        ("model.optim.sched.max_steps=9", "model.optim.sched.max_steps None -> 9"),
        ("trainer.gradient_clip_val=2", "trainer.gradient_clip_val 1.0 -> 2.0; add"),
        ("model.moe_aux_loss_coeff=0.1", "model.moe_aux_loss_coeff"),
    ],
)
def test_a_refused_start_leaves_the_record_of_the_run(
    micro: MicroRuns, short: str, setting: str, message: str
) -> None:
    folder = micro.folder / short
    names = ["config.yaml", "metrics.jsonl", "tokenizer/tokenizer.json"]
    before = [(folder / name).read_bytes() for name in names]
    micro.train(short, setting).assert_refused(message, "or start a new run")
    assert [(folder / name).read_bytes() for name in names] == before


def test_other_data_is_refused(micro: MicroRuns, short: str) -> None:
    other = micro.folder / "other.txt"
    other.write_text("hij abc def\n" * 400)
    tokenizer = micro.folder / "data.tokenizer"
    words = ["--output", "other", "--tokenizer", tokenizer]
    micro.cli("prepare-data", micro.folder / "text.jsonl", other, *words).assert_done()
    ran = micro.train(short, f"model.data.data_prefix={micro.folder / 'other'}")
    ran.assert_refused("was trained on other data than this configuration opens; add --resume-with")
    data = f"model.data.data_prefix={micro.folder / 'other'}"
    micro.train("data_a", "trainer.max_steps=2").assert_done()
    ran = micro.train("data_a", "trainer.max_steps=3", data, "--resume-with-changes").assert_done()
    assert "the samples; step 3 takes sample 9 and those after it" in ran.out
    micro.train("data_a", "trainer.max_steps=4", data).assert_done()  # it is the run's by now


def test_the_same_data_elsewhere_are_the_same(micro: MicroRuns) -> None:
    copies = micro.folder / "moved"
    copies.mkdir()
    for path in micro.folder.glob("data.*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, copies / path.name)
    micro.train("data_b", "trainer.max_steps=2").assert_done()
    data = f"model.data.data_prefix={copies / 'data'}"
    micro.train("data_b", "trainer.max_steps=3", data).assert_done()


def test_what_may_change_is_reported(micro: MicroRuns) -> None:
    micro.train("changed", "trainer.max_steps=2").assert_done()
    settings = ["trainer.max_steps=3", "model.optim.lr=1e-4", "model.global_batch_size=8"]
    ran = micro.train("changed", *settings, "--resume-with-changes").assert_done()
    assert "changed since the checkpoint: model.optim.lr 0.003 -> 0.0001" in ran.out
    assert "changed since the checkpoint: trainer.max_steps 2 -> 3" in ran.out
    assert "the samples; step 3 takes sample 17 and those after it" in ran.out
    assert "the schedule moves: the learning rate of step 3 is " in ran.out
    assert micro.rows("changed")[-1]["lr"] <= 1e-4
    assert "lr: 0.0001" in (micro.folder / "changed" / "config.yaml").read_text()


def test_what_is_harmless_asks_for_nothing(micro: MicroRuns) -> None:
    """A longer run, another layout, cadences, and the old schedule kept by its length."""
    micro.train("harmless", "trainer.max_steps=2").assert_done()
    settings = ["trainer.max_steps=3", "model.optim.sched.max_steps=2", "trainer.devices=1",
                "model.micro_batch_size=1", "trainer.log_every_n_steps=2",
                "model.activations_checkpoint_granularity=full",
                "exp_manager.monitor.every_n_steps=2",
                "exp_manager.checkpoint_callback_params.every_n_train_steps=1"]  # fmt: skip
    ran = micro.train("harmless", *settings).assert_done()
    assert "changed since the checkpoint: model.micro_batch_size" in ran.out
    assert "the schedule moves" not in ran.out
    params = "exp_manager.create_checkpoint_callback=false"
    micro.train("harmless", params, "--resume-with-changes").assert_refused(
        "--resume-with-changes needs checkpoints"
    )


def test_keys_that_an_earlier_version_did_not_know_have_their_default() -> None:
    before = {"seed": 1, "model.hidden_size": 8, "model.peft": None}
    now = before | {"model.moe_z_loss_coeff": 0.5, "model.peft.dim": 16}
    merged = with_new_keys(before, now)
    assert merged["model.moe_z_loss_coeff"] == FIELDS["model.moe_z_loss_coeff"].default
    assert "model.peft.dim" not in merged  # its section is new: that is a change


def test_all_checkpoints_damaged(micro: MicroRuns) -> None:
    micro.train("damaged", "trainer.max_steps=5").assert_done()
    paths = sorted((micro.folder / "damaged" / "checkpoints").glob("step_*"))
    assert len(paths) == 2
    for path in paths:
        shard = path / "__0_0.distcp"
        shard.write_bytes(shard.read_bytes()[:1000])
    ran = micro.train("damaged", "trainer.max_steps=5")
    ran.assert_refused(*(path.name for path in paths), "restore one from a copy")
    micro.cli("generate", "damaged").assert_refused("is sound")


@framework
def test_a_flipped_bit_in_the_newest_checkpoint(micro: MicroRuns, whole: str) -> None:
    micro.train("flipped", "trainer.max_steps=9", "model.optim.sched.max_steps=12").assert_done()
    shard = micro.folder / "flipped" / "checkpoints" / "step_00000009" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    ran = micro.train("flipped", "model.optim.sched.max_steps=12").assert_done()
    assert "step_00000009 is damaged: __0_0.distcp" in ran.out and "at step 8" in ran.out
    assert micro.differences(whole, "flipped") == []


def test_a_finished_run_whose_last_checkpoint_is_cut_is_not_complete(
    micro: MicroRuns, whole: str
) -> None:
    micro.train("cut_at_end").assert_done()
    done = micro.train("cut_at_end", "model.optim.lr=1e-4", "trainer.max_steps=9").assert_done().out
    assert "is complete: 12 of 9 steps" in done
    assert "other settings: model.optim.lr 0.003 -> 0.0001; its own are in --config" in done
    shard = micro.folder / "cut_at_end" / "checkpoints" / "step_00000012" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:1000])
    ran = micro.train("cut_at_end").assert_done()
    assert "step_00000012 is damaged" in ran.out and "at step 8" in ran.out
    assert micro.differences(whole, "cut_at_end") == []


def test_checkpoints_are_there_and_resuming_is_off(micro: MicroRuns, short: str) -> None:
    ran = micro.train(short, "exp_manager.resume_if_exists=false")
    ran.assert_refused("already holds checkpoints", "use another --run-dir")


def test_room_for_the_checkpoints_is_looked_for_before_the_first_step(micro: MicroRuns) -> None:
    room = "import shutil; shutil.disk_usage = lambda path: type('U', (), {'free': 2_000_000})()"
    ran = micro.train("no_room", before=room)
    ran.assert_refused("a run with 3 more checkpoints of 0.7 MB at one time needs about 2.2 MB")
    assert "step      1/" not in ran.out
    fewer = "exp_manager.checkpoint_callback_params.save_top_k=1"
    micro.train("no_room", fewer, "trainer.max_steps=2", before=room).assert_done()


def test_a_full_disk_at_the_start_is_one_line(micro: MicroRuns) -> None:
    full = """
import errno, os
import deepseek.monitoring.record.run_record as module
def full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
module.atomic_open = full
"""
    ran = micro.train("full_start", before=full)
    ran.assert_refused("writing the record of the run into", "No space left on device", "config")


def test_two_processes_on_one_folder(micro: MicroRuns) -> None:
    first = micro.start("busy", "trainer.max_steps=100000")
    first.wait_for("step      2/")
    second = micro.train("busy", "trainer.max_steps=99999")
    second.assert_refused(f"process {first.pid}", "or use another folder")
    first.signal(signal.SIGTERM)
    first.wait().assert_stopped()
    assert "max_steps: 100000" in (micro.folder / "busy" / "config.yaml").read_text()


@framework
def test_versions(micro: MicroRuns, tmp_path: Path) -> None:
    words = ["train", "--config", micro.config, f"model.data.data_prefix={micro.folder / 'data'}"]
    for steps, version in ((1, 0), (1, 1), (2, 1)):
        ran = micro.cli(*words, f"trainer.max_steps={steps}", cwd=tmp_path).assert_done()
        assert f"runs/micro/version_{version}" in ran.out
    # The newest is complete: a further run is a new one, and one that may go on continues it.
    assert sorted(p.name for p in (tmp_path / "runs" / "micro").iterdir()) == [
        "version_0",
        "version_1",
    ]


# -- steps that are not finite --

NAN_FROM = """
from deepseek.training.step import DeepSeekModel
from deepseek.parallel.pipeline import Sequential
step, train, now = DeepSeekModel.training_step, Sequential.train, []
def training_step(self, *args):
    now[:] = [self.finished_steps]
    return step(self, *args)
def wrapped(self, batch, loss, balance_scale):
    factor = float("nan") if {first} <= now[0] < {end} else 1.0
    return train(self, batch, lambda sums: loss(sums) * factor, balance_scale) * factor
DeepSeekModel.training_step, Sequential.train = training_step, wrapped
"""


@framework
def test_one_bad_step_is_skipped_and_said(micro: MicroRuns) -> None:
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps=1"
    keep = "exp_manager.checkpoint_callback_params.save_top_k=-1"
    code = NAN_FROM.format(first=2, end=3)
    ran = micro.train("skips", every, keep, "trainer.max_steps=5", before=code)
    assert "| SKIPPED, gradient " in ran.assert_done().out
    rows = by_step(micro.rows("skips"))
    assert [rows[step, "train"]["skipped"] for step in range(1, 6)] == [
        False, False, True, False, False]  # fmt: skip
    assert rows[3, "train"]["loss"] == rows[3, "train"]["grad_norm"] == "nan"
    before, after = (checkpoint_tensors(micro, "skips", step) for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert float(rows[4, "train"]["loss"]) > 0


def test_a_skipped_step_counts_also_after_a_kill(micro: MicroRuns) -> None:
    """12 steps are 12, on their own samples: one skipped, the run killed, or both."""
    bad = NAN_FROM.format(first=4, end=5)
    whole = micro.train("skipped_whole", before=bad).assert_done()
    assert "step     13" not in whole.out
    assert sorted(
        step for step, kind in by_step(micro.rows("skipped_whole")) if kind == "train"
    ) == (list(range(1, 13)))
    assert micro.steps("skipped_whole")[-1] == 12
    kill = (
        "import os\nfrom deepseek.monitoring.record.metrics_log import MetricsLog\n"
        "write = MetricsLog.write\n"
        "def deadly(self, row, *more):\n"
        "    if row.get('step') == 10:\n        os.kill(os.getpid(), 9)\n"
        "    return write(self, row, *more)\nMetricsLog.write = deadly\n"
    )
    assert micro.train("skipped_cut", before=bad + kill).code == -9
    micro.train("skipped_cut", before=bad).assert_done()
    assert micro.differences("skipped_whole", "skipped_cut") == []


@framework
def test_ten_bad_steps_end_the_run(micro: MicroRuns) -> None:
    ran = micro.train("bad", "trainer.max_steps=50", before=NAN_FROM.format(first=2, end=99))
    ran.assert_refused("was not finite for 10 steps in a row", "the weights are those of step 2",
                       "Lower model.optim.lr=0.003")  # fmt: skip
    skipped = [row["step"] for row in micro.rows("bad") if row.get("skipped")]
    assert skipped[:9] == list(range(3, 12))


def test_what_was_good_survives_a_streak_and_can_be_gone_back_to(micro: MicroRuns) -> None:
    """keep=1: each checkpoint of the streak would push out the one before."""
    params = "exp_manager.checkpoint_callback_params"
    settings = [f"{params}.every_n_train_steps=2", f"{params}.save_top_k=1", "trainer.max_steps=14"]
    nan = NAN_FROM.format(first=4, end=99)
    ran = micro.train("streak", *settings, before=nan)
    ran.assert_refused("the weights are those of step 4")
    assert "checkpoints from before the first skipped step, 5: 2, 4; the newest may" in ran.out
    assert micro.steps("streak") == [2, 4, 6, 8, 10, 12]  # no finite step came after 4
    # Going on within the streak: it is counted on, and the right step is named.
    ran = micro.train("streak", *settings, before=nan)
    ran.assert_refused("not finite for 10 steps in a row", "the weights are those of step 4")
    for step, message in (("5", "has no checkpoint of step 5; it has those of steps 2, 4, 6, 8"),
                          ("14", "nothing left to train up to trainer.max_steps=14")):  # fmt: skip
        micro.train("streak", *settings, "--resume-from", step).assert_refused(message)
    words = micro.words(None, *settings, "--resume-from", "4")
    micro.cli.start(*words).wait().assert_refused("--resume-from 4: say of which run")
    ran = micro.train("streak", *settings, "--resume-from", "4").assert_done()
    assert "set aside: a later checkpoint is now" in ran.out
    folder = micro.folder / "streak" / "checkpoints"
    left = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
    assert left == [f"set_aside_1_step_{n:08d}" for n in (6, 8, 10, 12)] + ["step_00000014"]
    micro.train("no_streak", *settings).assert_done()
    assert micro.differences("no_streak", "streak") == []


def test_the_last_good_checkpoint_survives_a_divergence(micro: MicroRuns) -> None:
    """keep=1, a save every step: one step ruins the weights, and only the next one shows it."""
    params = "exp_manager.checkpoint_callback_params"
    settings = [f"{params}.every_n_train_steps=1", f"{params}.save_top_k=1"]
    micro.train("ruined", *settings, "trainer.max_steps=3").assert_done()
    assert micro.steps("ruined") == [3]
    settings += ["trainer.max_steps=16", "model.optim.sched.max_steps=16"]
    wild = ["model.optim.lr=1e38", "model.optim.sched.min_lr=1e38", "--resume-with-changes"]
    ran = micro.train("ruined", *settings, *wild)
    ran.assert_refused("was not finite for 10 steps in a row")
    assert micro.steps("ruined")[:2] == [3, 4]
    assert "--resume-from 3 goes on from one of them" in ran.out
    back = ["--resume-from", "3", "--resume-with-changes", "trainer.max_steps=5"]
    micro.train("ruined", *settings, *back).assert_done()
    assert micro.steps("ruined") == [5]


def test_a_second_writer_is_refused_without_checkpoints_too(micro: MicroRuns) -> None:
    off = "exp_manager.create_checkpoint_callback=false"
    folder = micro.folder / "alone" / "checkpoints"
    folder.mkdir(parents=True)
    with Lock(folder / ".lock"):
        micro.train("alone", off, "trainer.max_steps=2").assert_refused("writes here already")
        assert not (micro.folder / "alone" / "metrics.jsonl").exists()
    micro.train("alone", off, "trainer.max_steps=2").assert_done()


def checkpoint_tensors(micro: MicroRuns, name: str, step: int) -> dict[str, torch.Tensor]:
    """The tensors of one step's checkpoint."""
    from deepseek.checkpoint.checkpoint import Checkpoint

    path = micro.folder / name / "checkpoints" / f"step_{step:08d}"
    checkpoint = Checkpoint.open(path)
    dtypes = checkpoint.tensor_dtypes()
    shapes = checkpoint.tensor_shapes().items()
    tensors = {key: torch.empty(shape, dtype=dtypes[key]) for key, shape in shapes}
    checkpoint.load(tensors)
    return tensors


# -- the trainer's settings --


def losses(micro: MicroRuns, name: str) -> list[float]:
    return [row["loss"] for row in micro.rows(name) if "loss" in row]


@framework
def test_bf16_is_close_and_keeps_its_weights_in_fp32(micro: MicroRuns, whole: str) -> None:
    micro.train("half", "trainer.precision=bf16-mixed").assert_done()
    assert losses(micro, "half") != losses(micro, whole)
    assert losses(micro, "half") == pytest.approx(losses(micro, whole), abs=0.02)
    tensors = micro.tensors("half")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    biases = [t for name, t in tensors.items() if name.endswith("gate.bias")]
    assert biases and all(bias.abs().max() > 0 for bias in biases)


COMPILE = """
import torch
compile = torch.compile
torch.compile = lambda forward: (print("COMPILED"), compile(forward, backend="{backend}"))[1]
"""


@pytest.mark.nightly
def test_compiled_is_close(micro: MicroRuns, whole: str) -> None:
    """Traced forward and backward; without the code generator, which takes half a minute."""
    settings = ["model.torch_compile=true", "trainer.max_steps=3", "trainer.val_check_interval=2"]
    sched = "model.optim.sched.max_steps=12"
    ran = micro.train("compiled", *settings, sched, before=COMPILE.format(backend="aot_eager"))
    assert ran.assert_done().out.count("COMPILED") == 3  # two layers and the MTP module
    assert losses(micro, "compiled") == pytest.approx(losses(micro, whole)[:3], rel=1e-5)
    assert ran.err == ""


@framework
def test_clipping(micro: MicroRuns, whole: str) -> None:
    for name, clip in (("unclipped", 0), ("clipped", 0.01)):
        settings = [f"trainer.gradient_clip_val={clip}", "trainer.max_steps=6"]
        micro.train(name, *settings, "model.optim.sched.max_steps=12").assert_done()
    norms = {n: [r["grad_norm"] for r in micro.rows(n) if "grad_norm" in r] for n in
             (whole, "unclipped", "clipped")}  # fmt: skip
    assert min(norms[whole]) > 1  # so that the default of 1 did clip
    assert norms["unclipped"][0] == norms["clipped"][0] == norms[whole][0]
    # AdamW's first update does not depend on the gradient's size, its later ones on their ratio.
    later = [losses(micro, name)[5] for name in (whole, "unclipped", "clipped")]
    assert len(set(later)) == 3


@framework
def test_an_apple_gpu_is_left_alone(micro: MicroRuns) -> None:
    """It has no fp64; Lightning's own choice would be to use it."""
    before = (
        "import platform, torch\nfrom deepseek.frameworks import pl\n"
        "platform.processor = lambda: 'arm'\n"  # Lightning asks for that, too
        "torch.backends.mps.is_available = lambda: True\n"
        "pl.accelerators.MPSAccelerator.is_available = staticmethod(lambda: True)\n"
    )
    settings = ("trainer.accelerator=auto", "trainer.max_steps=2", "trainer.val_check_interval=0")
    ran = micro.train("apple", *settings, "model.optim.cpu_offload=true", before=before)
    ran.assert_done()
    assert "Apple GPUs have no fp64, which losses and norms need: the CPU trains" in ran.out
    assert "model.optim.cpu_offload: the CPU trains, nothing lies elsewhere" in ran.out


@framework
def test_without_validation_checkpoints_and_tensorboard(micro: MicroRuns) -> None:
    settings = ["trainer.val_check_interval=0", "trainer.max_steps=3"]
    off = "exp_manager.create_checkpoint_callback=false"
    ran = micro.train("bare", *settings, off).assert_done()
    assert "val" not in ran.out.replace("micro", "") and "sample it" not in ran.out
    assert micro.steps("bare") == []
    assert list((micro.folder / "bare").rglob("events.out.*")) == []
    assert [row["step"] for row in micro.rows("bare")] == [1, 2, 3]


@framework
def test_tensorboard_has_the_numbers_of_the_log(micro: MicroRuns) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    micro.train("board", "exp_manager.create_tensorboard_logger=true").assert_done()
    events = EventAccumulator(str(micro.folder / "board" / "logs")).Reload()
    for key in ("loss", "mtp_loss", "grad_norm", "lr", "tokens", "val_loss"):
        logged = [(row["step"], row[key]) for row in micro.rows("board") if key in row]
        shown = [(event.step, event.value) for event in events.Scalars(key)]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged], key
    assert [event.step for event in events.Scalars("val_loss")] == [4, 8, 12]


@framework
def test_more_validation_batches_is_another_mean(micro: MicroRuns, whole: str) -> None:
    settings = ["trainer.limit_val_batches=2", "trainer.max_steps=4"]
    micro.train("two_batches", *settings, "model.optim.sched.max_steps=12").assert_done()
    more, all_ = (by_step(micro.rows(name))[4, "val"] for name in ("two_batches", whole))
    assert more["val_loss"] != all_["val_loss"]
    assert more["val_loss"] == pytest.approx(all_["val_loss"], abs=0.5)


def test_the_resolved_configuration_makes_the_same_run(micro: MicroRuns, whole: str) -> None:
    micro.cli("train", "--config", f"{whole}/config.yaml", "--run-dir", "again").assert_done()
    assert micro.differences(whole, "again") == []


@framework
def test_each_step_has_one_row(micro: MicroRuns, whole: str) -> None:
    lines = (micro.folder / whole / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == len(latest_rows(micro.folder / whole / "metrics.jsonl"))
    rows = [row for row in rows if "event" not in row]
    assert len(rows) == 15
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 13))
    for row in trained:
        assert row["tokens"] == 4 * 32 and row["seconds"] > 0 and row["grad_norm"] > 0
        assert row["loss"] > 0 and row["mtp_loss"] > 0 and not row["skipped"]
    validated = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in validated] == [4, 8, 12]
    assert all(row["val_bits_per_byte"] > 0 for row in validated)
    assert trained[-1]["loss"] < trained[0]["loss"]


# -- with NeMo --


@framework
@pytest.mark.skipif(not USES_NEMO, reason="NeMo is not installed; there is nothing to compare")
def test_nemo_and_lightning_give_the_same_numbers(
    micro: MicroRuns, whole: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = MicroRuns(tmp_path_factory.mktemp("lightning"), DEEPSEEK_FRAMEWORK="lightning")
    ran = other.train("whole").assert_done()
    other.cli.close()
    assert "PyTorch Lightning" in ran.out
    assert other.rows("whole") == micro.rows(whole)
    ours, theirs = micro.tensors(whole), other.tensors("whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@framework
@pytest.mark.skipif(not USES_NEMO, reason="restored by NeMo")
def test_a_run_with_nemo_writes_a_nemo_file_of_its_last_weights(micro: MicroRuns) -> None:
    from deepseek.training.step import DeepSeekModel

    nemo = "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true"
    board = "exp_manager.create_tensorboard_logger=true"
    micro.train("nemo", nemo, board, "trainer.max_steps=4").assert_done()
    # At a second start exp_manager moves what it finds: only its own files.
    micro.train("nemo", nemo, board, "trainer.max_steps=6").assert_done()
    folder = micro.folder / "nemo"
    names = (
        "checkpoints config.yaml environment.json logs metrics.jsonl micro.nemo monitor tokenizer"
    )
    assert {path.name for path in folder.iterdir()} == set(names.split())
    for log in (folder / "logs").rglob("nemo_error_log.txt"):
        assert log.read_text() == ""
    assert [row["step"] for row in micro.rows("nemo") if "loss" in row] == [1, 2, 3, 4, 5, 6]
    restored = DeepSeekModel.restore_from(str(folder / "micro.nemo"), map_location="cpu")
    state = restored.model.state_dict()
    tensors = micro.tensors("nemo")
    assert all(torch.equal(state[name], tensors[f"model.{name}"]) for name in state)


def test_generating_goes_by_what_has_a_digest(micro: MicroRuns) -> None:
    """An edited config.yaml of a run changes no text."""
    run = micro.folder / micro.make("sampled")
    words = ("generate", run, "--prompt", "ab", "--max-new-tokens", "60", "--temperature", "2")
    before = micro.cli.start(*words).wait().assert_done().out
    config = run / "config.yaml"
    text = config.read_text()
    edited = text.replace("rope_theta: 10000.0", "rope_theta: 10.0").replace(
        "routed_scaling_factor: 1.0", "routed_scaling_factor: 9.5"
    )
    assert edited != text
    config.write_text(edited)
    assert micro.cli.start(*words).wait().assert_done().out == before
