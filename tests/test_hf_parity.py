"""The model against its peer, Hugging Face's ``DeepseekV3ForCausalLM``: same weights, fp32.

Random small configurations; logits and every gradient agree to 2e-5 of each tensor's largest value.
The weights travel through the table of names and the configuration through ``config.json``, so
these are tested with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from deepseek.config.schema import ModelConfig, RopeScaling
from deepseek.interop.hf_config import hf_config
from deepseek.interop.huggingface import Layout, from_hf, to_hf
from deepseek.models.components.router import Router
from deepseek.models.transformer import Transformer, loss_sums

TOLERANCE = 2e-5
MARGIN = 1e-4
"""Top-k may go either way between scores closer than rounding; such examples are passed over."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def configurations(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    topk_group = draw(st.integers(1, groups))
    group_size = draw(st.integers(2, 4))
    mscale, mscale_all_dim = draw(
        st.sampled_from([(1.0, 1.0), (0.707, 0.707), (1.0, 0.0), (0.8, 1.0)])
    )
    yarn = RopeScaling(
        factor=draw(st.sampled_from([4.0, 40.0])),
        original_max_position_embeddings=draw(st.sampled_from([16, 64])),
        beta_fast=draw(st.sampled_from([1.0, 4.0, 32.0])),
        beta_slow=1.0,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )
    top_k = draw(st.integers(1, min(4, topk_group * group_size)))
    original = yarn.original_max_position_embeddings
    return ModelConfig(
        vocab_size=37,
        hidden_size=draw(st.sampled_from([16, 24])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=draw(st.integers(1, 4)),
        q_lora_rank=draw(st.sampled_from([None, 8, 12])),
        kv_lora_rank=draw(st.sampled_from([4, 16])),
        qk_nope_head_dim=draw(st.sampled_from([4, 8])),
        qk_rope_head_dim=draw(st.sampled_from([4, 8])),
        v_head_dim=draw(st.sampled_from([4, 8, 20])),
        intermediate_size=24,
        moe_intermediate_size=draw(st.sampled_from([8, 12])),
        n_routed_experts=groups * group_size,
        n_shared_experts=draw(st.integers(1, 2)),
        num_experts_per_tok=top_k,
        first_k_dense_replace=draw(st.integers(0, 1)),
        n_group=groups,
        topk_group=topk_group,
        # A single weight, normalised, is 1: the router's gradient would be rounding alone.
        norm_topk_prob=top_k > 1 and draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        rope_theta=draw(st.sampled_from([10000.0, 50000.0])),
        rope_scaling=draw(st.sampled_from([None, yarn])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        max_position_embeddings=int(yarn.factor * original),
    )


@given(
    cfg=configurations(),
    first_positions=st.tuples(st.sampled_from([0, 13]), st.sampled_from([0, 70, 200])),
    layout=st.sampled_from(["released", "stacked"]),
    seed=st.integers(0, 2**31),
)
def test_logits_and_gradients(
    cfg: ModelConfig, first_positions: tuple[int, int], layout: Layout, seed: int
) -> None:
    model = build(cfg, seed)
    tokens_BS, positions_BS = inputs(cfg, first_positions, length=11)
    assume(routing_margin(model, tokens_BS, positions_BS) > MARGIN)
    compare(model, tokens_BS, positions_BS, layout)


def test_far_positions() -> None:
    """YaRN as released, from inside to far past the original context, position by position."""
    cfg = small(
        rope_scaling=RopeScaling(factor=40.0, mscale=1.0, mscale_all_dim=1.0),
        max_position_embeddings=163_840,
    )
    model = build(cfg, seed=1)
    positions = [0, 1, 2, 1000, 1001, 4095, 4096, 5000, 40_000, 163_838, 163_839]
    positions_BS = torch.tensor([positions])
    tokens_BS, _ = inputs(cfg, (0,), length=len(positions))
    with torch.no_grad():
        ours = model(tokens_BS, positions_BS)
        # With a mask given, the peer takes the gaps for gaps and not for new documents.
        mask_BS = torch.ones_like(tokens_BS)
        theirs = peer(model)(tokens_BS, position_ids=positions_BS, attention_mask=mask_BS).logits
    for i, position in enumerate(positions):
        assert_close(f"logits at position {position}", ours[:, i], theirs[:, i])


def test_isolated_documents() -> None:
    """Positions that start again are, to the peer, a new document."""
    cfg = small()
    model = build(cfg, seed=2)
    tokens_BS, _ = inputs(cfg, (0,), length=11)
    positions_BS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
    documents_BS = torch.tensor([[5, 5, 5, 5, 9, 9, 9, 9, 9, 9, 9]])
    with torch.no_grad():
        ours = model(tokens_BS, positions_BS, documents_BS)
        theirs = peer(model)(tokens_BS, position_ids=positions_BS, use_cache=False).logits
    assert_close("logits", ours, theirs)


def test_bias_chooses_but_does_not_weigh() -> None:
    """The same choice under another bias gives the same logits, with us as with the peer."""
    cfg = small(first_k_dense_replace=0, num_hidden_layers=1)
    model = build(cfg, seed=3)
    tokens_BS, positions_BS = inputs(cfg, (0,), length=11)
    results = []
    for spread in (50.0, 100.0):  # far larger than any score: the bias alone chooses
        for router in model.routers().values():
            router.bias.copy_(torch.arange(cfg.n_routed_experts) * spread)
        with torch.no_grad():
            results.append(model(tokens_BS, positions_BS))
            assert_close("logits", results[-1], peer(model)(tokens_BS).logits)
    assert torch.equal(*results)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
@pytest.mark.parametrize("scaling", [None, RopeScaling(mscale=0.707, mscale_all_dim=0.707)])
def test_version_2(method: str, scaling: RopeScaling | None) -> None:
    """Softmax scores, no correction bias: ``DeepseekV2ForCausalLM``."""
    cfg = small(
        scoring_func="softmax",
        topk_method=method,
        n_group=2,
        topk_group=1,
        n_routed_experts=8,
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        rope_scaling=scaling,
    )
    model = build(cfg, seed=4)
    tokens_BS, positions_BS = inputs(cfg, (0, 5000), length=11)
    assert routing_margin(model, tokens_BS, positions_BS) > MARGIN
    compare(model, tokens_BS, positions_BS, "released")


def test_the_peer_can_say_no() -> None:
    """Swapping two experts' matrices is far outside the tolerance."""
    model = build(small(), seed=5)
    tokens_BS, positions_BS = inputs(model.config, (0,), length=11)
    theirs = peer(model)
    with torch.no_grad():
        experts = model.layers["1"].ffn.experts
        experts.w1.copy_(experts.w1.flip(0))
        difference = relative_difference(
            model(tokens_BS, positions_BS), theirs(tokens_BS, position_ids=positions_BS).logits
        )
    assert difference > 100 * TOLERANCE


# -- both sides ------------------------------------------------------------------------------------


def compare(model: Transformer, tokens_BS: Tensor, positions_BS: Tensor, layout: Layout) -> None:
    """Logits, the loss of the training path and all its gradients, both in training mode."""
    theirs = peer(model, layout).train()
    labels_BS = F.pad(tokens_BS[:, 1:], (0, 1), value=-100)
    out = theirs(tokens_BS, position_ids=positions_BS, labels=tokens_BS, use_cache=False)
    out.loss.backward()

    model.train()
    with torch.no_grad():
        assert_close("logits", model(tokens_BS, positions_BS), out.logits)
    hidden = model.hidden_states(tokens_BS, model.context(tokens_BS, positions_BS))
    loss = loss_sums(hidden.main_BSD, hidden.mtp_BSD, model.head, labels_BS).main
    loss = loss / (labels_BS != -100).sum()
    loss.backward()
    assert_close("loss", loss, out.loss)

    parameters = dict(model.named_parameters())
    gradients = {
        name: parameters[name].grad if name in parameters else torch.zeros_like(buffer)
        for name, buffer in model.state_dict().items()
    }
    ours = to_hf(gradients, model.config, "stacked", mtp=False)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.numel()}
    assert wanted.keys() == {name for name in ours if not name.endswith("e_score_correction_bias")}
    for name, gradient in wanted.items():
        if gradient is None:
            gradient = torch.zeros_like(ours[name])
        assert_close(f"gradient of {name}", ours[name], gradient)


def peer(model: Transformer, layout: Layout = "stacked") -> nn.Module:
    """The peer with the model's weights, by way of either layout."""
    cfg = model.config
    described = hf_config(cfg, mtp=False)
    family = described["architectures"][0].removesuffix("ForCausalLM")
    theirs = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(
            **described, attn_implementation="eager", experts_implementation="eager"
        )
    )
    state = to_hf(model.state_dict(), cfg, layout, mtp=False)
    if layout == "released":  # the peer itself stacks these only while reading files
        state = to_hf(from_hf(state, cfg), cfg, "stacked")
    theirs.load_state_dict(state)
    for name, module in theirs.named_modules():
        # transformers keeps 1e-6 for these two whatever its configuration says. vLLM and SGLang
        # take rms_norm_eps, as this model does.
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.variance_epsilon = cfg.rms_norm_eps
    return theirs


def build(cfg: ModelConfig, seed: int) -> Transformer:
    """Weights large enough that every non-linearity bends, biases that change the choice."""
    model = Transformer(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        # Of size 1, or the first norm would divide by a small number and magnify rounding.
        model.embed.weight.normal_(generator=generator)
        for router in model.routers().values():
            router.start_step()
            if router.bias is not None:
                router.bias.uniform_(-0.3, 0.3, generator=generator)
    return model


def inputs(
    cfg: ModelConfig, first_positions: tuple[int, ...], length: int
) -> tuple[Tensor, Tensor]:
    """One sequence for each first position."""
    generator = torch.Generator().manual_seed(len(first_positions))
    shape = (len(first_positions), length)
    tokens_BS = torch.randint(cfg.vocab_size, shape, generator=generator)
    positions_BS = torch.tensor(first_positions).unsqueeze(1) + torch.arange(length)
    return tokens_BS, positions_BS


def routing_margin(model: Transformer, tokens_BS: Tensor, positions_BS: Tensor) -> float:
    """Smallest gap between the last chosen and the first rejected expert (or group)."""
    margins = [1.0]

    def note(router: Router, args: tuple[Tensor], routing: object) -> None:
        choice_TE = routing.scores_TE if router.bias is None else routing.scores_TE + router.bias
        if router.num_groups > 1 and router.topk_method != "greedy":
            groups_TGe = choice_TE.unflatten(1, (router.num_groups, -1))
            best = 2 if router.topk_method == "noaux_tc" else 1
            margins.append(gap(groups_TGe.topk(best).values.sum(-1), router.top_k_groups))
            choice_TE = router._mask_groups(choice_TE)
        margins.append(gap(choice_TE, router.top_k))

    hooks = [router.register_forward_hook(note) for router in model.routers().values()]
    with torch.no_grad():
        model(tokens_BS, positions_BS)
    for hook in hooks:
        hook.remove()
    return min(margins)


def gap(values_TE: Tensor, count: int) -> float:
    """Smallest distance over tokens between the ``count``-th largest value and the next."""
    if count == values_TE.shape[-1]:
        return 1.0
    largest = values_TE.topk(count + 1).values
    return (largest[:, count - 1] - largest[:, count]).min().item()


def small(**changes: object) -> ModelConfig:
    fields = dict(
        vocab_size=37,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=8,
        n_routed_experts=4,
        max_position_embeddings=4096,
    )
    return ModelConfig(**(fields | changes))


def assert_close(what: str, ours: Tensor, wanted: Tensor) -> None:
    difference = relative_difference(ours, wanted)
    assert difference <= TOLERANCE, f"{what}: relative difference {difference:.1e}"


def relative_difference(ours: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value; both zero: 0."""
    assert ours.shape == wanted.shape and ours.dtype == wanted.dtype == torch.float32
    difference = (ours - wanted).abs().max().item()
    return difference if difference == 0 else difference / wanted.abs().max().item()
