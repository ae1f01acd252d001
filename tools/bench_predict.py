"""Measures images/s of `dpkd predict` on a CPU: the whole command, decoding alone, and the network by torch and ONNX.

    python -m tools.bench_predict --export runs/quickstart/export/conv --photos data/miniimagenet_dev/novel

The parts follow one another in each round, so that other work on the machine meets all of them; medians over rounds.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image

import dpkd
from dpkd.data.images import decode_image
from dpkd.evaluation.exported import Exported
from dpkd.verbs.predict import BATCH_SIZE, list_images


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True, help="exported student with model.onnx")
    parser.add_argument("--photos", type=Path, required=True, help="folder of images")
    options, rounds = parser.parse_args(arguments), 5
    files, exported = list_images(options.photos)[:1024], Exported(options.export)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(options.export / "model.onnx"), settings)
    layout: Any = {"memory_format": torch.channels_last}
    rows, last = exported.model, copy.deepcopy(exported.model).to(**layout)
    pixels = [decode_image(Path(file).read_bytes()) for file in files]
    batches = torch.stack([exported.transform(Image.fromarray(image_HWC)) for image_HWC in pixels]).split(BATCH_SIZE)
    parts: dict[str, Callable[[], list[Any]]] = {
        "network, torch": lambda: [rows(batch) for batch in batches],
        "network, torch, channels last": lambda: [last(batch.to(**layout)) for batch in batches],
        "network, ONNX": lambda: [session.run(["logits"], {"image": batch.numpy()})[0] for batch in batches],
        "decoding, one thread": lambda: [decode_image(Path(file).read_bytes()) for file in files],
        "preprocessing, one thread": lambda: [exported.transform(Image.fromarray(image_HWC)) for image_HWC in pixels],
        "dpkd.predict": lambda: [dpkd.predict(options.export, files)],
    }
    torch_NK, last_NK, onnx_NK = (np.concatenate(part()) for part in list(parts.values())[:3])
    shares = [f"{np.abs(other - torch_NK).max() / np.abs(torch_NK).max():.1g}" for other in (last_NK, onnx_NK)]
    print(f"logits differ by {shares[0]} (channels last) and {shares[1]} (ONNX) of the largest")
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for name, part in list(parts.items()) * rounds:
        began = time.perf_counter()
        part()
        seconds[name].append(time.perf_counter() - began)
    print("\n".join(f"{name}: {len(files) / median(times):,.0f} images/s" for name, times in seconds.items()))


if __name__ == "__main__":
    main()
