"""Reading the routers: what is shown is what they chose, in order, of real tokens, unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from deepseek.config.schema import DataConfig, ModelConfig
from deepseek.experts.analysis import LayerRouting, read_routing
from deepseek.models.components.router import Router
from deepseek.models.transformer import Transformer

SIZES = dict(
    vocab_size=13,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    intermediate_size=24,
    moe_intermediate_size=8,
    n_routed_experts=8,
    num_experts_per_tok=3,
    num_nextn_predict_layers=1,
)
CASES: dict[str, dict[str, object]] = {
    "groups": dict(n_group=4, topk_group=2),
    "no groups": {},
    "softmax": dict(scoring_func="softmax", topk_method="greedy", moe_router_bias_update_rate=0),
    "limited": dict(topk_method="group_limited_greedy", n_group=4, topk_group=2),
}


def model(**changes: object) -> Transformer:
    made = Transformer(ModelConfig(**(SIZES | changes)))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.5, generator=generator)
        for router in made.routers().values():
            router.start_step()
            if router.bias is not None:
                router.bias.normal_(-0.5, 0.4, generator=generator)
    return made


def batches() -> list[dict[str, np.ndarray]]:
    """Two batches, the last with padding whose tokens differ."""
    chance = np.random.default_rng(0)
    made = []
    for padding in (0, 4):
        tokens = chance.integers(0, 13, (2, 9))
        documents = np.repeat([[0] * 5 + [1] * 4], 2, axis=0).astype(np.int32)
        if padding:
            documents[1, -padding:] = -1
        positions = np.repeat([np.arange(9)], 2, axis=0)
        made.append({"tokens": tokens, "positions": positions, "documents": documents})
    return made


def read(made: Transformer) -> list[LayerRouting]:
    seen: list[LayerRouting] = []
    assert read_routing(made, batches(), seen.append) == 2 * 18 - 4
    return seen


@pytest.mark.parametrize("case", CASES)
def test_what_is_shown_is_what_was_chosen(case: str) -> None:
    """Layers in order of depth, MTP last; the compared scores explain the choice."""
    made = model(**CASES[case])
    seen = read(made)
    assert [s.layer for s in seen] == ["layers.1", "layers.2", "mtp.0.block"] * 2
    for shown in seen:
        highest = torch.from_numpy(shown.choice_TE).topk(3).indices.sort().values
        assert np.array_equal(np.sort(shown.experts_TK, axis=1), highest.numpy())
        assert shown.scores_TE.dtype == shown.choice_TE.dtype == np.float32
        router = made.routers()[shown.layer]
        bias = 0 if router.bias is None else router.bias.numpy()
        eligible = np.isfinite(shown.choice_TE)
        assert np.allclose((shown.scores_TE + bias)[eligible], shown.choice_TE[eligible])
        assert (eligible.sum(axis=1) == (4 if made.config.n_group > 1 else 8)).all()


def test_real_tokens_only_in_the_order_of_the_text() -> None:
    seen = read(model())
    for shown, batch in zip(seen, [b for b in batches() for _ in range(3)], strict=True):
        real = batch["documents"] >= 0
        assert shown.tokens_T.tolist() == batch["tokens"][real].tolist()
        assert len(shown.experts_TK) == len(shown.scores_TE) == real.sum()


def test_it_is_what_the_router_returns_in_a_plain_forward_pass() -> None:
    made = model()
    returned: list[np.ndarray] = []
    router = made.layers["2"].ffn.gate
    handle = router.register_forward_hook(
        lambda module, args, out: returned.append(out.expert_ids_TK.numpy())
    )
    for batch in batches():
        with torch.no_grad():
            made(torch.from_numpy(batch["tokens"]))
    handle.remove()
    shown = [s.experts_TK for s in read(made) if s.layer == "layers.2"]
    assert np.array_equal(shown[0], returned[0])
    assert np.array_equal(shown[1], returned[1][: len(shown[1])])  # padding stands at the end


@pytest.mark.parametrize("isolate", [True, False])
def test_documents_see_each_other_as_in_training(isolate: bool) -> None:
    made = model(data=DataConfig(isolate_documents=isolate))
    first, second = [], []
    one = batches()[:1]
    read_routing(made, one, lambda s: first.append(s.choice_TE))
    one[0]["tokens"] = one[0]["tokens"].copy()
    one[0]["tokens"][:, :4] = (one[0]["tokens"][:, :4] + 1) % 13
    read_routing(made, one, lambda s: second.append(s.choice_TE))
    rows = np.flatnonzero(np.tile(np.arange(9) >= 5, 2))  # of the second document
    same = [np.array_equal(a[rows], b[rows]) for a, b in zip(first, second, strict=True)]
    assert all(same) if isolate else not any(same)


def test_the_model_is_left_as_it_was() -> None:
    made = model().train()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in made.modules()]
    seen = read(made)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())
    assert not any(router.tokens_per_expert.any() for router in made.routers().values())
    assert [len(module._forward_hooks) for module in made.modules()] == hooks
    assert made.training and torch.is_grad_enabled() and len(seen) == 6

    def fail(shown: LayerRouting) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        read_routing(made, batches(), fail)
    assert [len(module._forward_hooks) for module in made.modules()] == hooks


def test_one_layer_at_a_time() -> None:
    """What a layer shows is shown before the next layer runs."""
    made = model()
    order: list[str] = []
    for name, module in made.named_modules():
        if isinstance(module, Router):

            def note(module: nn.Module, args: object, name: str = name) -> None:
                order.append(name)

            module.register_forward_pre_hook(note)
    read_routing(made, batches()[:1], lambda s: order.append(f"{s.layer} shown"))
    assert order == [
        word
        for layer in ("layers.1", "layers.2", "mtp.0.block")
        for word in (f"{layer}.ffn.gate", f"{layer} shown")
    ]


def test_a_dense_model_has_nothing_to_show() -> None:
    seen: list[LayerRouting] = []
    made = model(first_k_dense_replace=3, num_nextn_predict_layers=0)
    assert read_routing(made, batches(), seen.append) == 32 and not seen
