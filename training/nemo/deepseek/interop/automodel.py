"""The model for NVIDIA's NeMo AutoModel, which finds it through an entry point.

AutoModel takes the class named by ``architectures`` in a ``config.json``: the files of `hf export`
with this name in it are enough. Data parallelism only (DDP, FSDP): AutoModel's expert parallelism
wants MoE layers of its own class, and its loss sees no MTP modules.

Imported by AutoModel alone; needs ``nemo-automodel``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from nemo_automodel.components.models.common.hf_checkpointing_mixin import HFCheckpointingMixin
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from deepseek.config.schema import ModelConfig
from deepseek.interop.hf_config import model_config
from deepseek.interop.huggingface import from_hf, hf_tensors, to_hf
from deepseek.models.transformer import Transformer
from deepseek.parallel.gradients import sum_over_all

ARCHITECTURE = "DeepseekTrainingForCausalLM"
_PREFIX = "model."


class DeepseekTrainingForCausalLM(HFCheckpointingMixin, nn.Module):
    """``Transformer`` as AutoModel calls it.

    Attributes:
        model: its parameters have their usual names.
        bias_update_rate: gamma of the correction bias, applied by ``update_moe_gate_bias``.
    """

    @dataclass(frozen=True)
    class ModelCapabilities:
        """What AutoModel may ask of it."""

        supports_tp: bool = False
        supports_cp: bool = False
        supports_pp: bool = False
        supports_ep: bool = False

    def __init__(self, config: Any, bias_update_rate: float = 1e-3, **unused: Any) -> None:
        super().__init__()
        self.config = config
        ours = _without_losses(config)
        self.model = Transformer(ours)
        self.bias_update_rate = bias_update_rate
        self.state_dict_adapter = HuggingFaceNames(ours)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> DeepseekTrainingForCausalLM:
        """From a ``DeepseekV3Config``; weights are not filled."""
        return cls(config, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits.

        Args:
            input_ids: (B, S).
            position_ids: (B, S); None: 0, 1, 2, ...
            attention_mask: (B, S), 0 for padding, which must be on the right.
            padding_mask: (B, S), True for padding.
        """
        real_BS = None
        if padding_mask is not None:
            real_BS = ~padding_mask.bool()
        elif attention_mask is not None:
            real_BS = attention_mask.bool()
        counted = torch.ones((), device=input_ids.device) if self.training else None
        context = self.model.context(input_ids, position_ids, None, real_BS, counted)
        assert self.model.head is not None
        return CausalLMOutputWithPast(logits=self.model.head(self.model.main(input_ids, context)))

    @torch.no_grad()
    def update_moe_gate_bias(self) -> None:
        """Once after each optimiser step, from the tokens of all ranks since the last call."""
        for router in self.model.routers().values():
            router.update_bias(sum_over_all(router.tokens_per_expert), self.bias_update_rate)
            router.start_step()

    @torch.no_grad()
    def initialize_weights(
        self, buffer_device: Any = None, dtype: torch.dtype = torch.float32, seed: int = 1234
    ) -> None:
        """Start values that depend on seed and name alone; see ``Transformer.init_weights``."""
        self.model.init_weights(seed)
        self.to(dtype)

    def get_input_embeddings(self) -> nn.Module | None:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.head


class HuggingFaceNames:
    """How AutoModel turns its state dictionary into files and back; whole tensors only."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def to_hf(
        self, state_dict: Mapping[str, Tensor], exclude_key_regex: str | None = None, **unused: Any
    ) -> dict[str, Tensor]:
        """Our names to those of the released checkpoints."""
        ours = {name.removeprefix(_PREFIX): tensor for name, tensor in state_dict.items()}
        found = to_hf(ours, self._config)
        if exclude_key_regex is not None:
            found = {n: t for n, t in found.items() if not re.match(exclude_key_regex, n)}
        return found

    def from_hf(self, hf_state_dict: Mapping[str, Tensor], **unused: Any) -> dict[str, Tensor]:
        """Theirs to ours; MTP modules in the files are left out."""
        known = hf_tensors(self._config)
        kept = {name: tensor for name, tensor in hf_state_dict.items() if name in known}
        return {_PREFIX + name: t for name, t in from_hf(kept, self._config).items()}


def _without_losses(config: Any) -> ModelConfig:
    """The model that ``config`` describes, without what only our own training step computes."""
    stated = {key: value for key, value in config.to_dict().items() if value is not None}
    stated["architectures"] = ["DeepseekV3ForCausalLM"]
    stated["q_lora_rank"] = config.q_lora_rank
    return replace(model_config(stated), num_nextn_predict_layers=0, moe_aux_loss_coeff=0.0)
