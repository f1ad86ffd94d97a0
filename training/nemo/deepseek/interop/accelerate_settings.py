"""``deepseek migrate fsdp-config``: settings of accelerate and the Hugging Face Trainer to ours.

Every key of the files ends in one of three lists: taken, with what it became; not taken, with the
reason; or off (null, false, empty), which are only counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from deepseek.config import load_config
from deepseek.config.errors import ConfigError, UserError, shown
from deepseek.config.foreign_names import NO_SUCH_KEY, RENAMED, TRANSFORMERS
from deepseek.config.yaml_file import dump_yaml, read_yaml
from deepseek.console import complain, say

_OFF = (None, False, "", "no", "none", "NO")


@dataclass
class _Found:
    """The lists, and the configuration that grows."""

    settings: dict[str, Any] = field(default_factory=dict)
    """By dotted key of ours."""
    taken: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    off: int = 0

    def set(self, theirs: str, key: str, value: Any, note: str = "") -> None:
        self.settings[key] = value
        self.taken.append((theirs, f"{key}={shown(value)}" + (f" ({note})" if note else "")))

    def same(self, theirs: str, what: str) -> None:
        self.taken.append((theirs, what))

    def leave(self, theirs: str, reason: str) -> None:
        self.left.append((theirs, reason))


def migrate_config(
    files: Sequence[Path], output: Path | None = None, extends: str | None = None
) -> None:
    """Print what becomes of each key, and write or print the configuration.

    Args:
        files: an accelerate YAML, TrainingArguments as JSON or YAML, or both.
        output: the file to write; it must not exist. None: print it.
        extends: the configuration that holds the model.

    Raises:
        UserError: a file is neither of the two.
        ConfigError: the result breaks a rule.
    """
    if output is not None and output.exists():
        raise UserError(f"{output} exists already and is not overwritten; give another --output")
    keys: dict[str, Any] = {}
    for file in files:  # what one of them leaves open another may say
        read = _read(file)
        if not _TRAINING.keys() & read.keys() and not _ACCELERATE.keys() & read.keys():
            listed = ", ".join(sorted(read)[:6]) or "(no key)"
            raise UserError(
                f"{file}: neither a configuration of accelerate (num_processes, fsdp_config, ...) "
                f"nor TrainingArguments (learning_rate, max_steps, ...); it has {listed}"
            )
        for key, value in _flat(read).items():
            if keys.get(key) in _OFF:
                keys[key] = value
    found = _mapped(keys)
    tree = _tree(found.settings)
    if extends is not None:
        tree = {"extends": extends, **tree}
    for title, rows in (("taken", found.taken), ("not taken", found.left)):
        for key, text in rows:
            say(f"{title:<12} {key}: {text}")
    say(f"off          {found.off} keys that are null, false or empty")
    text = "# " + ", ".join(map(str, files)) + "\n" + dump_yaml(tree)
    if output is None:
        say()
        say(text.rstrip())
    else:
        try:
            output.write_text(text)
        except OSError as failure:
            raise UserError(f"{output}: cannot be written: {failure.strerror}") from failure
        say(f"written      {output}")
    try:
        load_config(output if output is not None else tree)
    except ConfigError as error:
        complain("what was found does not yet make a sound configuration:")
        raise error
    if extends is None:
        say("note         the model is the default one; add its keys, or use --extends")


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as failure:
        raise UserError(f"{file}: cannot be read: {failure}") from failure
    if file.suffix == ".json":
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as failure:
            raise UserError(f"{file}: is not JSON: {failure}") from None
    else:
        document = read_yaml(text, str(file))
        if document.problems:
            raise ConfigError(document.problems, str(file))
        tree = document.tree
    if not isinstance(tree, dict):
        raise UserError(f"{file}: holds a {type(tree).__name__}, expected keys and values")
    return tree


# -- what becomes of each key --


def _flat(keys: dict[str, Any]) -> dict[str, Any]:
    """With the keys of the sections that have rules as ``section.key``."""
    flat: dict[str, Any] = {}
    for key, value in keys.items():
        if key in _SECTIONS and isinstance(value, dict):
            prefix = "fsdp_" if key == "fsdp_config" else ""
            flat |= {f"{key}.{inner.removeprefix(prefix)}": v for inner, v in value.items()}
        else:
            flat[key] = value
    return flat


def _mapped(flat: dict[str, Any]) -> _Found:
    """What becomes of each key of ``_flat``."""
    found = _Found()
    for key in _NUMBERS & flat.keys():
        if flat[key] is not None and type(flat[key]) is not int:
            raise UserError(f"{key}={shown(flat[key])}: give a whole number, it decides the batch")
    world = int(flat.get("num_processes") or 1)
    for key, value in flat.items():
        section, _, name = key.partition(".")
        rule = _SECTIONS[section].get(name) if name else _ACCELERATE.get(key) or _TRAINING.get(key)
        if (value in _OFF or value in ({}, [])) and not isinstance(rule, _Meant):
            found.off += 1
        elif rule is None:
            found.leave(f"{key}={shown(value)}", "not known to this converter")
        elif isinstance(rule, str):
            found.leave(f"{key}={shown(value)}", rule)
        else:
            call = rule.call if isinstance(rule, _Meant) else rule
            try:
                call(found, key, value, flat)
            except (TypeError, ValueError):
                found.leave(f"{key}={shown(value)}", "of another type than that key has")
    _batch(found, flat, world)
    return found


Rule = Callable[[_Found, str, Any, dict[str, Any]], None]


@dataclass(frozen=True)
class _Meant:
    """A rule for which null, false and 0 say something as well."""

    call: Rule


def _copied(found: _Found, key: str, value: Any, flat: dict[str, Any], note: str = "") -> None:
    """It means the same under another name."""
    found.set(f"{key}={shown(value)}", _ours(key), value, note)


def _ours(key: str) -> str:
    """The dotted key that a key of ``_flat`` is about."""
    return TRANSFORMERS[key.rpartition(".")[2]]


def _same(what: str) -> Rule:
    return lambda found, theirs, value, flat: found.same(f"{theirs}={shown(value)}", what)


def _processes(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    machines = int(flat.get("num_machines") or 1)
    if int(value) % machines:
        raise UserError(f"num_processes={value} is no multiple of num_machines={machines}")
    found.set(f"{key}={shown(value)}", _ours(key), int(value) // machines, "per node")


def _precision(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    if value == "bf16":
        found.set(f"{key}=bf16", _ours(key), "bf16-mixed")
    elif value in ("no", None, False):
        found.set(f"{key}=no", _ours(key), "32")
    else:
        found.leave(f"{key}={shown(value)}", "precisions are 32, bf16-mixed and auto")


def _bf16(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    found.set(f"{key}=true", _ours(key), "bf16-mixed")


def _strategy(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    names = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
    number = str(value).isdigit() and 1 <= int(value) <= 5
    kind = names[int(value) - 1] if number else str(value).upper()
    shown_as = f"{key}={shown(value)}"
    world, nodes = int(flat.get("num_processes") or 1), int(flat.get("num_machines") or 1)
    if kind.startswith("HYBRID"):
        found.set(shown_as, "model.data_parallel_replicate_size", nodes, "one replica per node")
    gathers = world > (nodes if kind.startswith("HYBRID") else 1)
    if kind in ("FULL_SHARD", "HYBRID_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2"):
        if gathers:
            again = kind in ("FULL_SHARD", "HYBRID_SHARD")
            found.set(shown_as, "model.reshard_after_forward", again)
        else:
            found.same(shown_as, "data-parallel ranks share parameters, gradients and optimiser")
    elif kind == "NO_SHARD":
        found.set(shown_as, "model.data_parallel_replicate_size", world)
    else:
        found.leave(shown_as, f"no sharding strategy of FSDP: {', '.join(names)}")


def _reshard(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    if value is None or value == "":
        found.off += 1
    elif not isinstance(value, bool):  # accelerate: with version 1, the sharding strategy
        _strategy(found, key, value, flat)
    elif int(flat.get("num_processes") or 1) > 1:
        found.set(f"{key}={shown(value)}", _ours(key), value)
    else:
        found.same(f"{key}={shown(value)}", "one process gathers nothing")


def _recompute(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    if value is True:
        found.set(f"{key}=true", _ours(key), "full")


def _schedule(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    rate = flat.get("learning_rate", 5e-5)
    more = flat.get("lr_scheduler_kwargs") or {}
    kind = str(value).lower().removeprefix("schedulertype.")
    shown_as, least = f"{key}={shown(value)}", "model.optim.sched.min_lr"
    if kind in ("constant", "constant_with_warmup"):
        found.set(shown_as, least, rate, "a cosine from the peak to the peak")
    elif kind == "cosine":
        found.set(shown_as, _ours(key), "CosineAnnealing")
    elif kind == "cosine_with_min_lr" and isinstance(more, dict):
        floor = more.get("min_lr", float(rate) * float(more.get("min_lr_rate", 0.0)))
        found.set(shown_as, least, floor)
    else:
        found.leave(shown_as, "schedules are CosineAnnealing and WarmupConstantCosine")


def _warmup(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    if not value or key == "warmup_ratio" and flat.get("warmup_steps"):
        found.off += 1
        return
    steps = flat.get("max_steps") or -1
    if key == "warmup_ratio" or 0 < value < 1:
        if steps <= 0:
            found.leave(f"{key}={shown(value)}", "a share of max_steps, which is not set")
            return
        value = -(-float(value) * steps // 1)
    note = "step k of w has k/(w+1) of the peak here, k/w from 0 in transformers"
    found.set(f"{key}={shown(flat[key])}", _ours(key), int(value), note)


def _steps(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    if value and int(value) > 0:
        found.set(f"{key}={value}", _ours(key), int(value))
    else:
        found.leave(f"{key}={shown(value)}", "a run has a number of steps; set trainer.max_steps")


def _optimizer(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    if str(value).lower().removeprefix("optimizernames.").startswith("adamw_torch"):
        found.set(f"{key}={value}", _ours(key), "adamw")
    else:
        found.leave(f"{key}={shown(value)}", "optimisers are adamw and muon")


def _beta(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    pair = [flat.get("adam_beta1", 0.9), flat.get("adam_beta2", 0.999)]
    found.set(f"{key}={value}", _ours(key), pair)


def _clip(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    found.set(f"{key}={shown(value)}", _ours(key), value or 0.0)


def _every(strategy: str) -> Rule:
    def rule(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
        name = _ours(key)
        chosen = str(flat.get(strategy, "steps")).lower().rpartition(".")[2]
        if chosen == "no":
            found.set(f"{key}={shown(value)}", name, 0, f"{strategy}=no")
        elif not isinstance(value, int) or chosen == "epoch":
            found.leave(f"{key}={shown(value)}", f"{name} counts steps; {strategy}={chosen}")
        else:
            found.set(f"{key}={value}", name, value)

    return rule


def _report_to(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    names = [value] if isinstance(value, str) else list(value)
    board = "tensorboard" in names or "all" in names
    found.set(f"{key}={shown(value)}", _ours(key), board)
    for name in names:
        if name not in ("tensorboard", "all", "none"):
            found.leave(f"{key}={name}", "metrics.jsonl of the run folder holds every step")


def _timeout(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    found.set(f"{key}={value}", _ours(key), float(value) / 60)


def _cpu(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    if value is True:
        found.set(f"{key}=true", _ours(key), "cpu")


def _distributed(found: _Found, key: str, value: Any, flat: dict[str, Any]) -> None:
    if str(value).upper() in ("FSDP", "MULTI_GPU", "MULTI_CPU", "NO"):
        found.same(f"{key}={value}", "the layout follows from the parallel sizes")
    else:
        found.leave(f"{key}={value}", "this guide is for FSDP")


def _batch(found: _Found, flat: dict[str, Any], world: int) -> None:
    """The batch of a step is a product there, a number here."""
    mine = flat.get("per_device_train_batch_size")
    many = int(flat.get("gradient_accumulation_steps") or 1)
    if mine is None:
        if many > 1:
            found.leave(
                f"gradient_accumulation_steps={many}",
                "model.global_batch_size = micro_batch_size x data-parallel ranks x this",
            )
        return
    split = int(flat.get("parallelism_config.parallelism_config_tp_size") or 1)
    found.set(f"per_device_train_batch_size={mine}", "model.micro_batch_size", int(mine))
    ranks = max(1, world // split)
    found.set(
        f"gradient_accumulation_steps={many}",
        "model.global_batch_size",
        int(mine) * many * ranks,
        f"{mine} x {many} x {ranks} data-parallel ranks"
        + ("" if "num_processes" in flat else "; give the accelerate file too for their number"),
    )


def _tree(settings: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


_LAUNCH = "the launcher's: torchrun, or deepseek launch --slurm"
_WRAPS = "nothing to choose: every block is sharded on its own"
_SEEN_BY_BATCH: Rule = lambda found, key, value, flat: None  # noqa: E731  (see _batch)

_ACCELERATE: dict[str, Rule | str | _Meant] = {
    "compute_environment": _LAUNCH,
    "debug": "collectives are always watched (trainer.collective_timeout_minutes)",
    "distributed_type": _distributed,
    "downcast_bf16": "for TPUs",
    "enable_cpu_affinity": _LAUNCH,
    "gpu_ids": _LAUNCH,
    "machine_rank": _LAUNCH,
    "main_process_ip": _LAUNCH,
    "main_process_port": _LAUNCH,
    "main_training_function": "there is no training function; the command is deepseek train",
    "mixed_precision": _Meant(_precision),
    "num_machines": _copied,
    "num_processes": _processes,
    "rdzv_backend": _LAUNCH,
    "same_network": _LAUNCH,
    "use_cpu": _cpu,
    "gradient_clipping": _clip,
}
_FSDP: dict[str, Rule | str | _Meant] = {
    "version": _same("FSDP2 always"),
    "sharding_strategy": _strategy,
    "reshard_after_forward": _Meant(_reshard),
    "auto_wrap_policy": _WRAPS,
    "transformer_layer_cls_to_wrap": _WRAPS,
    "min_num_params": _WRAPS,
    "backward_prefetch": "FSDP2 prefetches by itself",
    "backward_prefetch_policy": "FSDP2 prefetches by itself",
    "forward_prefetch": "FSDP2 prefetches by itself",
    "limit_all_gathers": "FSDP2 limits them by itself",
    "offload_params": "there is no offloading; use more ranks, TP, EP or PP",
    "cpu_offload": "there is no offloading; use more ranks, TP, EP or PP",
    "state_dict_type": "checkpoints are always sharded, by name, and any layout loads them",
    "use_orig_params": "FSDP2 always keeps the parameters",
    "sync_module_states": "every rank makes its part of the same start values, or loads it",
    "cpu_ram_efficient_loading": "every rank loads its part only",
    "activation_checkpointing": _recompute,
    "activation_cpu_offload": "there is no offloading; use more ranks, TP, EP or PP",
    "ignored_modules": _WRAPS,
    "xla": "for TPUs",
}
_PARALLEL: dict[str, Rule | str | _Meant] = {
    "parallelism_config_dp_replicate_size": _copied,
    "parallelism_config_tp_size": _copied,
    "parallelism_config_dp_shard_size": "follows: devices x nodes / (TP x PP x replicas)",
    "parallelism_config_cp_size": NO_SUCH_KEY["parallelism_config_cp_size"],
}
_DYNAMO: dict[str, Rule | str | _Meant] = {
    "dynamo_backend": lambda found, key, value, flat: (
        found.set(f"{key}={value}", _ours(key), True)
        if str(value).lower() == "inductor"
        else found.leave(f"{key}={value}", "only inductor is used (model.torch_compile)")
    ),
}
_SECTIONS = {"fsdp_config": _FSDP, "parallelism_config": _PARALLEL, "dynamo_config": _DYNAMO}
_NUMBERS = {
    "num_processes",
    "num_machines",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "parallelism_config.parallelism_config_tp_size",
}
_NO_EPOCHS = "a run has a number of steps; trainer.max_steps = epochs x tokens / tokens a step"
_DATA = "the data come prepared (deepseek prepare-data), packed, in an order the seed decides"
_HUB = "nothing is uploaded; deepseek hf export writes the folder"
_COPIED = (
    "output_dir",
    "run_name",
    "seed",
    "learning_rate",
    "adam_epsilon",
    "torch_compile",
    "save_total_limit",
    "dataloader_num_workers",
)
_TRAINING: dict[str, Rule | str | _Meant] = {
    **dict.fromkeys(_COPIED, _copied),
    "data_seed": "one seed decides weights and order of the data (seed)",
    "weight_decay": _Meant(partial(_copied, note="of matrices only")),
    "adam_beta1": _beta,
    "adam_beta2": _beta,
    "max_grad_norm": _Meant(_clip),
    "max_steps": _steps,
    "num_train_epochs": _NO_EPOCHS,
    "lr_scheduler_type": _schedule,
    "lr_scheduler_kwargs": _same("see lr_scheduler_type"),
    "warmup_steps": _warmup,
    "warmup_ratio": _warmup,
    "per_device_train_batch_size": _SEEN_BY_BATCH,
    "gradient_accumulation_steps": _SEEN_BY_BATCH,
    "per_device_eval_batch_size": "validation uses model.micro_batch_size",
    "bf16": _bf16,
    "fp16": "precisions are 32, bf16-mixed and auto",
    "tf32": "fp32 products are fp32",
    "gradient_checkpointing": _recompute,
    "gradient_checkpointing_kwargs": "blocks are recomputed without reentering",
    "optim": _optimizer,
    "logging_steps": lambda found, key, value, flat: (
        found.set(f"{key}={value}", _ours(key), int(value))
        if value >= 1
        else found.leave(f"{key}={value}", f"{_ours(key)} counts steps")
    ),
    "eval_steps": _every("eval_strategy"),
    "save_steps": _every("save_strategy"),
    "eval_strategy": _same("see eval_steps"),
    "save_strategy": _same("see save_steps"),
    "logging_strategy": "metrics.jsonl of the run folder holds every step",
    "logging_dir": "logs lie in the run folder",
    "report_to": _report_to,
    "ddp_timeout": _timeout,
    "use_cpu": _cpu,
    "resume_from_checkpoint": "deepseek train goes on by itself; migrate the checkpoint first",
    "fsdp": _same("FSDP2 always"),
    "fsdp_config": "not a section of keys",
    "max_length": f"set {RENAMED['max_length']}",
    "do_train": _same("deepseek train"),
    "do_eval": "trainer.val_check_interval",
    "group_by_length": _DATA,
    "dataloader_drop_last": _DATA,
    "dataloader_pin_memory": _DATA,
    "remove_unused_columns": _DATA,
    "label_names": _DATA,
    "packing": _DATA,
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "local_rank": _LAUNCH,
    "save_safetensors": _HUB,
    "average_tokens_across_devices": _same("the loss is always a mean over all tokens of a step"),
    "logging_nan_inf_filter": "a step whose gradient is not finite changes no weight, and says so",
    "skip_memory_metrics": "memory is recorded (exp_manager.monitor)",
    "log_on_each_node": "one process speaks for all",
    "log_level_replica": "one process speaks for all",
    "dataloader_in_order": _DATA,
    "train_sampling_strategy": _DATA,
    "length_column_name": _DATA,
    "eval_do_concat_batches": "validation is a loss",
    "project": _HUB,
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "neftune_noise_alpha": "embeddings get no noise",
    "deepspeed": "the layout follows from the parallel sizes",
    "disable_tqdm": "the terminal decides",
    "log_level": "the terminal decides",
    "accelerator_config": _DATA,
}
