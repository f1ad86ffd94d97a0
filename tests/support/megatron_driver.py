"""What Megatron-Core builds from `deepseek emit megatron`: a process of its own.

Arguments: such a file, and the run that it is of, or nothing if it has several processes. Prints
one JSON object.
"""

import inspect
import json
import pydoc
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

warnings.simplefilter("ignore")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402
from megatron.core.transformer import (  # noqa: E402
    MLATransformerConfig,
    multi_latent_attention,
)
from megatron.core.transformer.moe import moe_utils  # noqa: E402

from deepseek.interop.open_weights import open_checkpoint  # noqa: E402
from support.peer_schedule import learning_rates  # noqa: E402


def main(path: Path, run: Path | None = None) -> dict[str, Any]:
    torch.set_num_threads(1)
    given = yaml.safe_load(path.read_text())
    config = built_config(given)
    OptimizerConfig(**arguments(given, "OptimizerConfig"))
    known = inspect.signature(parallel_state.initialize_model_parallel).parameters
    found: dict[str, Any] = {
        "lr": learning_rates(
            OptimizerParamScheduler,
            given["OptimizerParamScheduler"],
            given["training"]["train_iters"],
        ),
        "unknown sizes": sorted(given["initialize_model_parallel"].keys() - known.keys()),
        "stages": given["MLATransformerConfig"]["pipeline_model_parallel_layout"],
        "sequence_parallel": config.sequence_parallel,
    }
    if run is None:
        return found
    ours = open_checkpoint(run).model()
    model = built_model(given).eval()
    weights = named(ours.state_dict())
    loaded = model.load_state_dict(weights, strict=False)
    found["missing"] = [n for n in loaded.missing_keys if not n.endswith("_extra_state")]
    found["unexpected"] = loaded.unexpected_keys
    torch.manual_seed(0)
    tokens = torch.randint(0, given["GPTModel"]["vocab_size"], (2, 24))
    positions = torch.arange(24).expand(2, -1)
    mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).triu(1)
    labels = tokens.roll(-1, 1)
    with torch.no_grad():  # with MTP it wants labels, and gives losses instead of logits
        theirs = model(tokens, positions, mask, labels=labels)
        expected = F.cross_entropy(ours(tokens).transpose(1, 2), labels, reduction="none")
        found["differ by"] = float((theirs - expected).abs().max())
    model.train()
    model(tokens, positions, mask, labels=labels).mean().backward()
    found["no gradient"] = [n for n, p in model.named_parameters() if p.grad is None]
    return found


def arguments(given: dict[str, Any], section: str) -> dict[str, Any]:
    """As docs/nemo.md says."""
    objects = given["torch_objects"][section]
    return {**given[section], **{key: pydoc.locate(name) for key, name in objects.items()}}


def built_config(given: dict[str, Any], **other: Any) -> Any:
    return MLATransformerConfig(**{**arguments(given, "MLATransformerConfig"), **other})


class Attention(torch.nn.Module):
    """Megatron's own on a CPU knows heads of one size only."""

    def __init__(self, *args: Any, softmax_scale: float, **kwargs: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, q_SBNH: Tensor, k_SBNH: Tensor, v_SBNH: Tensor, *args: Any, **kw: Any) -> Any:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBNH, k_SBNH, v_SBNH))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)


def built_model(given: dict[str, Any]) -> Any:
    """On a CPU, so without what needs a GPU or Transformer Engine."""
    with tempfile.NamedTemporaryFile() as file:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{file.name}", rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel(**given["initialize_model_parallel"])
    if not torch.cuda.is_available():  # asked for whatever use_cpu_initialization says
        torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    if not isinstance(
        multi_latent_attention.TELinear, type
    ):  # a stand-in, which isinstance refuses
        multi_latent_attention.TELinear = type("TELinear", (), {})
    if not hasattr(moe_utils, "te_general_gemm"):  # defined with Transformer Engine only
        moe_utils.te_general_gemm = None
    config = built_config(
        given,
        moe_grouped_gemm=False,
        moe_token_dispatcher_type="allgather",
        bf16=False,
        use_cpu_initialization=True,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = Attention
    ahead = None
    if config.mtp_num_layers:
        ahead = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    return GPTModel(
        config=config, transformer_layer_spec=spec, mtp_block_spec=ahead, **given["GPTModel"]
    )


BLOCK = {
    "attn_norm": "input_layernorm",
    "attn.wq": "self_attention.linear_q_proj",
    "attn.wq_a": "self_attention.linear_q_down_proj",
    "attn.q_norm": "self_attention.q_layernorm",
    "attn.wq_b": "self_attention.linear_q_up_proj",
    "attn.wkv_a": "self_attention.linear_kv_down_proj",
    "attn.kv_norm": "self_attention.kv_layernorm",
    "attn.wkv_b": "self_attention.linear_kv_up_proj",
    "attn.wo": "self_attention.linear_proj",
    "ffn_norm": "pre_mlp_layernorm",
    "ffn.gate": "mlp.router",
    "ffn.w2": "mlp.linear_fc2",
    "ffn.shared_experts.w2": "mlp.shared_experts.linear_fc2",
}
OUTSIDE = {
    "embed": "embedding.word_embeddings",
    "norm": "decoder.final_layernorm",
    "head": "output_layer",
}


def named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under Megatron's names: gate and up projections in one, experts apart."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "layers":
            prefix, rest = f"decoder.layers.{parts[1]}.", ".".join(parts[2:])
        elif parts[0] == "mtp":
            prefix, rest = f"mtp.layers.{parts[1]}.", ".".join(parts[2:])
            if not rest.startswith("block."):
                found[prefix + {"norm.weight": "final_layernorm.weight"}.get(rest, rest)] = tensor
                continue
            prefix, rest = prefix + "transformer_layer.", rest.removeprefix("block.")
        else:
            found[f"{OUTSIDE[parts[0]]}.weight"] = tensor
            continue
        stem = rest.removesuffix(".weight")
        if rest == "ffn.gate.bias":
            found[f"{prefix}mlp.router.expert_bias"] = tensor
        elif stem in BLOCK:
            found[f"{prefix}{BLOCK[stem]}.weight"] = tensor
        elif stem.endswith("w1"):
            up = state[name.replace("w1", "w3")]
            if stem == "ffn.experts.w1":
                for e in range(tensor.shape[0]):
                    both = torch.cat([tensor[e], up[e]])
                    found[f"{prefix}mlp.experts.local_experts.{e}.linear_fc1.weight"] = both
            else:
                inner = "shared_experts." if "shared" in stem else ""
                found[f"{prefix}mlp.{inner}linear_fc1.weight"] = torch.cat([tensor, up])
        elif stem == "ffn.experts.w2":
            for e in range(tensor.shape[0]):
                found[f"{prefix}mlp.experts.local_experts.{e}.linear_fc2.weight"] = tensor[e]
    return found


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:]))))
