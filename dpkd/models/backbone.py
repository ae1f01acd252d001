"""Any timm model behind one face: a feature map, an embedding, logits.

Axes: B image, C colour, H W height and width (of the image, or of the patch grid), D features, K classes, N tokens.
"""

import difflib
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dpkd.errors import UserError
from dpkd.models.settings import ModelSettings
from dpkd.models.weights import load_weights


class Backbone(nn.Module):
    """A timm model as `timm`; its own weights and names stay, so that its state dict loads into plain timm.

    Raises `UserError` where the model gives no grid of patch features, or its logits are no function of its embedding.
    """

    def __init__(self, settings: ModelSettings, *, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.timm: Any = create_timm_model(settings, num_classes=num_classes, image_size=image_size)
        self.name = settings.name
        self.num_prefix_tokens = int(getattr(self.timm, "num_prefix_tokens", 0))
        self._channels_last = False
        self._probe(image_size, num_classes=num_classes)

    def features(self, image_BCHW: Tensor) -> Tensor:
        """The model's last features, in its own layout."""
        features: Tensor = self.timm.forward_features(image_BCHW)
        return features

    def patches(self, features: Tensor) -> Tensor:
        """The features as a map BDHW: channels-last maps turned, prefix tokens dropped, tokens put on their grid."""
        if features.ndim == 4:
            return features.permute(0, 3, 1, 2) if self._channels_last else features
        patch_BND = features[:, self.num_prefix_tokens :]
        return patch_BND.transpose(1, 2).unflatten(2, self.grid)

    def embed(self, features: Tensor) -> Tensor:
        """What the model pools of its features before its classifier, BD."""
        embedding_BD: Tensor = self.timm.forward_head(features, pre_logits=True)
        return embedding_BD

    def embed_pooled(self, pooled_BD: Tensor) -> Tensor:
        """The embedding of patch features that are pooled already: the model's own head after its pooling.

        The pooled vector stands for every cell, so that any pooling of the model's own gives it back.
        """
        if self._is_map:
            return self.embed(pooled_BD[:, None, None, :] if self._channels_last else pooled_BD[:, :, None, None])
        return self.embed(pooled_BD[:, None, :].expand(-1, self.num_prefix_tokens + 1, -1))

    def classify(self, embedding_BD: Tensor) -> Tensor:
        """Logits BK of embeddings; the mean over its classifiers where the model has several (LeViT)."""
        found = self.timm.get_classifier()
        classifiers = found if isinstance(found, (tuple, list, nn.ModuleList)) else (found,)
        logits = [_apply_classifier(classifier, embedding_BD) for classifier in classifiers]
        return torch.stack(logits).mean(0) if len(logits) > 1 else logits[0]

    @torch.no_grad()
    def _probe(self, image_size: int, *, num_classes: int) -> None:
        """Runs one image through, learns the layout and widths, and checks that the face fits this model."""
        was_training = self.timm.training
        self.timm.eval()
        parameter = next(self.timm.parameters())
        image_BCHW = torch.linspace(-2, 2, 3 * image_size**2, device=parameter.device).view(
            1, 3, image_size, image_size
        )
        try:
            features = self.features(image_BCHW)
            embedding_BD = self.embed(features)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise UserError(
                f"model {self.name!r} does not run on {image_size} px images: {_first_line(error)}"
            ) from error
        self._set_layout(features)
        if embedding_BD.ndim != 2:
            raise UserError(f"model {self.name!r} gives no embedding vector (global_pool is empty?); choose a pooling")
        self.embedding_dim = embedding_BD.shape[1]
        self.patch_dim = self.patches(features).shape[1]
        if num_classes and not self._classifies(image_BCHW, embedding_BD):
            raise UserError(f"the logits of model {self.name!r} are no function of its embedding; choose another model")
        self.timm.train(was_training)

    def _set_layout(self, features: Tensor) -> None:
        """Records whether features are a map or tokens, channels first or last, and the grid."""
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise UserError(f"model {self.name!r} gives no grid of patch features; choose another model")
        self._is_map = features.ndim == 4
        width = int(self.timm.num_features)
        if self._is_map:
            self._channels_last = features.shape[1] != width and features.shape[3] == width
            shape = features.shape[1:3] if self._channels_last else features.shape[2:]
            self.grid = (int(shape[0]), int(shape[1]))
            return
        num_patches = features.shape[1] - self.num_prefix_tokens
        side = round(num_patches**0.5)
        if side * side != num_patches:
            raise UserError(
                f"model {self.name!r} gives {num_patches} tokens, which are no square grid; choose another model"
            )
        self.grid = (side, side)

    def _classifies(self, image_BCHW: Tensor, embedding_BD: Tensor) -> bool:
        """Whether `classify` of the embedding is what the model itself answers."""
        try:
            return bool(torch.allclose(self.classify(embedding_BD), self.timm(image_BCHW), atol=1e-4, rtol=1e-3))
        except (RuntimeError, TypeError, LookupError):
            return False


def _apply_classifier(classifier: nn.Module, embedding_BD: Tensor) -> Tensor:
    if isinstance(classifier, nn.Conv2d):
        embedding_BD = embedding_BD[:, :, None, None]
    logits_BK: Tensor = classifier(embedding_BD)
    return logits_BK.flatten(1)


def create_timm_model(settings: ModelSettings, *, num_classes: int, image_size: int) -> nn.Module:
    """A timm model of this name and arguments, at this image size where the model must know it.

    Raises `UserError` for an unknown name (with the nearest ones) and for arguments that the model refuses.
    """
    if not timm.is_model(settings.name):
        near = difflib.get_close_matches(settings.name, timm.list_models(), n=3, cutoff=0.5)
        raise UserError(f"model.name {settings.name!r} is no timm model; nearest: {', '.join(near) or 'none'}")
    for name in ("num_classes", "pretrained", "checkpoint_path"):
        if name in settings.arguments:
            raise UserError(
                f"model.arguments.{name} is set by dpkd itself (classes, model.pretrained, model.weights); drop it"
            )
    arguments: dict[str, Any] = {"img_size": image_size, **settings.arguments}
    try:
        return _create(settings, arguments, num_classes=num_classes)
    except TypeError as error:
        if "'img_size'" not in str(error) or "img_size" in settings.arguments:
            raise _refused(settings, error) from error
    # Most convolutional models take any image size and do not know the argument.
    try:
        return _create(settings, settings.arguments, num_classes=num_classes)
    except TypeError as error:
        raise _refused(settings, error) from error


def _create(settings: ModelSettings, arguments: dict[str, Any], *, num_classes: int) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(
            settings.name, pretrained=settings.pretrained, num_classes=num_classes, **arguments
        )
    except (RuntimeError, AssertionError, ValueError, KeyError, AttributeError, OSError) as error:
        raise _refused(settings, error) from error
    if settings.weights is not None:
        load_weights(model, settings.weights)
    return model


def _refused(settings: ModelSettings, error: Exception) -> UserError:
    given = ", ".join(f"{key}={value!r}" for key, value in settings.arguments.items()) or "no arguments"
    return UserError(f"model.arguments: timm refuses {settings.name!r} with {given}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
