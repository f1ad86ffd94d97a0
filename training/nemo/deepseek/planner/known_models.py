"""Sizes of models that published runs are of, by the names that publishers give them.

From the models' ``config.json`` files on Hugging Face and, where no other is named, from their
reports.
"""

from __future__ import annotations

import re
from dataclasses import replace

from deepseek.config import load_config, shipped_configs
from deepseek.config.errors import UserError, nearest
from deepseek.planner.architecture import Architecture


def _latent(
    hidden: int, layers: int, dense: int, heads: int, vocab: int, ffn: tuple[int, int],
    experts: tuple[int, int, int], q_lora: int = 1536, groups: tuple[int, int] = (1, 1),
    mtp: int = 0, head: tuple[int, int] = (192, 128),
) -> Architecture:  # fmt: skip
    """A model with latent attention of 512 dims, 64 of them rotary beside.

    ``ffn`` is the width of a dense block and of an expert, ``experts`` routed, chosen, shared.
    """
    return Architecture(
        hidden, layers, dense, heads, heads, *head, vocab, *ffn, *experts,
        q_lora=q_lora, kv_lora=512, rope_dim=64, groups=groups[0], top_groups=groups[1], mtp=mtp,
    )  # fmt: skip


def _grouped(
    hidden: int, layers: int, heads: tuple[int, int, int], vocab: int, ffn: tuple[int, int],
    experts: tuple[int, int, int] = (0, 0, 0), dense: int = 0, window: int = 0, mtp: int = 0,
) -> Architecture:  # fmt: skip
    """A model with grouped-query attention; ``heads`` are queries, keys and the width of one."""
    queries, keys, width = heads
    return Architecture(
        hidden, layers, dense if experts[0] else layers, queries, keys, width, width, vocab, *ffn,
        *experts, window=window, mtp=mtp,
    )  # fmt: skip


_V3 = _latent(7168, 61, 3, 128, 129280, (18432, 2048), (256, 8, 1), groups=(8, 4), mtp=1)

KNOWN: dict[str, Architecture] = {
    "DeepSeek-V3": _V3,
    "DeepSeek-R1": _V3,
    "DeepSeek-V2-Lite": _latent(2048, 27, 1, 16, 102400, (10944, 1408), (64, 6, 2), 0),
    "DeepSeek-V2": _latent(5120, 60, 1, 128, 102400, (12288, 1536), (160, 6, 2), groups=(8, 3)),
    "Kimi-K2": _latent(7168, 61, 1, 64, 163840, (18432, 2048), (384, 8, 1)),
    "Moonlight-16B-A3B": _latent(2048, 27, 1, 16, 163840, (11264, 1408), (64, 6, 2), 0),
    "GLM-4.7-Flash": _latent(
        2048, 47, 1, 20, 154880, (10240, 1536), (64, 4, 1), 768, head=(256, 256)
    ),
    "GLM-5": _latent(6144, 78, 3, 64, 154880, (12288, 2048), (256, 8, 1), 2048, head=(256, 256)),
    "Pangu-Ultra-MoE": _latent(7680, 61, 3, 128, 153600, (18432, 2048), (256, 8, 1), mtp=1),
    "Qwen3-235B-A22B": _grouped(4096, 94, (64, 4, 128), 151936, (12288, 1536), (128, 8, 0)),
    "Qwen3-30B-A3B": _grouped(2048, 48, (32, 4, 128), 151936, (6144, 768), (128, 8, 0)),
    "Qwen3-Coder-480B-A35B": _grouped(6144, 62, (96, 8, 128), 151936, (8192, 2560), (160, 8, 0)),
    "Qwen3-32B": _grouped(5120, 64, (64, 8, 128), 151936, (25600, 0)),
    "Qwen3-14B": _grouped(5120, 40, (40, 8, 128), 151936, (17408, 0)),
    "Qwen3-8B": _grouped(4096, 36, (32, 8, 128), 151936, (12288, 0)),
    "Qwen2.5-72B": _grouped(8192, 80, (64, 8, 128), 152064, (29568, 0)),
    "Qwen2.5-32B": _grouped(5120, 64, (40, 8, 128), 152064, (27648, 0)),
    "Qwen2-57B-A14B": _grouped(3584, 28, (28, 4, 128), 151936, (18944, 2560), (64, 8, 8)),
    "Mixtral-8x22B": _grouped(6144, 56, (48, 8, 128), 32768, (16384, 16384), (8, 2, 0)),
    "Mixtral-8x7B": _grouped(4096, 32, (32, 8, 128), 32000, (14336, 14336), (8, 2, 0)),
    "Grok-1": _grouped(6144, 64, (48, 8, 128), 131072, (32768, 32768), (8, 2, 0)),
    "DBRX": _grouped(6144, 40, (48, 8, 128), 100352, (10752, 10752), (16, 4, 0)),
    "OLMoE-7B": _grouped(2048, 16, (16, 16, 128), 50304, (1024, 1024), (64, 8, 0)),
    "Phi-3.5-MoE": _grouped(4096, 32, (32, 8, 128), 32064, (6400, 6400), (16, 2, 0)),
    "DeepSeekMoE-16B": _grouped(2048, 28, (16, 16, 128), 102400, (10944, 1408), (64, 6, 2), 1),
    "GPT-OSS-120B": _grouped(2880, 36, (64, 8, 64), 201088, (2880, 2880), (128, 4, 0), window=128),
    "GPT-OSS-20B": _grouped(2880, 24, (64, 8, 64), 201088, (2880, 2880), (32, 4, 0), window=128),
    "GLM-4.5": _grouped(5120, 92, (96, 8, 128), 151552, (12288, 1536), (160, 8, 1), 3, mtp=1),
    "GLM-4.6": _grouped(5120, 92, (96, 8, 128), 151552, (12288, 1536), (160, 8, 1), 3, mtp=1),
    "GLM-4.5-Air": _grouped(4096, 46, (96, 8, 128), 151552, (10944, 1408), (128, 8, 1), 1, mtp=1),
    "dots.llm1": _grouped(4096, 62, (32, 32, 128), 152064, (10944, 1408), (128, 6, 2), 1),
    "ERNIE-4.5-300B-A47B": _grouped(8192, 54, (64, 8, 128), 103424, (28672, 3584), (64, 8, 0), 3),
    "Llama-3-8B": _grouped(4096, 32, (32, 8, 128), 128256, (14336, 0)),
    "Llama-3-70B": _grouped(8192, 80, (64, 8, 128), 128256, (28672, 0)),
    "Llama-3-405B": _grouped(16384, 126, (128, 8, 128), 128256, (53248, 0)),
    "Llama-3.2-1B": _grouped(2048, 16, (32, 8, 64), 128256, (8192, 0)),
    "Llama-3.2-3B": _grouped(3072, 28, (24, 8, 128), 128256, (8192, 0)),
    "Llama-2-7B": _grouped(4096, 32, (32, 32, 128), 32000, (11008, 0)),
    "Llama-2-13B": _grouped(5120, 40, (40, 40, 128), 32000, (13824, 0)),
    "Llama-2-70B": _grouped(8192, 80, (64, 8, 128), 32000, (28672, 0)),
    "Mistral-7B": _grouped(4096, 32, (32, 8, 128), 32000, (14336, 0)),
    # Two matrices of a feed-forward, counted as three of two thirds of their width.
    "GPT-3-175B": _grouped(12288, 96, (96, 96, 128), 51200, (32768, 0)),
    "Nemotron-4-340B": _grouped(18432, 96, (96, 8, 192), 256000, (49152, 0)),
}


OTHER_KINDS = {
    "v4": "compressed attention and hyper-connections",
    "deepseekv32": "an indexer that chooses what attention looks at",
    "qwen3next": "linear attention",
    "llama4": "attention in chunks",
}
"""Names of models that are not what their families are."""


def known_model(text: str) -> Architecture:
    """The sizes of a model of a table, such as ``DeepSeek-V3 671B`` or ``V3 4-layer proxy``.

    A proxy of N layers has one dense block, if its model has any, and no MTP module. A shipped
    configuration is meant by its name.

    Raises:
        UserError: it is not known, or is of another kind; with the nearest name.
    """
    if text in shipped_configs():
        return Architecture.of_model(load_config(text).model)
    plain = _plain(text).replace("qwen3moe", "qwen3")
    for version, what in OTHER_KINDS.items():
        if version in plain:
            raise UserError(f"model {text!r}: it has {what}, not modelled here")
    best = max(
        (name for name in KNOWN if any(part in plain for part in _keys(name))),
        key=lambda name: max(len(part) for part in _keys(name) if part in plain),
        default=None,
    )
    if best is None:
        near = nearest(text, KNOWN, cutoff=0.3)
        hint = f"; the nearest is {near}" if near else ""
        raise UserError(f"model {text!r} is not known{hint}; known are {', '.join(KNOWN)}")
    found = KNOWN[best]
    layers = re.search(r"(\d+)\s*-?\s*(?:layers?\b|l\b)", text.lower())
    if layers and 0 < int(layers[1]) < found.layers:
        found = replace(
            found, layers=int(layers[1]), dense_layers=min(1, found.dense_layers), mtp=0
        )
    return found


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _keys(name: str) -> list[str]:
    """How a name may be written, in full or shorter."""
    plain = _plain(name)
    keys = [plain]
    if not plain.startswith("qwen2"):  # 2.5-7B would read as 2-57B
        keys.append(re.sub(r"a\d+b$", "", plain))
    if plain.startswith("deepseekv") or plain == "deepseekr1":
        keys += [plain.replace("deepseek", "dsv", 1).replace("vv", "v"), plain[8:]]
    if plain.startswith("llama3"):
        keys += [f"llama{v}{plain[6:]}" for v in ("31", "33")]
    if plain.startswith("moonlight"):
        keys.append("moonlight")
    return keys
