"""Peaks that are known, and none that are guessed."""

import pytest
import torch

from ossature.train.devices import memory_bytes, peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200", "fp32", 66.9),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA GB200", "bf16", 2500.0),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312.0),
        ("Tesla T4", "fp16", 65.0),
    ],
)
def test_the_peak_belongs_to_the_device_and_to_the_dtype(name, precision, teraflops):
    assert peak_flops(name, precision) == teraflops * 1e12


@pytest.mark.parametrize(
    ("name", "precision"), [("CPU", "fp32"), ("Unheard-of 9000", "bf16"), ("Tesla T4", "bf16")]
)
def test_there_is_no_peak_where_none_is_known(name, precision):
    assert peak_flops(name, precision) is None


def test_memory_is_that_of_this_process():
    before = memory_bytes(torch.device("cpu"))
    block = torch.ones(64 * 2**20 // 4)
    assert memory_bytes(torch.device("cpu")) - before > 0.8 * block.nbytes
