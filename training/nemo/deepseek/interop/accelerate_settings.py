"""``deepseek migrate fsdp-config``: settings of accelerate and the Hugging Face Trainer to ours.

Every key of the files ends in one of three lists: taken, with what it became; not taken, with the
reason; or off (null, false, empty), which are only counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek.config import load_config
from deepseek.config.errors import ConfigError, UserError, shown
from deepseek.config.foreign_names import RENAMED, TRANSFORMERS
from deepseek.config.yaml_file import dump_yaml, read_yaml
from deepseek.console import complain, say
from deepseek.files import refuse_existing, write_new

_OFF = (None, False, "", "no", "none", "NO")


@dataclass
class _Found:
    """The lists, and the configuration that grows."""

    flat: dict[str, Any]
    """All keys; see ``_flat``."""
    settings: dict[str, Any] = field(default_factory=dict)
    """By dotted key of ours."""
    taken: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    off: int = 0
    key: str = ""
    """The one of ``flat`` that is looked at."""

    @property
    def ours(self) -> str:
        """The dotted key that it is about."""
        return TRANSFORMERS[self.key.rpartition(".")[2]]

    @property
    def told(self) -> str:
        """With its value."""
        return f"{self.key}={shown(self.flat[self.key])}"

    def number(self, key: str) -> int:
        """A whole number, 1 if it is not given."""
        return int(self.flat.get(key) or 1)

    def set(self, value: Any, note: str = "", key: str = "") -> None:
        """It becomes ``key``, else ``ours``."""
        key = key or self.ours
        self.settings[key] = value
        self.same(f"{key}={shown(value)}" + (f" ({note})" if note else ""))

    def same(self, what: str) -> None:
        """It is so here."""
        self.taken.append((self.told, what))

    def leave(self, reason: str) -> None:
        """It has no counterpart."""
        self.left.append((self.told, reason))


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
    if output is not None:
        refuse_existing(output)
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
        write_new(output, text)
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
    found = _Found(flat)
    for key in _NUMBERS & flat.keys():
        if flat[key] is not None and type(flat[key]) is not int:
            raise UserError(f"{key}={shown(flat[key])}: give a whole number, it decides the batch")
    for key, value in flat.items():
        found.key = key
        section, _, name = key.partition(".")
        rule = _SECTIONS[section].get(name) if name else _ACCELERATE.get(key) or _TRAINING.get(key)
        if (value in _OFF or value in ({}, [])) and not isinstance(rule, _Meant):
            found.off += 1
        elif rule is None:
            found.leave("not known to this converter")
        elif isinstance(rule, str):
            found.leave(rule)
        else:
            try:
                (rule.call if isinstance(rule, _Meant) else rule)(found, value)
            except (TypeError, ValueError):
                found.leave("of another type than that key has")
    _batch(found)
    return found


Rule = Callable[[_Found, Any], None]


@dataclass(frozen=True)
class _Meant:
    """A rule for which null, false and 0 say something as well."""

    call: Rule


def _same(what: str) -> Rule:
    return lambda found, value: found.same(what)


def _processes(found: _Found, value: Any) -> None:
    machines = found.number("num_machines")
    if int(value) % machines:
        raise UserError(f"num_processes={value} is no multiple of num_machines={machines}")
    found.set(int(value) // machines, "per node")


def _precision(found: _Found, value: Any) -> None:
    if value == "bf16":
        found.set("bf16-mixed")
    elif value in ("no", None, False):
        found.set("32")
    else:
        found.leave("precisions are 32, bf16-mixed and auto")


def _if_true(setting: object) -> Rule:
    def rule(found: _Found, value: Any) -> None:
        if value is not True:
            raise TypeError(value)
        found.set(setting)

    return rule


def _strategy(found: _Found, value: Any) -> None:
    names = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
    number = str(value).isdigit() and 1 <= int(value) <= 5
    kind = names[int(value) - 1] if number else str(value).upper()
    if kind not in names:
        found.leave(f"no sharding strategy of FSDP: {', '.join(names)}")
        return
    world, replicas = found.number("num_processes"), "model.data_parallel_replicate_size"
    if kind == "NO_SHARD":
        found.set(world, key=replicas)
        return
    ranks = 1
    if kind.startswith("HYBRID"):
        ranks = found.number("num_machines")
        found.set(ranks, "one replica per node", key=replicas)
    if world > ranks:
        again = kind in ("FULL_SHARD", "HYBRID_SHARD")
        found.set(again, key="model.reshard_after_forward")
    else:
        found.same("data-parallel ranks share parameters, gradients and optimiser")


def _reshard(found: _Found, value: Any) -> None:
    if value is None or value == "":
        found.off += 1
    elif not isinstance(value, bool):  # accelerate: with version 1, the sharding strategy
        _strategy(found, value)
    elif found.number("num_processes") > 1:
        found.set(value)
    else:
        found.same("one process gathers nothing")


def _schedule(found: _Found, value: Any) -> None:
    rate = found.flat.get("learning_rate", 5e-5)
    more = found.flat.get("lr_scheduler_kwargs") or {}
    kind = str(value).lower().removeprefix("schedulertype.")
    least = "model.optim.sched.min_lr"
    if kind in ("constant", "constant_with_warmup"):
        found.set("WarmupStableDecay", "without a decay")
    elif kind == "cosine":
        found.set("CosineAnnealing")
    elif kind == "cosine_with_min_lr" and isinstance(more, dict):
        floor = more.get("min_lr", float(rate) * float(more.get("min_lr_rate", 0.0)))
        found.set(floor, key=least)
    else:
        found.leave("schedules are CosineAnnealing, WarmupConstantCosine and WarmupStableDecay")


def _warmup(found: _Found, value: Any) -> None:
    share = found.key == "warmup_ratio"
    if not value or share and found.flat.get("warmup_steps"):
        found.off += 1
        return
    steps = found.flat.get("max_steps") or -1
    if share or 0 < value < 1:
        if steps <= 0:
            found.leave("a share of max_steps, which is not set")
            return
        value = -(-float(value) * steps // 1)
    found.set(int(value), "step k of w has k/(w+1) of the peak here, k/w from 0 in transformers")


def _steps(found: _Found, value: Any) -> None:
    if value and int(value) > 0:
        found.set(int(value))
    else:
        found.leave("a run has a number of steps; set trainer.max_steps")


def _optimizer(found: _Found, value: Any) -> None:
    if str(value).lower().removeprefix("optimizernames.").startswith("adamw_torch"):
        found.set("adamw")
    else:
        found.leave("optimisers are adamw and muon")


def _beta(found: _Found, value: Any) -> None:
    found.set([found.flat.get("adam_beta1", 0.9), found.flat.get("adam_beta2", 0.999)])


def _clip(found: _Found, value: Any) -> None:
    found.set(value or 0.0)


def _every(strategy: str) -> Rule:
    def rule(found: _Found, value: Any) -> None:
        chosen = str(found.flat.get(strategy, "steps")).lower().rpartition(".")[2]
        if chosen == "no":
            found.set(0, f"{strategy}=no")
        elif not isinstance(value, int) or chosen == "epoch":
            found.leave(f"{found.ours} counts steps; {strategy}={chosen}")
        else:
            found.set(value)

    return rule


def _logging(found: _Found, value: Any) -> None:
    if value >= 1:
        found.set(int(value))
    else:
        found.leave(f"{found.ours} counts steps")


def _report_to(found: _Found, value: Any) -> None:
    names = [value] if isinstance(value, str) else list(value)
    found.set("tensorboard" in names or "all" in names)
    for name in names:
        if name not in ("tensorboard", "all", "none"):
            reason = "metrics.jsonl of the run folder holds every step"
            found.left.append((f"{found.key}={name}", reason))


def _distributed(found: _Found, value: Any) -> None:
    if str(value).upper() in ("FSDP", "MULTI_GPU", "MULTI_CPU", "NO"):
        found.same("the layout follows from the parallel sizes")
    else:
        found.leave("this guide is for FSDP")


def _dynamo(found: _Found, value: Any) -> None:
    if str(value).lower() == "inductor":
        found.set(True)
    else:
        found.leave("only inductor is used (model.torch_compile)")


def _batch(found: _Found) -> None:
    """The batch of a step is a product there, a number here."""
    mine = found.flat.get("per_device_train_batch_size")
    many = found.number("gradient_accumulation_steps")
    factor = f"gradient_accumulation_steps={many}"
    if mine is None:
        if many > 1:
            product = "model.global_batch_size = micro_batch_size x data-parallel ranks x this"
            found.left.append((factor, product))
        return
    split = found.number("parallelism_config.parallelism_config_tp_size")
    found.key = "per_device_train_batch_size"
    found.set(int(mine), key="model.micro_batch_size")
    ranks = max(1, found.number("num_processes") // split)
    note = f"{mine} x {many} x {ranks} data-parallel ranks"
    if "num_processes" not in found.flat:
        note += "; give the accelerate file too for their number"
    whole = found.settings["model.global_batch_size"] = int(mine) * many * ranks
    found.taken.append((factor, f"model.global_batch_size={whole} ({note})"))


def _tree(settings: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


_SEEN_BY_BATCH: Rule = lambda found, value: None  # noqa: E731  (see _batch)
Rules = dict[str, Rule | str | _Meant]
_NO_OFFLOADING = (
    "there is no offloading of weights; use model.optim.cpu_offload=true for what the optimiser "
    "keeps, or more ranks, TP, EP or PP"
)


def _each(keys: str, rule: Rule | str) -> Rules:
    return dict.fromkeys(keys.split(), rule)


_ACCELERATE: Rules = {
    **_each(
        "compute_environment enable_cpu_affinity gpu_ids local_rank machine_rank main_process_ip "
        "main_process_port rdzv_backend same_network",
        "the launcher's: torchrun, or deepseek launch --slurm",
    ),
    "debug": "collectives are always watched (trainer.collective_timeout_minutes)",
    "distributed_type": _distributed,
    "downcast_bf16": "for TPUs",
    "main_training_function": "there is no training function; the command is deepseek train",
    "mixed_precision": _Meant(_precision),
    "num_machines": _Found.set,
    "num_processes": _processes,
    "use_cpu": _if_true("cpu"),
    "gradient_clipping": _clip,
}
_FSDP: Rules = {
    "version": _same("FSDP2 always"),
    "sharding_strategy": _strategy,
    "reshard_after_forward": _Meant(_reshard),
    **_each(
        "auto_wrap_policy transformer_layer_cls_to_wrap min_num_params ignored_modules",
        "nothing to choose: every block is sharded on its own",
    ),
    **_each(
        "backward_prefetch backward_prefetch_policy forward_prefetch", "FSDP2 prefetches by itself"
    ),
    "limit_all_gathers": "FSDP2 limits them by itself",
    **_each("offload_params cpu_offload", _NO_OFFLOADING),
    "activation_cpu_offload": "use model.cpu_offloading_activations=true, on GPUs",
    "state_dict_type": "checkpoints are always sharded, by name, and any layout loads them",
    "use_orig_params": "FSDP2 always keeps the parameters",
    "sync_module_states": "every rank makes its part of the same start values, or loads it",
    "cpu_ram_efficient_loading": "every rank loads its part only",
    "activation_checkpointing": _if_true("full"),
    "xla": "for TPUs",
}
_PARALLEL: Rules = {
    "parallelism_config_dp_replicate_size": _Found.set,
    "parallelism_config_tp_size": _Found.set,
    "parallelism_config_cp_size": _Found.set,
    "parallelism_config_dp_shard_size": "follows: devices x nodes / (TP x PP x CP x replicas)",
}
_DYNAMO: Rules = {"dynamo_backend": _dynamo}
_SECTIONS = {"fsdp_config": _FSDP, "parallelism_config": _PARALLEL, "dynamo_config": _DYNAMO}
_NUMBERS = {
    "num_processes",
    "num_machines",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "parallelism_config.parallelism_config_tp_size",
    "parallelism_config.parallelism_config_cp_size",
}
_NO_EPOCHS = "a run has a number of steps; trainer.max_steps = epochs x tokens / tokens a step"
_DATA = "the data come prepared (deepseek prepare-data), packed, in an order the seed decides"
_HUB = "nothing is uploaded; deepseek hf export writes the folder"
_TRAINING: Rules = {
    **_each(
        "output_dir run_name seed learning_rate adam_epsilon torch_compile save_total_limit "
        "dataloader_num_workers",
        _Found.set,
    ),
    **_each("adam_beta1 adam_beta2", _beta),
    "weight_decay": _Meant(lambda found, value: found.set(value, "of matrices only")),
    "max_grad_norm": _Meant(_clip),
    "max_steps": _steps,
    "num_train_epochs": _NO_EPOCHS,
    "lr_scheduler_type": _schedule,
    "lr_scheduler_kwargs": _same("see lr_scheduler_type"),
    **_each("warmup_steps warmup_ratio", _warmup),
    **_each("per_device_train_batch_size gradient_accumulation_steps", _SEEN_BY_BATCH),
    "per_device_eval_batch_size": "validation uses model.micro_batch_size",
    "bf16": _if_true("bf16-mixed"),
    "fp16": "precisions are 32, bf16-mixed and auto",
    "tf32": "fp32 products are fp32",
    "gradient_checkpointing": _if_true("full"),
    "gradient_checkpointing_kwargs": "blocks are recomputed without reentering",
    "optim": _optimizer,
    "logging_steps": _logging,
    "eval_steps": _every("eval_strategy"),
    "save_steps": _every("save_strategy"),
    "eval_strategy": _same("see eval_steps"),
    "save_strategy": _same("see save_steps"),
    "logging_strategy": "metrics.jsonl of the run folder holds every step",
    "logging_dir": "logs lie in the run folder",
    "report_to": _report_to,
    "ddp_timeout": lambda found, value: found.set(float(value) / 60),
    "resume_from_checkpoint": "deepseek train goes on by itself; migrate the checkpoint first",
    "fsdp": _same("FSDP2 always"),
    "fsdp_config": "not a section of keys",
    "max_length": f"set {RENAMED['max_length']}",
    "do_train": _same("deepseek train"),
    "do_eval": "trainer.val_check_interval",
    "data_seed": "one seed decides weights and order of the data (seed)",
    **_each(
        "group_by_length dataloader_drop_last dataloader_pin_memory remove_unused_columns "
        "label_names packing dataloader_in_order train_sampling_strategy length_column_name "
        "accelerator_config",
        _DATA,
    ),
    **_each("push_to_hub hub_model_id hub_strategy hub_token save_safetensors project", _HUB),
    "average_tokens_across_devices": _same("the loss is always a mean over all tokens of a step"),
    "logging_nan_inf_filter": "a step whose gradient is not finite changes no weight, and says so",
    "skip_memory_metrics": "memory is recorded (exp_manager.monitor)",
    **_each("log_on_each_node log_level_replica", "one process speaks for all"),
    "eval_do_concat_batches": "validation is a loss",
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "neftune_noise_alpha": "embeddings get no noise",
    "deepspeed": "the layout follows from the parallel sizes",
    **_each("disable_tqdm log_level", "the terminal decides"),
}
