"""Any timm model with one interface: a feature map, an embedding, logits.

Axes: B image, C colour, H W height and width (of the image, or of the patch grid), D features, K classes, N tokens.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dpkd.errors import UserError
from dpkd.models.published import fetch_weights
from dpkd.models.settings import ModelSettings

LAYER = "layer-"
"""The output of a layer is named `layer-<index>`, with timm's index of intermediate outputs."""
PYRAMID = "pyramid-"
"""A head on `pyramid-<stride>` reads the last layer of each stride, from this one on."""
OWN_ARGUMENTS = {
    "num_classes": "the classes of data.train",
    "pretrained": "model.pretrained",
    "checkpoint_path": "weights",
    "features_only": "nothing: dpkd reads the last features of any model",
}
"""Arguments of `timm.create_model` that dpkd sets, and their source."""


@dataclass(frozen=True)
class LayerMix:
    """Mixes the features of R rows with those of partners, `share · own + (1 - share) · partner`, after one stage."""

    stage: int
    """Number of a stage of the model, from 1."""
    share_R: Tensor
    partner_R: Tensor
    """Rows, counted from the first of these."""


class Backbone(nn.Module):
    """A timm model as `timm`, with unchanged weights and names, so that its state dict loads into plain timm.

    Raises `UserError` if the model has no grid of patch features, or its logits are not a function of its embedding.
    """

    def __init__(self, settings: ModelSettings, *, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.timm: Any = create_timm_model(settings, num_classes=num_classes, image_size=image_size)
        self.name = settings.name
        self.num_prefix_tokens = int(getattr(self.timm, "num_prefix_tokens", 0))
        self._image_size = image_size
        self._probe(num_classes)

    def features(self, image_BCHW: Tensor) -> Tensor:
        """The model's last features, in the model's layout."""
        return self.timm.forward_features(image_BCHW)

    def features_and_layers(self, image_BCHW: Tensor, outputs: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's last features, and a map BDHW for each `layer-<index>` of the outputs, by name."""
        indices = sorted(int(name.removeprefix(LAYER)) for name in outputs if name.startswith(LAYER))
        if not indices:
            return self.features(image_BCHW), {}
        features, layers = self.timm.forward_intermediates(image_BCHW, indices=indices, output_fmt="NCHW")
        return features, {f"{LAYER}{index}": layer for index, layer in zip(indices, layers, strict=True)}

    def width(self, output: str) -> int:
        """Channels of `embedding`, `patch` or `layer-<index>`; raises `UserError` if the model has no such layer."""
        if not output.startswith(LAYER):
            return self.embedding_dim if output == "embedding" else self.patch_dim
        layers = self.timm.feature_info if hasattr(self.timm, "forward_intermediates") else []
        index = int(output.removeprefix(LAYER))
        if index >= len(layers):
            raise UserError(f"model {self.name!r} has no layer {index}: timm gives {len(layers)}, counted from 0")
        return int(layers[index]["num_chs"])

    def levels(self, reads: str) -> tuple[str, ...]:
        """The outputs that a head reads: itself, or for `pyramid-S` the last layer of each stride from S on."""
        if not reads.startswith(PYRAMID):
            return (reads,)
        self.width(f"{LAYER}0")  # raises for a model without layers
        last_of = {int(layer["reduction"]): number for number, layer in enumerate(self.timm.feature_info)}
        chosen = [number for stride, number in last_of.items() if stride >= int(reads.removeprefix(PYRAMID))]
        if not chosen:
            raise UserError(f"model {self.name!r} has no layer of a stride of {reads.removeprefix(PYRAMID)} pixels")
        return tuple(f"{LAYER}{number}" for number in sorted(chosen))

    def patches(self, features: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The features as a map BDHW: channels first, without prefix tokens, patch tokens on a grid.

        The grid follows the (height, width) of the images, `image_size`.
        """
        if features.ndim == 4:
            return features.permute(0, 3, 1, 2) if self._channels_last else features
        patch_BND = features[:, self.num_prefix_tokens :]
        cells = (round(self.grid[axis] * image_size[axis] / self._image_size) for axis in (0, 1))
        return patch_BND.transpose(1, 2).unflatten(2, tuple(cells))

    def embed(self, features: Tensor) -> Tensor:
        """The pooled features before the classifier, BD."""
        return self.timm.forward_head(features, pre_logits=True)

    @contextmanager
    def mixing(self, mixes: Sequence[tuple[int, LayerMix]]) -> Iterator[None]:
        """Mixes features after a stage of the model, in a forward pass of the body; each mix starts at a row.

        Raises `UserError` if the model has fewer stages.
        """
        hooks = []
        stages = [stage["module"] for stage in getattr(self.timm, "feature_info", [])]
        for first, mix in mixes:
            if mix.stage > len(stages):
                raise UserError(f"model {self.name!r} has {len(stages)} stages: lower mixup.stages={mix.stage}")
            stage = self.timm.get_submodule(stages[mix.stage - 1])
            hooks.append(stage.register_forward_hook(partial(_mix_rows, first=first, mix=mix)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def embed_pooled(self, pooled_BD: Tensor) -> Tensor:
        """The embedding BD of pooled patch features: the output of the model's head.

        The head gets the pooled vector in every cell, so any pooling of the model returns the vector.
        """
        if self._is_map:
            return self.embed(pooled_BD[:, None, None, :] if self._channels_last else pooled_BD[:, :, None, None])
        return self.embed(pooled_BD[:, None, :].expand(-1, self.num_prefix_tokens + 1, -1))

    def classify(self, embedding_BD: Tensor) -> Tensor:
        """Logits BK of embeddings; the mean over classifiers if the model has several (LeViT)."""
        classifiers = self.timm.get_classifier()
        logits = []
        for classifier in classifiers if isinstance(classifiers, (tuple, list, nn.ModuleList)) else (classifiers,):
            convolves = isinstance(classifier, nn.Conv2d)
            logits.append(classifier(embedding_BD[:, :, None, None] if convolves else embedding_BD).flatten(1))
        return torch.stack(logits).mean(0) if len(logits) > 1 else logits[0]

    @torch.no_grad()
    def _probe(self, num_classes: int) -> None:
        """Runs one image to find layout and widths, and checks that the logits depend only on the embedding."""
        was_training, side = self.timm.training, self._image_size
        self.timm.eval()
        device = next(self.timm.parameters()).device
        image_BCHW = torch.linspace(-2, 2, 3 * side**2, device=device).view(1, 3, side, side)
        try:
            features = self.features(image_BCHW)
            embedding_BD = self.embed(features)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise UserError(f"model {self.name!r} does not run on {side} px images: {_first_line(error)}") from error
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise UserError(f"model {self.name!r} has no grid of patch features; choose another model")
        self._is_map, dim = features.ndim == 4, int(self.timm.num_features)
        self._channels_last = self._is_map and features.shape[1] != dim and features.shape[3] == dim
        if self._is_map:
            height, width = features.shape[1:3] if self._channels_last else features.shape[2:]
        else:
            num_patches = features.shape[1] - self.num_prefix_tokens
            height = width = round(num_patches**0.5)
            if height * width != num_patches:
                raise UserError(
                    f"model {self.name!r} has {num_patches} tokens, which is not a square grid; choose another model"
                )
        self.grid = (height, width)
        if embedding_BD.ndim != 2:
            raise UserError(f"model {self.name!r} has no embedding vector; set a pooling: model.arguments.global_pool")
        self.embedding_dim = embedding_BD.shape[1]
        self.patch_dim = self.patches(features, (side, side)).shape[1]
        if num_classes and device.type != "meta":
            try:
                logits_BK, expected_BK = self.classify(embedding_BD), self.timm(image_BCHW)
                same = device.type == "meta" or torch.allclose(logits_BK, expected_BK, atol=1e-4, rtol=1e-3)
            except (RuntimeError, TypeError, LookupError):
                same = False
            if not same:
                raise UserError(
                    f"the logits of model {self.name!r} are not a function of its embedding; choose another model"
                )
        self.timm.train(was_training)


def _mix_rows(_stage: nn.Module, _inputs: Any, features: Tensor, *, first: int, mix: LayerMix) -> Tensor:
    """The features of a stage, in which the rows of one view, from `first` on, are mixed with their partners."""
    rows = features[first : first + len(mix.share_R)]
    share_R = mix.share_R.to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))
    mixed = share_R * rows + (1 - share_R) * rows[mix.partner_R]
    return torch.cat([features[:first], mixed, features[first + len(rows) :]])


def create_timm_model(settings: ModelSettings, *, num_classes: int, image_size: int) -> nn.Module:
    """A timm model of this name and arguments, with the image size if the model has that argument.

    Raises `UserError` for an unknown name (with the nearest names) and for arguments that the model refuses.
    """
    if not timm.is_model(settings.name):
        near = difflib.get_close_matches(settings.name, timm.list_models(), n=3, cutoff=0.5)
        raise UserError(f"model.name {settings.name!r} is not a timm model; nearest: {', '.join(near) or 'none'}")
    if settings.pretrained:
        fetch_weights(settings.name)
    for name in OWN_ARGUMENTS.keys() & settings.arguments.keys():
        raise UserError(f"model.arguments.{name} is set by dpkd (from {OWN_ARGUMENTS[name]}); remove it")
    # most convolutional models accept any image size and lack the argument
    for arguments in ({"img_size": image_size, **settings.arguments}, settings.arguments):
        try:
            model: nn.Module = timm.create_model(
                settings.name, pretrained=settings.pretrained, num_classes=num_classes, **arguments
            )
        except (TypeError, RuntimeError, AssertionError, ValueError, KeyError, AttributeError, OSError) as error:
            if isinstance(error, TypeError) and "'img_size'" in str(error) and "img_size" not in settings.arguments:
                continue
            listed = ", ".join(f"{key}={value!r}" for key, value in settings.arguments.items()) or "no arguments"
            raise UserError(
                f"model.arguments: timm refuses {settings.name!r} with {listed}: {_first_line(error)}"
            ) from error
        return model
    raise AssertionError("the second call has no img_size")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
