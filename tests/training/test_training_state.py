"""What a checkpoint of a training run holds, and how it is put back."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.manager import CheckpointManager
from deepseek.checkpoint.ranks import Ranks
from deepseek.checkpoint.training_state import collect_tensors, load_weights, restore
from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig, OptimConfig
from deepseek.models.transformer import Transformer
from deepseek.training.optim import build_optimizer

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, kv_lora_rank=8, q_lora_rank=8
)


def optim(name: str) -> OptimConfig:
    """``adamw``, ``adamw bf16`` or ``adamw bf16 host``."""
    kind, *more = name.split(" ")
    moments = "bf16" if "bf16" in more else "fp32"
    return OptimConfig(name=kind, moments_dtype=moments, cpu_offload="host" in more)


def trained(optimizer_name: str, config: ModelConfig = CONFIG) -> tuple[Transformer, Any]:
    """A model after two updates with arbitrary gradients, and a bias that is not zero."""
    model = Transformer(config)
    model.init_weights(1)
    optimizer = build_optimizer(model.named_parameters(), optim(optimizer_name))
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    for router in model.routers().values():
        assert router.bias is not None
        router.bias.uniform_(-1, 1, generator=generator)
    return model, optimizer


def fresh(optimizer_name: str, config: ModelConfig = CONFIG) -> tuple[Transformer, Any]:
    model = Transformer(config)
    model.init_weights(9)
    return model, build_optimizer(model.named_parameters(), optim(optimizer_name))


def saved(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    manager = CheckpointManager(folder)
    path = manager.save(1, tensors, {})
    manager.close()
    return Checkpoint.open(path)


@pytest.mark.parametrize(
    "optimizer_name", ["adamw", "muon", "adamw bf16", "muon bf16 host", "adamw host"]
)
def test_everything_comes_back_and_the_next_update_is_the_same(
    tmp_path: Path, optimizer_name: str
) -> None:
    model, optimizer = trained(optimizer_name)
    tensors = collect_tensors(model, optimizer)
    keys = {name.rsplit(".", 1)[1] for name in tensors if name.startswith("optim.")}
    assert keys == {"step", "exp_avg", "exp_avg_sq"} | (
        {"momentum_buffer"} if "muon" in optimizer_name else set()
    )
    assert any(name.endswith("gate.bias") for name in tensors)
    again, its_optimizer = fresh(optimizer_name)
    restore(saved(tmp_path, tensors), again, its_optimizer)
    restored = collect_tensors(again, its_optimizer)
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        other.grad = one.grad
    optimizer.step()
    its_optimizer.step()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_moments_are_rounded_or_widened_to_what_is_asked_for(tmp_path: Path) -> None:
    model, optimizer = trained("adamw")
    checkpoint = saved(tmp_path, collect_tensors(model, optimizer))
    half, its_optimizer = fresh("adamw bf16")
    restore(checkpoint, half, its_optimizer)
    for name, parameter in half.named_parameters():
        exact = optimizer.state[dict(model.named_parameters())[name]]["exp_avg"]
        assert torch.equal(its_optimizer.state[parameter]["exp_avg"], exact.bfloat16())
    again, wide = fresh("adamw")
    restore(saved(tmp_path / "half", collect_tensors(half, its_optimizer)), again, wide)
    assert {state["exp_avg"].dtype for state in wide.state.values()} == {torch.float32}


def test_state_lies_beside_its_parameter() -> None:
    """On a GPU the step count of fused AdamW is refused elsewhere; meta stands in for one."""
    model, optimizer = trained("adamw")
    shapes = {name: tuple(t.shape) for name, t in collect_tensors(model, optimizer).items()}
    asked: dict[str, Tensor] = {}
    checkpoint: Any = SimpleNamespace(
        path="step_00000001",
        ranks=Ranks(),
        tensor_names=lambda: sorted(shapes),
        tensor_shapes=lambda: shapes,
        tensor_dtypes=lambda: dict.fromkeys(shapes, torch.float32),
        load=asked.update,
    )
    with torch.device("meta"):
        there, its_optimizer = fresh_on_meta()
    restore(checkpoint, there, its_optimizer)
    assert asked.keys() == shapes.keys()
    for states in its_optimizer.state.values():
        assert {name for name in states} == {"step", "exp_avg", "exp_avg_sq"}
        assert all(t.is_meta and not t.requires_grad for t in states.values())
    assert all(tensor.is_meta for name, tensor in asked.items() if name.startswith("optim."))


def fresh_on_meta() -> tuple[nn.Module, Any]:
    model = Transformer(CONFIG)
    return model, torch.optim.AdamW(model.parameters())


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained("adamw")
    checkpoint = saved(tmp_path, collect_tensors(model, optimizer))
    for change, message in (
        ({"hidden_size": 24}, "does not fit"),
        ({"num_hidden_layers": 1}, "belongs to no parameter of this model"),
        ({"q_lora_rank": None}, "belongs to no parameter of this model"),
        ({"topk_method": "greedy"}, "holds 1 tensors this model does not have, such as "
                                    "model.layers.1.ffn.gate.bias"),
        ({"num_nextn_predict_layers": 1}, "missing"),
    ):  # fmt: skip
        config = ModelConfig(**(vars(CONFIG) | change))
        other, its_optimizer = fresh("adamw", config)
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(UserError, match=message):
            restore(checkpoint, other, its_optimizer)
        after = other.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_alone(tmp_path: Path) -> None:
    model, optimizer = trained("muon")
    checkpoint = saved(tmp_path, collect_tensors(model, optimizer))
    other, _ = fresh("adamw")
    load_weights(checkpoint, other)
    state = other.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
