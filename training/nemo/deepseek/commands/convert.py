"""``deepseek hf``, ``lora`` and ``nemo``: checkpoints to files of other programs, and back."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

from deepseek.config import RunConfig, changed, check, resolved_yaml
from deepseek.config.errors import ConfigError, UserError, nearest
from deepseek.config.schema import ModelConfig
from deepseek.console import StageProgress, complain, say
from deepseek.data.tokenizer import GENERATION, Tokenizer, check_generation
from deepseek.data.tokenizer_files import (
    CHAT_TEMPLATE,
    MORE_TEMPLATES,
    generation_config,
    load_tokenizer,
)
from deepseek.files import LOCK, Staging, disk_errors, refuse_existing, write_new
from deepseek.interop.open_weights import OpenedCheckpoint, open_checkpoint, with_config
from deepseek.run_folder import CHECKPOINTS, CONFIG_FILE, TOKENIZER


def import_hf(
    source: Path,
    target: Path,
    mtp: str = "keep",
    tokenizer: Path | None = None,
    ignore_keys: Sequence[str] = (),
    vocab: str | None = None,
) -> None:
    """Write the checkpoint of step 0, ``config.yaml`` and the tokenizer into ``target``.

    Work that was cut short goes on with the same command. The weights are fp32 in the result.

    Args:
        source: folder with ``config.json`` and safetensors files.
        target: a folder that does not exist.
        mtp: ``keep`` the multi-token-prediction modules if there are any, or ``drop`` them.
        tokenizer: a ``tokenizer.json`` or its folder; None: the one in ``source``.
        ignore_keys: keys of ``config.json`` that are known not to change the model.
        vocab: ``pad`` or ``trim`` embedding and head where their rows, ``vocab_size`` and the
            tokenizer's ids differ; None: refuse.

    Raises:
        ConfigError: the model is not one that is built here; every reason at once.
        UserError: files are missing or broken, tensors are not accounted for, no room.
    """
    from deepseek.checkpoint.manifest import step_name
    from deepseek.interop.hf_config import model_config
    from deepseek.interop.hf_import import HfFolder, Mtp, Vocab, plan_import

    kept = cast(Mtp, one_of("--mtp", mtp, get_args(Mtp)))
    rows = None if vocab is None else cast(Vocab, one_of("--vocab", vocab, get_args(Vocab)))
    refuse_existing(target)
    folder = HfFolder(source)
    for key in ignore_keys:
        if key not in folder.config:
            close = nearest(key, list(folder.config))
            hint = f"; {close}?" if close else "; leave the option out"
            raise UserError(f"--ignore-key {key}: config.json has no such key{hint}")
    stated = model_config(folder.config, ignore_keys)
    _run_config(target, stated)  # the rules first: nothing is listed by sizes that break them
    token_ids = {k: folder.config[k] for k in _TOKEN_IDS if folder.config.get(k) is not None}
    told = generation_config(source) or token_ids  # as transformers reads it
    check_generation(told, str(source))
    read = _tokenizer(source, tokenizer, told)
    ids = 0 if read is None else read.vocab_size
    weights = plan_import(folder, stated, kept, rows, ids)
    run = _run_config(target, weights.config)
    dropped = {reason: names for reason, names in weights.dropped.items() if names}
    state: dict[str, Any] = {
        "step": 0,
        "consumed_samples": 0,
        "seed": run.seed,
        "config": asdict(run),
        "data": "imported",
        "imported": {
            "from": str(source),
            "architecture": folder.config.get("architectures"),
            "dropped": dropped,
        },
    }
    plan = {
        "import": 1,
        "files": folder.fingerprint(),
        "config": folder.config,
        "mtp": kept,
        "vocab": [weights.config.vocab_size, vocab],
        "source": str(source.resolve()),
    }
    _say_source(weights, folder)
    with Staging(target, plan) as staging, disk_errors(f"importing to {target}", staging.folder):
        staging.require_room(weights.result_bytes, "the import")
        with StageProgress() as shown:
            weights.write(
                staging,
                staging.folder / CHECKPOINTS / step_name(0),
                state,
                shown.of_bytes("importing", weights.source_bytes),
            )
        staging.write(CONFIG_FILE, resolved_yaml(run).encode())
        if read is not None:
            read.save(staging.folder / TOKENIZER)
            copy_template(tokenizer or source, staging.folder / TOKENIZER)
        elif told:
            staging.write(GENERATION, json.dumps(told, indent=2).encode() + b"\n")
        staging.finish()
    _say_result(target, run, dropped, read)


def config_of_hf(source: Path, output: Path, ignore_keys: Sequence[str] = ()) -> None:
    """Write the configuration of a model that is described as elsewhere, without its weights.

    Args:
        source: a ``config.json``, its folder, or the JSON of DeepSeek's inference code.
        output: a YAML file that does not exist.
        ignore_keys: keys of ``config.json`` that are known not to change the model.

    Raises:
        ConfigError: the model is not one that is built here; every reason at once.
        UserError: a file is missing or broken, or ``output`` exists.
    """
    from deepseek.interop.hf_config import inference_config, model_config
    from deepseek.interop.hf_import import CONFIG, read_json

    content = read_json(source / CONFIG if source.is_dir() else source)
    own = {"dim", "n_layers"} <= content.keys()  # as no config.json calls them
    model = inference_config(content) if own else model_config(content, ignore_keys)
    run = _run_config(output.with_suffix(""), model)
    write_new(output, resolved_yaml(run))
    say(f"written      {output}; deepseek validate {shlex.quote(str(output))} shows its numbers")


def one_of(option: str, value: str, allowed: Sequence[str]) -> str:
    """``value``. Raises UserError unless it is one of ``allowed``."""
    if value not in allowed:
        raise UserError(f"{option} {value}: use {' or '.join(allowed)}")
    return value


def copy_template(source: Path, target: Path) -> None:
    """The chat templates that lie in a folder or beside a tokenizer, if there are some."""
    folder = source if source.is_dir() else source.parent
    if (folder / CHAT_TEMPLATE).is_file():
        shutil.copyfile(folder / CHAT_TEMPLATE, target / CHAT_TEMPLATE)
    if (folder / MORE_TEMPLATES).is_dir():
        shutil.copytree(folder / MORE_TEMPLATES, target / MORE_TEMPLATES, dirs_exist_ok=True)


def _tokenizer(source: Path, given: Path | None, told: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer with what the source tells of generation.

    None, with a note, where the folder has none that can be read.
    """
    if given is None and not (source / "tokenizer.json").is_file():
        try:
            load_tokenizer(source)
        except UserError as failure:
            say(f"note         imported without a tokenizer (--tokenizer PATH adds one): {failure}")
        return None
    return load_tokenizer(given or source).with_generation(told)


_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _run_config(target: Path, cfg: ModelConfig) -> RunConfig:
    """A whole configuration around the model. Raises ConfigError if it breaks a rule."""
    rate = cfg.moe_router_bias_update_rate if cfg.topk_method == "noaux_tc" else 0.0
    if cfg.rope_scaling is None:
        longest = cfg.max_position_embeddings
    else:  # the first training phase had no more
        longest = cfg.rope_scaling.original_max_position_embeddings
    values = {
        "moe_router_bias_update_rate": rate,
        "data.seq_length": min(4096, longest, cfg.max_position_embeddings),
        "tokenizer.vocab_size": min(cfg.tokenizer.vocab_size, cfg.vocab_size),
    }
    run = RunConfig(name=target.absolute().name, model=changed(cfg, values))
    problems = check(run)
    if problems:
        raise ConfigError(problems, "the imported model")
    return run


def _say_source(weights: Any, folder: Any) -> None:
    say(
        f"source       {folder.path}: {len(folder.owner):,} tensors in {len(folder.files)} files, "
        f"{weights.source_bytes / 1e9:,.2f} GB"
        + (f", {len(weights.quantised):,} in FP8" if weights.quantised else "")
    )
    if "auto_map" in folder.config:
        say("note         the code that config.json names (auto_map) is not needed and not run")
    size, stated = weights.config.vocab_size, folder.config["vocab_size"]
    if weights.rows | {stated} != {size}:
        had = " and ".join(f"{count:,}" for count in sorted(weights.rows))
        say(f"vocabulary   {size:,} rows; the source has {had}, its config.json says {stated:,}")
    if weights.mtp_absent:
        say("note         config.json speaks of MTP modules, but their weights are not there")


def _say_result(
    target: Path, run: RunConfig, dropped: dict[str, list[str]], tokenizer: Tokenizer | None
) -> None:
    from deepseek.config.cost import count_parameters

    for reason, names in dropped.items():
        listed = ", ".join(names[:3]) + (", ..." if names[3:] else "")
        say(f"dropped      {len(names):,} tensors, {reason}: {listed}")
    counts = count_parameters(run.model)
    depths = run.model.num_nextn_predict_layers
    say(
        f"imported     {(counts.total + counts.mtp) / 1e6:,.1f} M parameters, "
        f"{counts.active / 1e6:,.1f} M active per token, {depths or 'no'} MTP modules"
    )
    settings = [f"model.restore_from={target}"]
    if tokenizer is not None:
        settings.append(f"model.tokenizer.path={target / TOKENIZER}")
        say(f"sample it    deepseek generate {target}")
    command = ["deepseek", "train", "--config", str(target / CONFIG_FILE), *settings]
    say(f"train it     {shlex.join(command)} model.data.data_prefix=YOUR_DATA")


def export_hf(
    checkpoint: Path, target: Path, dtype: str = "fp32", mtp: str = "keep", shard_gb: float = 5.0
) -> None:
    """Write ``config.json``, weights, index and tokenizer into ``target``.

    Work that was cut short goes on with the same command.

    Args:
        checkpoint: a checkpoint, or a run or imported folder, of which the newest is taken.
        target: a folder that does not exist.
        dtype: ``fp32``, every bit as in the checkpoint, ``bf16``, rounded, or ``fp8``, projections
            with a scale per block.
        mtp: ``keep`` or ``drop`` the multi-token-prediction modules.
        shard_gb: largest file, 10^9 bytes, unless one tensor is larger.

    Raises:
        ConfigError: no Hugging Face class computes this model.
        UserError: no sound checkpoint, tensors are not accounted for, no room.
    """
    from deepseek.checkpoint.training_state import Base
    from deepseek.interop.hf_export import Dtype, WeightExport

    chosen = cast(Dtype, one_of("--dtype", dtype, get_args(Dtype)))
    keep = one_of("--mtp", mtp, ("keep", "drop")) == "keep"
    if not shard_gb > 0:
        raise UserError(f"--shard-gb {shard_gb:g}: give a size above 0")
    refuse_existing(target)
    opened = open_checkpoint(checkpoint)
    if opened.config.model.peft is not None:
        raise UserError(
            f"{opened.path} holds adapters only; `deepseek lora merge {checkpoint} DIR` makes a "
            "whole model to export, `deepseek lora export` writes them as peft reads them"
        )
    tokenizer = opened.tokenizer()
    weights = WeightExport(
        opened.checkpoint,
        opened.config.model,
        chosen,
        keep,
        int(shard_gb * 1e9),
    )
    told = tokenizer.generation if tokenizer is not None else opened.generation
    ids = _token_ids(tokenizer, told)
    plan = {
        "export": 1,
        "checkpoint": Base.of(opened.path).sha256,
        "dtype": chosen,
        "mtp": mtp,
        "files": weights.file_names,
    }
    say(f"checkpoint   {opened.path}, step {opened.step}")
    with Staging(target, plan) as staging, disk_errors(f"exporting to {target}", staging.folder):
        total = weights.result_bytes
        staging.require_room(total, "the export")
        with StageProgress() as shown:
            weights.write(staging, ids, shown.of_bytes("exporting", total))
        if tokenizer is not None and opened.run is not None:
            tokenizer.save(staging.folder)
            copy_template(opened.run / TOKENIZER, staging.folder)
        staging.write(GENERATION, json.dumps({**told, **ids}, indent=2).encode() + b"\n")
        staging.finish()
    files = len(weights.file_names)
    say(
        f"exported     {weights.num_tensors:,} tensors, {total / 1e9:,.2f} GB of {chosen} in "
        f"{files} file{'s' * (files > 1)}, as {weights.hf_config['architectures'][0]}: {target}"
    )
    if weights.narrows:
        kept = ", but for blocks that came from it" if chosen == "fp8" else ""
        say(f"note         rounded from fp32 to {chosen}{kept}; --dtype fp32 keeps every bit")
    if weights.dropped:
        say(f"dropped      {len(weights.dropped):,} tensors of the MTP modules")
    if tokenizer is None:
        say("note         there is no tokenizer with this checkpoint; add the model's own")


def _token_ids(
    tokenizer: Tokenizer | None, told: dict[str, Any]
) -> dict[str, int | list[int] | None]:
    """What ``config.json`` says of the tokenizer: one id or, where several stop, their list."""
    if tokenizer is None:
        return {key: told.get(key) for key in _TOKEN_IDS}
    stops = tokenizer.stop_ids
    return {
        "bos_token_id": told.get("bos_token_id") if tokenizer.bos_id is None else tokenizer.bos_id,
        "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
        "pad_token_id": told.get("pad_token_id") if tokenizer.pad_id is None else tokenizer.pad_id,
    }


def export_lora(run: Path, target: Path, base: str | None = None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as ``peft`` reads them.

    Args:
        run: a run folder with adapters, or a checkpoint of one.
        target: a folder that does not exist.
        base: Hugging Face name or folder of the model below, for ``adapter_config.json``.

    Raises:
        UserError: no adapters, their base is gone or has changed, ``target`` exists.
    """
    from deepseek.checkpoint.shards import TensorSpec
    from deepseek.interop.hf_config import hf_config
    from deepseek.interop.hf_export import TensorFileWriter
    from deepseek.interop.open_weights import load_adapted
    from deepseek.interop.peft import peft_adapter

    refuse_existing(target)
    opened = _with_adapters(run)
    model = opened.config.model
    hf_config(model)  # raises if no Hugging Face class computes this model
    tensors, config = peft_adapter(load_adapted(opened.checkpoint, model), model, base)
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with _written(target) as folder:
        with TensorFileWriter(folder / "adapter_model.safetensors", specs) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    count = sum(tensor.numel() for tensor in tensors.values())
    say(f"wrote {target}: {len(tensors)} tensors, {count:,} numbers, of step {opened.step}")
    if model.num_nextn_predict_layers:
        say("note: MTP modules have no adapters; the base is used without them")
    say(f"read it with: PeftModel.from_pretrained(BASE, {str(target)!r})")


def merge_lora(run: Path, target: Path) -> None:
    """Write one model, base and adapters, into a folder that every command reads.

    Args:
        run: a run folder with adapters, or a checkpoint of one.
        target: a folder that does not exist.

    Raises:
        UserError: no adapters, their base is gone or has changed, ``target`` exists.
    """
    from deepseek.checkpoint.manager import CheckpointManager

    refuse_existing(target)
    opened = _with_adapters(run)
    model, config = opened.model().cpu(), opened.config
    config = changed(
        config,
        {"name": target.absolute().name, "model.peft": None, "model.restore_from": None},
    )
    state = {
        "step": 0,
        "consumed_samples": 0,
        "seed": config.seed,
        "config": asdict(config),
        "data": "merged",
        "imported": {"from": str(run), "step": opened.step},
    }
    tokenizer = opened.tokenizer()
    with _written(target) as folder:
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        with CheckpointManager(folder / CHECKPOINTS) as manager:
            manager.save(0, tensors, state)
        (folder / CHECKPOINTS / LOCK).unlink(missing_ok=True)  # a sign of a run that was begun
        (folder / CONFIG_FILE).write_text(resolved_yaml(config))
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER)
    say(f"wrote {target}: the model of {run} at step {opened.step}, adapters merged")
    say(f"next: deepseek generate {target}, or deepseek hf export {target} DIR")


def _with_adapters(run: Path) -> OpenedCheckpoint:
    opened = open_checkpoint(run)
    if opened.config.model.peft is None:
        raise UserError(
            f"{opened.path} was not trained with model.peft and holds no adapters; "
            f"`deepseek hf export {run} DIR` writes whole models"
        )
    return opened


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """A folder that becomes ``target`` once it is complete."""
    folder = target.with_name(f".{target.name}.partial")
    try:
        with disk_errors(f"writing {target}"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            yield folder
            os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def export_nemo(checkpoint: Path, target: Path) -> None:
    """Write the weights and the ``model`` section into ``target``.

    Args:
        checkpoint: a checkpoint, or a run or imported folder, of which the newest is taken.
        target: a file that does not exist, ending in ``.nemo``.

    Raises:
        UserError: no sound checkpoint, only adapters in it, no room.
    """
    if target.suffix != ".nemo":
        raise UserError(f"{target}: NeMo expects the ending .nemo; use {target}.nemo")
    refuse_existing(target)
    opened = open_checkpoint(checkpoint)
    if opened.config.model.peft is not None:
        raise UserError(
            f"{opened.path} holds adapters only; `deepseek lora merge {checkpoint} DIR` makes a "
            "whole model, and `deepseek nemo export DIR FILE` a .nemo file of it"
        )
    _write_nemo(opened, target)


def keep_nemo(folder: Path, name: str) -> None:
    """Make sure that ``name.nemo`` in the run folder ``folder`` is of its newest checkpoint.

    For one process; the others of the run need not be there any more.

    Raises:
        UserError: no sound checkpoint, no room.
    """
    from deepseek.checkpoint.checkpoint import newest_sound
    from deepseek.commands.versions import finished_steps
    from deepseek.interop.nemo_file import step_in
    from deepseek.run_folder import CHECKPOINTS

    target = folder / f"{name}.nemo"
    if target.is_file() and step_in(target) == finished_steps(folder):
        return
    checkpoint = newest_sound(folder / CHECKPOINTS, complain)
    assert checkpoint is not None, "the last step is always kept"
    _write_nemo(with_config(checkpoint), target)


def _write_nemo(opened: OpenedCheckpoint, target: Path) -> None:
    from deepseek.interop.nemo_file import NemoWriter

    writer = NemoWriter(opened.checkpoint, opened.config.model)
    with StageProgress() as shown:
        writer.write(target, shown.of_bytes("writing .nemo", writer.nbytes))
    say(f"nemo         {target}, step {opened.step}, {writer.nbytes / 1e9:,.2f} GB")
