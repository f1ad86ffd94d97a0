"""``deepseek test``: a table of checks of a small model, in seconds.

The model keeps the kind of the configuration (routing, query compression, MTP, YaRN) and shrinks
its sizes; the parameter count is checked at full size, on the meta device.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepseek.config import ModelConfig, changed, load_config
from deepseek.config.cost import count_parameters
from deepseek.console import say, table
from deepseek.models import reference
from deepseek.models.components.moe import MoE
from deepseek.models.transformer import Transformer, loss_sums

VOCAB, LENGTH = 128, 24


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    name: str
    measured: str
    required: str
    passed: bool


def test_model(config: str | None = None) -> bool:
    """Print the table; True if every check passed.

    Args:
        config: name of a shipped configuration or a YAML file; None: ``deepseek_v3_tiny``.

    Raises:
        ConfigError: a broken configuration.
    """
    start = time.monotonic()
    run = load_config(config or "deepseek_v3_tiny")
    small = shrink(run.model)
    checks = [check for group in CHECKS for check in group(small)]
    checks += full_size(run.model)
    rows = [(c.name, c.measured, c.required, "ok" if c.passed else "FAILED") for c in checks]
    table(f"model of {run.name}", ("check", "measured", "required", ""), rows)
    failed = sum(not c.passed for c in checks)
    verdict = (
        f"{failed} of {len(checks)} checks failed" if failed else f"{len(checks)} checks passed"
    )
    say(f"{verdict} in {time.monotonic() - start:.1f} s")
    return failed == 0


def shrink(model: ModelConfig) -> ModelConfig:
    """The same kind of model, small enough to check in seconds."""
    groups = min(model.n_group, 4)
    kept = min(model.topk_group, max(1, groups // 2)) if groups > 1 else 1
    experts = max(4 * groups, 8)
    small = replace(
        model,
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=min(model.first_k_dense_replace, 1),
        num_attention_heads=4,
        q_lora_rank=None if model.q_lora_rank is None else 16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=experts,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=min(model.num_experts_per_tok, 3),
        num_nextn_predict_layers=min(model.num_nextn_predict_layers, 2),
        initializer_range=0.1,
        activations_checkpoint_granularity=None,
        activations_checkpoint_num_layers=None,
    )
    if small.rope_scaling is not None:
        context = LENGTH // 2  # so that positions lie past the original context
        small = changed(
            small,
            {
                "rope_scaling.original_max_position_embeddings": context,
                "rope_scaling.factor": 4.0,
                "max_position_embeddings": 4 * context,
            },
        )
    return small


# -- the checks --


def shapes(config: ModelConfig) -> Iterator[Check]:
    """Logits have the shape (B, S, V) and are finite."""
    logits_BSV = build(config)(tokens())
    finite = bool(logits_BSV.isfinite().all())
    shape = tuple(logits_BSV.shape)
    yield Check("logits", f"{shape}, finite: {finite}", f"(2, {LENGTH}, {VOCAB})",
                finite and shape == (2, LENGTH, VOCAB))  # fmt: skip


def causality(config: ModelConfig) -> Iterator[Check]:
    """A token changes nothing before it, and nothing in another isolated document."""
    model = build(config)
    before_BS, place = tokens(), LENGTH // 2
    after_BS = before_BS.clone()
    after_BS[:, place] = (after_BS[:, place] + 1) % VOCAB
    with torch.no_grad():
        change_BS = (model(before_BS) - model(after_BS)).abs().amax(-1)
    past, present = float(change_BS[:, :place].max()), float(change_BS[:, place:].max())
    yield small("causality: change before a changed token", past, 1e-12)
    yield Check("causality: change after it", f"{present:.1e}", "> 0", present > 0)
    ids_BS = (torch.arange(LENGTH) > place).long().expand_as(before_BS)
    with torch.no_grad():
        change_BS = model(before_BS, documents_BS=ids_BS) - model(after_BS, documents_BS=ids_BS)
    isolated_BS = change_BS.abs().amax(-1)
    leak = float(isolated_BS[:, place + 1 :].max())
    yield Check("isolation: change in the next document", f"{leak:.1e}", "0 (bitwise)", leak == 0)


def routing(config: ModelConfig) -> Iterator[Check]:
    """K distinct experts from the allowed groups; the bias chooses but does not weigh."""
    router = first_moe(build(config)).gate
    router.requires_grad_(False)
    x_TD = torch.randn(64, config.hidden_size, dtype=torch.float64, generator=seeded())
    chosen = router(x_TD)
    ids_TK = chosen.expert_ids_TK
    distinct = int(min(len(set(row)) for row in ids_TK.tolist()))
    required = config.num_experts_per_tok
    yield Check("routing: distinct experts per token", str(distinct), str(required),
                distinct == required)  # fmt: skip
    size = config.n_routed_experts // config.n_group
    spread = max(len({i // size for i in row}) for row in ids_TK.tolist())
    if config.topk_method != "greedy":
        yield Check("routing: groups per token", str(spread), f"<= {config.topk_group}",
                    spread <= config.topk_group)  # fmt: skip
    if config.norm_topk_prob:
        error = float((chosen.weights_TK.sum(-1) - config.routed_scaling_factor).abs().max())
        yield small("routing: sum of weights - scaling factor", error, 1e-9)
    if router.bias is None:
        return
    router.bias[0] = 10.0
    biased = router(x_TD)
    everywhere = bool((biased.expert_ids_TK == 0).any(-1).all())
    yield Check("routing: a large bias is chosen by every token", str(everywhere), "True",
                everywhere)  # fmt: skip
    weights_TK = biased.scores_TE.gather(1, biased.expert_ids_TK)
    if config.norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    error = float((biased.weights_TK - weights_TK * config.routed_scaling_factor).abs().max())
    yield small("routing: weights from unbiased scores", error, 1e-9)


def experts(config: ModelConfig) -> Iterator[Check]:
    """The stacked experts compute what single ones do."""
    moe = first_moe(build(config))
    x_BSD = torch.randn(2, LENGTH, config.hidden_size, dtype=torch.float64, generator=seeded())
    got_BSD = moe(x_BSD)
    chosen = moe.gate(x_BSD.flatten(0, 1))
    singles = [moe.experts.expert(e) for e in range(config.n_routed_experts)]
    rows = [
        sum((w * singles[int(e)](x) for w, e in zip(ws, es, strict=True)), torch.zeros_like(x))
        for x, ws, es in zip(
            x_BSD.flatten(0, 1), chosen.weights_TK, chosen.expert_ids_TK, strict=True
        )
    ]
    want_BSD = torch.stack(rows).view_as(x_BSD)
    if moe.shared_experts is not None:
        want_BSD = want_BSD + moe.shared_experts(x_BSD)
    yield small("experts: stacked - one by one", relative(got_BSD, want_BSD), 1e-12)


def balance(config: ModelConfig) -> Iterator[Check]:
    """The bias update evens out the load of a skewed router."""
    router = first_moe(build(config)).gate
    if router.bias is None:
        return
    x_TD = torch.randn(512, config.hidden_size, dtype=torch.float64, generator=seeded()) + 0.3

    def fullest() -> float:
        counts_E = torch.bincount(
            router(x_TD).expert_ids_TK.flatten(), minlength=config.n_routed_experts
        )
        router.update_bias(counts_E, 0.01)
        return float(counts_E.max() / counts_E.double().mean())

    loads = [fullest() for _ in range(200)]
    yield Check("balance: fullest / mean load, before and after 200 updates",
                f"{loads[0]:.2f} -> {loads[-1]:.2f}", "down, < 1.25",
                loads[-1] < min(loads[0], 1.25))  # fmt: skip


def gradients(config: ModelConfig) -> Iterator[Check]:
    """Every parameter learns, also with activations recomputed, which changes nothing."""
    model = build(config)
    plain, counts = training_gradients(model)
    dead = [name for name, g in plain.items() if not (g.isfinite().all() and g.abs().sum() > 0)]
    yield Check("gradients: parameters with a finite non-zero one",
                f"{len(plain) - len(dead)} of {len(plain)} {' '.join(dead[:2])}".rstrip(),
                "all", not dead)  # fmt: skip
    model.recompute = "full"
    again, counts_again = training_gradients(model)
    yield small("recomputation: gradients", worst(again, plain), 1e-12)
    same = counts == counts_again
    yield Check("recomputation: tokens counted once", str(same), "True", same)


def decoding(config: ModelConfig) -> Iterator[Check]:
    """Absorbed attention over the latent cache equals expanded attention."""
    from deepseek.inference.generation import LatentCache

    model = build(config)
    tokens_BS = tokens()
    want_BV = model(tokens_BS)[:, -1]
    caches = [
        LatentCache(2, LENGTH, config, torch.zeros(2, dtype=torch.int64), torch.float64)
        for _ in model.layers
    ]
    got_BV = want_BV
    for i in range(LENGTH):
        got_BV = model.last_logits(tokens_BS[:, i : i + 1], torch.full((2, 1), i), caches)
    yield small("attention: absorbed - expanded", relative(got_BV, want_BV), 1e-10)
    numbers = sum(c.kept_BMX[0, 0].numel() for c in caches)
    per_layer = config.kv_lora_rank + config.qk_rope_head_dim
    yield Check("cache: numbers per token and layer", str(numbers // len(caches)), str(per_layer),
                numbers == per_layer * len(caches))  # fmt: skip


def precision(config: ModelConfig) -> Iterator[Check]:
    """The correction bias survives a cast of the whole model."""
    router = first_moe(build(config).bfloat16()).gate
    if router.bias is not None:
        yield Check("bias after .to(bf16)", str(router.bias.dtype), "torch.float32",
                    router.bias.dtype == torch.float32)  # fmt: skip


def against_reference(config: ModelConfig) -> Iterator[Check]:
    """Logits, loss and gradients against the paper's equations as plain loops, in float64."""
    model = build(config)
    tokens_BS = tokens()
    labels_BS = tokens_BS.roll(-1, 1)
    state = {
        name: tensor.detach().double().clone().requires_grad_(tensor.requires_grad)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    batch = [
        reference.Sequence(t.tolist(), labels.tolist())
        for t, labels in zip(tokens_BS, labels_BS, strict=True)
    ]
    want = reference.training_loss(state, config, batch)
    want.total.backward()
    got_BSV = model(tokens_BS)
    want_BSV = torch.stack([reference.sequence_logits(state, config, s) for s in batch])
    yield small("reference: logits", relative(got_BSV, want_BSV), 1e-10)
    grads, _ = training_gradients(model)
    wanted = {name: state[name].grad for name in grads}
    yield small("reference: gradients", worst(grads, wanted), 1e-10)


@contextmanager
def _hushed() -> Iterator[None]:
    """What the libraries that transformers loads on the way log is not about the model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def against_transformers(config: ModelConfig) -> Iterator[Check]:
    """Logits and gradients against Hugging Face's model of the same weights, in fp32."""
    if importlib.util.find_spec("transformers") is None:
        yield Check("transformers", "not installed: not compared", "-", True)
        return
    if config.scoring_func != "sigmoid" or config.topk_method != "noaux_tc":
        yield Check("transformers", "no V3 class for this routing: not compared", "-", True)
        return
    with _hushed():
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from deepseek.interop.hf_config import hf_config
    from deepseek.interop.huggingface import from_hf, to_hf

    config = replace(config, num_nextn_predict_layers=0, moe_aux_loss_coeff=0.0)
    ours = build(config).float()
    theirs = DeepseekV3ForCausalLM(
        DeepseekV3Config(**hf_config(config) | {"attn_implementation": "eager"})
    )
    theirs.load_state_dict(to_hf(ours.state_dict(), config, layout="stacked"))
    for name, module in theirs.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            # Theirs is 1e-6 whatever config.json says; vLLM and SGLang take rms_norm_eps, as we do.
            module.variance_epsilon = config.rms_norm_eps
    theirs.eval()
    tokens_BS = tokens()
    want_BSV, got_BSV = theirs(tokens_BS).logits, ours(tokens_BS)
    yield small("transformers: logits", relative(got_BSV, want_BSV), 2e-5)
    direction_BSV = torch.randn(got_BSV.shape, generator=seeded())
    (want_BSV * direction_BSV).sum().backward()
    (got_BSV * direction_BSV).sum().backward()
    their_grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    their_state = {n: torch.zeros_like(t) for n, t in theirs.state_dict().items()} | their_grads
    wanted = from_hf(their_state, config)
    grads = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    yield small("transformers: gradients", worst(grads, wanted), 2e-5)


def full_size(config: ModelConfig) -> Iterator[Check]:
    """Parameters of the unshrunk model, built on the meta device, against the arithmetic."""
    with torch.device("meta"):
        built = Transformer(config)
    total = sum(p.numel() for p in built.parameters())
    counts = count_parameters(config)
    counted = counts.total + counts.mtp
    yield Check("parameters at full size, MTP included", f"{total:,}", f"{counted:,}",
                total == counted)  # fmt: skip


CHECKS: list[Callable[[ModelConfig], Iterator[Check]]] = [
    shapes,
    causality,
    routing,
    experts,
    balance,
    gradients,
    decoding,
    precision,
    against_reference,
    against_transformers,
]

# -- helpers --


def build(config: ModelConfig) -> Transformer:
    """The small model in float64, with a bias that is not zero."""
    model = Transformer(config).double()
    model.init_weights(seed=1)
    for router in model.routers().values():
        if router.bias is not None:
            router.bias.uniform_(0, 0.05, generator=seeded())
    return model


def training_gradients(model: Transformer) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Gradients of the training loss on the fixed tokens, and the tokens per expert."""
    model = copy.deepcopy(model)
    tokens_BS = tokens()
    num_tokens = tokens_BS.numel()
    context = model.context(
        tokens_BS, balance_scale=torch.tensor(1 / num_tokens, dtype=torch.float64)
    )
    hidden = model.hidden_states(tokens_BS, context)
    assert model.head is not None
    sums = loss_sums(hidden.main_BSD, hidden.mtp_BSD, model.head, tokens_BS.roll(-1, 1))
    factor = model.config.mtp_loss_scaling_factor
    ((sums.main + factor * sums.mtp) / num_tokens).backward()
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    return grads, [router.tokens_per_expert.tolist() for router in model.routers().values()]


def first_moe(model: Transformer) -> MoE:
    """The first MoE layer."""
    return next(module for module in model.modules() if isinstance(module, MoE))


def tokens() -> Tensor:
    """Fixed tokens, (2, LENGTH)."""
    return torch.randint(0, VOCAB, (2, LENGTH), generator=seeded())


def seeded() -> torch.Generator:
    """A fresh generator of fixed seed."""
    return torch.Generator().manual_seed(0)


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-300))


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest relative difference over all tensors."""
    return max(relative(got[name], want[name]) for name in got)


def small(name: str, value: float, limit: float) -> Check:
    """A check that a difference is small."""
    return Check(name, f"{value:.1e}", f"<= {limit:.0e}", value <= limit)
