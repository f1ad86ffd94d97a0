"""The oracle: the equations of the DeepSeek-V3 report (arXiv:2412.19437) as plain float64 loops.

Token by token, head by head, expert by expert; nothing is batched, cached or fused. It shares no
code with the package but the configuration. "eq N" below is equation N of the report; YaRN is
arXiv:2309.00071. Scalars and vectors are torch float64, so that autograd gives gradients.

``training_loss`` is the loss of one optimiser step; ``sequence_logits`` the logits of one sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.config.schema import ModelConfig

State = dict[str, Tensor]
Vectors = list[Tensor]  # one vector per token
IGNORED = -100


@dataclass
class Sequence:
    """One training sequence of S tokens; every list has S entries."""

    tokens: list[int]
    labels: list[int]
    """The next token, or -100 where there is none to predict."""
    positions: list[int] | None = None
    """Rotary position; None: 0, 1, 2, ..."""
    documents: list[int] | None = None
    """Document id: attention and MTP labels stay within one id; None: one stream."""
    real: list[bool] | None = None
    """False for padding; None: nothing is padding."""

    @property
    def is_real(self) -> list[bool]:
        return [True] * len(self.tokens) if self.real is None else self.real


@dataclass
class Route:
    """What the router of one MoE layer decided for one token."""

    logits: Tensor  # (E,)
    scores: Tensor  # (E,) s of eq 15, without the bias
    chosen: list[int]
    weights: list[Tensor]  # g of eq 13, one per chosen expert


Routes = list[list[Route]]  # per MoE layer, per token


@dataclass
class StepLoss:
    """The parts of one step's loss, already divided by the step's labels or real tokens."""

    total: Tensor
    cross_entropy: Tensor
    mtp: Tensor
    """Mean over depths, before lambda."""
    balance: Tensor
    z: Tensor


# -- the loss of one step --------------------------------------------------------------------------


def training_loss(state: State, cfg: ModelConfig, batch: list[Sequence]) -> StepLoss:
    """Cross-entropy + lambda * MTP (eq 24-25) + alpha * balance (eq 17) + coeff * z-loss."""
    label_count = sum(label != IGNORED for sequence in batch for label in sequence.labels)
    real_count = sum(real for sequence in batch for real in sequence.is_real)
    depths = cfg.num_nextn_predict_layers

    cross_entropy = balance = z = zero()
    mtp = [zero() for _ in range(depths)]
    for sequence in batch:
        hidden, routes = transformer(state, cfg, sequence)
        cross_entropy = cross_entropy + cross_entropy_sum(
            [head(state, h_D) for h_D in hidden], sequence.labels
        )
        previous = hidden
        for depth in range(1, depths + 1):
            previous, mtp_routes = mtp_module(state, cfg, sequence, previous, depth)
            routes = routes + mtp_routes
            mtp[depth - 1] = mtp[depth - 1] + cross_entropy_sum(
                [head(state, h_D) for h_D in previous], mtp_labels(sequence, depth)
            )
        for layer_routes in routes:
            real_routes = [
                r for r, real in zip(layer_routes, sequence.is_real, strict=True) if real
            ]
            if real_routes:
                balance = balance + len(real_routes) * balance_term(cfg, real_routes)
            for route in real_routes:
                z = z + torch.logsumexp(route.logits, 0) ** 2

    cross_entropy = cross_entropy / label_count
    mtp_mean = sum(mtp, zero()) / depths / label_count if depths else zero()
    balance = cfg.moe_aux_loss_coeff * balance / real_count
    z = cfg.moe_z_loss_coeff * z / real_count
    total = cross_entropy + cfg.mtp_loss_scaling_factor * mtp_mean + balance + z
    return StepLoss(total, cross_entropy, mtp_mean, balance, z)


def cross_entropy_sum(logits: Vectors, labels: list[int]) -> Tensor:
    """Sum over tokens of -log p(label) (eq 24, unnormalised); label -100 counts nothing."""
    total = zero()
    for logits_V, label in zip(logits, labels, strict=True):
        if label != IGNORED:
            total = total - torch.log_softmax(logits_V, 0)[label]
    return total


def balance_term(cfg: ModelConfig, routes: list[Route]) -> Tensor:
    """Sum over experts of f_i * P_i (eq 17-20) over the real tokens of one sequence."""
    length = len(routes)
    experts, chosen_per_token = cfg.n_routed_experts, cfg.num_experts_per_tok
    total = zero()
    for i in range(experts):
        hits = 0
        probability = zero()
        for route in routes:
            hits += i in largest(route.scores.tolist(), chosen_per_token)
            probability = probability + route.scores[i] / route.scores.sum()  # eq 19
        f_i = experts / (chosen_per_token * length) * hits  # eq 18
        p_i = probability / length  # eq 20
        total = total + f_i * p_i
    return total


def updated_bias(bias: list[float], counts: list[int], rate: float) -> list[float]:
    """Bias after one step (section 2.1.2): up if the expert got less than the mean, else down."""
    mean = sum(counts) / len(counts)
    moved = []
    for value, count in zip(bias, counts, strict=True):
        if count < mean:
            moved.append(value + rate)
        elif count > mean:
            moved.append(value - rate)
        else:
            moved.append(value)
    return moved


def expert_counts(cfg: ModelConfig, routes: list[Route]) -> list[int]:
    """How many of these tokens chose each expert."""
    counts = [0] * cfg.n_routed_experts
    for route in routes:
        for i in route.chosen:
            counts[i] += 1
    return counts


# -- the model -------------------------------------------------------------------------------------


def sequence_logits(state: State, cfg: ModelConfig, sequence: Sequence) -> Tensor:
    """Logits of the next token, (S, V)."""
    hidden, _ = transformer(state, cfg, sequence)
    return torch.stack([head(state, h_D) for h_D in hidden])


def transformer(state: State, cfg: ModelConfig, sequence: Sequence) -> tuple[Vectors, Routes]:
    """Hidden state of every token after the final norm, and what every MoE layer routed."""
    hidden = [state["embed.weight"][token] for token in sequence.tokens]
    routes: Routes = []
    for layer in range(cfg.num_hidden_layers):
        hidden, layer_routes = block(state, f"layers.{layer}.", cfg, hidden, sequence, layer)
        routes += layer_routes
    return [rms_norm(h_D, state["norm.weight"], cfg) for h_D in hidden], routes


def head(state: State, h_D: Tensor) -> Tensor:
    return state["head.weight"] @ h_D


def mtp_module(
    state: State, cfg: ModelConfig, sequence: Sequence, previous: Vectors, depth: int
) -> tuple[Vectors, Routes]:
    """Depth-k prediction (eq 21-23); the embedding comes first, as in the released weights."""
    prefix = f"mtp.{depth - 1}."
    joined = []
    for i in range(len(sequence.tokens)):
        seen = sees(sequence, i, i + depth) and sequence.is_real[i + depth]
        ahead = sequence.tokens[i + depth] if seen else 0
        embedding_D = rms_norm(state["embed.weight"][ahead], state[prefix + "enorm.weight"], cfg)
        hidden_D = rms_norm(previous[i], state[prefix + "hnorm.weight"], cfg)
        joined.append(state[prefix + "eh_proj.weight"] @ torch.cat([embedding_D, hidden_D]))
    layer = cfg.num_hidden_layers + depth - 1
    hidden, routes = block(state, prefix + "block.", cfg, joined, sequence, layer)
    return [rms_norm(h_D, state[prefix + "norm.weight"], cfg) for h_D in hidden], routes


def mtp_labels(sequence: Sequence, depth: int) -> list[int]:
    """Label of position i at depth k: labels[i + k], where there is such a position."""
    return [
        sequence.labels[i + depth] if sees(sequence, i, i + depth) else IGNORED
        for i in range(len(sequence.tokens))
    ]


def sees(sequence: Sequence, i: int, ahead: int) -> bool:
    """True if position ``ahead`` exists and belongs to the document of position i."""
    if ahead >= len(sequence.tokens):
        return False
    return sequence.documents is None or sequence.documents[i] == sequence.documents[ahead]


def block(
    state: State, prefix: str, cfg: ModelConfig, x: Vectors, sequence: Sequence, layer: int
) -> tuple[Vectors, Routes]:
    """Pre-norm residual block; the first ``first_k_dense_replace`` layers have no experts."""
    normed = [rms_norm(x_D, state[prefix + "attn_norm.weight"], cfg) for x_D in x]
    attended = attention(state, prefix + "attn.", cfg, normed, sequence)
    x = [x_D + a_D for x_D, a_D in zip(x, attended, strict=True)]

    normed = [rms_norm(x_D, state[prefix + "ffn_norm.weight"], cfg) for x_D in x]
    if layer < cfg.first_k_dense_replace:
        fed = [swiglu(state, prefix + "ffn.", x_D) for x_D in normed]
        routes: Routes = []
    else:
        fed, layer_routes = mixture_of_experts(state, prefix + "ffn.", cfg, normed)
        routes = [layer_routes]
    return [x_D + f_D for x_D, f_D in zip(x, fed, strict=True)], routes


def rms_norm(x_D: Tensor, weight_D: Tensor, cfg: ModelConfig) -> Tensor:
    mean_square = (x_D * x_D).sum() / len(x_D)
    return x_D / torch.sqrt(mean_square + cfg.rms_norm_eps) * weight_D


def swiglu(state: State, prefix: str, x_D: Tensor) -> Tensor:
    gate = state[prefix + "w1.weight"] @ x_D
    up = state[prefix + "w3.weight"] @ x_D
    return state[prefix + "w2.weight"] @ (silu(gate) * up)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


# -- multi-head latent attention (section 2.1.1) ---------------------------------------------------


def attention(
    state: State, prefix: str, cfg: ModelConfig, x: Vectors, sequence: Sequence
) -> Vectors:
    """MLA in its expanded form, causal and within one document."""
    nope, rope, value = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    length = len(x)
    positions = list(range(length)) if sequence.positions is None else sequence.positions
    documents = [0] * length if sequence.documents is None else sequence.documents

    queries, keys, values = [], [], []  # per token, per head
    for x_D, position in zip(x, positions, strict=True):
        # eq 1-5: one latent and one rotary key per token, expanded to keys and values per head
        compressed = state[prefix + "wkv_a.weight"] @ x_D
        latent_C = rms_norm(compressed[: cfg.kv_lora_rank], state[prefix + "kv_norm.weight"], cfg)
        rotary_key = rotate(compressed[cfg.kv_lora_rank :], position, cfg)
        expanded = state[prefix + "wkv_b.weight"] @ latent_C

        # eq 6-9: the query, through its own latent if it has one
        if cfg.q_lora_rank is None:
            query = state[prefix + "wq.weight"] @ x_D
        else:
            latent = state[prefix + "wq_a.weight"] @ x_D
            latent = rms_norm(latent, state[prefix + "q_norm.weight"], cfg)
            query = state[prefix + "wq_b.weight"] @ latent

        token_queries, token_keys, token_values = [], [], []
        for n in range(cfg.num_attention_heads):
            q_H = query[n * (nope + rope) : (n + 1) * (nope + rope)]
            token_queries.append(torch.cat([q_H[:nope], rotate(q_H[nope:], position, cfg)]))
            kv_H = expanded[n * (nope + value) : (n + 1) * (nope + value)]
            token_keys.append(torch.cat([kv_H[:nope], rotary_key]))
            token_values.append(kv_H[nope:])
        queries.append(token_queries)
        keys.append(token_keys)
        values.append(token_values)

    outputs = []
    for t in range(length):
        visible = [j for j in range(t + 1) if documents[j] == documents[t]]
        heads = []
        for n in range(cfg.num_attention_heads):
            # eq 10
            scores = [softmax_scale(cfg) * torch.dot(queries[t][n], keys[j][n]) for j in visible]
            shares = torch.softmax(torch.stack(scores), 0)
            mixed = zero()
            for share, j in zip(shares, visible, strict=True):
                mixed = mixed + share * values[j][n]
            heads.append(mixed)
        outputs.append(state[prefix + "wo.weight"] @ torch.cat(heads))  # eq 11
    return outputs


def softmax_scale(cfg: ModelConfig) -> float:
    """1 / sqrt(head dim), times yarn_mscale(factor, mscale_all_dim) squared under YaRN."""
    scale = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5
    scaling = cfg.rope_scaling
    if scaling is not None and scaling.mscale_all_dim != 0:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def rotate(x_R: Tensor, position: int, cfg: ModelConfig) -> Tensor:
    """RoPE on neighbouring pairs: (x0, x1) turns by the first frequency, (x2, x3) by the next."""
    amplitude = 1.0
    if cfg.rope_scaling is not None:
        scaling = cfg.rope_scaling
        amplitude = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    turned = []
    for pair in range(len(x_R) // 2):
        angle = position * rope_frequency(pair, cfg)
        cos, sin = amplitude * math.cos(angle), amplitude * math.sin(angle)
        a, b = x_R[2 * pair], x_R[2 * pair + 1]
        turned += [a * cos - b * sin, a * sin + b * cos]
    return torch.stack(turned)


def rope_frequency(pair: int, cfg: ModelConfig) -> float:
    """Radians per position of one pair, blended by YaRN between as-is and divided by factor."""
    dims = cfg.qk_rope_head_dim
    plain = cfg.rope_theta ** (-2 * pair / dims)
    scaling = cfg.rope_scaling
    if scaling is None:
        return plain

    def pair_with(rotations: float) -> float:
        """The (fractional) pair that turns this often over the original context."""
        wavelength = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dims * math.log(wavelength) / (2 * math.log(cfg.rope_theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), dims - 1)
    width = high - low if high != low else 0.001  # as released: a step instead of 0 / 0
    interpolated = min(max((pair - low) / width, 0.0), 1.0)
    return plain / scaling.factor * interpolated + plain * (1 - interpolated)


def yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


# -- DeepSeekMoE (section 2.1.2) -------------------------------------------------------------------


def mixture_of_experts(
    state: State, prefix: str, cfg: ModelConfig, x: Vectors
) -> tuple[Vectors, list[Route]]:
    """Shared expert plus the weighted routed experts of every token (eq 12)."""
    outputs, routes = [], []
    for x_D in x:
        route = router(state, prefix + "gate.", cfg, x_D)
        out_D = torch.zeros_like(x_D)
        for i, weight in zip(route.chosen, route.weights, strict=True):
            gate = state[prefix + "experts.w1"][i] @ x_D
            up = state[prefix + "experts.w3"][i] @ x_D
            out_D = out_D + weight * (state[prefix + "experts.w2"][i] @ (silu(gate) * up))
        if cfg.n_shared_experts > 0:
            out_D = out_D + swiglu(state, prefix + "shared_experts.", x_D)
        outputs.append(out_D)
        routes.append(route)
    return outputs, routes


def router(state: State, prefix: str, cfg: ModelConfig, x_D: Tensor) -> Route:
    """Scores of eq 15, choice of eq 14 and 16 (within the best groups), weights of eq 13."""
    logits_E = state[prefix + "weight"] @ x_D
    scores_E = torch.sigmoid(logits_E)
    if cfg.scoring_func == "softmax":
        scores_E = torch.softmax(logits_E, 0)

    # The bias chooses but does not weigh.
    preference = scores_E.tolist()
    if cfg.topk_method == "noaux_tc":
        bias = state[prefix + "bias"].tolist()
        preference = [score + b for score, b in zip(preference, bias, strict=True)]

    if cfg.topk_method != "greedy":
        size = cfg.n_routed_experts // cfg.n_group
        best_of_group = 2 if cfg.topk_method == "noaux_tc" else 1
        group_scores = []
        for group in range(cfg.n_group):
            members = sorted(preference[group * size : (group + 1) * size], reverse=True)
            group_scores.append(sum(members[:best_of_group]))
        allowed = largest(group_scores, cfg.topk_group)
        # -inf and not 0: a biased score may be negative.
        preference = [
            value if i // size in allowed else -math.inf for i, value in enumerate(preference)
        ]

    chosen = largest(preference, cfg.num_experts_per_tok)
    weights = [scores_E[i] for i in chosen]
    if cfg.norm_topk_prob:
        denominator = sum(weights, zero()) + 1e-20
        weights = [weight / denominator for weight in weights]
    weights = [weight * cfg.routed_scaling_factor for weight in weights]
    return Route(logits_E, scores_E, chosen, weights)


def largest(values: list[float], count: int) -> list[int]:
    """Indices of the ``count`` largest values, the largest first."""
    return sorted(range(len(values)), key=lambda i: values[i], reverse=True)[:count]


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)
