"""What NeMo AutoModel makes of our files: a process of its own, as it patches transformers.

Arguments: a recipe of `deepseek emit automodel`, the run that it is of, a folder of `hf export`.
Prints one JSON object.
"""

import copy
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from support.peer_schedule import learning_rates  # noqa: E402
from support.ranks import run_ranks  # noqa: E402

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")

from nemo_automodel._transformers.registry import get_registry  # noqa: E402
from nemo_automodel.components.config.loader import load_yaml_config  # noqa: E402
from nemo_automodel.components.models.deepseek_v3.model import DeepseekV3ForCausalLM  # noqa: E402
from nemo_automodel.components.optim.scheduler import OptimizerParamScheduler  # noqa: E402
from nemo_automodel.recipes._dist_utils import parse_distributed_section  # noqa: E402
from nemo_automodel.recipes._typed_config import RecipeConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from deepseek.interop.open_weights import open_checkpoint  # noqa: E402

ARCHITECTURE = "DeepseekTrainingForCausalLM"


def main(recipe: Path, run: Path, files: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cfg = load_yaml_config(str(recipe))
    reference = open_checkpoint(run).model()
    tokens = torch.randint(0, reference.config.vocab_size, (2, 24))
    with torch.no_grad():
        expected = reference(tokens)
    hf_config = cfg.model.config.instantiate()
    backend = cfg.model.backend.instantiate()
    overrides = cfg.model.moe_overrides.to_dict()
    theirs = DeepseekV3ForCausalLM.from_config(hf_config, backend=backend, moe_overrides=overrides)
    exported = load_file(files / "model.safetensors")
    main_model = {name: t for name, t in exported.items() if not _is_mtp(name, hf_config)}
    loaded = theirs.load_state_dict(theirs.state_dict_adapter.from_hf(dict(exported)), strict=False)
    ours_class = get_registry().get_model_cls_from_model_arch(ARCHITECTURE)
    ours = ours_class.from_config(hf_config)
    ours.initialize_weights()
    ours.load_state_dict(ours.state_dict_adapter.from_hf(exported))
    back = ours.state_dict_adapter.to_hf(ours.state_dict())
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in theirs.parameters()),
        "class": f"{ours_class.__module__}.{ours_class.__name__}",
        "files come back": sorted(back) == sorted(main_model)
        and all(torch.equal(back[name], main_model[name]) for name in back),
        "not loaded": [
            *loaded.missing_keys,
            *(name for name in loaded.unexpected_keys if not _is_mtp(name, hf_config)),
        ],
        "steps": {},
    }
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.eval()
        with torch.no_grad():
            found[f"{name} differ by"] = float((model(tokens).logits - expected).abs().max())
        found["steps"][name] = step(model, tokens)
    start = ours_class.from_config(hf_config)
    start.load_state_dict(start.state_dict_adapter.from_hf(exported))
    whole = one_step(copy.deepcopy(start), tokens)
    for kind in ("DDP", "FSDP"):
        parts = run_ranks(
            2, lambda rank, k=kind: spread_step(copy.deepcopy(start), tokens, rank, k)
        )
        found[kind] = max(
            float((part[name] - whole[name]).abs().max()) for part in parts for name in whole
        )
    found["sections"] = sections(cfg)
    wd = {"start_wd": 0.0, "end_wd": 0.0, "wd_incr_steps": 1, "wd_incr_style": "constant"}
    schedule = cfg.lr_scheduler.to_dict() | wd
    found["lr"] = learning_rates(OptimizerParamScheduler, schedule, cfg.step_scheduler.max_steps)
    return found


def _is_mtp(name: str, config: Any) -> bool:
    return any(f"model.layers.{config.num_hidden_layers + k}." in name for k in range(4))


def step(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """A step as the recipe takes it: loss, backward, optimiser, biases."""
    model.train()
    biases = {n: b.clone() for n, b in model.named_buffers() if "bias" in n}
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.update_moe_gate_bias()
    moved = [(b - biases[n]).abs().max().item() for n, b in model.named_buffers() if n in biases]
    return {"losses": losses, "biases moved by": moved}


def one_step(model: Any, tokens: torch.Tensor, run: Any = None) -> dict[str, torch.Tensor]:
    """Weights and biases after a step of SGD."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = (run or model)(tokens).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    optimizer.step()
    model.update_moe_gate_bias()
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in model.state_dict().items()
    }


def spread_step(model: Any, tokens: torch.Tensor, rank: int, kind: str) -> dict[str, torch.Tensor]:
    """The same on two ranks, each with half of the sequences."""
    mine = tokens[rank : rank + 1]
    if kind == "DDP":
        return one_step(model, mine, DistributedDataParallel(model))
    mesh = dist.init_device_mesh("cpu", (2,))
    for block in model.model.layers.values():
        fully_shard(block, mesh=mesh)
    return one_step(fully_shard(model, mesh=mesh), mine)


def sections(cfg: Any) -> dict[str, str]:
    """The recipe's own reading of its sections."""
    typed = RecipeConfig(cfg)
    parsed = parse_distributed_section(cfg.distributed.to_dict())
    return {
        "recipe": str(cfg.recipe),
        "optimizer": type(typed.optimizer).__name__,
        "loss_fn": type(typed.loss_fn).__name__,
        "checkpoint": str(typed.checkpoint.model_save_format),
        "step_scheduler": str(typed.step_scheduler.global_batch_size),
        "distributed": str({k: parsed[k] for k in ("tp_size", "pp_size", "ep_size")}),
        "dataloader": type(typed.dataloader).__name__,
    }


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:]))))
