"""Segmentation in the evaluation and in the export: masks of a split measured image by image, and the head's files.

    export/<student>/
      segmentation.safetensors   the weights of the head, as `dpkd.evaluation.segmenter` names them
      segmentation.json          {"classes", "layers", "groups", "size", "mean", "std", "tile"}

Axes: B image of a batch, H W pixels, K class, N image.
"""

import inspect
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpkd.data.images import decode_image, decode_mask, encode_png
from dpkd.data.masks import classes_of, masked_samples
from dpkd.data.settings import MaskSettings
from dpkd.data.shards import Split
from dpkd.errors import UserError
from dpkd.evaluation.masks import Agreement, class_figures, compare_masks, mask_scores
from dpkd.evaluation.segmenter import Segmenter, segment
from dpkd.io import storage
from dpkd.launch.heartbeat import pulse
from dpkd.log import Progress
from dpkd.models.backbone import LAYER
from dpkd.models.network import GROUPS, Network
from dpkd.models.onnx_file import difference_of
from dpkd.report.pictures import Picture, contact_sheet
from dpkd.stages.run import Run

HEAD = "segmentation"
EXAMPLES = "masks-"
"""The start of the names of pictures of examples, one a split, in the run folder."""
NUM_EXAMPLES = 4
COLOURS = np.random.default_rng(5).integers(40, 255, (256, 3), np.uint8)
"""The colours of classes from 2 on in pictures; class 0 is black and class 1 white."""
COLOURS[:2] = ((0,), (255,))
USE = """
## Masks

The head gives each pixel one of the classes {classes}. This code needs timm, torch, NumPy and safetensors:

```python
{source}

if __name__ == "__main__":
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
    segmenter = Segmenter("{name}")
    mask = segmenter.segment(np.asarray(image))
    print({{name: (mask == number).mean() for number, name in enumerate(segmenter.settings["classes"])}})
```

An image is cut into square tiles, which are resized to {size} x {size}. The output `segmentation` of `model.onnx`, if
it is there, has the logits of a tile at the stride of the finest layer.
"""
"""Part of the model card."""
WRONG = (255, 60, 0)
TOLERANCE = 1e-4


def masked_splits(run: Run) -> dict[str, NDArray[np.int64]]:
    """The samples with a usable mask of each evaluated split that has some, if a network of the run segments."""
    if run.data.masks is None or not any(HEAD in each.needs().heads for each in run.settings.objectives.values()):
        return {}
    splits = [run.dataset.split(name) for name in run.data.evaluated_splits]
    found = {each.name: masked_samples(each, unusable=run.unusable_masks(each.name)) for each in splits}
    return {name: np.flatnonzero(masked_N) for name, masked_N in found.items() if masked_N.any()}


def measure_masks(
    run: Run, networks: Mapping[str, Network], split: Split, *, indices: NDArray[np.int64]
) -> tuple[dict[str, dict[str, NDArray[np.float64]]], dict[str, Any]]:
    """By network that segments, the scores of the images and the figures of the classes.

    Every rank calls it and measures its share of the samples `indices`; all get the figures. Rank 0 draws examples.
    """
    masks, world = run.data.masks, run.world
    assert masks is not None, "only due if there are masks"
    segmenters = {name: network for name, network in networks.items() if HEAD in network.spec.heads}
    rows: dict[str, list[Agreement]] = {name: [] for name in segmenters}
    pictures: list[list[tuple[str, Picture]]] = []
    with Progress(f"masks of {split.name}", len(indices), shown=world.rank == 0) as progress:
        for i in indices[world.rank :: world.size].tolist():
            sample = split.read(i)
            image_HW3, true_HW = decode_image(sample.image), classes_of(decode_mask(sample.given["mask"]), masks)
            shown = [("image", image_HW3), ("true mask", COLOURS[true_HW])]
            for name, network in segmenters.items():
                predicted_HW = segment_with(network, image_HW3, tile=masks.tile)
                rows[name].append(compare_masks(predicted_HW, true_HW, num_classes=len(masks.names)))
                if name.startswith("students."):
                    wrong_HW = (predicted_HW != true_HW) & (true_HW >= 0)
                    error = np.where(wrong_HW[:, :, None], np.array(WRONG, np.uint8), image_HW3 // 2)
                    title = name.removeprefix("students.")
                    shown += [(title, COLOURS[predicted_HW]), (f"{title}: wrong", error)]
            if len(pictures) < NUM_EXAMPLES:
                pictures.append(shown)
            pulse()
            progress.advance(world.size)
    all_rows: dict[str, list[Agreement]] = defaultdict(list)
    for of_rank in world.gather(rows):
        for name, part in of_rank.items():
            all_rows[name] += part
    outlined = range(len(masks.names)) if masks.kind == "classes" else [1]
    scores = {name: mask_scores(part, outlined=outlined) for name, part in all_rows.items()}
    figures = {name: class_figures(part, masks.names) for name, part in all_rows.items()}
    if world.rank == 0:
        picture = encode_png(contact_sheet(pictures))
        storage.write_bytes_atomic(run.folder.path / f"{EXAMPLES}{split.name}.png", picture)
    return scores, figures


def segment_with(network: Network, image_HW3: Picture, *, tile: int | None) -> NDArray[np.uint8]:
    """The class of each pixel by a network of this run, as its export gives it."""
    device, spec = next(network.parameters()).device, network.spec

    def head(image_BCHW: Tensor) -> Tensor:
        return network(image_BCHW.to(device), torch.ones(len(image_BCHW), 1, 1, 1, device=device))[HEAD]

    return segment(head, image_HW3, size=spec.image_size, mean=spec.mean, std=spec.std, tile=tile)


def head_card(name: str, network: Network, masks: MaskSettings) -> str:
    """The part of the model card on masks, with the code that makes them."""
    source = Path(inspect.getfile(Segmenter)).read_text().strip()
    return USE.format(classes=", ".join(masks.names), source=source, name=name, size=network.spec.image_size)


def write_head(folder: Path, network: Network, masks: MaskSettings) -> None:
    """Writes the head beside the timm model in `folder`; raises `UserError` if they give other logits together."""
    spec, head = network.spec, network.heads[HEAD]
    tensors = {name.replace(".", "_"): tensor.contiguous().clone() for name, tensor in head.state_dict().items()}
    (folder / "segmentation.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    hidden = spec.heads[HEAD].hidden or 1
    settings = {
        "classes": list(masks.names),
        "layers": [int(name.removeprefix(LAYER)) for name in network.reads[HEAD]],
        "groups": int(np.gcd(GROUPS, hidden)),
        "size": spec.image_size,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "tile": masks.tile,
    }
    (folder / "segmentation.json").write_text(json.dumps(settings, indent=2) + "\n")
    image_B3HW = torch.from_numpy(
        np.random.default_rng(0).standard_normal((2, 3, spec.image_size, spec.image_size), np.float32)
    )
    with torch.inference_mode():
        expected = network(image_B3HW, torch.ones(2, 1, 1, 1))[HEAD]
        difference = difference_of(Segmenter(folder)(image_B3HW), expected)
    if difference > TOLERANCE:
        raise UserError(
            f"model {spec.model.name!r} cannot be exported with its segmentation head: its logits differ by "
            f"{difference:.2g} of the largest"
        )
