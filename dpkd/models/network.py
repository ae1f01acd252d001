"""The trained network: a backbone, its pooling, and the heads of the objectives.

Axes: B image, C colour or map channels, H W height and width, D features, K classes.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from dpkd.models.backbone import PYRAMID, Backbone
from dpkd.models.resample import area_resample
from dpkd.models.settings import FigureGroundPooling, HeadSpec, NetworkSpec
from dpkd.models.weights import load_weights

GROUPS = 8
"""Groups of channels of a pyramid's norm."""
PLAIN_SHARE = 1e-3
"""Added to every patch's figure-ground weight, so that a blank map gives the plain mean."""


class Network(nn.Module):
    """Embedding, patch features, logits and head outputs, from one forward pass."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        pooling = spec.model.pooling
        self.figure_ground_floor = pooling.floor if isinstance(pooling, FigureGroundPooling) else None
        self.backbone = Backbone(spec.model, num_classes=len(spec.classes), image_size=spec.image_size)
        self.extra: frozenset[str] = frozenset()
        """Further outputs for those who follow the network: `patch_logits`, `layer-<index>`."""
        self.heads = nn.ModuleDict()
        self.reads: dict[str, tuple[str, ...]] = {}
        """The outputs that each head reads."""
        for name, head in spec.heads.items():
            self.reads[name] = self.backbone.levels(head.reads)
            widths = [self.backbone.width(output) for output in self.reads[name]]
            self.heads[name] = Pyramid(head, widths) if head.reads.startswith(PYRAMID) else build_head(head, widths[0])

    def forward(self, image_BCHW: Tensor, weight_B1HW: Tensor | None = None) -> dict[str, Tensor]:
        """The outputs for normalised float images; figure-ground pooling needs `weight_B1HW` in [0, 1], of any size.

        Outputs by name: `embedding` BD, `patch` BDHW, `logits` BK (if the network has classes), and the output of each
        head, [B, width] or [B, width, H, W] on its grid. If `extra` or a head asks for them: `layer-<index>` BDHW, and
        `patch_logits` BKHW, each patch classified as if it filled the image. Raises `ValueError` if figure-ground
        pooling lacks a weight.
        """
        asked = {output for outputs in self.reads.values() for output in outputs} | self.extra
        features, layers = self.backbone.features_and_layers(image_BCHW, sorted(asked))
        patch_BDHW = self.backbone.patches(features, (image_BCHW.shape[2], image_BCHW.shape[3]))
        if self.figure_ground_floor is None:
            embedding_BD = self.backbone.embed(features)
        elif weight_B1HW is None:
            raise ValueError("figure-ground pooling needs a saliency map: give weight_B1HW")
        else:
            pooled_BD = figure_ground(patch_BDHW, weight_B1HW, floor=self.figure_ground_floor)
            embedding_BD = self.backbone.embed_pooled(pooled_BD)
        outputs = {"embedding": embedding_BD, "patch": patch_BDHW, **layers}
        if self.spec.classes:
            outputs["logits"] = self.backbone.classify(embedding_BD)
        if self.spec.classes and "patch_logits" in asked:
            patch_BHWD = patch_BDHW.permute(0, 2, 3, 1)
            logits_LK = self.backbone.classify(self.backbone.embed_pooled(patch_BHWD.flatten(0, 2)))
            outputs["patch_logits"] = logits_LK.unflatten(0, patch_BHWD.shape[:3]).permute(0, 3, 1, 2)
        for name, head in self.heads.items():
            outputs[name] = head(*(outputs[output] for output in self.reads[name]))
        return outputs


def build_head(head: HeadSpec, dim: int) -> nn.Module:
    """A head on features of width `dim`; on a grid its linear layers are 1x1 convolutions."""
    on_grid = head.reads != "embedding"
    linear = partial(nn.Conv2d, kernel_size=1) if on_grid else nn.Linear
    if head.hidden is None:
        return linear(dim, head.width)
    norm = (LayerNorm2d if on_grid else nn.LayerNorm)(dim)
    return nn.Sequential(norm, linear(dim, head.hidden), nn.GELU(), linear(head.hidden, head.width))


class Pyramid(nn.Module):
    """A head on layers of several strides, with one output for each cell of the finest (a light FPN).

    Linear maps of all layers to `hidden` channels, enlarged and summed, then a 3x3 convolution with group norm and
    GELU, and the linear output: the semantic branch of Kirillov et al. 2019 with one convolution.
    """

    def __init__(self, head: HeadSpec, widths: Sequence[int]) -> None:
        super().__init__()
        assert head.hidden is not None, "a pyramid has hidden channels"
        self.lateral = nn.ModuleList(nn.Conv2d(width, head.hidden, 1) for width in widths)
        self.mix = nn.Conv2d(head.hidden, head.hidden, 3, padding=1)
        self.norm = nn.GroupNorm(math.gcd(GROUPS, head.hidden), head.hidden)
        self.out = nn.Conv2d(head.hidden, head.width, 1)

    def forward(self, *levels: Tensor) -> Tensor:
        """The outputs BKHW, for layers BDHW from the finest on."""
        total, size = torch.zeros((), device=levels[0].device), levels[0].shape[2:]
        for lateral, level in zip(self.lateral, levels, strict=True):
            total = total + F.interpolate(lateral(level), size=size, mode="bilinear")
        output: Tensor = self.out(F.gelu(self.norm(self.mix(total))))
        return output


def figure_ground(patch_BDHW: Tensor, saliency_B1HW: Tensor, *, floor: float) -> Tensor:
    """Mean of the patch features weighted by `S / (mean S + floor)`; S: the mean saliency of each patch; BD.

    The idea is from saliency-guided few-shot training (COSOC, Luo et al. 2021). The scale of S has no effect until the
    mean of S is near the floor; a blank map gives the plain mean.
    """
    saliency_B1HW = area_resample(saliency_B1HW, (patch_BDHW.shape[2], patch_BDHW.shape[3]))
    weight_B1HW = saliency_B1HW / (saliency_B1HW.mean((2, 3), keepdim=True) + floor) + PLAIN_SHARE
    share_B1HW = weight_B1HW / weight_B1HW.sum((2, 3), keepdim=True)
    return (share_B1HW.to(patch_BDHW.dtype) * patch_BDHW).sum((2, 3))


def build_network(spec: NetworkSpec, *, seed: int | None = None, weights: str | None = None) -> Network:
    """A network of this spec in training mode, with weights drawn from `seed` (without one, the global generator).

    `weights` is a file with the backbone's initial weights. Raises `UserError` for names and arguments that timm
    refuses, for models without patch features, and for weights that do not fit.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        network = Network(spec)
    if weights is not None:
        load_weights(network.backbone.timm, weights)
    return network
