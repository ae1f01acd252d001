"""What a model of the user's says of an image: class attention of a ViT, depth, learned edges."""

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field, model_validator

from dpkd.config import Config
from dpkd.errors import UserError
from dpkd.priors.base import grid_size, mirror
from dpkd.priors.catalogue.kernels import cell_means
from dpkd.priors.codecs import ByteCodec, JpegCodec, Map
from dpkd.priors.image_views import ImageViews
from dpkd.priors.model_output import Array, Run, Scale, scaled
from dpkd.priors.model_settings import Model, TimmModel, checksum


class Learned(Config):
    """An output of a model, as the map `learned-<of>` in [0, 1], on the grid of the model or of `stride`.

    Images are stretched to `size`, and run in batches that are always filled up to `batch_size`, so that an image at
    the same place of a batch has the same map whatever the others are. Weights and their licence are the user's.
    """

    kind: Literal["learned"] = "learned"
    of: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """What the map shows; it names the map."""
    model: Model
    size: int | tuple[int, int] = 224
    """Side of the model's input in pixels, or its height and width."""
    colour: Literal["rgb", "bgr", "grey"] = "rgb"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Taken from each channel of an image in 0..1, which is then divided by `std`; the default is ImageNet's."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    scale: Scale = "unit"
    """How values come into [0, 1]: `unit` are there already; `softmax` over the channels; `largest` in shares of the
    largest value, `minmax` between the smallest and the largest, of each channel of each image."""
    channels: int = Field(1, ge=1)
    stride: int | None = Field(None, ge=1)
    """Pixels of the image to a cell of the map; none keeps the model's own grid."""
    batch_size: int = Field(16, ge=1)
    device: Literal["accelerator", "cpu"] = "accelerator"
    """`accelerator` is a GPU where there is one, and the CPU elsewhere."""

    version: ClassVar[int] = 1
    nearest: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Names the map in a prior set."""
        return f"learned-{self.of}"

    @property
    def codec(self) -> ByteCodec | JpegCodec:
        """JPEG for dense maps; bytes for the few cells of a patch grid, and for many channels."""
        return ByteCodec() if isinstance(self.model, TimmModel) or self.channels > 4 else JpegCodec()

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @model_validator(mode="after")
    def _parts_fit(self) -> "Learned":
        num_inputs = 1 if self.colour == "grey" else 3
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != num_inputs:
                raise ValueError(f"{key} has {len(values)} numbers, and colour={self.colour} takes {num_inputs}")
        if min(self.std) <= 0 or min(self.input_size) < 1:
            raise ValueError("std and size must be greater than 0")
        if self.scale == "softmax" and self.channels == 1:
            raise ValueError("scale=softmax shares 1 out among channels, and channels=1 leaves nothing to share")
        if isinstance(self.model, TimmModel):
            if num_inputs != 3 or not isinstance(self.size, int):
                raise ValueError("a timm model takes colour images and one side as size; export others as ONNX")
            if self.channels > 1 and self.model.output != "features":
                raise ValueError(f"output={self.model.output} of a timm model is one channel; set channels=1")
        return self

    def sealed(self) -> "Learned":
        """The same prior with the checksum of its weights, which from now on is part of what it is.

        Raises `UserError` that names the file where it is missing, or is another one than `sha256` says.
        """
        try:
            found = checksum(self.model)
        except FileNotFoundError as error:
            if self.model.sha256 is not None:
                return self  # maps that stand need no model; to compute one will say that the file is missing
            raise _fault(
                self,
                f"{error.filename} is missing: give the path of the weights or, where all maps stand, model.sha256 as "
                "priors.json has it",
            ) from error
        except (OSError, UserError) as error:
            raise _fault(self, str(error)) from error
        if self.model.sha256 not in (None, found):
            raise _fault(self, f"its sha256 is {found}, and model.sha256 says {self.model.sha256}; correct one of them")
        return self.model_copy(update={"model": self.model.model_copy(update={"sha256": found})})

    def identity(self) -> str:
        """What the maps depend on, as JSON: not where the weights stand, nor how many images run at once, nor where."""
        assert self.model.sha256 is not None, "a prior is sealed before it is named"
        return self.model_dump_json(exclude={"model": {"file"}, "batch_size": True, "device": True})

    def map(self, picture: ImageViews) -> Map:
        """The map of an image, float32; raises ValueError where the model gives values that are not finite."""
        (map_HWC,) = self.maps([picture], device="cpu")
        if not np.isfinite(map_HWC).all():
            raise ValueError(f"{self.name}: the model gives values that are not finite")
        return map_HWC

    def maps(self, pictures: Sequence[ImageViews], *, device: str) -> list[Map]:
        """The maps of at most `batch_size` images, float32, by the model on `device`, a device of torch.

        Values that are not finite pass. Raises `UserError` where the model cannot be used, before its first map.
        """
        values_BCHW = _values(self, _loaded(self, device), _batch(self, pictures))[: len(pictures)]
        maps = [np.ascontiguousarray(values_CHW.transpose(1, 2, 0)) for values_CHW in values_BCHW]
        if self.stride is None:
            return list(maps)
        grids = [grid_size(picture, self.stride) for picture in pictures]
        return [cell_means(map_HWC, grid) for map_HWC, grid in zip(maps, grids, strict=True)]

    def flip(self, map_HWC: Map) -> Map:
        """The map of the mirrored image, as far as the model treats left and right alike."""
        return mirror(map_HWC)


def _batch(prior: Learned, pictures: Sequence[ImageViews]) -> Array:
    """The images as the model takes them; places that are left over are of the mean colour."""
    assert len(pictures) <= prior.batch_size, f"{len(pictures)} images in a batch of {prior.batch_size}"
    height, width = prior.input_size
    mean_C, std_C = np.asarray(prior.mean, np.float32), np.asarray(prior.std, np.float32)
    batch_BCHW = np.zeros((prior.batch_size, len(prior.mean), height, width), np.float32)
    for image_CHW, picture in zip(batch_BCHW, pictures, strict=False):
        shrinks = height <= picture.size[0] and width <= picture.size[1]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image_HWC = cv2.resize(picture.rgb_HWC, (width, height), interpolation=method)
        if prior.colour == "bgr":
            image_HWC = image_HWC[:, :, ::-1]
        elif prior.colour == "grey":
            image_HWC = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY)[:, :, None]
        unit_HWC = image_HWC.astype(np.float32) * np.float32(1 / 255)
        image_CHW[:] = ((unit_HWC - mean_C) / std_C).transpose(2, 0, 1)
    return batch_BCHW


def _values(prior: Learned, run: Run, batch_BCHW: Array) -> Array:
    """What the model says of a batch, in [0, 1]; raises `UserError` where that is no map of the prior's channels."""
    try:
        found = run(batch_BCHW)
        values_BCHW = found[:, None] if found.ndim == 3 else found
        if values_BCHW.ndim != 4 or values_BCHW.shape[:2] != (prior.batch_size, prior.channels):
            raise UserError(
                f"its output has the shape {found.shape}, and {prior.batch_size} images x {prior.channels} channels x "
                "height x width belong there; set channels, or another model.output"
            )
        return scaled(values_BCHW, prior.scale)
    except UserError as error:
        raise _fault(prior, str(error)) from error
    except Exception as error:  # whatever a model of the user's raises
        raise _fault(
            prior,
            f"the model does not run on float32 of {batch_BCHW.shape} ({_first_line(error)}); set size, colour and "
            "batch_size to what it takes and what fits into memory",
        ) from error


@lru_cache(maxsize=4)
def _loaded(prior: Learned, device: str) -> Run:
    """The model on a device, loaded once a process and tried on blank images before any map is taken from it."""
    try:
        found = checksum(prior.model)
        if prior.model.sha256 not in (None, found):
            raise UserError(f"its sha256 on this machine is {found}, not {prior.model.sha256}: copy it here again")
        run = _load(prior, device)
    except FileNotFoundError as error:
        raise _fault(
            prior, f"{error.filename} is missing on this machine: put it where every worker sees it"
        ) from error
    except UserError as error:
        raise _fault(prior, str(error)) from error
    except Exception as error:  # the same
        raise _fault(prior, f"it cannot be loaded ({_first_line(error)})") from error
    if not np.isfinite(_values(prior, run, _batch(prior, []))).all():
        raise _fault(prior, "the model gives values that are not finite for blank images; check mean, std and weights")
    return run


def _load(prior: Learned, device: str) -> Run:
    # here, not at the top: torch and onnxruntime must not load with the settings
    if prior.model.kind == "onnx":
        from dpkd.priors.onnx_model import load_onnx  # noqa: PLC0415

        return load_onnx(prior.model, device=device)
    from dpkd.priors.torch_model import load_timm, load_torch  # noqa: PLC0415

    if prior.model.kind == "timm":
        return load_timm(prior.model, size=prior.input_size[0], device=device)
    return load_torch(prior.model, device=device)


def _fault(prior: Learned, what: str) -> UserError:
    return UserError(f"the prior {prior.name!r}, {prior.model.file}: {what}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
