"""The DeepSeek-V3 transformer: embedding, blocks, norm, head, and multi-token prediction.

Single-device code. Source: arXiv:2412.19437 section 2.

B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepseek.config.layout import StageParts
from deepseek.config.peft_rules import targeted
from deepseek.config.schema import ModelConfig
from deepseek.models.components.attention import LatentStore, MultiHeadLatentAttention
from deepseek.models.components.block import DeepSeekBlock
from deepseek.models.components.context import TokenContext
from deepseek.models.components.head import Head
from deepseek.models.components.lora import add_adapters, freeze_all_but_adapters
from deepseek.models.components.moe import MoE
from deepseek.models.components.mtp import MultiTokenPredictor
from deepseek.models.components.norm import RMSNorm
from deepseek.models.components.router import Router
from deepseek.models.parts import HiddenStates, Parts


class Transformer(Parts):
    """Weights start uninitialised; call ``init_weights``, or load some.

    Args:
        config: sizes.
        stages: the pipeline stages whose parts to hold, under the names they have in the whole
            model; None: everything.
    """

    def __init__(self, config: ModelConfig, stages: Sequence[StageParts] | None = None) -> None:
        super().__init__()
        everything = StageParts(range(config.num_hidden_layers), first=True, last=True)
        stages = [everything] if stages is None else stages
        first, last = any(s.first for s in stages), any(s.last for s in stages)
        depths = config.num_nextn_predict_layers if last else 0
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size) if first else None
        self.layers = nn.ModuleDict(
            {str(i): DeepSeekBlock(config, i) for stage in stages for i in stage.layers}
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if last else None
        self.head = Head(config.hidden_size, config.vocab_size) if last else None
        self.mtp = nn.ModuleList(MultiTokenPredictor(config, depth) for depth in range(depths))
        # Two stages of one rank each have their own too: they are two units of FSDP.
        copied = depths and not any(s.first and s.last for s in stages)
        self.mtp_embed = nn.Embedding(config.vocab_size, config.hidden_size) if copied else None
        self.recompute = config.activations_checkpoint_granularity == "full"
        if config.peft is not None:
            matrices = targeted(config.peft.target_modules)
            scale = config.peft.alpha / config.peft.dim
            add_adapters(self.layers.values(), matrices, config.peft.dim, scale)
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

    def compile_attention(self) -> None:
        """Compile every block's attention in place; the expert dispatch stays eager, since its
        shapes change with each batch."""
        for module in self.modules():
            if isinstance(module, MultiHeadLatentAttention):
                module.compile()

    def routers(self) -> dict[str, Router]:
        """Every router by the name of its block, in order of depth."""
        return {
            name.removesuffix(".ffn"): module.gate
            for name, module in self.named_modules()
            if isinstance(module, MoE)
        }

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every weight and buffer; the values depend on seed and name alone.

        | what                | start                               |
        | ------------------- | ----------------------------------- |
        | RMSNorm             | 1                                   |
        | correction bias     | 0                                   |
        | ``lora_a``          | normal, std 1 / sqrt(3 I)           |
        | ``lora_b``          | 0                                   |
        | all other weights   | normal, std ``initializer_range``   |

        (arXiv:2412.19437 section 4.2: all learnable parameters, std 0.006. Adapters start as peft's
        do, I inputs; it draws them from a uniform distribution.) Each matrix, and each
        expert of a stack, has a generator of its own, so that a shard can be filled without the
        rest and any layout starts from the same model.
        """
        for name, parameter in self.named_parameters():
            whole = [slice(0, size) for size in parameter.shape]
            parameter.copy_(initial_weight(name, parameter.shape, whole, self.config, seed))
        for buffer in self.buffers():
            buffer.zero_()


def initial_weight(
    name: str, shape: Sequence[int], part: Sequence[slice], config: ModelConfig, seed: int
) -> Tensor:
    """A part of the fp32 start value of a parameter, on the CPU; see ``Transformer.init_weights``.

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


def global_name(name: str) -> str:
    """The name of a parameter in the whole model: a copy has that of what it copies."""
    return "embed.weight" if name == "mtp_embed.weight" else name


def _normal(shape: Sequence[int], std: float, seed: int, name: str) -> Tensor:
    """Normal numbers from a generator seeded by (seed, name); drawn on the CPU in fp32."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=generator)
