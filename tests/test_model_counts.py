"""The arithmetic of the planner against the model itself, built on the meta device."""

import pytest
import torch
from omegaconf import OmegaConf

from deepseek.config import load_config, shipped_configs
from deepseek.config.cost import count_parameters
from deepseek.models.transformer import Transformer


@pytest.mark.parametrize("name", shipped_configs())
def test_counts_equal_the_built_model(name: str) -> None:
    config = OmegaConf.to_object(load_config(name)).model
    with torch.device("meta"):
        model = Transformer(config)
    counts = count_parameters(config)
    main = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("mtp."))
    mtp = sum(p.numel() for p in model.mtp.parameters())
    assert (main, mtp) == (counts.total, counts.mtp)
    if name == "deepseek_v3_671b":
        assert main == 671_026_404_352
