"""Trains a small model in some layout of ranks and in one process, and compares all there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from math import hypot, isnan
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from deepseek.config.batch_ramp import batch_size
from deepseek.config.layout import Layout
from deepseek.config.rules import check
from deepseek.config.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SchedConfig,
    TrainerConfig,
)
from deepseek.models.components import offload
from deepseek.models.transformer import global_name
from deepseek.parallel.mesh import Meshes, SingleProcess, local, local_slices, placed
from deepseek.training.step import DeepSeekModel
from support.ranks import run_ranks

offload.LEAST_BYTES = 0  # nothing here is large

METRICS = (
    "loss",
    "mtp_loss",
    "balance_loss",
    "grad_norm",
    "grad_norm_dense",
    "grad_norm_expert",
    "grad_norm_router",
    "max_attention_logit",
)


def small_config(**changes: Any) -> ModelConfig:
    """Dims of all kinds, large weights, all losses on."""
    config = ModelConfig(
        vocab_size=48,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        intermediate_size=24,
        moe_intermediate_size=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=2,
        num_nextn_predict_layers=1,
        initializer_range=0.3,
        moe_aux_loss_coeff=0.02,
        moe_z_loss_coeff=0.01,
        moe_router_bias_update_rate=0.01,
        micro_batch_size=1,
        global_batch_size=8,
        optim=OptimConfig(lr=1e-2, sched=SchedConfig(min_lr=1e-3)),
        data=DataConfig(seq_length=8),
    )
    return replace(config, **changes)


@dataclass
class Case:
    """A model in a layout."""

    config: ModelConfig
    world: int
    dtype: torch.dtype = torch.float64
    seed: int = 0
    clip: float = 1.0
    """Largest gradient norm."""
    steps: int = 2
    """The second has moments, and weights that a step has changed."""
    autocast: bool = False
    """Products in bf16, as with ``bf16-mixed``."""
    edit: Callable[[dict[str, Tensor]], None] = lambda batch: None
    """Changes each global batch, in place."""
    prepare: Callable[[Driven], None] = lambda driven: None
    """Changes the model before the first step, on every rank and in the one process."""

    @property
    def layout(self) -> Layout:
        return Layout.of(self.config, self.world)

    def problems(self) -> list[Any]:
        """What the rules say of it."""
        found = check(RunConfig(trainer=TrainerConfig(devices=self.world), model=self.config))
        return [p for p in found if "tokenizer" not in p.field + p.rule]  # no text here

    def __str__(self) -> str:
        c, sizes = self.config, self.layout
        return (
            f"pp{sizes.pp} rep{sizes.dp_replicate} dp{sizes.dp_shard} cp{sizes.cp} tp{sizes.tp} "
            f"ep{sizes.ep} {c.pipeline_schedule} v{c.virtual_pipeline_model_parallel_size} "
            f"L{c.num_hidden_layers} k{c.first_k_dense_replace} E{c.n_routed_experts} "
            f"sh{c.n_shared_experts} mtp{c.num_nextn_predict_layers} q{c.q_lora_rank} "
            f"mb{c.micro_batch_size} gb{c.global_batch_size} ramp{c.rampup_batch_size} "
            f"{c.topk_method} {c.optim.name} "
            f"moments={c.optim.moments_dtype} {'on host ' if c.optim.cpu_offload else ''}"
            f"clip={c.optim.qk_clip_threshold} "
            f"recompute={c.activations_checkpoint_granularity} "
            f"of={c.activations_checkpoint_num_layers} offload={c.cpu_offloading_activations} "
            f"per_node={c.moe_ranks_per_node} "
            f"isolated={c.data.isolate_documents} seed={self.seed} {self.dtype}"
        )


def batches(case: Case) -> Iterator[dict[str, Tensor]]:
    """Global batches with very uneven numbers of labels, documents and padding."""
    chance = torch.Generator().manual_seed(case.seed)
    config = case.config
    for step in range(case.steps):
        rows = batch_size(step, config.global_batch_size, config.rampup_batch_size)
        shape = (rows, config.data.seq_length)
        tokens = torch.randint(config.vocab_size, shape, generator=chance)
        labels = torch.randint(config.vocab_size, shape, generator=chance)
        documents = (torch.rand(shape, generator=chance) < 0.2).cumsum(1).to(torch.int32)
        ends = torch.randint(2, shape[1] + 1, (shape[0], 1), generator=chance)
        padding = torch.arange(shape[1]).expand(shape) >= ends
        labels[padding | (torch.rand(shape, generator=chance) < 0.2)] = -100
        documents[padding] = -1
        batch = {
            "tokens": tokens,
            "labels": labels,
            "positions": torch.arange(shape[1]).repeat(shape[0], 1),
            "documents": documents,
        }
        case.edit(batch)
        yield batch


class Driven:
    """A module stepped without a trainer."""

    def __init__(self, case: Case, meshes: Meshes | SingleProcess) -> None:
        self.case, self.meshes = case, meshes
        self.module: Any = DeepSeekModel(
            case.config, seed=3, max_steps=20, gradient_clip_val=case.clip, parallelize_later=True
        )
        products = torch.bfloat16 if case.autocast else None
        self.module.parallelize(meshes, torch.device("cpu"), case.dtype, products)
        self.optimizer = self.module.configure_optimizers()
        self.gradients: dict[str, Tensor] = {}
        self.metrics: list[Any] = []
        case.prepare(self)

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def make_room(self) -> None:
        self.optimizer.make_room()

    def step(self) -> None:
        clips = any(group["gradient_factor"] != 1 for group in self.param_groups)
        self.gradients = {  # zero_grad drops them: no copy, unless the update clips
            name: placed(local(parameter.grad).clone(), parameter) if clips else parameter.grad
            for name, parameter in self.module.model.named_parameters()
            if parameter.grad is not None
        }
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def run(self, steps: Iterable[dict[str, Tensor]]) -> None:
        """One optimiser step for each global batch."""
        for batch in steps:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.case.autocast):
                self.metrics.append(self.module.train_step(self.share(batch), self))

    def validate(self, steps: Iterable[dict[str, Tensor]]) -> float:
        """Loss per label of these batches, a micro-batch at a time."""
        self.module.on_validation_epoch_start()
        size = self.case.config.micro_batch_size
        for batch in map(self.share, steps):
            for start in range(0, len(batch["tokens"]), size):
                micro = {name: rows[start : start + size] for name, rows in batch.items()}
                self.module.validation_step(micro, 0)
        self.module.on_validation_epoch_end()
        return self.module.validation_record.val_loss

    def share(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows of a global batch."""
        share = len(batch["tokens"]) // self.meshes.layout.dp
        rows = slice(self.meshes.data_rank * share, (self.meshes.data_rank + 1) * share)
        return {name: tensor[rows] for name, tensor in batch.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers, the last step's gradients before clipping, the optimiser's state."""
        named = dict(self.module.model.named_parameters())
        tensors = {f"weight.{name}": _detached(p) for name, p in named.items()}
        tensors |= {f"buffer.{n}": b for n, b in self.module.model.named_buffers() if ".bias" in n}
        tensors |= {
            f"load.{name}": router.tokens_per_expert
            for name, router in self.module.model.routers().items()
        }
        tensors |= {f"gradient.{name}": g for name, g in self.gradients.items()}
        for name, parameter in named.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        return tensors


def _detached(parameter: Tensor) -> Tensor:
    """A DTensor as it is: only its local part is looked at, and each of its operations is dear."""
    return parameter if isinstance(parameter, DTensor) else parameter.detach()


def spread(case: Case) -> Driven:
    """This rank's part."""
    return Driven(case, Meshes(case.layout, "cpu", timedelta(seconds=60)))


def work_of_rank(rank: int, cases: list[Case]) -> list[tuple[list[Any], list[Any]]]:
    """Of each case metrics, and the parts of every tensor that are here."""
    results = []
    for case in cases:
        try:
            results.append(_train_here(case))
        except Exception as error:
            error.add_note(f"the layout: {case}")
            raise
    return results


def _train_here(case: Case) -> tuple[list[Any], list[Any]]:
    driven = spread(case)
    driven.run(batches(case))
    parts = []
    for name, tensor in driven.tensors().items():
        part, shape = local_slices(tensor), tuple(tensor.shape)
        kind, _, rest = name.partition(".")
        here = local(tensor).detach().clone()
        here = here.float() if here.dtype == torch.bfloat16 else here  # which numpy does not know
        parts.append((f"{kind}.{global_name(rest)}", shape, part, here.numpy()))
    return driven.metrics, parts


WITHOUT_LAYOUT = {
    "tensor_model_parallel_size": 1,
    "context_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "pipeline_schedule": "1F1B",
    "virtual_pipeline_model_parallel_size": 1,
    "pipeline_layers_per_stage": None,
    "pipeline_output_stages": 1,
    "expert_model_parallel_size": 1,
    "data_parallel_replicate_size": 1,
    "reshard_after_forward": None,
    "reduce_gradients": None,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_num_layers": None,
    "cpu_offloading_activations": False,
    "moe_dispatch_fp8": False,
    "overlap_moe_expert_parallel_comm": False,
    "moe_ranks_per_node": None,
}
_trained: dict[Any, Driven] = {}
"""By what was trained: many layouts are compared with the same."""


def in_one_process(case: Case) -> Driven:
    """After all steps, each of one micro-batch, recomputing nothing. Nobody may change it."""
    config, rows = case.config, case.config.global_batch_size
    optim = replace(config.optim, cpu_offload=False)
    config = replace(config, optim=optim, micro_batch_size=rows, **WITHOUT_LAYOUT)
    case = replace(case, config=config, world=1)
    told = tuple(getattr(case, field.name) for field in fields(case))
    key = repr(told[0]), *told[1:]
    if key not in _trained:
        if len(_trained) >= 16:
            _trained.clear()
        alone = Driven(case, SingleProcess())
        alone.run(batches(case))
        _trained[key] = alone
    return _trained[key]


def compare(case: Case, timeout: float = 120.0) -> dict[str, float]:
    """Relative error of each metric and of each tensor, 2-norm over 2-norm, every rank's copy.

    ``all.weight`` and the like take all tensors of a kind as one.
    """
    return compare_all([case], timeout)[0]


def compare_all(cases: list[Case], timeout: float = 120.0) -> list[dict[str, float]]:
    """Of cases of one size, one after another on the same ranks, which costs a third less."""
    (world,) = {case.world for case in cases}
    for case in cases:
        in_one_process(case)  # first: its ranks are forks, and have what it has brought into memory
    ranks = run_ranks(world, work_of_rank, cases, timeout=timeout * len(cases))
    return [
        errors_of(case, results)
        for case, results in zip(cases, zip(*ranks, strict=True), strict=True)
    ]


def errors_of(case: Case, results: tuple[tuple[list[Any], list[Any]], ...]) -> dict[str, float]:
    """What ``compare`` returns, of what each rank returned."""
    alone = in_one_process(case)
    wanted = alone.tensors()
    errors: dict[str, float] = {}
    covered = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in wanted.items()}
    differences: dict[str, float] = {}
    for metrics, parts in results:
        for ours, theirs in zip(metrics, alone.metrics, strict=True):
            _note_metrics(errors, ours, theirs)
            for key in ("tokens", "lr", "skipped", "clipped_heads"):
                assert getattr(ours, key) == getattr(theirs, key), key
        for name, shape, part, numbers in parts:
            assert shape == tuple(wanted[name].shape), name
            here = wanted[name][part]
            assert here.shape == numbers.shape, (name, here.shape, numbers.shape)
            covered[name][part] = True
            difference = (torch.from_numpy(numbers).double() - here.double()).norm().item()
            differences[name] = max(differences.get(name, 0.0), difference)
    missing = [name for name, seen in covered.items() if not seen.all()]
    assert not missing, f"no rank has all of {missing}"
    return errors | _relative(differences, wanted)


def rounding(case: Case) -> dict[str, float]:
    """How far the tensors of one process are from the same in fp64, as ``compare`` measures.

    The furthest of some runs, whose start weights differ in the last bit: each rounds differently.
    """
    return _furthest(case, [replace(case, prepare=_nudge(case, number)) for number in range(4)])


def conditioning(case: Case) -> dict[str, float]:
    """How far exact tensors move when start weights change in the last bit of the case's dtype.

    All in fp64: a property of the function that is computed, whoever computes it. What moves by
    more than some error cannot be computed to within that error in the case's dtype, which cannot
    even hold the start weights so exactly. The furthest of some runs.
    """
    nudged = [_nudge(case, number) for number in range(1, 9)]
    return _furthest(case, [replace(case, dtype=torch.float64, prepare=n) for n in nudged])


def _nudge(case: Case, number: int) -> Callable[[Driven], None]:
    """Changes start weights in the last bit of the case's dtype, at random; number 0 does not."""

    def nudge(driven: Driven) -> None:
        case.prepare(driven)
        generator = torch.Generator().manual_seed(number)
        for weight in driven.module.model.parameters() if number else ():
            sign = torch.randint(-1, 2, weight.shape, generator=generator).to(weight.dtype)
            weight.data.mul_(1 + sign * torch.finfo(case.dtype).eps / 2)

    return nudge


def _furthest(case: Case, others: list[Case]) -> dict[str, float]:
    """The largest error of these runs in one process, each against ``case`` in fp64."""
    exactly = in_one_process(replace(case, dtype=torch.float64))
    exact, errors = exactly.tensors(), dict[str, float]()
    differences = dict.fromkeys(exact, 0.0)
    for other in map(in_one_process, others):
        for ours, theirs in zip(other.metrics, exactly.metrics, strict=True):
            _note_metrics(errors, ours, theirs)
        for name, tensor in other.tensors().items():
            difference = (tensor.double() - exact[name].double()).norm().item()
            differences[name] = max(differences[name], difference)
    return errors | _relative(differences, exact)


def _note_metrics(errors: dict[str, float], ours: Any, theirs: Any) -> None:
    """Keep the largest relative error of each metric of a step."""
    for key in METRICS:
        a, b = getattr(ours, key), getattr(theirs, key)
        if b is None:
            assert a is None
            continue
        same = a == b or (isnan(a) and isnan(b))
        error = 0.0 if same else abs(a - b) / max(abs(b), 1e-30)
        errors[key] = max(errors.get(key, 0.0), error)


def _relative(differences: dict[str, float], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Norms of differences over norms, of each tensor and of each kind as a whole."""
    norms = {name: wanted[name].double().norm().item() for name in differences}
    for kind in {name.partition(".")[0] for name in norms}:
        for values in (differences, norms):
            own = [value for name, value in values.items() if name.startswith(f"{kind}.")]
            values[f"all.{kind}"] = hypot(*own)
    return {name: d / norms[name] if norms[name] else d for name, d in differences.items()}


def worst(errors: dict[str, float]) -> tuple[str, float]:
    """The largest error and whose it is."""
    return max(errors.items(), key=lambda item: (item[1] != item[1], item[1]))
