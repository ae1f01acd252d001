"""A timm folder as plain timm loads it: outputs of images, another classifier, a short fine-tune.

Axes: B image, C channel, H W height and width, V view (the first is the plain one), D embedding, K class, S shot.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.torch
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dpkd.data.augment import random_views
from dpkd.data.settings import AugmentSettings, Window
from dpkd.errors import UserError
from dpkd.evaluation.adaptation import Floats, Head, Integers
from dpkd.models.onnx_file import difference_of, write_module

OF_CLASSES = ("label_descriptions", "problem_type")
"""Keys of `config.json` that do not hold for new classes."""
NUM_VIEWS = 9
"""Views of a shot: the plain one, and random crops."""
CROPS = AugmentSettings(crop_scale=(0.4, 1.0), crop_ratio=(1.0, 1.0), brightness=0, contrast=0, saturation=0)
STEPS, BATCH_SIZE, LEARNING_RATE = 80, 32, 1e-3
"""Of the fine-tune."""
TOLERANCE, ONNX_TOLERANCE = 1e-5, 1e-3
MULTI_LABEL = "multi_label_classification"
"""Value of `problem_type` in `config.json` where an image may have several labels, as Hugging Face has it."""


class Exported(nn.Module):
    """A timm model in evaluation mode, and its preprocessing."""

    model: Any

    def __init__(self, folder: Path) -> None:
        """Loads the folder; raises `UserError` if timm cannot."""
        super().__init__()
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json: give a folder that `dpkd export` has written")
        try:
            self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
            self.model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        except Exception as error:  # timm, safetensors and torch raise many kinds for a damaged folder
            raise UserError(f"{folder} cannot be loaded by timm ({str(error)[:300]}): export it again") from error
        preprocessing = resolve_data_config({}, model=self.model)
        self.size: int = preprocessing["input_size"][-1]
        self.transform = create_transform(**preprocessing, is_training=False)
        names = self.model.pretrained_cfg.get("label_names") or range(self.model.num_classes)
        self.classes = tuple(str(name) for name in names)[: self.model.num_classes]
        self.window = window_of(folder)
        self.multi_label = self.config.get("problem_type") == MULTI_LABEL
        self.eval()

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding BD, and the logits BK of a linear classifier on it, of normalised images."""
        embedding_BD = self.embedding(image_BCHW)
        return embedding_BD, self.model.get_classifier()(embedding_BD)

    def embedding(self, image_BCHW: Tensor) -> Tensor:
        """The embedding BD, of any model."""
        return self.model.forward_head(self.model.forward_features(image_BCHW), pre_logits=True)

    def example(self, batch_size: int) -> Tensor:
        """Random normalised images, the same in every call."""
        shape = (batch_size, 3, self.size, self.size)
        return torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))

    def views(self, image_HWC: NDArray[np.uint8], *, seed: int, index: int) -> Tensor:
        """The image by timm's preprocessing, and random square crops of it, half of them flipped; VCHW."""
        parts = [image_HWC]
        for view in random_views([CROPS] * (NUM_VIEWS - 1), image_HWC.shape[:2], seed=seed, epoch=0, index=index):
            part_HWC = image_HWC[view.top : view.top + view.height, view.left : view.left + view.width]
            parts.append(np.ascontiguousarray(part_HWC[:, ::-1] if view.flip else part_HWC))
        return torch.stack([self.transform(Image.fromarray(part_HWC)) for part_HWC in parts])

    @torch.inference_mode()
    def embed(self, image_BCHW: Tensor) -> Floats:
        """The embeddings, BD in float64."""
        return self.embedding(image_BCHW).double().numpy()

    def with_head(self, head: Head) -> Self:
        """A copy with this classifier."""
        other = copy.deepcopy(self)
        other.model.reset_classifier(len(head.bias_K))
        weight, bias = torch.from_numpy(head.weight_KD), torch.from_numpy(head.bias_K)
        other.model.get_classifier().load_state_dict({"weight": weight, "bias": bias})
        return other

    def fine_tuned(self, view_SVCHW: Tensor, label_S: Integers, *, seed: int) -> Self:
        """A copy whose whole network has followed `STEPS` batches of random views, as many of each class.

        AdamW with a rate that falls to 0; batch norm and dropout as in use. The same bits for the same seed.
        """
        other = copy.deepcopy(self)
        optimizer = torch.optim.AdamW(other.parameters(), lr=LEARNING_RATE, weight_decay=0)
        rng = np.random.Generator(np.random.Philox(seed))
        members = [np.flatnonzero(label_S == label) for label in range(label_S.max() + 1)]
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / STEPS)
            label_B = rng.permutation(BATCH_SIZE * len(members))[:BATCH_SIZE] % len(members)
            shot_B = np.array([rng.choice(members[label]) for label in label_B])
            image_BCHW = view_SVCHW[shot_B, rng.integers(0, NUM_VIEWS, BATCH_SIZE)].float()
            optimizer.zero_grad()
            cross_entropy(other(image_BCHW)[1], torch.from_numpy(label_B)).backward()
            optimizer.step()
        return other

    def write(self, folder: Path, classes: Sequence[str], *, onnx: bool) -> None:
        """Writes the timm folder and ONNX, and checks both."""
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.model.state_dict().items()}
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        count, config = len(classes), {key: self.config[key] for key in self.config if key not in OF_CLASSES}
        config |= {"num_classes": count, "label_names": list(classes)}
        config["pretrained_cfg"] = config.get("pretrained_cfg", {}) | {"num_classes": count}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        with torch.inference_mode():
            difference = difference_of(Exported(folder).model(self.example(2)), self(self.example(2))[1])
        if difference > TOLERANCE:
            raise UserError(f"{self.folder}: its logits are not those of one linear layer on the embedding")
        if onnx:
            names = ["image"], ["embedding", "logits"]
            path = folder / "model.onnx"
            write_module(path, self, lambda count: (self.example(count),), names=names, tolerance=ONNX_TOLERANCE)


def window_of(folder: Path) -> Window | None:
    """The window by which images of more than 8 bits became inputs of an exported model."""
    window = json.loads((folder / "config.json").read_text()).get("window")
    return None if window is None else Window(**window)
