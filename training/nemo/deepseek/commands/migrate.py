"""``deepseek migrate``: a checkpoint of PyTorch FSDP to a run that goes on, and back."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepseek.config import RunConfig, load_config, resolved_yaml
from deepseek.config.batch_ramp import consumed_samples
from deepseek.config.errors import UserError
from deepseek.console import StageProgress, complain, say
from deepseek.data.open_data import open_data
from deepseek.files import Staging, disk_errors, refuse_existing, require_room, write_new
from deepseek.interop.open_weights import open_checkpoint
from deepseek.run_folder import CHECKPOINTS, CONFIG_FILE, TOKENIZER


def migrate_checkpoint(
    source: Path,
    target: Path,
    config: str,
    overrides: Sequence[str] = (),
    names: Path | None = None,
    write_names: Path | None = None,
    step: int | None = None,
    optimizer: Path | None = None,
    weights_only: bool = False,
) -> None:
    """Write a run folder whose newest checkpoint is that of the FSDP run.

    Work that was cut short goes on with the same command.

    Args:
        source: a ``.pt`` file with whole tensors, or a folder of DCP or accelerate.
        target: the run folder, which does not exist.
        config: of the run that goes on, with its data.
        overrides: ``a.b=c``.
        names: a table of names; None: Hugging Face's.
        write_names: write that table here, say how much of the source it names, and stop.
        step: optimiser steps done; None: what the source says.
        optimizer: file or folder of the optimiser's state, if it lies apart.
        weights_only: start the optimiser anew.

    Raises:
        ConfigError: the configuration is broken.
        UserError: the source is none, tensors are not accounted for, no room.
    """
    from deepseek.checkpoint.manifest import step_name
    from deepseek.interop.fsdp_export import ORIGIN, Origin
    from deepseek.interop.fsdp_migration import plan_migration, write_migration
    from deepseek.interop.fsdp_names import NameTable
    from deepseek.interop.fsdp_source import open_source

    if step is not None and step < 0:
        raise UserError(f"--step {step}: give the optimiser steps done, 0 or more")
    run = load_config(config, overrides)
    default = NameTable.hugging_face(run.model)
    table = default if names is None else NameTable.read(names)
    if write_names is None:
        refuse_existing(target)
    opened = open_source(source, optimizer)
    say(
        f"source       {opened.path}: {opened.form}, {len(opened.tensors):,} tensors, "
        f"{sum(spec.nbytes for spec in opened.tensors.values()) / 1e9:,.2f} GB"
    )
    if write_names is not None:
        _write_table(write_names, default, opened)
        return
    migration = plan_migration(opened, run.model, table, weights_only)
    found = migration.step()
    if step is None and found is None:
        raise UserError(f"{source} does not say how many steps were done; give --step N")
    steps, origin = (step, "--step") if step is not None else (found or (0, ""))
    notes = [*migration.notes, *_notes(opened.objects, migration, run, steps)]
    with StageProgress() as shown:
        data = open_data(run.model, run.seed, shown.of_data)
    data.verification.start()
    state = {
        "step": steps,
        "consumed_samples": consumed_samples(
            steps, run.model.global_batch_size, run.model.rampup_batch_size
        ),
        "seed": run.seed,
        "config": asdict(run),
        "data": data.fingerprint,
        "data_sha256": data.verification.digests,
        "migrated": {"from": str(source), "dropped": dict(migration.dropped)},
    }
    stats = [(str(file.resolve()), file.stat()) for file in opened.files()]
    plan = {
        "migration": 1,
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "config": asdict(run),
        "names": table.to_yaml(),
        "step": steps,
        "weights_only": weights_only,
    }
    with Staging(target, plan) as staging, disk_errors(f"migrating to {target}", staging.folder):
        staging.require_room(migration.result_bytes, "the migration")
        with StageProgress() as shown:
            write_migration(
                migration,
                staging,
                staging.folder / CHECKPOINTS / step_name(steps),
                steps,
                state,
                shown.of_bytes("migrating", migration.source_bytes),
            )
        staging.write(CONFIG_FILE, resolved_yaml(run).encode())
        staging.write(ORIGIN, Origin.of(migration).to_json())
        if data.tokenizer is not None:
            data.tokenizer.save(staging.folder / TOKENIZER)
        if left := data.verification.finish():
            complain(left)
        staging.finish()
    _say_result(migration, target, steps, origin, notes, [config, *overrides])


def export_to_fsdp(run: Path, target: Path, like: Path | None = None) -> None:
    """Write a checkpoint of a migrated run as it once came: form, names, dtypes.

    Args:
        run: a run folder (its newest checkpoint), or a checkpoint.
        target: a file or folder that does not exist.
        like: a migrated run folder whose origin gives form and names; None: ``run``.

    Raises:
        UserError: nothing migrated, ``target`` exists, no room, or the checkpoint lacks tensors.
    """
    from deepseek.interop.fsdp_export import FsdpExport, Origin, export_fsdp

    refuse_existing(target)
    opened = open_checkpoint(run)
    origin = Origin.read(like or opened.run or run)
    if origin.is_file and not target.suffix:
        raise UserError(f"{run} came from one file: give a name such as {target}.pt")
    total = FsdpExport(opened.checkpoint, origin).total_bytes
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        require_room(target.absolute().parent, total, "the export")
        with StageProgress() as shown:
            export_fsdp(opened.checkpoint, origin, target, shown.of_bytes("writing", total))
    except OSError as failure:
        raise UserError(
            f"writing {target} failed: {failure.strerror}; nothing has that name, mend it and give "
            "the same command again"
        ) from failure
    entries = [saved for piece in origin.pieces for saved in piece.content.values()]
    tensors = sum(saved.dtype is not None for saved in entries)
    form = "SHARDED state dict (DCP)" if origin.pieces[0].sharded else "FULL state dict"
    say(f"wrote        {target}: {form}, {tensors:,} tensors, {total / 1e9:,.2f} GB")
    say(f"step         {opened.step}")
    if not any(saved.kind == "exp_avg" for saved in entries):
        say("note         without optimiser state, as the source was read without it")
    elif any(saved.keys[-1] == "lr" for saved in entries):
        say("note         the learning rates in param_groups are those of the source")
    if origin.lost:
        listed = ", ".join(origin.lost[:3]) + (", ..." if origin.lost[3:] else "")
        say(f"not written  {len(origin.lost):,} that were not carried over: {listed}")


def _write_table(file: Path, table: Any, source: Any) -> None:
    """Write the table to edit, and say what of the source it does not name."""
    from deepseek.interop.fsdp_migration import weight_names

    write_new(file, table.to_yaml())
    names = weight_names(source)
    prefix = ""
    try:
        prefix = table.find_prefix(names)
    except UserError:
        pass
    unknown = sorted(n for n in names if table.parts(n.removeprefix(prefix)) is None)
    say(f"table        {file}: {len(table.names)} entries; edit it and give it with --names")
    say(f"it names     {len(names) - len(unknown)} of {len(names)} weights of the source")
    for name in unknown[:20]:
        say(f"not named    {name} {list(source.tensors[names[name]].shape)}")
    if unknown[20:]:
        say(f"             and {len(unknown) - 20} more")


def _notes(objects: dict[str, Any], migration: Any, run: RunConfig, step: int) -> list[str]:
    """Settings under which the run would go on otherwise than it went so far."""
    from deepseek.interop.fsdp_migration import param_groups
    from deepseek.training.optim import learning_rate

    optim = run.model.optim
    notes: list[str] = []
    if not migration.counts:
        notes.append("there is no optimiser state: AdamW starts anew, so warm it up again")
    elif optim.name != "adamw":
        raise UserError(
            f"model.optim.name={optim.name}: the checkpoint holds the state of AdamW; set "
            "model.optim.name=adamw, or migrate with --weights-only"
        )
    ours = {"betas": list(optim.betas), "eps": optim.eps}
    decayed: list[str] = []
    decays: set[float] = set()
    rates: set[float] = set()
    for name, group in param_groups(objects).items():
        given = {"betas": list(group.get("betas", ours["betas"])), "eps": group.get("eps")}
        for key, value in given.items():
            if value is not None and value != ours[key]:
                notes.append(f"{key} were {value}, model.optim.{key} is {ours[key]}")
        if group.get("weight_decay") is not None:
            decays.add(float(group["weight_decay"]))
        if group.get("lr") is not None:
            rates.add(float(group["lr"]))
        if group.get("weight_decay"):
            members = [str(member) for member in group.get("params", [name])]
            decayed += [member for member in members if member.endswith("norm.weight")]
    if decayed:
        notes.append(
            f"{len(decayed)} norms were decayed, such as {decayed[0]}; here they never are"
        )
    wrong = sorted(decays - {0.0, optim.weight_decay})
    if wrong:
        notes.append(
            f"weight_decay was {wrong[0]:g}, model.optim.weight_decay is {optim.weight_decay:g}"
        )
    now = learning_rate(step, optim.lr, optim.sched, run.trainer.max_steps)
    if rates and not any(abs(rate - now) <= 1e-6 * max(rate, now) for rate in rates):
        notes.append(
            f"the learning rate was {max(rates):g}, that of step {step} is {now:g} here "
            "(model.optim.lr, model.optim.sched)"
        )
    weights = [migration.source.tensors[key] for key in migration.read_as("weight")]
    narrow = sum(spec.dtype.itemsize < 4 for spec in weights)
    if narrow:
        notes.append(f"{narrow} weights were 16 bits wide; here the trained weights are fp32")
    if step >= run.trainer.max_steps:
        notes.append(
            f"trainer.max_steps={run.trainer.max_steps}: raise it, to go on at step {step}"
        )
    return list(dict.fromkeys(notes))


def _say_result(
    migration: Any,
    target: Path,
    step: int,
    origin: str,
    notes: list[str],
    config: list[str],
) -> None:
    from deepseek.interop.fsdp_migration import MOMENTS

    say(f"step         {step} ({origin})")
    say(
        f"used         {len(migration.read_as('weight')):,} weights -> {len(migration.shapes):,} "
        f"of ours, {len(migration.read_as(*MOMENTS, 'count')):,} optimiser states -> "
        f"{3 * len(migration.counts):,}"
    )
    dropped = {reason: keys for reason, keys in migration.dropped.items() if keys}
    for reason, keys in dropped.items():
        listed = ", ".join(keys[:3]) + (", ..." if keys[3:] else "")
        say(f"dropped      {len(keys):,}, {reason}: {listed}")
    say("missing      0; every tensor is accounted for")
    for note in notes:
        say(f"note         {note}")
    command = ["deepseek", "train", "--config", *config, "--run-dir", str(target)]
    say(f"go on        {shlex.join(command)}")
