"""``deepseek hf import``: Hugging Face files to a folder that trains, generates and exports."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepseek.config import RunConfig, changed, check, resolved_yaml
from deepseek.config.errors import ConfigError, UserError
from deepseek.config.foreign_names import nearest
from deepseek.config.schema import ModelConfig
from deepseek.console import StageProgress, say
from deepseek.data.tokenizer import Tokenizer, load_tokenizer
from deepseek.files import Staging, disk_errors, refuse_existing, require_room, write_durably
from deepseek.run_folder import CHECKPOINTS, CONFIG_FILE, TOKENIZER

CHAT_TEMPLATE = "chat_template.jinja"
"""Where transformers 5 keeps the template; before, it was in ``tokenizer_config.json``."""


def import_hf(
    source: Path,
    target: Path,
    mtp: str = "keep",
    tokenizer: Path | None = None,
    ignore_keys: Sequence[str] = (),
) -> None:
    """Write the checkpoint of step 0, ``config.yaml`` and the tokenizer into ``target``.

    Work that was cut short goes on with the same command. The weights are fp32 in the result.

    Args:
        source: folder with ``config.json`` and safetensors files.
        target: a folder that does not exist.
        mtp: ``keep`` the multi-token-prediction modules if there are any, or ``drop`` them.
        tokenizer: a ``tokenizer.json`` or its folder; None: the one in ``source``.
        ignore_keys: keys of ``config.json`` that are known not to change the model.

    Raises:
        ConfigError: the model is not one that is built here; every reason at once.
        UserError: files are missing or broken, tensors are not accounted for, no room.
    """
    from deepseek.checkpoint.folder import step_name
    from deepseek.interop.hf_folder import HfFolder
    from deepseek.interop.hf_import import WeightImport

    kept = one_of("--mtp", mtp, ("keep", "drop"))
    refuse_existing(target)
    folder = HfFolder(source)
    for key in ignore_keys:
        if key not in folder.config:
            close = nearest(key, list(folder.config))
            hint = f"; {close}?" if close else "; leave the option out"
            raise UserError(f"--ignore-key {key}: config.json has no such key{hint}")
    weights = WeightImport(folder, "drop" if kept == "drop" else "keep", tuple(ignore_keys))
    read = _tokenizer(source, tokenizer, weights.config)
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
        "source": str(source.resolve()),
    }
    _say_source(weights, folder)
    with Staging(target, plan) as staging, disk_errors(f"importing to {target}", staging.folder):
        written = sum(p.stat().st_size for p in staging.folder.rglob("*") if p.is_file())
        require_room(staging.folder, max(0, weights.result_bytes - written), "the import")
        total = weights.source_bytes
        with StageProgress() as shown:
            weights.write(
                staging,
                staging.folder / CHECKPOINTS / step_name(0),
                state,
                lambda done: shown.update("importing", done, total, f"{done / 1e9:,.2f} GB"),
            )
        (staging.folder / CONFIG_FILE).unlink(missing_ok=True)
        write_durably(staging.folder / CONFIG_FILE, resolved_yaml(run).encode())
        if read is not None:
            read.save(staging.folder / TOKENIZER)
            copy_template(tokenizer or source, staging.folder / TOKENIZER)
        staging.finish()
    _say_result(target, run, dropped, read)


def one_of(option: str, value: str, allowed: Sequence[str]) -> str:
    """``value``. Raises UserError unless it is one of ``allowed``."""
    if value not in allowed:
        raise UserError(f"{option} {value}: use {' or '.join(allowed)}")
    return value


def copy_template(source: Path, target: Path) -> None:
    """The chat template that lies in a folder or beside a tokenizer, if there is one."""
    template = (source if source.is_dir() else source.parent) / CHAT_TEMPLATE
    if template.is_file():
        shutil.copyfile(template, target / CHAT_TEMPLATE)


def _tokenizer(source: Path, given: Path | None, cfg: ModelConfig) -> Tokenizer | None:
    """None, with a note, where the folder has none that can be read."""
    if given is None and not (source / "tokenizer.json").is_file():
        try:
            load_tokenizer(source)
        except UserError as failure:
            say(f"note         imported without a tokenizer (--tokenizer PATH adds one): {failure}")
        return None
    read = load_tokenizer(given or source)
    if read.vocab_size > cfg.vocab_size:
        raise UserError(
            f"{given or source}: the tokenizer has {read.vocab_size} ids, the model "
            f"{cfg.vocab_size}; give the model's own with --tokenizer"
        )
    return read


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
