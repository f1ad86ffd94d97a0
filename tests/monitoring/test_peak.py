"""The denominator of MFU: configured, of a data sheet, or measured; never guessed."""

import pytest
import torch

from deepseek.monitoring.record import peak as peak_module
from deepseek.monitoring.record.peak import DENSE_BF16_TFLOPS, ROUNDS, SIDE, peak_of

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_a_configured_number_wins() -> None:
    assert peak_of(CPU, 2.5).flops == 2.5e12
    assert peak_of(GPU, 900.0).source == "exp_manager.monitor.peak_tflops"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_known_gpus(monkeypatch: pytest.MonkeyPatch, name: str, key: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_of(GPU, None)
    assert peak.flops == DENSE_BF16_TFLOPS[key] * 1e12
    assert f"data sheet of {key}," in peak.source


def test_an_unknown_gpu_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU 9000")
    peak = peak_of(GPU, None)
    assert peak.flops is None
    assert peak.source == "unknown for Some GPU 9000: set exp_manager.monitor.peak_tflops"


def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 3.0, 10.0, 12.0, *range(20, 20 + 8 * ROUNDS, 4)])
    clock = type("Clock", (), {"perf_counter": staticmethod(lambda: next(ticks))})
    monkeypatch.setattr(peak_module, "time", clock)
    assert peak_of(CPU, None).flops == 2 * SIDE**3 / 2.0  # the best took two seconds


def test_a_measured_peak_is_plausible() -> None:
    flops = peak_of(CPU, None).flops
    assert flops is not None and 1e8 < flops < 1e14
