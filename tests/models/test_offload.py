"""What lies on the host is what was kept, bit by bit, and no weight; afterwards nothing does."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from deepseek.models.components import offload
from deepseek.models.transformer import Transformer
from support.tiny_models import backward, random_batch, tiny_config, tiny_model


@pytest.mark.parametrize("granularity", [None, "full"])
def test_offloaded_activations(granularity: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    config = tiny_config(activations_checkpoint_granularity=granularity, num_nextn_predict_layers=1)
    sent: list[weakref.ref[offload._Copy]] = []
    kinds: list[bool] = []
    make = offload._Copy.__init__

    def noted(copy: offload._Copy, tensor: torch.Tensor) -> None:
        make(copy, tensor)
        sent.append(weakref.ref(copy))
        kinds.append(isinstance(tensor, torch.nn.Parameter))

    monkeypatch.setattr(offload._Copy, "__init__", noted)

    def trained(offloading: bool) -> Transformer:
        model = tiny_model(replace(config, cpu_offloading_activations=offloading))
        backward(model, random_batch())
        return model

    plain, away = trained(False), trained(True)
    assert not any(kinds)
    blocks = config.num_hidden_layers + 1
    assert len(sent) == blocks + 1 if granularity else len(sent) > 10 * blocks  # MTP has two inputs
    for a, b in zip(plain.parameters(), away.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    gc.collect()
    assert not any(reference() for reference in sent), "it stays on the host"


def test_what_is_small_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST_BYTES", 1 << 20)
    model = tiny_model(tiny_config(cpu_offloading_activations=True))
    block = offload._Block(model, None)
    small = torch.ones(8, requires_grad=True) * 2
    assert block.send(small) is small
    assert isinstance(block.send(torch.ones(1 << 18)), offload._Copy)
