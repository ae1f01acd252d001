"""The network that is trained: a backbone, its pooling, and the heads that objectives ask for.

Axes: B image, C colour or map channels, H W height and width, D features, K classes, A attributes.
"""

import torch
from torch import Tensor, nn

from dpkd.models.backbone import Backbone
from dpkd.models.resample import area_resample
from dpkd.models.settings import FigureGroundPooling, NetworkSpec

PLAIN_SHARE = 1e-3
"""What every patch weighs beside its figure-ground weight, so that a blank map gives the plain mean."""


class Network(nn.Module):
    """Embedding, patch features, logits, predicted priors and projections to a teacher's widths, from one forward."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        pooling = spec.model.pooling
        self.figure_ground_floor = pooling.floor if isinstance(pooling, FigureGroundPooling) else None
        self.backbone = Backbone(spec.model, num_classes=len(spec.classes), image_size=spec.image_size)
        self.prior_heads = nn.ModuleDict(
            {name: nn.Conv2d(self.patch_dim, channels, 1) for name, channels in spec.targets.items()}
        )
        self.to_teacher = nn.ModuleDict()
        if spec.teacher_dim is not None:
            self.to_teacher["embedding"] = nn.Linear(self.embedding_dim, spec.teacher_dim)
            self.to_teacher["patch"] = nn.Conv2d(self.patch_dim, spec.teacher_patch_dim or spec.teacher_dim, 1)
        # last: a head more must not change the weights that the others are drawn with
        self.attribute_head = nn.Linear(self.embedding_dim, len(spec.attributes)) if spec.attributes else None
        self.region_heads = nn.ModuleDict({name: nn.Conv2d(self.patch_dim, 1, 1) for name in spec.regions})

    @property
    def embedding_dim(self) -> int:
        """Width of the embedding."""
        return self.backbone.embedding_dim

    @property
    def patch_dim(self) -> int:
        """Width of the patch features."""
        return self.backbone.patch_dim

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the patch grid at the network's image size."""
        return self.backbone.grid

    def forward(self, image_BCHW: Tensor, weight_B1HW: Tensor | None = None) -> dict[str, Tensor]:
        """Runs normalised float images through; figure-ground pooling needs `weight_B1HW` in [0, 1], of any size.

        Returns `embedding` BD, `patch` BDHW, `logits` BK (where there are classes), `prior.<name>` BCHW on the patch
        grid, `attributes` BA and `region.<name>` B1HW as logits, and with a teacher width `to_teacher.embedding` BD and
        `to_teacher.patch` BDHW. Raises `ValueError` where the pooling needs a weight and none is given.
        """
        features = self.backbone.features(image_BCHW)
        patch_BDHW = self.backbone.patches(features)
        if self.figure_ground_floor is None:
            embedding_BD = self.backbone.embed(features)
        else:
            if weight_B1HW is None:
                raise ValueError("figure-ground pooling needs a saliency map: give weight_B1HW")
            embedding_BD = self.backbone.embed_pooled(
                figure_ground(patch_BDHW, weight_B1HW, floor=self.figure_ground_floor)
            )
        outputs = {"embedding": embedding_BD, "patch": patch_BDHW}
        if self.spec.classes:
            outputs["logits"] = self.backbone.classify(embedding_BD)
        for name, head in self.prior_heads.items():
            outputs[f"prior.{name}"] = head(patch_BDHW)
        if self.attribute_head is not None:
            outputs["attributes"] = self.attribute_head(embedding_BD)
        for name, head in self.region_heads.items():
            outputs[f"region.{name}"] = head(patch_BDHW)
        for name, projection in self.to_teacher.items():
            outputs[f"to_teacher.{name}"] = projection(outputs[name])
        return outputs


def figure_ground(patch_BDHW: Tensor, saliency_B1HW: Tensor, *, floor: float) -> Tensor:
    """Mean of the patch features weighted by `S / (mean S + floor)`, S the saliency averaged over each patch; BD.

    The idea is that of saliency-guided few-shot training (COSOC, Luo et al. 2021). Scaling S changes nothing until
    its mean falls towards the floor; a blank map gives the plain mean.
    """
    saliency_B1HW = area_resample(saliency_B1HW, (patch_BDHW.shape[2], patch_BDHW.shape[3]))
    weight_B1HW = saliency_B1HW / (saliency_B1HW.mean((2, 3), keepdim=True) + floor) + PLAIN_SHARE
    share_B1HW = weight_B1HW / weight_B1HW.sum((2, 3), keepdim=True)
    return (share_B1HW.to(patch_BDHW.dtype) * patch_BDHW).sum((2, 3))


def build_network(spec: NetworkSpec, *, seed: int | None = None) -> Network:
    """A network of this spec in training mode, with weights drawn from `seed` (the global generator where none).

    Raises `UserError` for names and arguments that timm refuses and for models without patch features.
    """
    if seed is None:
        return Network(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(spec)
