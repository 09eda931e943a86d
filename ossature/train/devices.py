"""Peak rates and memory of the device in use."""

from __future__ import annotations

import psutil
import torch

# Dense, without sparsity, from the makers' data sheets: bf16 and fp16, fp32 (no TF32), in TFLOP/s.
# The first name that the device's name contains counts.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500.0, 80.0),
    ("GB300", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("H200", 989.4, 66.9),
    ("H100 PCIe", 756.0, 51.2),
    ("H100 NVL", 835.5, 60.0),
    ("H100", 989.4, 66.9),
    ("A100", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L4", 121.0, 30.3),
    ("A10G", 70.0, 35.0),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
    ("MI300X", 1307.4, 163.4),
)
NO_BF16 = ("V100", "T4")


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s the device reaches at most in this precision; None where that is not known.

    An unknown device has no MFU: somebody else's peak would be a wrong number.
    """
    for name, half, single in PEAKS:
        if name in device_name:
            if precision == "bf16" and name in NO_BF16:
                return None
            return (single if precision == "fp32" else half) * 1e12
    return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def memory_bytes(device: torch.device) -> int:
    """The most that tensors took on the GPU since the last call; on CPU, what the process takes."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    return psutil.Process().memory_info().rss
