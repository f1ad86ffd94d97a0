"""The DeepSeek-V3 transformer, its pipeline stages, start weights and training losses.

Single-device code. Source: arXiv:2412.19437 section 2. Shapes: ``models/__init__.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepseek.config.layout import StageSlice
from deepseek.config.schema import ModelConfig
from deepseek.config.weights import OUTPUT, lora_targets, packed_columns
from deepseek.models.components.attention import LatentStore
from deepseek.models.components.block import (
    DeepSeekBlock,
    MultiTokenPredictor,
    TokenContext,
    use_fp8,
)
from deepseek.models.components.feed_forward import Linear, RMSNorm
from deepseek.models.components.lora import (
    add_adapters,
    freeze_all_but_adapters,
    pack_base,
)
from deepseek.models.components.moe import MoE
from deepseek.models.components.offload import HostMemory
from deepseek.models.components.recompute import recomputed
from deepseek.models.components.rope import rotation
from deepseek.models.components.router import Router
from deepseek.ops.autocast import lookup
from deepseek.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from deepseek.ops.document_attention import Chunks, chunk_blocks
from deepseek.ops.packed import pack_rows


class Transformer(nn.Module):
    """Embedding, blocks, norm, head and MTP modules, or those of some pipeline stages.

    Weights start uninitialised; call ``init_weights``, or load some.

    Args:
        config: sizes.
        stages: the pipeline stages whose modules to hold, under the names they have in the whole
            model; None: everything.

    Attributes:
        embed: None unless the first stage is here.
        layers: blocks by their number.
        norm, head: None unless the stage with the main loss is here.
        mtp: empty unless the stage with MTP is here.
        mtp_embed: a copy of the embedding for MTP, where the embedding itself is in another stage.
        mtp_head: a copy of the head for MTP's losses, where the main loss is in another stage.
        packed: inputs of each matrix whose rows are packed, by name.
        chunks: which tokens of a sequence are here; replaced where several ranks share each.
        recompute: granularity at which blocks compute their activations again in the backward
            pass; None: they keep them.
    """

    def __init__(self, config: ModelConfig, stages: Sequence[StageSlice] | None = None) -> None:
        super().__init__()
        everything = StageSlice(range(config.num_hidden_layers), first=True, output=OUTPUT)
        stages = [everything] if stages is None else stages
        first, main = any(s.first for s in stages), any(s.main for s in stages)
        depths = config.num_nextn_predict_layers
        ahead = depths if any(s.ahead for s in stages) else 0
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size) if first else None
        self.layers = nn.ModuleDict(
            {str(i): DeepSeekBlock(config, i) for stage in stages for i in stage.layers}
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if main else None
        self.head = Head(config.hidden_size, config.vocab_size) if main else None
        self.mtp = nn.ModuleList(MultiTokenPredictor(config, depth) for depth in range(ahead))
        # Two stages of one rank each have their own too: they are two units of FSDP.
        copied = ahead and not any(s.first and s.ahead for s in stages)
        self.mtp_embed = Embedding(config.vocab_size, config.hidden_size) if copied else None
        copied = depths and any(s.last and not s.main for s in stages)
        self.mtp_head = Head(config.hidden_size, config.vocab_size) if copied else None
        self.recompute = config.activations_checkpoint_granularity
        self.chunks = Chunks()
        self.packed: dict[str, int] = {}
        if config.fp8_recipe is not None:
            for module in self.modules():
                if isinstance(module, DeepSeekBlock):
                    use_fp8(module, config.fp8_kernels)
        if config.peft is not None:
            matrices = lora_targets(config.peft.target_modules)
            scale = config.peft.alpha / config.peft.dim
            add_adapters(self.layers.values(), matrices, config.peft.dim, scale)
            wide = {name: parameter.shape[-1] for name, parameter in self.named_parameters()}
            if config.peft.base_dtype is not None:
                pack_base(self.layers.values(), config.peft.base_dtype)
            now = self.named_parameters()
            self.packed = {name: wide[name] for name, p in now if p.dtype == torch.uint8}
            freeze_all_but_adapters(self)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits (B, S, V).

        Args:
            tokens_BS: int64 ids.
            positions_BS: int64 positions; None: 0, 1, 2, ...
            documents_BS: document ids that attention must not cross; None: one stream.
        """
        context = self.context(tokens_BS, positions_BS, documents_BS)
        assert self.head is not None, "decoding needs the whole model"
        return self.head(self.main(tokens_BS, context))

    def last_logits(
        self, tokens_BS: Tensor, positions_BS: Tensor, caches: Sequence[LatentStore]
    ) -> Tensor:
        """Logits after the last of these tokens, (B, V), which also see the cached ones.

        Args:
            tokens_BS: new tokens, added to the caches.
            positions_BS: their positions.
            caches: one per layer.
        """
        context = self.context(tokens_BS, positions_BS)
        assert self.head is not None, "decoding needs the whole model"
        return self.head(self.main(tokens_BS, context, caches)[:, -1])

    def hidden_states(self, tokens_BS: Tensor, context: TokenContext) -> HiddenStates:
        """Hidden states of the main model and of every MTP depth, for the training loss."""
        main_BSD = self.main(tokens_BS, context)
        return HiddenStates(main_BSD, self.predict_ahead(main_BSD, tokens_BS, context))

    def context(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        real_BS: Tensor | None = None,
        balance_scale: Tensor | None = None,
    ) -> TokenContext:
        """What the blocks need to know of these tokens."""
        config = self.config
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        positions_BS = positions_BS.expand_as(tokens_BS)  # kernels read those of every row
        if documents_BS is not None:
            documents_BS = documents_BS.expand_as(tokens_BS)
        is_fp64 = next(self.parameters()).dtype == torch.float64
        cos_BSA, sin_BSA = rotation(
            positions_BS,
            config.qk_rope_head_dim,
            config.rope_theta,
            config.rope_scaling,
            torch.float64 if is_fp64 else torch.float32,
        )
        # FlexAttention alone tells the logits that a step asks for.
        tells = config.optim.qk_clip_threshold is not None and torch.is_grad_enabled()
        blocks = chunk_blocks(tokens_BS, documents_BS, self.chunks, tells)
        return TokenContext(cos_BSA, sin_BSA, documents_BS, real_BS, balance_scale, blocks)

    def main(
        self,
        inputs: Tensor,
        context: TokenContext,
        caches: Sequence[LatentStore] | None = None,
    ) -> Tensor:
        """Embedding, blocks and final norm, as far as they are here: (B, S, D).

        Args:
            inputs: tokens (B, S) if the embedding is here, else the stage before's result.
            context: of all tokens.
            caches: one per block, when decoding.
        """
        h_BSD = self.embed(inputs) if self.embed is not None else inputs
        if torch.is_grad_enabled() and not h_BSD.requires_grad:
            # Frozen below, as with adapters: loads are counted in the backward pass, which must
            # come to every block.
            h_BSD.requires_grad_()
        most, host = self.config.activations_checkpoint_num_layers, HostMemory()
        for i, block in enumerate(self.layers.values()):
            keeps = most is not None and i >= most
            h_BSD = self._run(block, host, keeps, h_BSD, context, *([caches[i]] if caches else []))
        return self.norm(h_BSD) if self.norm is not None else h_BSD

    def predict_ahead(
        self, main_BSD: Tensor, tokens_BS: Tensor, context: TokenContext
    ) -> list[Tensor]:
        """Hidden states of every MTP depth, from the main model's."""
        if context.real_BS is not None:  # MTP looks ahead: what padding holds must not matter
            tokens_BS = tokens_BS.where(context.real_BS, 0)
        embed = self.mtp_embed if self.mtp_embed is not None else self.embed
        hidden_BSD, mtp_BSD, host = main_BSD, [], HostMemory()
        for depth, module in enumerate(self.mtp, start=1):
            assert embed is not None
            ahead_BS = shift(tokens_BS, depth, 0, context.documents_BS)
            hidden_BSD = self._run(module, host, False, hidden_BSD, embed(ahead_BS), context)
            mtp_BSD.append(hidden_BSD)
        return mtp_BSD

    def _run(self, module: nn.Module, host: HostMemory, keeps: bool, *args: object) -> Tensor:
        """Call a block. Its activations are recomputed in the backward pass, and what it keeps lies
        on the host till then, if so configured."""

        def compute() -> Tensor:
            if self.recompute is None or keeps:
                return module(*args)
            return recomputed(module, self.recompute, self.config.hidden_size, *args)

        if not torch.is_grad_enabled():
            return module(*args)
        return host.run(module, compute) if self.config.cpu_offloading_activations else compute()

    def compile_blocks(self) -> None:
        """Compile every block in place: one graph, in which nothing but an exchange between ranks
        makes a break. Hooks around a block, as FSDP's, stay outside."""
        # A break inside of the MoE layer parts the block there, not at the layer's border too.
        if hasattr(torch._dynamo.config, "nested_graph_breaks"):
            torch._dynamo.config.nested_graph_breaks = True
        for module in self.modules():
            if isinstance(module, DeepSeekBlock):
                module.forward = torch.compile(module.forward)  # type: ignore[method-assign]

    def routers(self) -> dict[str, Router]:
        """Every router by the name of its block, in order of depth."""
        return {
            name.removesuffix(".ffn"): module.gate
            for name, module in self.named_modules()
            if isinstance(module, MoE)
        }

    def start_value(
        self, name: str, shape: Sequence[int], part: Sequence[slice], seed: int
    ) -> Tensor:
        """``initial_weight`` of a parameter, as it is held here."""
        columns = self.packed.get(name)
        if columns is None:
            return initial_weight(name, shape, part, self.config, seed)
        assert self.config.peft is not None and self.config.peft.base_dtype is not None
        kind = self.config.peft.base_dtype
        shape, part = (*shape[:-1], columns), (*part[:-1], packed_columns(part[-1], columns, kind))
        return pack_rows(initial_weight(name, shape, part, self.config, seed), kind)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every weight and buffer with its start value, see ``initial_weight``."""
        for name, parameter in self.named_parameters():
            whole = [slice(0, size) for size in parameter.shape]
            parameter.copy_(self.start_value(name, parameter.shape, whole, seed))
        for buffer in self.buffers():
            buffer.zero_()


class HiddenStates(NamedTuple):
    """Normed hidden states, ready for the head."""

    main_BSD: Tensor
    mtp_BSD: list[Tensor]
    """One per MTP depth."""


class Stage(Transformer):
    """What one pipeline stage computes in training; with all layers, the loss of the whole model.

    A view: its modules are those of ``model``.

    Args:
        model: holds at least this stage.
        parts: which of its modules to run.

    Attributes:
        loss: from loss sums (2,) to what is differentiated; a stage that has the main loss and is
            not the last one asks it.
    """

    loss: Callable[[Tensor], Tensor]

    def __init__(self, model: Transformer, parts: StageSlice) -> None:
        nn.Module.__init__(self)  # a Transformer's own would make modules
        self.config = model.config
        self.embed = model.embed if parts.first else None
        self.layers = nn.ModuleDict({str(i): model.layers[str(i)] for i in parts.layers})
        self.norm = model.norm if parts.main else None
        self.head = model.head if parts.main else None
        self.mtp = model.mtp if parts.ahead else nn.ModuleList()
        self.mtp_embed = model.mtp_embed if parts.ahead else None
        self.mtp_head = model.mtp_head if parts.last and not parts.main else None
        self.last = parts.last
        self.recompute, self.chunks = model.recompute, model.chunks

    def forward(  # type: ignore[override]  # a stage gives losses, not logits
        self,
        inputs: Tensor,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        documents_BS: Tensor,
        balance_scale_B: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, S, D) for the next stage; from the last stage the loss sums (2,).

        A main loss that comes before the last stage goes back with the hidden states' gradient, so
        that stages hand on one tensor, whatever they have.

        Args:
            inputs: tokens (B, S) for the first stage, the stage before's result for the others.
            tokens_BS: int64 ids, on every stage.
            labels_BS: next tokens, ``IGNORE_INDEX`` where there is none.
            positions_BS: int64.
            documents_BS: int32 document ids, -1 for padding.
            balance_scale_B: B times ``TokenContext.balance_scale``; None: not training.

        Returns:
            The last stage's two numbers are those of ``LossSums``: main, if it is here, and MTP.
        """
        isolated_BS = documents_BS if self.config.data.isolate_documents else None
        context = self.context(
            tokens_BS,
            positions_BS,
            isolated_BS,
            real_BS=documents_BS >= 0,
            balance_scale=balance_scale_B[0] if balance_scale_B is not None else None,
        )
        h_BSD = self.main(inputs, context)
        if self.head is not None and not self.last:
            main = self.head.loss_sum(h_BSD, labels_BS)
            return attach_loss(h_BSD, self.loss(torch.stack((main, torch.zeros_like(main)))))
        ahead = self.predict_ahead(h_BSD, tokens_BS, context)
        if self.head is not None:
            return torch.stack(loss_sums(h_BSD, ahead, self.head, labels_BS, isolated_BS))
        if self.mtp_head is None:
            return ahead[-1] if ahead else h_BSD
        mtp = mtp_loss_sum(ahead or [h_BSD], self.mtp_head, labels_BS, isolated_BS)
        return torch.stack((torch.zeros_like(mtp), mtp))


class Embedding(nn.Embedding):
    """Rows of a table, in the dtype of products: the residual stream begins here, and keeps it."""

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """(B, S) -> (B, S, D)."""
        return lookup(tokens_BS, self.weight)


class Head(Linear):
    """Linear map to the vocabulary, shared by the main model and every MTP depth.

    Attributes:
        sequence_part: of labels (B, S), those of the hidden states here; replaced where several
            ranks share each sequence.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size)
        self.sequence_part: Callable[[Tensor], Tensor] = lambda labels_BS: labels_BS

    def loss_sum(self, hidden_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross-entropy summed over labelled tokens, in nats; scalar. Never holds all logits."""
        labels_T = self.sequence_part(labels_BS).flatten()
        return linear_cross_entropy(hidden_BSD.flatten(0, 1), self.weight, labels_T)


# -- start weights --


def initial_weight(
    name: str, shape: Sequence[int], part: Sequence[slice], config: ModelConfig, seed: int
) -> Tensor:
    """A part of the start value of a parameter, fp32, on the CPU.

    | what                | start                               |
    | ------------------- | ----------------------------------- |
    | RMSNorm             | 1                                   |
    | correction bias     | 0                                   |
    | ``lora_a``          | normal, std 1 / sqrt(3 I)           |
    | ``lora_b``          | 0                                   |
    | all other weights   | normal, std ``initializer_range``   |

    (arXiv:2412.19437 section 4.2: all learnable parameters, std 0.006. Adapters start as peft's
    do, I inputs; it draws them from a uniform distribution.) The value depends on seed and name
    alone. Each matrix, and each expert of a stack, has a generator of its own, so that a shard can
    be filled without the rest and any layout starts from the same model.

    Args:
        name: of the parameter.
        shape: of the whole parameter.
        part: one slice per dim; of a stack of experts only those in it are drawn.
        config: has the standard deviation.
        seed: of the run.
    """
    name, std = global_name(name), config.initializer_range
    if len(shape) == 1:
        return torch.ones(shape)[tuple(part)]
    if name.endswith("lora_b"):
        return torch.zeros(shape)[tuple(part)]
    if name.endswith("lora_a"):
        std = (3 * shape[-1]) ** -0.5
    if len(shape) == 3:
        experts = range(shape[0])[part[0]]
        drawn = [_normal(shape[1:], std, seed, f"{name}.{e}")[tuple(part[1:])] for e in experts]
        return torch.stack(drawn) if drawn else torch.empty(shape)[tuple(part)]
    return _normal(shape, std, seed, name)[tuple(part)]


COPIES = ("mtp_embed.weight", "mtp_head.weight")
"""Parameters that are another stage's embedding and head."""


def global_name(name: str) -> str:
    """The name of a parameter in the whole model: a copy has that of what it copies."""
    return name.removeprefix("mtp_") if name in COPIES else name


def _normal(shape: Sequence[int], std: float, seed: int, name: str) -> Tensor:
    """Normal numbers from a generator seeded by (seed, name); drawn on the CPU in fp32."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=generator)


# -- training losses: sums, so that they do not depend on how the batch was cut; the training step
# divides by the label tokens of the whole optimiser step (all ranks, all micro-batches) --


class LossSums(NamedTuple):
    """Cross-entropy sums of one micro-batch, in nats."""

    main: Tensor
    """Next-token prediction."""
    mtp: Tensor
    """Multi-token prediction, averaged over depths; zero without MTP."""


def loss_sums(
    hidden_BSD: Tensor,
    mtp_hidden_BSD: Sequence[Tensor],
    head: Head,
    labels_BS: Tensor,
    documents_BS: Tensor | None = None,
) -> LossSums:
    """Cross-entropy sums of the main model and of the MTP depths (arXiv:2412.19437 eq 24-25).

    The MTP sums share the main task's divisor, as eq 24 divides by the sequence length T for every
    depth.

    Args:
        hidden_BSD: normed hidden state of the main model.
        mtp_hidden_BSD: normed hidden state of each depth.
        head: shared by all depths.
        labels_BS: next tokens, ``IGNORE_INDEX`` where there is none.
        documents_BS: ids of isolated documents, across whose borders nothing is predicted.
    """
    main = head.loss_sum(hidden_BSD, labels_BS)
    if not mtp_hidden_BSD:
        return LossSums(main, torch.zeros_like(main))
    return LossSums(main, mtp_loss_sum(mtp_hidden_BSD, head, labels_BS, documents_BS))


def mtp_loss_sum(
    mtp_hidden_BSD: Sequence[Tensor],
    head: Head,
    labels_BS: Tensor,
    documents_BS: Tensor | None = None,
) -> Tensor:
    """``LossSums.mtp`` of one MTP depth or more; see ``loss_sums``."""
    sums = [
        head.loss_sum(hidden_BSD, shift(labels_BS, depth, IGNORE_INDEX, documents_BS))
        / len(mtp_hidden_BSD)
        for depth, hidden_BSD in enumerate(mtp_hidden_BSD, start=1)
    ]
    return sum(sums[1:], sums[0])


def attach_loss(hidden_BSD: Tensor, loss: Tensor) -> Tensor:
    """``hidden`` unchanged; its backward pass goes back from ``loss``, a scalar, too."""
    return _AttachLoss.apply(hidden_BSD, loss)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BSD: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return hidden_BSD.clone()  # schedules take outputs off their graph, as no view can be

    @staticmethod
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, Tensor]:
        return grad_BSD, torch.ones((), dtype=ctx.dtype, device=grad_BSD.device)


def shift(ids_BS: Tensor, places: int, fill: int, documents_BS: Tensor | None = None) -> Tensor:
    """Position i gets the id ``places`` ahead; ``fill`` past the end or in another document."""
    ahead_BS = torch.full_like(ids_BS, fill)
    ahead_BS[:, :-places] = ids_BS[:, places:]
    if documents_BS is not None:
        other_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        other_BS[:, :-places] = documents_BS[:, places:] != documents_BS[:, :-places]
        ahead_BS = ahead_BS.masked_fill(other_BS, fill)
    return ahead_BS
