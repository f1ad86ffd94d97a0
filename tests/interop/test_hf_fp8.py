"""Hugging Face files whose projections are FP8, in and out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deepseek.checkpoint.manager import CheckpointManager
from deepseek.commands.convert import export_hf, import_hf
from deepseek.config.errors import UserError
from deepseek.interop.hf_config import hf_config
from deepseek.interop.huggingface import Layout, from_hf
from deepseek.interop.open_weights import open_checkpoint
from deepseek.ops.fp8 import dequantise_blocks_plainly, quantise_blocks_plainly
from support.hf_folders import (
    assert_equal,
    exported,
    imported,
    quantised,
    small,
    weights,
    write_folder,
    write_tensors,
)


@pytest.mark.parametrize("layout", ["released", "stacked"])
@pytest.mark.parametrize("exponents", [False, True], ids=["fp32", "ue8m0"])
def test_fp8_blocks(tmp_path: Path, layout: Layout, exponents: bool) -> None:
    """Weights and scales in different files, edges that are no whole blocks."""
    cfg = small(hidden_size=24, moe_intermediate_size=10)
    block = (8, 16)
    state = {name: tensor.bfloat16() for name, tensor in weights(cfg).items()}
    theirs = write_folder(tmp_path / "hf", cfg, state, layout=layout)
    (tmp_path / "hf" / "model.safetensors").unlink()
    stored, meant = quantised(theirs, block, exponents)
    assert sum(t.dtype == torch.float8_e4m3fn for t in stored.values()) > 10
    write_tensors(tmp_path / "hf", stored, shards=3)
    quantisation = {"quant_method": "fp8", "weight_block_size": list(block), "fmt": "e4m3"}
    config = hf_config(cfg) | {"quantization_config": quantisation}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    import_hf(tmp_path / "hf", tmp_path / "run")
    wanted = from_hf(meant, cfg)
    assert_equal(imported(tmp_path / "run"), {n: t.float() for n, t in wanted.items()})


@pytest.mark.parametrize("exponents", [False, True], ids=["fp32", "ue8m0"])
def test_what_came_as_fp8_goes_out_as_fp8(tmp_path: Path, exponents: bool) -> None:
    """And means the same, bit by bit; the scales may share factors of two with the numbers."""
    cfg = small(hidden_size=136, moe_intermediate_size=130, num_nextn_predict_layers=1)
    state = {name: tensor.bfloat16().float() for name, tensor in weights(cfg).items()}
    theirs = write_folder(tmp_path / "hf", cfg, state)
    (tmp_path / "hf" / "model.safetensors").unlink()
    stored, meant = quantised(theirs, (128, 128), exponents)
    write_tensors(tmp_path / "hf", stored, shards=3)
    quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = hf_config(cfg) | {"quantization_config": quantisation}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    import_hf(tmp_path / "hf", tmp_path / "one")
    export_hf(tmp_path / "one", tmp_path / "back", dtype="fp8", shard_gb=200e-6)
    out = exported(tmp_path / "back")
    assert {n: t.shape for n, t in out.items()} == {n: t.shape for n, t in stored.items()}
    kinds = {name: tensor.dtype for name, tensor in out.items()}
    for name, tensor in stored.items():
        fp8, bias = tensor.dtype == torch.float8_e4m3fn, name.endswith("correction_bias")
        scale = name.endswith("_scale_inv")
        wanted = torch.bfloat16 if not fp8 else torch.float8_e4m3fn
        assert kinds[name] == (torch.float32 if bias or scale else wanted), name
    described = json.loads((tmp_path / "back" / "config.json").read_text())
    assert described["quantization_config"]["fmt"] == "e4m3"
    assert described["torch_dtype"] == "bfloat16"
    import_hf(tmp_path / "back", tmp_path / "two")
    again = imported(tmp_path / "two")
    assert_equal(again, imported(tmp_path / "one"))
    assert_equal(again, {n: t.float() for n, t in from_hf(meant, cfg).items()})


def test_fp8_export_rounds_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = small(hidden_size=136, num_nextn_predict_layers=1)
    theirs = write_folder(tmp_path / "hf", cfg, weights(cfg))
    import_hf(tmp_path / "hf", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out", dtype="fp8")
    assert "rounded from fp32 to fp8, but for blocks that came from it" in capsys.readouterr().out
    import_hf(tmp_path / "out", tmp_path / "again")
    meant = {}
    for name, tensor in theirs.items():
        if "_proj" in name and "eh_proj" not in name:
            meant[name] = dequantise_blocks_plainly(*quantise_blocks_plainly(tensor))
            assert not torch.equal(meant[name], tensor)
        else:
            meant[name] = tensor if name.endswith("correction_bias") else tensor.bfloat16().float()
    assert_equal(imported(tmp_path / "again"), from_hf(meant, cfg))


def test_fp8_of_what_is_not_finite(tmp_path: Path) -> None:
    cfg = small()
    write_folder(tmp_path / "hf", cfg, weights(cfg))
    import_hf(tmp_path / "hf", tmp_path / "run")
    state = open_checkpoint(tmp_path / "run").checkpoint.state()
    tensors = {f"model.{name}": tensor for name, tensor in weights(cfg).items()}
    tensors["model.layers.1.attn.wo.weight"][0, 0] = torch.inf
    with CheckpointManager(tmp_path / "bad" / "checkpoints") as manager:
        manager.save(1, tensors, state | {"step": 1})
    wanted = r"model\.layers\.1\.attn\.wo\.weight holds numbers that are not finite.*or as bf16"
    with pytest.raises(UserError, match=wanted):
        export_hf(tmp_path / "bad", tmp_path / "new", dtype="fp8")
    assert not (tmp_path / "new").exists()
