"""The peak speed of known GPUs, to which the speed of training is compared."""

import torch

PEAK_TFLOPS = {
    "B200": (2250.0, 1125.0),
    "H200 NVL": (835.0, 418.0),
    "H200": (989.0, 495.0),
    "H100 NVL": (835.0, 418.0),
    "H100 PCIe": (756.0, 378.0),
    "H100": (989.0, 495.0),
    "A100": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "L4": (121.0, 60.0),
    "A10": (125.0, 62.5),
    "RTX 6000 Ada": (364.0, 182.0),
    "RTX A6000": (155.0, 77.0),
    "RTX 4090": (165.0, 82.6),
    "RTX 3090": (71.0, 35.6),
}
"""Dense TFLOP/s with fp32 sums from NVIDIA's data sheets, bf16 and tf32, by a part of the device's name.

The first match counts.
"""


def peak_tflops(device: torch.device, *, precision: str) -> float | None:
    """Peak TFLOP/s of a device; fp32 is compared to tf32, the fastest that it could be. None for unknown devices."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), None)
    return None if peaks is None else peaks[0 if precision == "bf16" else 1]
