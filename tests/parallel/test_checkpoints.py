"""Checkpoints of several ranks: any layout loads any other, and what is wrong is wrong for all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner

from deepseek.checkpoint import checkpoint as checkpoint_module
from deepseek.checkpoint import manager as manager_module
from deepseek.checkpoint import manifest, shards
from deepseek.checkpoint.callback import Checkpointing
from deepseek.checkpoint.checkpoint import Checkpoint, newest_sound
from deepseek.checkpoint.manager import CheckpointManager
from deepseek.checkpoint.ranks import Ranks
from deepseek.checkpoint.training_state import collect_tensors, load_weights, restore
from deepseek.commands.stopping import Stopping
from deepseek.config.errors import UserError
from deepseek.config.schema import CheckpointConfig
from deepseek.models.transformer import Transformer
from support.chains import (
    LAYOUTS,
    STEPS,
    Chain,
    draw_chains,
    drive,
    fail,
    parts_of,
    train,
    worst_of_chain,
)
from support.layouts import Case, Driven, batches
from support.ranks import run_in_turn, run_ranks

DRAWN = draw_chains(6, 2, seed=0, largest_world=4)
BY_HAND = [
    # every rank of a V has the first or the last stage, or both, and with both two embeddings
    Chain(("ZBVZeroBubble pp2", "one process"), "adamw", in_background=True),
    Chain(("one process", "DualPipeV pp2 dp2 ep2", "dp3"), "muon", in_background=False),
    # two heads of one rank, then of two; the copies are not saved
    Chain(
        ("Interleaved1F1B pp2, output shared", "ZBVZeroBubble pp2 tp2, output shared", "dp2"),
        "adamw",
        in_background=False,
    ),
    # the last rank has a copy alone, and nothing to save
    Chain(("1F1B pp4, output shared", "one process"), "adamw", in_background=True),
]
SHORT = [*BY_HAND, DRAWN[2], DRAWN[5]]
LONG = [pytest.param(c, marks=pytest.mark.nightly) for c in DRAWN if c not in SHORT]


@pytest.mark.parametrize("chain", SHORT + LONG, ids=str)
def test_training_goes_on_in_another_layout(tmp_path: Path, chain: Chain) -> None:
    error, what = worst_of_chain(chain, tmp_path)
    assert error <= 1e-10, what


def saved_by_ranks(folder: Path, name: str, *steps: int) -> None:
    """Checkpoints of a model in a layout, without training."""
    run_ranks(LAYOUTS[name].world, _save_untrained, LAYOUTS[name], folder, steps)


def _save_untrained(rank: int, case: Case, folder: Path, steps: tuple[int, ...]) -> None:
    driven = drive(case)
    with CheckpointManager(folder) as manager:
        for step in steps:
            manager.save(step, collect_tensors(driven.module.model, driven.optimizer), {})


# -- names --


def test_one_process_loads_the_weights_alone(tmp_path: Path) -> None:
    """For generating: no optimiser, no process group."""
    case = LAYOUTS["DualPipeV pp2 dp2 ep2"]
    parts = [
        part for results in run_ranks(case.world, _trained, case, tmp_path) for part in results
    ]
    checkpoint = newest_sound(tmp_path, fail)
    assert checkpoint is not None
    assert not any("mtp_embed" in name for name in checkpoint.tensor_names())
    model = Transformer(case.config).double()
    load_weights(checkpoint, model)
    state = model.state_dict()
    compared = set()
    for name, part, local in parts:
        kind, _, rest = name.partition(".")
        if kind in ("weight", "buffer"):
            assert torch.equal(state[rest][part], local), name
            compared.add(rest)
    assert compared == set(state)


def _trained(rank: int, case: Case, folder: Path) -> list[tuple[str, tuple[slice, ...], Tensor]]:
    driven = drive(case)
    train(driven, 0)
    with CheckpointManager(folder) as manager:
        manager.save(3, collect_tensors(driven.module.model, driven.optimizer), {})
    return parts_of(driven)


def test_two_embeddings_of_one_rank_do_not_share_their_moments(tmp_path: Path) -> None:
    assert run_ranks(2, _moments_are_apart, LAYOUTS["ZBVZeroBubble pp2"], tmp_path) == [True, False]


def _moments_are_apart(rank: int, case: Case, folder: Path) -> bool:
    """Whether both embeddings are here; fails if they share memory or differ."""
    _trained(rank, case, folder)
    driven = drive(case)
    checkpoint = newest_sound(folder, fail)
    assert checkpoint is not None
    restore(checkpoint, driven.module.model, driven.optimizer)
    model, state = driven.module.model, driven.optimizer.state
    if model.embed is None or model.mtp_embed is None:
        return False
    first, second = state[model.embed.weight], state[model.mtp_embed.weight]
    for key in ("exp_avg", "exp_avg_sq"):
        one, other = first[key].to_local(), second[key].to_local()
        assert torch.equal(one, other) and one.count_nonzero()
        assert one.data_ptr() != other.data_ptr()
    assert first["step"] is not second["step"] and first["step"] == second["step"] == STEPS
    return True


OTHER_MODELS = [
    ({"num_hidden_layers": 6}, "layers.4.attn_norm.weight: missing"),
    ({"topk_method": "greedy", "n_group": 1, "topk_group": 1}, "does not have, such as "),
    ({"num_nextn_predict_layers": 0}, "does not have, such as model.mtp.0"),
    ({"hidden_size": 32}, "has shape [48, 16], asked for [48, 32]"),
]


def test_another_model_is_refused_by_all_ranks(tmp_path: Path) -> None:
    case = LAYOUTS["1F1B pp2 dp2 ep2"]
    results = run_ranks(case.world, _refusals_of_others, case, tmp_path)
    for (_, message), *messages in zip(OTHER_MODELS, *results, strict=True):
        assert message in messages[0] and set(messages) == {messages[0]}


def _refusals_of_others(rank: int, case: Case, folder: Path) -> list[str]:
    _save_untrained(rank, case, folder, (1,))
    return [
        _refusal(rank, replace(case, config=replace(case.config, **change)), folder)
        for change, _ in OTHER_MODELS
    ]


def _refusal(rank: int, case: Case, folder: Path) -> str:
    driven = drive(case)
    before = [local for _, _, local in parts_of(driven)]
    checkpoint = newest_sound(folder, fail)
    assert checkpoint is not None
    with pytest.raises(UserError) as caught:
        restore(checkpoint, driven.module.model, driven.optimizer)
    after = [local for _, _, local in parts_of(driven)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    return str(caught.value)


def test_a_state_that_one_stage_needs_and_nobody_saved(tmp_path: Path) -> None:
    messages = run_ranks(2, _refuse_what_is_without, LAYOUTS["GPipe pp2"], tmp_path)
    assert "holds no optimiser state for 1 parameters, such as head.weight" in messages[0]
    assert messages[0] == messages[1]


def _refuse_what_is_without(rank: int, case: Case, folder: Path) -> str:
    driven, prefix = drive(case), "optim.head.weight."
    driven.run(iter([next(batches(case))]))
    tensors = collect_tensors(driven.module.model, driven.optimizer)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    with CheckpointManager(folder) as manager:
        manager.save(1, kept, {})
    return _refusal(rank, case, folder)


# -- damage --


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def forge(path: Path) -> None:
    """Code to run instead of the content, with the digest it ought to have."""
    path.write_bytes(b"cos\nsystem\n(S'touch " + bytes(path.parent / "ran") + b"'\ntR.")
    listing = path.with_name("manifest.json")
    content = json.loads(listing.read_bytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    content["files"][path.name] = {"size": path.stat().st_size, "sha256": digest}
    listing.write_text(json.dumps(content))


DAMAGES = [
    ("__1_0.distcp", flip),
    ("__1_0.distcp", cut),
    (".metadata", flip),
    (".metadata", cut),
    (".metadata", forge),
]


def test_all_ranks_take_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(DAMAGES))]
    first, second = run_ranks(2, _newest, tmp_path / "sound", folders)
    assert first == [(1, 1)] * len(DAMAGES) and second == [(1, 0)] * len(DAMAGES)
    assert not any((folder / "step_00000002" / "ran").exists() for folder in folders)


def _newest(rank: int, sound: Path, folders: list[Path]) -> list[tuple[int, int]]:
    """Step of the newest sound one in each damaged copy, and how many lines were reported here."""
    _save_untrained(rank, LAYOUTS["ep2"], sound, (1, 2))
    if rank == 0:
        for folder, (file, damage) in zip(folders, DAMAGES, strict=True):
            shutil.copytree(sound, folder)
            damage(folder / "step_00000002" / file)
    dist.barrier()
    found = []
    for folder in folders:
        lines: list[str] = []
        checkpoint = newest_sound(folder, lines.append)
        assert checkpoint is not None
        assert all(line.endswith("trying the one before") for line in lines)
        found.append((checkpoint.step, len(lines)))
    return found


def test_an_error_of_the_disk_on_one_rank_is_the_error_of_all(tmp_path: Path) -> None:
    ranks = run_ranks(2, _read_with_broken_disk, LAYOUTS["ep2"], tmp_path)
    for first, second in zip(*ranks, strict=True):
        assert "Input/output error" in first and first == second


def _read_with_broken_disk(rank: int, case: Case, folder: Path) -> list[str]:
    """What is said of digests that cannot be made, and of shards that cannot be read."""
    _save_untrained(rank, case, folder, (1,))
    driven, said = drive(case), []

    def broken(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for where, name in ((manifest, "sha256_of"), (shards._Reader, "read_data")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(where, name, broken)
            with pytest.raises(UserError) as caught:
                checkpoint = Checkpoint.open(folder / "step_00000001", None)
                load_weights(checkpoint, driven.module.model)
        said.append(str(caught.value))
    return said


# -- in the background --


def test_ranks_train_on_while_their_checkpoint_is_written(tmp_path: Path) -> None:
    case = LAYOUTS["1F1B pp2 dp2 ep2"]
    for written, changed in run_ranks(case.world, _train_while_saving, case, tmp_path):
        assert written == "after" and changed


def _train_while_saving(rank: int, case: Case, folder: Path) -> tuple[str, bool]:
    """Whether the training came first, and whether it changed what had been saved already."""
    driven = drive(case)
    steps = batches(case)
    driven.run(iter([next(steps)]))
    moment = {name: local for name, _, local in parts_of(driven)}
    trained = Path(folder / f"trained{rank}")
    order: list[str] = []

    def late(*args: Any) -> Any:
        end = time.monotonic() + 20
        while not trained.exists() and time.monotonic() < end:
            time.sleep(0.01)
        order.append("after" if trained.exists() else "before")
        return write(*args)

    write, manager_module.write_shards = manager_module.write_shards, late  # type: ignore[assignment]
    with CheckpointManager(folder / "checkpoints") as manager:
        manager.save_in_background(
            1, collect_tensors(driven.module.model, driven.optimizer), {"rank": rank}
        )
        driven.run(steps)  # two more, with collectives of their own
        now = {name: local for name, _, local in parts_of(driven)}
        changed = not any(torch.equal(now[name], old) for name, old in moment.items())
        trained.touch()
        manager.wait()
        _assert_holds(case, folder, moment)
        with pytest.MonkeyPatch.context() as patch:  # by the plan of the first one
            patch.setattr(DefaultSavePlanner, "create_local_plan", fail)
            manager.save(2, collect_tensors(driven.module.model, driven.optimizer), {"rank": rank})
    _assert_holds(case, folder, now)
    return order[0], changed


def _assert_holds(case: Case, folder: Path, expected: dict[str, Tensor]) -> None:
    again = drive(case)
    checkpoint = newest_sound(folder / "checkpoints", fail)
    assert checkpoint is not None and checkpoint.state() == {"rank": 0}
    restore(checkpoint, again.module.model, again.optimizer)
    loaded = {name: local for name, _, local in parts_of(again)}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], old) for name, old in expected.items())


def test_a_failure_in_the_background_is_raised_on_all_ranks(tmp_path: Path) -> None:
    messages = run_ranks(2, _fail_in_background, LAYOUTS["ep2"], tmp_path)
    assert "File too large" in messages[0] and messages[0] == messages[1]


def _fail_in_background(rank: int, case: Case, folder: Path) -> str:
    import resource

    driven = drive(case)
    tensors = collect_tensors(driven.module.model, driven.optimizer)
    manager = CheckpointManager(folder)
    manager.save(1, tensors, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    manager.save_in_background(2, tensors, {})
    with pytest.raises(UserError) as caught:
        manager.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert manager.steps() == [1]
    manager.save(2, tensors, {})
    assert manager.steps() == [1, 2]
    manager.close()
    return str(caught.value)


# -- the callback --


def test_a_signal_to_any_rank_stops_all_after_the_same_step() -> None:
    for target, results in enumerate(run_in_turn(2, _signalled, [0, 1])):  # of two stages
        assert [stopped for stopped, _ in results] == [2] * 2
        said = [lines for _, lines in results]
        assert len(said[0]) == 1 and said[1:] == [[]]
        who = "SIGTERM: saving" if target == 0 else "SIGTERM to another rank: saving"
        assert said[0][0].startswith(who)


def _signalled(rank: int, target: int) -> tuple[int, list[str]]:
    """After which step it stopped, and what was said; rank ``target`` has a signal in step 2, and
    all others one just after, as a cluster sends it to all."""
    case = LAYOUTS["GPipe pp2"]
    driven, batch = drive(case), next(batches(case))
    lines: list[str] = []
    callback = Stopping(True, lines.append)
    trainer: Any = SimpleNamespace(should_stop=False, val_check_batch=7, limit_val_batches=3)
    callback.on_fit_start(trainer, driven.module)
    try:
        for step in range(1, 4):
            if step == 2 and rank == target:
                os.kill(os.getpid(), signal.SIGTERM)
            driven.run([batch])
            callback.on_train_batch_end(trainer, driven.module)
            if trainer.should_stop:
                break
        if rank != target:
            os.kill(os.getpid(), signal.SIGTERM)  # not a second one: nothing is raised
    finally:
        callback.teardown(trainer, driven.module, "fit")
    assert trainer.limit_val_batches == 0 and driven.module.stop_signal == signal.SIGTERM
    return step, lines


def test_a_run_is_continued_by_other_ranks_through_the_callback(tmp_path: Path) -> None:
    """Saved in the background by four ranks on the way and at the end, resumed by two."""
    config = {"model": {"micro_batch_size": 2}, "trainer": {"devices": 4}, "seed": 1}
    four = run_ranks(4, _train_with_callback, LAYOUTS["1F1B pp2 dp2 ep2"], tmp_path, config, 0)
    assert [lines for _, lines in four] == [[]] * 4
    other = {"model": {"micro_batch_size": 4}, "trainer": {"devices": 2}, "seed": 1}
    fixed = {"model": {"micro_batch_size": 4}, "trainer": {"devices": 2}, "seed": 2}

    def train_and_be_refused(rank: int) -> tuple[int, list[str], str]:
        trained = _train_with_callback(rank, LAYOUTS["tp2"], tmp_path, other, 1)
        return *trained, _refused_by_callback(rank, LAYOUTS["tp2"], tmp_path, fixed)

    two = run_ranks(2, train_and_be_refused)
    assert [step for step, *_ in two] == [6, 6]
    assert two[0][1] == [
        "changed since the checkpoint: model.micro_batch_size 2 -> 4",
        "changed since the checkpoint: trainer.devices 4 -> 2",
        f"resumed from {tmp_path / 'step_00000003'} at step 3",
    ]
    assert two[1][1] == []
    assert "seed 1 -> 2" in two[0][2] and two[0][2] == two[1][2]


def _callback(folder: Path, config: dict[str, Any], lines: list[str], driven: Driven) -> Any:
    params = CheckpointConfig(every_n_train_steps=2, async_save=True)
    callback = Checkpointing(folder, params, config, "same data", True, lines.append)
    progress = SimpleNamespace(total=SimpleNamespace(ready=0, completed=0))
    loops = SimpleNamespace(
        batch_progress=progress, manual_optimization=SimpleNamespace(optim_step_progress=progress)
    )
    trainer = SimpleNamespace(
        should_stop=False, optimizers=[driven.optimizer], fit_loop=SimpleNamespace(epoch_loop=loops)
    )
    return callback, trainer


def _train_with_callback(
    rank: int, case: Case, folder: Path, config: dict[str, Any], link: int
) -> tuple[int, list[str]]:
    driven, lines = drive(case), []  # type: ignore[var-annotated]
    callback, trainer = _callback(folder, config, lines, driven)
    callback.on_fit_start(trainer, driven.module)
    write = callback.manager._write
    callback.manager._write = lambda *args: (time.sleep(0.3), write(*args))[1]  # outlasts steps
    for batch in batches(replace(case, seed=link, steps=3)):
        callback.on_train_batch_start(trainer, driven.module)
        driven.run(iter([batch]))
        callback.on_train_batch_end(trainer, driven.module)
    callback.on_train_end(trainer, driven.module)
    assert callback.manager.steps() == ([2, 3] if link == 0 else [3, 4, 6])  # 6 is not proven
    callback.teardown(trainer, driven.module, "fit")
    return driven.module.finished_steps, lines


def _refused_by_callback(rank: int, case: Case, folder: Path, config: dict[str, Any]) -> str:
    driven = drive(case)
    callback, trainer = _callback(folder, config, [], driven)
    with pytest.raises(UserError) as caught:
        callback.on_fit_start(trainer, driven.module)
    callback.on_exception(trainer, driven.module, caught.value)
    dist.barrier()
    return str(caught.value)


def test_what_is_large_goes_to_rank_0_alone_and_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_by_ranks(tmp_path, "dp3", 1)

    def full(rank: int) -> None:
        if rank == 1:
            raise UserError("full")

    def work(rank: int) -> tuple[list[int], str, int, list[str]]:
        reads: list[Path] = []
        read = checkpoint_module.read_metadata
        monkeypatch.setattr(
            checkpoint_module,
            "read_metadata",
            lambda path, sizes: reads.append(path) or read(path, sizes),  # type: ignore[func-returns-value]
        )
        ranks = Ranks()
        gathered = ranks.gather(lambda: 10 * rank)
        with pytest.raises(UserError) as raised:
            ranks.gather(lambda: full(rank))
        opened = Checkpoint.open(tmp_path / "step_00000001", ranks)
        return gathered, str(raised.value), len(reads), opened.tensor_names()

    first, second, third = run_ranks(3, work)
    assert (first[0], second[0], third[0]) == ([0, 10, 20], [], [])
    assert first[1] == second[1] == third[1] == "rank 1: full"
    assert (first[2], second[2], third[2]) == (1, 0, 0) and first[3] == second[3] == third[3] != []


@pytest.mark.parametrize("size", [1, 7, 2048])
def test_a_rank_gathers_from_few_others(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is played when another one hears it."""
    at, sent = [0], dict[int, Any]()
    peers: dict[int, set[int]] = {rank: set() for rank in range(size)}

    def play(rank: int) -> list[Any]:
        at.append(rank)
        gathered = Ranks()._to_rank_0(f"of {rank}")
        at.pop()
        return gathered

    def send(objects: list[Any], dst: int, group: Any) -> None:
        sent[at[-1]] = objects[0]
        peers[at[-1]].add(dst)

    def receive(box: list[Any], src: int, group: Any) -> None:
        assert play(src) == []
        box[0] = sent.pop(src)
        peers[at[-1]].add(src)

    monkeypatch.setattr(Ranks, "size", size)
    monkeypatch.setattr(Ranks, "rank", property(lambda self: at[-1]))
    monkeypatch.setattr(dist, "send_object_list", send)
    monkeypatch.setattr(dist, "recv_object_list", receive)
    assert play(0) == [f"of {rank}" for rank in range(size)]
    assert max(map(len, peers.values())) == math.ceil(math.log2(size))
