"""The rules of ``model.peft``: adapters have something to be on."""

from __future__ import annotations

from collections.abc import Iterator

from deepseek.config.errors import Problem
from deepseek.config.foreign_names import nearest
from deepseek.config.schema import RunConfig
from deepseek.config.weights import LORA_GROUPS, LORA_HF_NAMES, model_weights

_MATRICES = tuple(name for group in LORA_GROUPS.values() for name in group)
_OTHER_NAMES = {
    **LORA_HF_NAMES,
    # of transformers 5, Megatron, NeMo and peft
    "gate_up_proj": "experts.w1 and experts.w3",
    "linear_qkv": "attention",
    "linear_proj": "wo",
    "linear_q_proj": "wq",
    "linear_q_down_proj": "wq_a",
    "linear_q_up_proj": "wq_b",
    "linear_kv_down_proj": "wkv_a",
    "linear_kv_up_proj": "wkv_b",
    "linear_fc1": "w1 and w3",
    "linear_fc2": "w2",
    "all-linear": "attention, feed_forward and experts",
    "mtp": "attention, feed_forward or experts: MTP modules get no adapters, since peft and "
    "transformers have no place for them",
}


def adapters(cfg: RunConfig) -> Iterator[Problem]:
    """Adapters have something to be on, and nothing below them moves."""
    peft = cfg.model.peft
    if peft is None:
        return
    names = list(peft.target_modules)
    key = "model.peft.target_modules"
    options = [*LORA_GROUPS, *_MATRICES]
    unknown = [name for name in names if name not in options]
    for name in unknown:
        meant = _OTHER_NAMES.get(name) or nearest(name, options, cutoff=0.5)
        way_out = f"use {meant}" if meant else f"use {', '.join(LORA_GROUPS)}"
        yield Problem(key, names, f"there is no matrix {name}", way_out)
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
    has = {weight.lora for weight in model_weights(cfg.model)}
    for name in names:
        if name not in unknown and has.isdisjoint(LORA_GROUPS.get(name, (name,))):
            yield Problem(
                key,
                names,
                f"this model has no {name}",
                f"leave it out; there are {', '.join(m for m in _MATRICES if m in has)}",
            )
