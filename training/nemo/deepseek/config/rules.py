"""What must hold between the keys of a configuration, each rule with its numbers and a way out.

Here are the model, the optimiser, data and files, and the run; layouts are in ``layout_rules.py``.
What one key may hold is told in ``schema.py`` and checked first. A rule that reads a key already
found wrong is not applied, so that one mistake gives one problem.

Paths are read relative to the current folder; ``~`` is not expanded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

from deepseek.config.errors import Problem, divisors, listed, nearest
from deepseek.config.foreign_names import LORA_TARGETS
from deepseek.config.layout_rules import (
    batch,
    context_parallel,
    data_parallel_shards,
    dispatchers,
    expert_parallel,
    fp8_blocks,
    gradient_reduction,
    offloading,
    pipeline_micro_batches,
    pipeline_settings,
    pipeline_stages,
    processes,
    rampup,
    recomputation,
    resharding,
    tensor_parallel,
)
from deepseek.config.schema import LEAVES, RunConfig, idle, value_at
from deepseek.config.weights import (
    LORA_GROUPS,
    LORA_HF_NAMES,
    PACKED_BLOCKS,
    model_weights,
    weight_kinds,
)


def check(config: RunConfig) -> list[Problem]:
    """Every broken rule of ``config``; empty for a sound one."""
    values = {path: value_at(config, path) for path in LEAVES if _is_there(config, path)}
    problems = single_problems(values)
    return problems + joint_problems(config, {problem.field for problem in problems})


def single_problems(values: Mapping[str, object]) -> list[Problem]:
    """Values, by dotted key, that their keys may not hold whatever the others hold."""
    found = (LEAVES[path].problem_with(value) for path, value in values.items())
    return [problem for problem in found if problem is not None]


def joint_problems(config: RunConfig, wrong: Collection[str]) -> list[Problem]:
    """Broken rules between keys.

    Args:
        config: each of its values is one that its key may hold, but for those in ``wrong``.
        wrong: dotted keys that no rule reads; of a section, all below it.
    """
    problems: list[Problem] = []
    view = cast(RunConfig, _View(config, wrong))
    for rule in RULES:
        try:
            problems.extend(rule(view))  # what was found before a wrong key was read is kept
        except _WrongKey:
            continue
    return problems


def _is_there(config: RunConfig, path: str) -> bool:
    section = path.rpartition(".")[0]
    return not section or value_at(config, section) is not None


class _WrongKey(Exception):
    """A rule read a key that is already known to be wrong."""


class _View:
    """A configuration in which reading a wrong key ends the rule that reads it."""

    def __init__(self, section: object, wrong: Collection[str], prefix: str = "") -> None:
        self._section, self._wrong, self._prefix = section, wrong, prefix

    def __getattr__(self, key: str) -> Any:
        path = f"{self._prefix}{key}"
        if path in self._wrong:
            raise _WrongKey(path)
        value = getattr(self._section, key)
        return _View(value, self._wrong, f"{path}.") if is_dataclass(value) else value


# -- the model --


def heads(cfg: RunConfig) -> Iterator[Problem]:
    """Shapes of attention."""
    rope = cfg.model.qk_rope_head_dim
    if rope % 2:
        yield Problem(
            "model.qk_rope_head_dim",
            rope,
            "must be even, since rotary position turns pairs of numbers",
            f"use {rope - 1} or {rope + 1}",
        )


def layers(cfg: RunConfig) -> Iterator[Problem]:
    """Dense and MoE blocks, tied embeddings."""
    if cfg.model.tie_word_embeddings:
        yield Problem(
            "model.tie_word_embeddings",
            True,
            "no V3-class model ties head and embedding, and none is built here",
            "use false",
        )
    dense, total = cfg.model.first_k_dense_replace, cfg.model.num_hidden_layers
    if dense > total:
        yield Problem(
            "model.first_k_dense_replace",
            dense,
            f"is more than model.num_hidden_layers={total}",
            f"use 0 to {total}",
        )


def expert_groups(cfg: RunConfig) -> Iterator[Problem]:
    """Groups of group-limited routing (arXiv:2412.19437 section 2.1.2), and the experts that a
    token can reach through them."""
    groups, kept = cfg.model.n_group, cfg.model.topk_group
    chosen, experts = cfg.model.num_experts_per_tok, cfg.model.n_routed_experts
    if chosen > experts:
        yield Problem(
            "model.num_experts_per_tok",
            chosen,
            f"is more than model.n_routed_experts={experts}",
            f"use 1 to {experts}",
        )
    if cfg.model.topk_method == "greedy":
        for key in ("n_group", "topk_group"):
            yield from idle(
                cfg,
                f"model.{key}",
                "model.topk_method=greedy knows no groups",
                "model.topk_method=group_limited_greedy or noaux_tc",
            )
        return
    if kept > groups:
        yield Problem(
            "model.topk_group", kept, f"is more than model.n_group={groups}", f"use 1 to {groups}"
        )
    size, left_over = divmod(experts, groups)
    if left_over:
        yield Problem(
            "model.n_group",
            groups,
            f"does not divide model.n_routed_experts={experts}",
            f"use {listed(divisors(experts), near=groups)}",
        )
    elif size == 1 and groups > 1 and cfg.model.topk_method == "noaux_tc":
        yield Problem(
            "model.n_group",
            groups,
            f"leaves 1 expert in a group of model.n_routed_experts={experts}, and noaux_tc scores "
            "a group by its two best",
            f"use {listed(divisors(experts)[:-1], near=groups)}",
        )
    elif kept * size < chosen <= experts and kept <= groups:
        yield Problem(
            "model.num_experts_per_tok",
            chosen,
            f"cannot be met: model.topk_group={kept} groups of {size} experts hold {kept * size}",
            f"use 1 to {kept * size}, or model.topk_group={math.ceil(chosen / size)} or more",
        )


def routing_weights(cfg: RunConfig) -> Iterator[Problem]:
    """Settings under which the router would not learn, or would not act."""
    if cfg.model.num_experts_per_tok == 1 and cfg.model.norm_topk_prob:
        yield Problem(
            "model.norm_topk_prob",
            True,
            "with model.num_experts_per_tok=1 every normalised weight is 1, so that the router "
            "gets no gradient",
            "use false, or model.num_experts_per_tok=2 or more",
        )
    if cfg.model.topk_method != "noaux_tc":
        yield from idle(
            cfg,
            "model.moe_router_bias_update_rate",
            f"model.topk_method={cfg.model.topk_method} has no correction bias",
            "model.topk_method=noaux_tc",
            harmless=(0,),
        )


def dense_only(cfg: RunConfig) -> Iterator[Problem]:
    """Settings of experts in a model that has none."""
    total, dense = cfg.model.num_hidden_layers, cfg.model.first_k_dense_replace
    # the block of an MTP module holds experts
    if dense < total or cfg.model.num_nextn_predict_layers > 0:
        return
    for name in (
        "moe_z_loss_coeff",
        "moe_aux_loss_coeff",
        "moe_router_bias_update_rate",
        "expert_model_parallel_size",
    ):
        key = f"model.{name}"
        yield from idle(
            cfg,
            key,
            f"all model.num_hidden_layers={total} blocks are dense "
            f"(model.first_k_dense_replace={dense})",
            f"model.first_k_dense_replace={total - 1} or less",
            harmless=(LEAVES[key].default, 0),
        )


def multi_token_prediction(cfg: RunConfig) -> Iterator[Problem]:
    """MTP depth and weight (arXiv:2412.19437 section 2.2)."""
    key, depth = "model.mtp_loss_scaling_factor", cfg.model.num_nextn_predict_layers
    default = LEAVES[key].default
    if depth == 0:
        yield from idle(
            cfg,
            key,
            "model.num_nextn_predict_layers=0",
            "model.num_nextn_predict_layers=1",
            harmless=(default, 0),
        )
    elif cfg.model.mtp_loss_scaling_factor == 0:
        yield Problem(
            key,
            cfg.model.mtp_loss_scaling_factor,
            f"would leave model.num_nextn_predict_layers={depth} modules without gradient",
            f"use {default}, or model.num_nextn_predict_layers=0",
        )
    length = cfg.model.data.seq_length
    if depth >= length:
        yield Problem(
            "model.num_nextn_predict_layers",
            depth,
            f"predicts beyond the end of model.data.seq_length={length}",
            f"use less than {length}",
        )


def context(cfg: RunConfig) -> Iterator[Problem]:
    """Sequence length against the positions the model knows."""
    length, longest = cfg.model.data.seq_length, cfg.model.max_position_embeddings
    if length > longest:
        yield Problem(
            "model.data.seq_length",
            length,
            f"is more than model.max_position_embeddings={longest}",
            f"use {longest} or less, or model.max_position_embeddings={length}",
        )
    yarn = cfg.model.rope_scaling
    if yarn is None:
        return
    original = yarn.original_max_position_embeddings
    if length > yarn.factor * original:
        yield Problem(
            "model.data.seq_length",
            length,
            f"is more than YaRN extends to: factor {yarn.factor:g} x original {original} = "
            f"{yarn.factor * original:g}",
            f"use {int(yarn.factor * original)} or less, or "
            f"model.rope_scaling.factor={math.ceil(length / original)}",
        )
    if yarn.beta_fast < yarn.beta_slow:
        yield Problem(
            "model.rope_scaling.beta_fast",
            yarn.beta_fast,
            f"is less than beta_slow={yarn.beta_slow:g}, so the ramp between them runs backwards",
            f"use {yarn.beta_slow:g} or more (YaRN: 32 and 1)",
        )


def adapters(cfg: RunConfig) -> Iterator[Problem]:
    """Adapters have something to be on, and nothing below them moves."""
    peft = cfg.model.peft
    if peft is None:
        return
    names, key = list(peft.target_modules), "model.peft.target_modules"
    matrices = [matrix for group in LORA_GROUPS.values() for matrix in group]
    options = [*LORA_GROUPS, *matrices]
    unknown = [name for name in names if name not in options]
    for name in unknown:
        meant = (LORA_HF_NAMES | LORA_TARGETS).get(name) or nearest(name, options, cutoff=0.5)
        way_out = f"use {meant or ', '.join(LORA_GROUPS)}"
        yield Problem(key, names, f"there is no matrix {name}", way_out)
    kind, tp = peft.base_dtype, cfg.model.tensor_model_parallel_size
    unit = tp * PACKED_BLOCKS.get(kind or "", 1)
    cut = {
        f"{weight.name} has {weight.shape[1]}"
        for weight in weight_kinds(cfg.model)
        if weight.lora and weight.tp_dim == 1 and weight.shape[1] % unit
    }
    if kind is not None and tp > 1 and cut:
        yield Problem(
            "model.peft.base_dtype",
            kind,
            f"has a scale for each {PACKED_BLOCKS[kind]} numbers of a row, and "
            f"model.tensor_model_parallel_size={tp} would cut between: {min(cut)}, no multiple of "
            f"{unit}",
            "use model.tensor_model_parallel_size=1 (data, expert, context and pipeline "
            "parallelism cut no row), or null",
        )
    if not names:
        yield Problem(key, names, "would train nothing", f"use [{', '.join(LORA_GROUPS)}]")
    if cfg.model.restore_from is None:
        yield Problem(
            "model.restore_from",
            None,
            "adapters are trained on top of weights that exist, and none are given",
            "give a run folder or the result of `deepseek hf import`, or use model.peft=null",
        )
    rate = cfg.model.moe_router_bias_update_rate
    if rate != 0:
        yield Problem(
            "model.moe_router_bias_update_rate",
            rate,
            "would change the router, which is frozen with model.peft",
            "use 0",
        )
    if cfg.exp_manager.checkpoint_callback_params.save_nemo_on_train_end:
        yield Problem(
            "exp_manager.checkpoint_callback_params.save_nemo_on_train_end",
            True,
            "a .nemo file holds whole models, and model.peft trains adapters",
            "use false; after the run `deepseek lora merge` and `deepseek nemo export` write one",
        )
    clip = cfg.model.optim.qk_clip_threshold
    if clip is not None:
        yield Problem(
            "model.optim.qk_clip_threshold",
            clip,
            "would scale weights of queries and keys, which are frozen with model.peft",
            "use null",
        )
    has = {weight.lora for weight in model_weights(cfg.model)}
    for name in names:
        if name not in unknown and has.isdisjoint(LORA_GROUPS.get(name, (name,))):
            yield Problem(
                key,
                names,
                f"this model has no {name}",
                f"leave it out; there are {', '.join(m for m in matrices if m in has)}",
            )


# -- the optimiser --


def optimiser(cfg: RunConfig) -> Iterator[Problem]:
    """AdamW and Muon."""
    betas, name = cfg.model.optim.betas, cfg.model.optim.name
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield Problem(
            "model.optim.betas",
            list(betas),
            "must be two numbers, each at least 0 and below 1",
            "use [0.9, 0.95]",
        )
    if name != "muon":
        because = f"model.optim.name={name}"
        yield from idle(cfg, "model.optim.muon_momentum", because, "model.optim.name=muon")


def learning_rates(cfg: RunConfig) -> Iterator[Problem]:
    """The schedule ends no higher than its peak."""
    peak, floor = cfg.model.optim.lr, cfg.model.optim.sched.min_lr
    if floor > peak:
        yield Problem(
            "model.optim.sched.min_lr",
            floor,
            f"is more than the peak model.optim.lr={peak:g}",
            f"use {peak / 10:g} (a tenth) or anything from 0 to {peak:g}",
        )


def schedule_parts(cfg: RunConfig) -> Iterator[Problem]:
    """What is told of a schedule is a part of it."""
    sched, section = cfg.model.optim.sched, "model.optim.sched"
    stable, because = "WarmupStableDecay", f"{section}.name={sched.name}"
    if sched.name != stable:
        for key in ("decay_steps", "decay_style"):
            yield from idle(cfg, f"{section}.{key}", because, f"{section}.name={stable}")
        return
    instead = f"{section}.name=WarmupConstantCosine"
    yield from idle(cfg, f"{section}.constant_steps", because, instead)
    if sched.decay_steps == 0:
        for key in ("decay_style", "min_lr"):
            because, instead = f"{section}.decay_steps=0", f"{section}.decay_steps above 0"
            yield from idle(cfg, f"{section}.{key}", because, instead)


def schedule_steps(cfg: RunConfig) -> Iterator[Problem]:
    """Warm-up and the other part fit into a schedule of a length of its own.

    A schedule as long as the run may be cut short by ``trainer.max_steps``: a trial of ten steps
    then ends in the warm-up, as it should.
    """
    sched, section = cfg.model.optim.sched, "model.optim.sched"
    part = "decay" if sched.name == "WarmupStableDecay" else "constant"
    held = sched.decay_steps if part == "decay" else sched.constant_steps
    used = sched.warmup_steps + held
    if sched.max_steps is not None and used > sched.max_steps:
        total = sched.max_steps
        yield Problem(
            f"{section}.warmup_steps",
            sched.warmup_steps,
            f"warm-up {sched.warmup_steps} + {part} {held} = {used} steps is "
            f"more than {section}.max_steps={total}",
            f"use warmup_steps={min(sched.warmup_steps, total // 10)} and "
            f"{part}_steps={min(held, total // 2)}, or {section}.max_steps={used}",
        )


# -- data, files, folders --


def vocabulary(cfg: RunConfig) -> Iterator[Problem]:
    """The tokenizer trained for the built-in corpus fits the embedding."""
    if cfg.model.tokenizer.path is not None or cfg.model.data.data_prefix is not None:
        return
    ids, rows = cfg.model.tokenizer.vocab_size, cfg.model.vocab_size
    least = int(LEAVES["model.tokenizer.vocab_size"].limits.low)
    if rows < least:
        yield Problem(
            "model.vocab_size",
            rows,
            f"is less than the {least} ids of the smallest tokenizer that is trained here (256 "
            "bytes and 6 special tokens)",
            f"use {least} or more, or give a smaller tokenizer: data prepared with it as "
            "model.data.data_prefix, or model.tokenizer.path",
        )
    elif ids > rows:
        yield Problem(
            "model.tokenizer.vocab_size",
            ids,
            f"gives ids that model.vocab_size={rows} has no rows for",
            f"use {rows} or less, or model.vocab_size={ids}",
        )


def validation(cfg: RunConfig) -> Iterator[Problem]:
    """There is something to validate on, given once."""
    key, every = "model.data.validation_fraction", cfg.trainer.val_check_interval
    default = LEAVES[key].default
    if cfg.model.data.validation_prefix is not None:
        yield from idle(
            cfg,
            key,
            "model.data.validation_prefix is given",
            "model.data.validation_prefix=null",
            harmless=(default, 0),
        )
    elif cfg.model.data.validation_fraction == 0 and every > 0:
        yield Problem(
            "trainer.val_check_interval",
            every,
            "there is nothing to validate on: model.data.validation_fraction=0 and "
            "model.data.validation_prefix=null",
            f"use trainer.val_check_interval=0, or {key}={default}",
        )


def conversations(cfg: RunConfig) -> Iterator[Problem]:
    """Settings of text under which conversations would not be what they are."""
    data = cfg.model.data
    if not data.chat:
        return
    if data.data_prefix is None:
        yield Problem(
            "model.data.chat",
            True,
            "the built-in corpus holds no conversations",
            "make some with `deepseek prepare-data --chat` and set model.data.data_prefix",
        )
    if not data.isolate_documents:
        yield Problem(
            "model.data.isolate_documents",
            False,
            "with model.data.chat=true several conversations share a sequence, and none may see "
            "another",
            "use true",
        )
    because = "model.data.chat=true keeps conversations in order"
    yield from idle(cfg, "model.data.fim_rate", because)


def data_files(cfg: RunConfig) -> Iterator[Problem]:
    """Prefixes and blends name files that exist."""
    for key in ("data_prefix", "validation_prefix"):
        yield from _prefix_problems(f"model.data.{key}", getattr(cfg.model.data, key))


def tokenizer_file(cfg: RunConfig) -> Iterator[Problem]:
    """A given tokenizer exists."""
    path = cfg.model.tokenizer.path
    if path is None:
        return
    if Path(path).is_dir() and not (Path(path) / "tokenizer.json").is_file():
        fault = f"the folder {path} holds no tokenizer.json"
    elif not Path(path).exists():
        fault = f"there is no file {Path(path).absolute()}"
    else:
        return
    yield Problem(
        "model.tokenizer.path",
        path,
        fault,
        _home_way_out(path) or "give a tokenizer.json, a folder that holds one, or null",
    )


def starting_weights(cfg: RunConfig) -> Iterator[Problem]:
    """Weights to start from are there: a checkpoint, a folder with checkpoints, a .nemo file."""
    path = cfg.model.restore_from
    if path is None:
        return
    folder = Path(path)
    if (folder / "manifest.json").is_file() or any(folder.glob("checkpoints/step_*/manifest.json")):
        return
    if folder.is_file() and folder.suffix == ".nemo":
        return
    way_out = (
        "give a run folder, the result of `deepseek hf import`, a checkpoint, a .nemo file, or null"
    )
    if not folder.exists():
        fault = f"there is no folder {folder.absolute()}"
    elif folder.is_file():
        fault = "is a file, but no .nemo file"
    else:
        fault = "holds no checkpoint (no manifest.json, and none in checkpoints/step_*)"
        if (folder / "config.json").is_file():
            fault = "holds Hugging Face files, which must be imported first"
            way_out = f"run `deepseek hf import {path} NEW_FOLDER` and give NEW_FOLDER"
    yield Problem("model.restore_from", path, fault, _home_way_out(path) or way_out)


def folders(cfg: RunConfig) -> Iterator[Problem]:
    """Folders to write to can be made, and names of runs are names."""
    for key, folder in (
        ("exp_manager.exp_dir", cfg.exp_manager.exp_dir),
        ("model.data.cache_dir", cfg.model.data.cache_dir),
    ):
        if folder is None:
            continue
        if not folder:
            yield Problem(key, folder, "must name a folder", f"use {LEAVES[key].default}")
        elif _home_way_out(folder):
            yield Problem(key, folder, "~ is not expanded in a file", str(_home_way_out(folder)))
        elif Path(folder).exists() and not Path(folder).is_dir():
            yield Problem(key, folder, "is a file", "give a folder, or a name that is free")


def run_names(cfg: RunConfig) -> Iterator[Problem]:
    """A name becomes one folder."""
    for key, name in (
        ("name", cfg.name),
        ("exp_manager.name", cfg.exp_manager.name),
        ("exp_manager.version", cfg.exp_manager.version),
    ):
        if name is None:
            continue
        plain = "".join("_" if c in "/\\\0" or not c.isprintable() else c for c in name).strip()
        if plain != name or plain in ("", ".", ".."):
            free = plain if plain not in ("", ".", "..") else "deepseek"
            rule = "becomes one folder, so it holds no path separators and no surrounding spaces"
            yield Problem(
                key, name, rule, f"use {free}; folders above it go in exp_manager.exp_dir"
            )


def _prefix_problems(key: str, value: Any) -> Iterator[Problem]:
    """Problems of a prefix, or of a blend ``[weight, prefix, weight, prefix]``."""
    form = f"write {key}=PREFIX, or a blend [0.7, PREFIX1, 0.3, PREFIX2]"
    if value is None:
        return
    if isinstance(value, str):
        yield from _file_problems(key, value)
        return
    if not isinstance(value, list):
        yield Problem(key, value, "must be a prefix, a blend or null", form)
        return
    weights, prefixes = value[0::2], value[1::2]
    if value and all(isinstance(item, str) for item in value):
        example = ", ".join(f"{1 / len(value):.2g}, {prefix}" for prefix in value)
        yield Problem(key, value, "a blend needs a weight before each prefix", f"write [{example}]")
        return
    if not value or len(weights) != len(prefixes):
        rule = f"a blend is pairs of weight and prefix, got {len(value)} entries"
        yield Problem(key, value, rule, form)
        return
    for weight, prefix in zip(weights, prefixes, strict=True):
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            rule = f"the weight {weight} must be a number above 0"
            way_out = "use shares such as 0.7 and 0.3, or leave that prefix out"
            yield Problem(key, value, rule, way_out)
        if isinstance(prefix, str):
            yield from _file_problems(key, prefix)
        else:
            yield Problem(key, value, f"the prefix {prefix} must be text", form)


def _file_problems(key: str, prefix: str) -> Iterator[Problem]:
    stem, suffix = os.path.splitext(prefix)
    if suffix in (".bin", ".idx"):
        rule = f"a prefix is given without {suffix}, since it names both P.bin and P.idx"
        yield Problem(key, prefix, rule, f"use {stem}")
        return
    files = [Path(f"{prefix}{ending}").absolute() for ending in (".bin", ".idx")]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        rule = f"there is no file {' and no file '.join(missing)}"
        way_out = "make them with `deepseek prepare-data`, or use null for the built-in corpus"
        yield Problem(key, prefix, rule, _home_way_out(prefix) or way_out)


def _home_way_out(path: str) -> str | None:
    return f"use {os.path.expanduser(path)}" if path.startswith("~") else None


# -- what is written and recorded --


def checkpoints(cfg: RunConfig) -> Iterator[Problem]:
    """Checkpoints that are asked for can be written."""
    section, writes = "exp_manager.checkpoint_callback_params", "create_checkpoint_callback"
    if cfg.exp_manager.checkpoint_callback_params.save_top_k == 0:
        yield Problem(
            f"{section}.save_top_k",
            0,
            "would keep no checkpoint",
            f"use 1 or more, -1 for all, or exp_manager.{writes}=false",
        )
    if not cfg.exp_manager.create_checkpoint_callback:
        key = f"{section}.save_nemo_on_train_end"
        yield from idle(cfg, key, f"exp_manager.{writes}=false", f"exp_manager.{writes}=true")


def loggers(cfg: RunConfig) -> Iterator[Problem]:
    """No setting of a logger that is not made."""
    for name in ("wandb", "mlflow"):
        made = f"exp_manager.create_{name}_logger"
        for path in LEAVES:
            if path.startswith(f"exp_manager.{name}_logger_kwargs.") and not value_at(cfg, made):
                yield from idle(cfg, path, f"{made}=false", f"{made}=true")


def profile(cfg: RunConfig) -> Iterator[Problem]:
    """The steps to profile are steps of the run; no setting is without effect."""
    section, last = "exp_manager.profile", cfg.trainer.max_steps
    wanted = cfg.exp_manager.profile.steps
    if not wanted:
        for key in ("with_stack", "record_shapes", "memory"):
            because = f"{section}.steps names no step"
            yield from idle(cfg, f"{section}.{key}", because, f"{section}.steps=[{min(10, last)}]")
        return
    outside = [step for step in wanted if not 1 <= step <= last]
    inside = sorted({step for step in wanted if 1 <= step <= last})
    if outside:
        yield Problem(
            f"{section}.steps",
            wanted,
            f"names step {outside[0]}, and the run has steps 1 to trainer.max_steps={last}",
            f"use {inside or [min(10, last)]}",
        )
    elif len(inside) < len(wanted):
        twice = next(step for step in wanted if wanted.count(step) > 1)
        yield Problem(f"{section}.steps", wanted, f"names step {twice} twice", f"use {inside}")


RULES: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    heads,
    layers,
    expert_groups,
    routing_weights,
    dense_only,
    multi_token_prediction,
    context,
    optimiser,
    learning_rates,
    schedule_parts,
    schedule_steps,
    processes,
    context_parallel,
    tensor_parallel,
    fp8_blocks,
    pipeline_settings,
    pipeline_stages,
    pipeline_micro_batches,
    rampup,
    recomputation,
    offloading,
    expert_parallel,
    dispatchers,
    data_parallel_shards,
    resharding,
    gradient_reduction,
    batch,
    vocabulary,
    data_files,
    validation,
    conversations,
    adapters,
    tokenizer_file,
    starting_weights,
    folders,
    run_names,
    checkpoints,
    profile,
    loggers,
)
