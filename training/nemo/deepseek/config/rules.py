"""The rules a configuration must obey, each with its numbers and a way out.

What one field may hold (``ranges.py``) is checked first, then the rules between fields (here,
``layout_rules.py`` for layouts, ``paths.py`` for files, ``monitor_rules.py`` for what is
recorded). A rule that reads a field already found wrong is not applied, so that one mistake gives
one problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any, cast

from deepseek.config.choices import divisors, listed
from deepseek.config.errors import Problem
from deepseek.config.fields import LEAVES, type_problems, value_at
from deepseek.config.layout_rules import (
    batch,
    data_parallel_shards,
    expert_parallel,
    pipeline_micro_batches,
    pipeline_settings,
    pipeline_stages,
    processes,
    resharding,
    tensor_parallel,
)
from deepseek.config.monitor_rules import loggers, profile
from deepseek.config.paths import (
    data_files,
    folders,
    run_names,
    starting_weights,
    tokenizer_file,
)
from deepseek.config.peft_rules import adapters
from deepseek.config.ranges import name_problem, range_problem
from deepseek.config.schema import RunConfig


def check(config: RunConfig, unreadable: Collection[str] = ()) -> list[Problem]:
    """Every broken rule of ``config``; empty for a sound one.

    ``unreadable``: dotted keys whose values are known to be wrong; no rule reads them.
    """
    tree = asdict(config)
    bad = set(unreadable)
    problems = [p for p in type_problems(tree) if not _is_under(p.field, bad)]
    bad |= {problem.field for problem in problems}
    for one_field_rule in (range_problem, name_problem):
        for path in LEAVES:
            if _is_under(path, bad) or value_at(tree, path) is None:
                continue
            problem = one_field_rule(path, value_at(tree, path))
            if problem is not None:
                problems.append(problem)
    bad |= {problem.field for problem in problems}
    view = cast(RunConfig, _View(config, bad))
    for rule in RULES:
        try:
            problems.extend(rule(view))  # what was found before a bad field was read is kept
        except _Unreadable:
            continue
    return problems


# -- between fields --


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
        for key, size in (("n_group", groups), ("topk_group", kept)):
            if size != 1:
                yield Problem(
                    f"model.{key}",
                    size,
                    "would be ignored, since model.topk_method=greedy knows no groups",
                    f"use model.{key}=1, or model.topk_method=group_limited_greedy or noaux_tc",
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
    rate, method = cfg.model.moe_router_bias_update_rate, cfg.model.topk_method
    if rate != 0 and method != "noaux_tc":
        yield Problem(
            "model.moe_router_bias_update_rate",
            rate,
            f"would be ignored, since model.topk_method={method} has no correction bias",
            "use 0, or model.topk_method=noaux_tc",
        )


def dense_only(cfg: RunConfig) -> Iterator[Problem]:
    """Settings of experts in a model that has none."""
    if cfg.model.first_k_dense_replace < cfg.model.num_hidden_layers:
        return
    if cfg.model.num_nextn_predict_layers > 0:  # the block of an MTP module holds experts
        return
    for key, idle in (("moe_z_loss_coeff", 0), ("expert_model_parallel_size", 1)):
        value = getattr(cfg.model, key)
        if value != idle:
            yield Problem(
                f"model.{key}",
                value,
                "would be ignored, since all "
                f"model.num_hidden_layers={cfg.model.num_hidden_layers} blocks are dense "
                f"(model.first_k_dense_replace={cfg.model.first_k_dense_replace})",
                f"use {idle}, or model.first_k_dense_replace="
                f"{cfg.model.num_hidden_layers - 1} or less",
            )


def multi_token_prediction(cfg: RunConfig) -> Iterator[Problem]:
    """MTP depth and weight (arXiv:2412.19437 section 2.2)."""
    depth, factor = cfg.model.num_nextn_predict_layers, cfg.model.mtp_loss_scaling_factor
    default = LEAVES["model.mtp_loss_scaling_factor"].default
    if depth == 0 and factor not in (0, default):
        yield Problem(
            "model.mtp_loss_scaling_factor",
            factor,
            "would be ignored, since model.num_nextn_predict_layers=0",
            f"use {default} (the default), or model.num_nextn_predict_layers=1",
        )
    if depth > 0 and factor == 0:
        yield Problem(
            "model.mtp_loss_scaling_factor",
            factor,
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


def optimiser(cfg: RunConfig) -> Iterator[Problem]:
    """AdamW and Muon."""
    betas = cfg.model.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield Problem(
            "model.optim.betas",
            list(betas),
            "must be two numbers, each at least 0 and below 1",
            "use [0.9, 0.95]",
        )
    momentum, default = cfg.model.optim.muon_momentum, LEAVES["model.optim.muon_momentum"].default
    if cfg.model.optim.name != "muon" and momentum != default:
        yield Problem(
            "model.optim.muon_momentum",
            momentum,
            f"would be ignored, since model.optim.name={cfg.model.optim.name}",
            f"use {default} (the default), or model.optim.name=muon",
        )


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


def schedule_steps(cfg: RunConfig) -> Iterator[Problem]:
    """Warm-up and constant part fit into a schedule of a length of its own.

    A schedule as long as the run may be cut short by ``trainer.max_steps``: a trial of ten steps
    then ends in the warm-up, as it should.
    """
    sched = cfg.model.optim.sched
    used = sched.warmup_steps + sched.constant_steps
    if sched.max_steps is not None and used > sched.max_steps:
        total = sched.max_steps
        yield Problem(
            "model.optim.sched.warmup_steps",
            sched.warmup_steps,
            f"warm-up {sched.warmup_steps} + constant {sched.constant_steps} = {used} steps is "
            f"more than model.optim.sched.max_steps={total}",
            f"use warmup_steps={min(sched.warmup_steps, total // 10)} and "
            f"constant_steps={min(sched.constant_steps, total // 2)}, or "
            f"model.optim.sched.max_steps={used}",
        )


def vocabulary(cfg: RunConfig) -> Iterator[Problem]:
    """The tokenizer trained for the built-in corpus fits the embedding."""
    if cfg.model.tokenizer.path is not None or cfg.model.data.data_prefix is not None:
        return
    ids, rows = cfg.model.tokenizer.vocab_size, cfg.model.vocab_size
    if ids > rows:
        yield Problem(
            "model.tokenizer.vocab_size",
            ids,
            f"gives ids that model.vocab_size={rows} has no rows for",
            f"use {rows} or less, or model.vocab_size={ids}",
        )


def validation(cfg: RunConfig) -> Iterator[Problem]:
    """There is something to validate on, given once."""
    data, every = cfg.model.data, cfg.trainer.val_check_interval
    default = LEAVES["model.data.validation_fraction"].default
    if data.validation_prefix is not None and data.validation_fraction not in (0, default):
        yield Problem(
            "model.data.validation_fraction",
            data.validation_fraction,
            "would be ignored, since model.data.validation_prefix is given",
            f"use {default} (the default), or model.data.validation_prefix=null",
        )
    if data.validation_prefix is None and data.validation_fraction == 0 and every > 0:
        yield Problem(
            "trainer.val_check_interval",
            every,
            "there is nothing to validate on: model.data.validation_fraction=0 and "
            "model.data.validation_prefix=null",
            "use trainer.val_check_interval=0, or model.data.validation_fraction=0.02",
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
    if data.fim_rate:
        yield Problem(
            "model.data.fim_rate",
            data.fim_rate,
            "would be ignored, since model.data.chat=true keeps conversations in order",
            "use 0",
        )


def checkpoints(cfg: RunConfig) -> Iterator[Problem]:
    """Checkpoints that are asked for can be written."""
    manager = cfg.exp_manager
    section = "exp_manager.checkpoint_callback_params"
    if manager.checkpoint_callback_params.save_top_k == 0:
        yield Problem(
            f"{section}.save_top_k",
            0,
            "would keep no checkpoint",
            "use 1 or more, -1 for all, or exp_manager.create_checkpoint_callback=false",
        )
    if manager.checkpoint_callback_params.save_nemo_on_train_end and (
        not manager.create_checkpoint_callback
    ):
        yield Problem(
            f"{section}.save_nemo_on_train_end",
            True,
            "would be ignored, since exp_manager.create_checkpoint_callback=false",
            "use false, or exp_manager.create_checkpoint_callback=true",
        )


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
    schedule_steps,
    processes,
    tensor_parallel,
    pipeline_settings,
    pipeline_stages,
    pipeline_micro_batches,
    expert_parallel,
    data_parallel_shards,
    resharding,
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


# -- helpers --


class _Unreadable(Exception):
    """A rule read a field that is already known to be wrong."""


class _View:
    """A configuration in which reading a wrong field ends the rule that reads it."""

    def __init__(self, section: object, bad: Collection[str], prefix: str = "") -> None:
        self._section, self._bad, self._prefix = section, bad, prefix

    def __getattr__(self, key: str) -> Any:
        path = f"{self._prefix}{key}"
        if path in self._bad:
            raise _Unreadable(path)
        value = getattr(self._section, key)
        return _View(value, self._bad, f"{path}.") if is_dataclass(value) else value


def _is_under(path: str, bad: Collection[str]) -> bool:
    """True if ``path`` or a section above it is in ``bad``."""
    return any(path == name or path.startswith(f"{name}.") for name in bad)
