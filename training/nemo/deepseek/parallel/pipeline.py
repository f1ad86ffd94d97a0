"""The forward and backward passes of one optimiser step, over its micro-batches.

``Sequential`` runs one stage, the whole model; ``Pipeline`` runs the stages of this rank in the
order of a schedule. Both leave the summed gradients in the parameters and tell this rank's sums of
the losses.

B batch, S sequence, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules

from deepseek.config.batch_ramp import batch_size
from deepseek.config.errors import UserError
from deepseek.config.layout import (
    INTERLEAVED_SCHEDULES,
    V_SCHEDULES,
    num_stages,
    stage_rank,
)
from deepseek.config.schema import ModelConfig
from deepseek.models.transformer import Stage
from deepseek.ops.added_gradients import added_in_place
from deepseek.parallel import overlap
from deepseek.parallel.mesh import Meshes

Batch = dict[str, Tensor]
"""``tokens``, ``labels``, ``positions``, ``documents``, each (B, S)."""
Loss = Callable[[Tensor], Tensor]
"""From the loss sums (2,) of a micro-batch, main and MTP, to what is differentiated."""

SCHEDULES = {
    "GPipe": schedules.ScheduleGPipe,
    "1F1B": schedules.Schedule1F1B,
    "Interleaved1F1B": schedules.ScheduleInterleaved1F1B,
    "InterleavedZeroBubble": schedules.ScheduleInterleavedZeroBubble,
    "ZBVZeroBubble": schedules.ScheduleZBVZeroBubble,
    "DualPipeV": schedules.ScheduleDualPipeV,
}
NEEDS_TORCH_2_13 = ("InterleavedZeroBubble", *V_SCHEDULES)
"""torch 2.11 gives wrong gradients in the first with FSDP2, and none of the others runs on gloo."""


class MicroBatches(Protocol):
    """Runs what this rank has of the model over a batch of this rank's sequences."""

    def train(self, batch: Batch, loss: Loss, balance_scale: Tensor) -> Tensor:
        """Forward and backward of every micro-batch; gradients are added up.

        Returns:
            This rank's loss sums, fp64 (2,), without gradient; zeros where the last stage is
            elsewhere.
        """
        ...

    def evaluate(self, batch: Batch) -> Tensor:
        """Forward only, of one micro-batch; the same sums."""
        ...


class Sequential:
    """One micro-batch after the other through the whole model.

    Args:
        stage: the whole model.
        micro_batch_size: sequences per forward pass.
        reshards: weights are gathered anew for each forward and backward pass; else once a step.
        reduces: gradients are summed over ranks and divided after each micro-batch; else once a
            step, and stay whole till then.
    """

    def __init__(
        self, stage: Stage, micro_batch_size: int, reshards: bool = True, reduces: bool = False
    ) -> None:
        self.stage = stage
        self.size = micro_batch_size
        self.reshards = reshards
        self.reduces = reduces

    def train(self, batch: Batch, loss: Loss, balance_scale: Tensor) -> Tensor:
        """See ``MicroBatches``."""
        total = balance_scale.new_zeros(2, dtype=torch.float64)
        rows = batch["tokens"].shape[0]
        divided = self.stage if isinstance(self.stage, FSDPModule) else None
        for start in range(0, rows, self.size):
            if divided is not None:
                last = start + self.size >= rows
                divided.set_requires_gradient_sync(last or self.reduces)
                divided.set_reshard_after_backward(last or self.reshards)
                # A weight that autocast has cast for an earlier micro-batch would get its gradient
                # late, when FSDP has sent what there was. (Lightning 2.4 has the cache on.)
                torch.clear_autocast_cache()
            micro = {name: tensor[start : start + self.size] for name, tensor in batch.items()}
            sums = self.stage(micro["tokens"], **_arguments(micro, balance_scale))
            with added_in_place() if divided is None else nullcontext():
                loss(sums).backward()
            total = total + sums.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """See ``MicroBatches``."""
        sums = self.stage(batch["tokens"], **_arguments(batch))
        _reshard([self.stage])
        return sums


class Pipeline:
    """The stages of this rank, in the order of the configured schedule.

    Args:
        stages: this rank's, by their number.
        config: has schedule and sizes.
        meshes: has the pipeline group.
        hidden: dtype of what stages hand to the next.

    Raises:
        UserError: the installed torch cannot run the schedule.
    """

    def __init__(
        self, stages: dict[int, Stage], config: ModelConfig, meshes: Meshes, hidden: torch.dtype
    ) -> None:
        check_schedule(config.pipeline_schedule, torch.__version__)
        self.stages, self.config, self.meshes = stages, config, meshes
        first = batch_size(0, config.global_batch_size, config.rampup_batch_size)
        self.micro_batches = first // (config.micro_batch_size * meshes.layout.dp)
        self._loss: Loss | None = None
        self._sums: Tensor | None = None
        for stage in stages.values():
            stage.loss = self._loss_of_sums
        weight = next(next(iter(stages.values())).parameters())
        self._device, self._sum_dtype, self._dtype = weight.device, weight.dtype, hidden
        self._schedule = self._make_schedule()

    def train(self, batch: Batch, loss: Loss, balance_scale: Tensor) -> Tensor:
        """See ``MicroBatches``."""
        self._loss, self._sums = loss, balance_scale.new_zeros(2, dtype=torch.float64)
        count = len(batch["tokens"]) // self.config.micro_batch_size
        if count != self.micro_batches:  # a batch that grows: torch's schedules are of one number
            self.micro_batches = count
            self._schedule = self._make_schedule()
        first = [batch["tokens"]] if 0 in self.stages else []
        arguments = _arguments(batch, balance_scale)
        self._schedule.step(*first, target=batch["labels"], return_outputs=False, **arguments)
        return self._sums

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """See ``MicroBatches``; the stages one after the other."""
        total, pp = num_stages(self.config), self.meshes.pp
        self._loss = torch.sum
        self._sums = torch.zeros(2, dtype=self._sum_dtype, device=self._device)
        h_BSD: Tensor = batch["tokens"]
        for index in range(total):
            if stage_rank(self.config, index) != self.meshes.coordinate.pp:
                continue
            before, after = (
                stage_rank(self.config, i) if 0 <= i < total else self.meshes.coordinate.pp
                for i in (index - 1, index + 1)
            )
            if before != self.meshes.coordinate.pp:
                h_BSD = self._hidden(len(batch["tokens"]))
                dist.recv(h_BSD, group=pp, group_src=before)
            h_BSD = self.stages[index](h_BSD, **_arguments(batch))
            if after != self.meshes.coordinate.pp:
                dist.send(h_BSD.contiguous(), group=pp, group_dst=after)
            elif index == total - 1:
                self._sums += h_BSD
        _reshard(self.stages.values())
        return self._sums

    def _make_schedule(self) -> Any:
        rows, total = self.config.micro_batch_size, num_stages(self.config)
        several = self.config.num_nextn_predict_layers > 1
        at_once = [index for index, stage in self.stages.items() if several and stage.mtp]
        recomputes = self.config.activations_checkpoint_granularity is not None
        whole = recomputes or self.config.cpu_offloading_activations
        tokens = torch.empty(rows, self.config.data.seq_length, dtype=torch.int64, device="meta")
        hidden = self._hidden(rows, "meta").requires_grad_()
        sums = torch.empty(2, dtype=self._sum_dtype, device="meta", requires_grad=True)
        made = [
            _LeanStage(
                stage,
                index,
                total,
                self._device,
                # Given, so that torch does not find the shapes out by running the model.
                input_args=(tokens if index == 0 else hidden,),
                output_args=(sums if index == total - 1 else hidden,),
                group=self.meshes.pp,
                # Schedules that split the backward pass compute the gradients of the inputs first
                # and those of the weights later, from where a weight's part of the graph meets the
                # path of the input. With a second MTP depth the embedding meets it twice, and torch
                # would run what lies between twice: this stage computes both at once. So does every
                # stage that recomputes: torch would do so for the inputs and once more for each
                # weight, and keep all of it. And so does every stage whose activations lie on the
                # host: what an operator keeps of its own result through a hook holds the operator,
                # for good, unless a whole backward pass lets go of it.
                dw_builder=_weights_are_done if whole or index in at_once else None,
            )
            for index, stage in self.stages.items()
        ]
        name = self.config.pipeline_schedule
        several = name in (*INTERLEAVED_SCHEDULES, *V_SCHEDULES)
        schedule = SCHEDULES[name](
            made if several else made[0],
            n_microbatches=self.micro_batches,
            loss_fn=self._loss_of_micro_batch,
            scale_grads=False,  # the losses are sums over all labels already
        )
        if self.config.overlap_moe_expert_parallel_comm:
            schedule.register_custom_function(schedules.OVERLAP_F_B, self._forward_beside_backward)
        return schedule

    def _forward_beside_backward(self, action: Any, context: Any) -> None:
        """What torch's ``_perform_action`` does for a forward and then a backward pass, in turn."""
        forward, backward = action.sub_actions
        assert forward.computation_type == schedules.FORWARD
        assert backward.computation_type == schedules.FULL_BACKWARD
        schedule, micro = context.schedule_ref, forward.microbatch_index
        stages = {stage.stage_index: stage for stage in schedule._stages}
        stage, other = stages[forward.stage_index], stages[backward.stage_index]
        schedule._assert_unsharded(stage)
        schedule._assert_unsharded(other)
        if not stage.is_first and stage.stage_index - 1 not in stages:
            schedules._wait_batch_p2p(schedule.fwd_recv_ops.pop((stage.stage_index, micro)))
        if not other.is_last and other.stage_index + 1 not in stages:
            of = other.stage_index, backward.microbatch_index
            schedules._wait_batch_p2p(schedule.bwd_recv_ops.pop(of))
        loss = schedule._maybe_get_loss(other, backward.microbatch_index)
        schedule.backward_counter[other.stage_index] += 1
        last = schedule.backward_counter[other.stage_index] == schedule._n_microbatches
        _, output = overlap.in_turn(
            lambda: other.backward_one_chunk(
                backward.microbatch_index, loss=loss, full_backward=True, last_backward=last
            ),
            lambda: stage.forward_one_chunk(
                micro, context.arg_mbs[micro], context.kwarg_mbs[micro], save_forward_output=False
            ),
            self._device,
        )
        schedule._maybe_compute_loss(stage, output, context.target_mbs, micro, None)
        if stage.stage_index + 1 in stages:
            stages[stage.stage_index + 1].set_local_fwd_input(output, micro)
        if other.stage_index - 1 in stages:
            gradient = other.get_local_bwd_output(backward.microbatch_index)
            stages[other.stage_index - 1].set_local_bwd_input(gradient, backward.microbatch_index)

    def _loss_of_micro_batch(self, sums: Tensor, labels_BS: Tensor) -> Tensor:
        return self._loss_of_sums(sums)

    def _loss_of_sums(self, sums: Tensor) -> Tensor:
        assert self._loss is not None and self._sums is not None
        self._sums += sums.detach()
        return self._loss(sums)

    def _hidden(self, rows: int, device: torch.device | str | None = None) -> Tensor:
        """What a stage hands to the next, unfilled: this rank's part of each sequence."""
        length = self.config.data.seq_length // (self.meshes.layout.cp * self.meshes.layout.tp)
        shape = (rows, length, self.config.hidden_size)
        return torch.empty(shape, dtype=self._dtype, device=device or self._device)


class _LeanStage(PipelineStage):
    """A stage that has memory to receive in only while something is under way.

    torch makes a buffer for every micro-batch of a step, and one for its gradient: 26 GiB of a rank
    of V3 with 120 micro-batches. Here each is on the meta device until it is received into, and
    again once the stage has taken it over; what still needs it, the backward pass, holds it.
    """

    def _prepare_forward_infra(self, *arguments: Any, **named: Any) -> Any:
        return self._without_memory(super()._prepare_forward_infra, *arguments, **named)

    def _prepare_backward_infra(self, *arguments: Any, **named: Any) -> Any:
        return self._without_memory(super()._prepare_backward_infra, *arguments, **named)

    def _without_memory(self, prepare: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        device, self.device = self.device, torch.device("meta")
        try:
            return prepare(*arguments, **named)
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """With memory for the hidden states of one micro-batch."""
        self._move(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """With memory for their gradient."""
        self._move(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        received = super()._retrieve_recv_activations(fwd_chunk_id)
        self._move(self.args_recv_info[fwd_chunk_id], "meta")
        return received

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        received = super()._retrieve_recv_grads(bwd_chunk_id)
        self._move(self.grad_recv_info[bwd_chunk_id], "meta")
        return received

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, *arguments: Any, **named: Any
    ) -> None:
        """As torch's. The schedule keeps the loss of every micro-batch to the end of the step, and
        with its graph what this stage had received would stay."""
        super().backward_one_chunk(bwd_chunk_id, loss, *arguments, **named)
        if loss is not None:
            loss.detach_()

    @staticmethod
    def _move(infos: Iterable[Any], device: torch.device | str) -> None:
        for info in infos:
            buffer = getattr(info, "buffer", None)
            if buffer is not None:
                needs = buffer.requires_grad
                info.buffer = torch.empty_like(buffer, device=device).requires_grad_(needs)


def check_schedule(name: str, version: str) -> None:
    """Raises ``UserError`` if this torch cannot run the schedule."""
    if name in NEEDS_TORCH_2_13 and tuple(map(int, version.split(".")[:2])) < (2, 13):
        raise UserError(
            f"model.pipeline_schedule={name} needs torch 2.13 or later, this is {version}: earlier "
            "ones give wrong gradients or stop; use 1F1B, GPipe or Interleaved1F1B, or "
            'pip install "torch>=2.13"'
        )


def _reshard(stages: Iterable[Stage]) -> None:
    """Give gathered weights back, which by itself only a backward pass does.

    As long as they are gathered, parameters are no DTensors.
    """
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _weights_are_done() -> Callable[[], None]:
    """The second half of a split backward pass whose first half has computed everything: none."""
    return lambda: None


def _arguments(batch: Batch, balance_scale: Tensor | None = None) -> dict[str, Tensor]:
    """What every stage is told of its micro-batch."""
    arguments = {f"{name}_BS": tensor for name, tensor in batch.items()}
    if balance_scale is not None:
        arguments["balance_scale_B"] = balance_scale.expand(len(batch["tokens"]))
    return arguments
