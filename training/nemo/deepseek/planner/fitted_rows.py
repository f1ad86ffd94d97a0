"""Published runs that the constants of ``layer_time.FITTED`` were fitted to, by their source."""

FITTED_ROWS: dict[str, tuple[str, ...]] = {
    "arXiv:2505.09343 Table 4; layout arXiv:2412.19437 s3.2; GBS s4.2": (
        "DeepSeek-V3 production layout, MPFT",
    ),
    "arXiv:2505.09343 Table 4": ("DeepSeek-V3 production layout, MRFT",),
    "arXiv:2412.19437 s1 Table 1, s4.2": ("DeepSeek-V3 tech-report aggregate",),
    "arXiv:2603.07685 Table 11 + Table 20 (layout)": (
        "Megatron-Core MoE V3 GB300 MXFP8",
        "Megatron-Core MoE V3 GB200 MXFP8",
        "Megatron-Core MoE Qwen3-235B GB300 MXFP8",
        "Megatron-Core MoE Qwen3-235B GB200 MXFP8",
        "Megatron-Core MoE Qwen3-235B H100 BF16",
        "Megatron-Core MoE Qwen3-235B GB300 131K context",
    ),
    "arXiv:2603.07685 Table 11 + Table 20 (layout); Table 17": (
        "Megatron-Core MoE V3 H100 FP8-blockwise",
    ),
    "Megatron-Bridge@067f987 docs/performance-summary.md (26.08)": (
        "MBridge 26.08 DeepSeek-V3 GB300 MXFP8 GBS4096",
        "MBridge 26.08 DeepSeek-V3 GB200 MXFP8 GBS4096",
    ),
    "Megatron-Bridge@067f987 docs/performance-summary-archive.md (26.06.01)": (
        "MBridge 26.06.01 DeepSeek-V3 GB300 MXFP8 GBS4096",
        "MBridge 26.06.01 DeepSeek-V3 GB200 MXFP8 GBS4096",
    ),
    "Megatron-Bridge@067f987 docs/performance-summary-archive.md (26.04.01)": (
        "MBridge 26.04.01 DeepSeek-V3 GB300 MXFP8 GBS4096",
        "MBridge 26.04.01 DeepSeek-V3 GB200 MXFP8 GBS4096",
        "MBridge 26.04.01 Kimi-K2 GB300 MXFP8 GBS4096",
        "MBridge 26.04.01 Qwen3-235B-A22B H100 FP8-current-scaling GBS8192",
    ),
    "Megatron-Bridge@067f987 docs/performance-summary-archive.md (26.04)": (
        "MBridge 26.04 DeepSeek-V3 GB300 MXFP8 GBS4096",
        "MBridge 26.04 DeepSeek-V3 GB200 MXFP8 GBS4096",
        "MBridge 26.04 DeepSeek-V3 B300 MXFP8 GBS4096",
        "MBridge 26.04 DeepSeek-V3 B200 MXFP8 GBS4096",
        "MBridge 26.04 Kimi-K2 GB300 MXFP8 GBS4096",
    ),
    "Megatron-Bridge@067f987 docs/performance-summary-archive.md (26.02.01)": (
        "MBridge 26.02.01 DeepSeek-V3 GB300 MXFP8 GBS4096",
        "MBridge 26.02.01 DeepSeek-V3 GB200 MXFP8 GBS4096",
        "MBridge 26.02.01 DeepSeek-V3 B300 MXFP8 GBS4096",
        "MBridge 26.02.01 DeepSeek-V3 B200 MXFP8 GBS4096",
        "MBridge 26.02.01 Kimi-K2 GB300 MXFP8 GBS4096",
    ),
    "Megatron-Bridge@067f987 docs/performance-summary-archive.md (26.02)": (
        "MBridge 26.02 DeepSeek-V3 GB300 MXFP8 GBS4096",
        "MBridge 26.02 DeepSeek-V3 GB200 MXFP8 GBS4096",
        "MBridge 26.02 DeepSeek-V3 B300 MXFP8 GBS4096",
        "MBridge 26.02 DeepSeek-V3 B200 MXFP8 GBS4096",
    ),
    "Megatron-Bridge@067f987 docs/performance-summary-archive.md (25.11)": (
        "MBridge 25.11 DeepSeek-V3 GB300 MXFP8 GBS4096",
        "MBridge 25.11 DeepSeek-V3 GB200 BF16 GBS4096",
        "MBridge 25.11 DeepSeek-V3 B200 MXFP8 GBS2048",
        "MBridge 25.11 Qwen3-235B-A22B GB300 BF16 GBS8192",
        "MBridge 25.11 Qwen3-235B-A22B GB200 BF16 GBS8192",
        "MBridge 25.11 Qwen3-235B-A22B H100 FP8-current-scaling GBS2048",
    ),
    "Megatron-Bridge@067f987 docs/performance-summary-archive.md (25.09)": (
        "MBridge 25.09 DeepSeek-V3 GB200 FP8-current-scaling GBS2048",
        "MBridge 25.09 DeepSeek-V3 B200 FP8-current-scaling GBS2048",
        "MBridge 25.09 DeepSeek-V3 B200 MXFP8 GBS2048 MX",
        "MBridge 25.09 DeepSeek-V3 H100 FP8-current-scaling GBS8192",
    ),
    "Megatron-Bridge@067f987 examples/model_verification_cards/<model>/card.yaml": (
        "MBridge card V3 GB200 MXFP8",
    ),
    "Megatron-Bridge@067f987 skills/nemo-mbridge-perf-moe-optimization-workflow/SKILL.md": (
        "MBridge perf-skill Qwen3-30B-A3B H100 BF16",
    ),
    "Automodel@36044ad docs/performance-summary.mdx": (
        "Automodel V3 1024xH100",
        "Automodel Qwen3-30B 8xH100",
    ),
    "github.com/MooreThreads/SimuMax@4dcaae5 docs/b200/b200_release_v1.2_summary.json": (
        "SimuMax V3-4L EP8 PP1 mbc4",
        "SimuMax V3-4L EP8 PP1 mbc32",
        "SimuMax V3-4L EP4 PP2 mbc4",
        "SimuMax V3-4L EP4 PP2 mbc32",
        "SimuMax V2-4L EP8 PP1 mbc4",
        "SimuMax V2-4L EP8 PP1 mbc8",
        "SimuMax V2-4L EP8 PP1 mbc32",
        "SimuMax V2-4L EP4 PP2 mbc4",
        "SimuMax V2-4L EP4 PP2 mbc8",
        "SimuMax V2-4L EP4 PP2 mbc32",
    ),
}
