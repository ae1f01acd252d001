"""Maps from a user's model: class attention of a ViT, depth, learned edges.

Axes: B image, C colour or channel, H W height and width.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from dpkd.config import Config
from dpkd.errors import UserError
from dpkd.priors.base import ImageViews, PriorConfig, grid_size
from dpkd.priors.catalogue.kernels import cell_means
from dpkd.priors.codecs import BYTES, Codec, JpegCodec, Map

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[np.float32]
Run = Callable[[Array], Array]
"""A loaded model: maps normalised float32 images BCHW to its output."""
Scale = Literal["unit", "sigmoid", "softmax", "largest", "minmax"]

SLACK = 0.1
"""Tolerance below 0 and above 1 with `scale=unit`: resampling inside a model overshoots."""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class TimmModel(Config):
    """A timm model; `arguments` are passed to `timm.create_model`."""

    kind: Literal["timm"] = "timm"
    name: str
    arguments: dict[str, Any] = {}
    file: str
    """The weights: a local safetensors file or PyTorch state dict, or the network.safetensors of a run of dpkd."""
    sha256: str | None = None
    """SHA-256 of the file; another file is refused. None accepts any file."""
    output: Literal["attention", "energy", "features"] = "attention"
    """`attention` is the last block's class attention (ViT), `energy` is Σ f² of the patch features (any model), both
    divided by their maximum; `features` are the patch features."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def load(self, size: tuple[int, int], *, device: str) -> Run:
        """The timm model as a function of images BCHW of that size; on the CPU it uses one thread.

        Raises `UserError` if the weights do not fit the model, or the model lacks class attention as its output.
        """
        # imported here: settings must not import torch
        import torch  # noqa: PLC0415

        from dpkd.models.attention import attention_layer, with_attention  # noqa: PLC0415
        from dpkd.models.backbone import Backbone  # noqa: PLC0415
        from dpkd.models.settings import ModelSettings  # noqa: PLC0415
        from dpkd.models.weights import load_weights  # noqa: PLC0415

        settings = ModelSettings(name=self.name, arguments=self.arguments)
        backbone = Backbone(settings, num_classes=0, image_size=size[0])
        load_weights(backbone.timm, self.file)
        if self.output == "attention" and attention_layer(backbone) is None:
            raise UserError(f"the timm model {self.name!r} has no readable class attention; set output=energy")
        backbone = backbone.eval().to(device)
        if torch.device(device).type == "cpu":
            torch.set_num_threads(1)  # the pool has a process for every core

        @torch.no_grad()
        def run(image_BCHW: Array) -> Array:
            image = torch.from_numpy(image_BCHW).to(device)

            def patches() -> dict[str, "Tensor"]:
                return {"patch": backbone.patches(backbone.features(image), size)}

            attention = self.output == "attention"
            values = with_attention(backbone, patches)["attention"] if attention else patches()["patch"]
            if self.output == "energy":
                values = values.square().sum(1, keepdim=True)
                values = values / values.amax((2, 3), keepdim=True).clamp(min=1e-12)
            return np.asarray(values.float().cpu().numpy())

        return run


class OnnxModel(Config):
    """An ONNX model with one image input."""

    kind: Literal["onnx"] = "onnx"
    file: str
    sha256: str | None = None
    """SHA-256 of the file and the files of its external data, in this order; other files are refused."""
    output: str | int | None = None
    """Name or position of the output if the model has several."""

    def load(self, size: tuple[int, int], *, device: str) -> Run:  # noqa: ARG002 (the file defines it)
        """The ONNX model as a function of images BCHW; on the CPU it uses one thread.

        Raises `UserError` if onnxruntime has no provider for the device or the model lacks the output, and errors of
        onnxruntime for a file that is not a model.
        """
        import onnxruntime  # noqa: PLC0415

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # the pool has a process for every core
        options.log_severity_level = 3
        provider = PROVIDERS[device.partition(":")[0]]
        session = onnxruntime.InferenceSession(self.file, options, providers=[provider])
        if provider not in session.get_providers():  # onnxruntime silently uses another provider
            raise UserError(
                f"onnxruntime could not start {provider}: replace onnxruntime with onnxruntime-gpu, or set device=cpu "
                "for this prior"
            )
        names = [output.name for output in session.get_outputs()]
        choices: dict[str | int | None, str] = {name: name for name in names}
        choices |= {**dict(enumerate(names)), **dict(enumerate(names, -len(names)))}
        if len(names) == 1:
            choices[None] = names[0]
        if self.output not in choices:
            raise UserError(f"model.output={self.output!r} is not one of the {len(names)} outputs: {', '.join(names)}")
        image = session.get_inputs()[0]
        dtype = np.float16 if image.type == "tensor(float16)" else np.float32

        def run(image_BCHW: Array) -> Array:
            inputs = {image.name: image_BCHW.astype(dtype, copy=False)}
            return np.asarray(session.run([choices[self.output]], inputs)[0], np.float32)

        return run


class Learned(PriorConfig):
    """An output of a model as the map `learned-<of>` in [0, 1], on the grid of the model or of `stride`.

    Images are stretched to `size`, and batches are padded to `batch_size`. So the map of an image depends only on its
    position in the batch, not on the other images. The map of the mirrored image is the mirrored map if the model
    treats left and right equally. The user is responsible for weights and their licence.
    """

    kind: Literal["learned"] = "learned"
    of: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Content of the map; part of its name."""
    model: Annotated[TimmModel | OnnxModel, Field(discriminator="kind")]
    size: int | tuple[int, int] = 224
    """Side of the model's input in pixels, or its height and width."""
    colour: Literal["rgb", "bgr", "grey"] = "rgb"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from each channel of an image in 0..1, before the division by `std`; ImageNet's by default."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    scale: Scale = "unit"
    """The mapping to [0, 1]: `unit` clips; `sigmoid`; `softmax` over channels; `largest` divides by the maximum, and
    `minmax` maps minimum and maximum to 0 and 1, for each channel of each image."""
    channels: int = Field(1, ge=1)
    stride: int | None = Field(None, ge=1)
    """Pixels of the image for one cell of the map; None keeps the model's grid."""
    batch_size: int = Field(16, ge=1)
    device: Literal["accelerator", "cpu"] = "accelerator"
    """`accelerator` is a GPU, or the CPU of a machine without one."""

    @property
    def name(self) -> str:
        return f"learned-{self.of}"

    @property
    def codec(self) -> Codec:
        """JPEG for dense maps; bytes for the few cells of a patch grid, and for many channels."""
        return BYTES if isinstance(self.model, TimmModel) or self.channels > 4 else JpegCodec()

    @property
    def input_size(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @model_validator(mode="after")
    def _parts_fit(self) -> "Learned":
        num_inputs = 1 if self.colour == "grey" else 3
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != num_inputs:
                raise ValueError(f"{key} has {len(values)} numbers, and colour={self.colour} needs {num_inputs}")
        if min(self.std) <= 0 or min(self.input_size) < 1:
            raise ValueError("std and size must be greater than 0")
        if self.scale == "softmax" and self.channels == 1:
            raise ValueError("scale=softmax needs more than one channel, and channels=1: set another scale")
        if isinstance(self.model, TimmModel):
            if num_inputs != 3 or not isinstance(self.size, int):
                raise ValueError("a timm model needs colour images and a square size; export other models as ONNX")
            if self.channels > 1 and self.model.output != "features":
                raise ValueError(f"output={self.model.output} of a timm model has one channel; set channels=1")
        return self

    def sealed(self) -> "Learned":
        """The same prior with the checksum of its weights, which becomes part of its identity.

        Raises `UserError` with the file if it is missing or differs from `sha256`.
        """
        with _user_errors(self, "it cannot be read as a model"):
            try:
                digest = checksum(self.model)
            except FileNotFoundError as error:
                if self.model.sha256 is not None:
                    return self  # stored maps need no model; computing one reports the missing file
                raise UserError(
                    f"{error.filename} is missing: give the path of the weights or, if all maps are prepared, "
                    "model.sha256 from priors.json"
                ) from error
            if self.model.sha256 not in (None, digest):
                raise UserError(f"its sha256 is {digest}, and model.sha256 is {self.model.sha256}; correct one of them")
        return self.model_copy(update={"model": self.model.model_copy(update={"sha256": digest})})

    def identity(self) -> str:
        """Everything that determines the maps, as JSON: not the path of the weights, the batch size or the device."""
        assert self.model.sha256 is not None, "a prior is sealed before its identity is used"
        return self.model_dump_json(exclude={"model": {"file"}, "batch_size": True, "device": True})

    def map(self, image: ImageViews) -> Map:
        """The map of an image, float32; raises ValueError if the model's values are not finite."""
        (map_HWC,) = self.maps([image], device="cpu")
        if not np.isfinite(map_HWC).all():
            raise ValueError(f"{self.name}: the model's values are not finite")
        return map_HWC

    def maps(self, images: Sequence[ImageViews], *, device: str) -> list[Map]:
        """The maps of at most `batch_size` images, float32, by the model on `device`, a torch device.

        Values may be not finite. Raises `UserError` before the first map if the model cannot be used.
        """
        maps: list[Map] = []
        for values_CHW, image in zip(_values(self, _loaded(self, device), images), images, strict=False):
            map_HWC = np.ascontiguousarray(values_CHW.transpose(1, 2, 0))
            maps.append(map_HWC if self.stride is None else cell_means(map_HWC, grid_size(image, self.stride)))
        return maps


@lru_cache(maxsize=4)
def _loaded(prior: Learned, device: str) -> Run:
    """The model on a device, loaded once a process and tested on blank images."""
    with _user_errors(prior, "it cannot be loaded; every worker needs a complete copy at this path"):
        digest = checksum(prior.model)
        if prior.model.sha256 not in (None, digest):
            raise UserError(f"its sha256 on this machine is {digest}, not {prior.model.sha256}: copy the file again")
        run = prior.model.load(prior.input_size, device=device)
    blank_BCHW = _values(prior, run, [])
    with _user_errors(prior, "it fails"):
        if not np.isfinite(blank_BCHW).all():
            raise UserError("the model's values for blank images are not finite; check mean, std and weights")
    return run


def _values(prior: Learned, run: Run, images: Sequence[ImageViews]) -> Array:
    """The model's output in [0, 1] for a full batch: the images, then blank images of the mean colour.

    Raises `UserError` if the output's shape does not fit the prior's channels.
    """
    assert len(images) <= prior.batch_size, f"{len(images)} images in a batch of {prior.batch_size}"
    height, width = prior.input_size
    mean_C, std_C = np.asarray(prior.mean, np.float32), np.asarray(prior.std, np.float32)
    batch_BCHW = np.zeros((prior.batch_size, len(prior.mean), height, width), np.float32)
    for input_CHW, image in zip(batch_BCHW, images, strict=False):
        shrinks = height <= image.size[0] and width <= image.size[1]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        resized_HWC = cv2.resize(image.rgb_HWC, (width, height), interpolation=method)
        if prior.colour == "bgr":
            resized_HWC = resized_HWC[:, :, ::-1]
        elif prior.colour == "grey":
            resized_HWC = cv2.cvtColor(resized_HWC, cv2.COLOR_RGB2GRAY)[:, :, None]
        unit_HWC = resized_HWC.astype(np.float32) * np.float32(1 / 255)
        input_CHW[:] = ((unit_HWC - mean_C) / std_C).transpose(2, 0, 1)
    fault = f"the model does not run on float32 of {batch_BCHW.shape}: set size, colour and batch_size of the model"
    with _user_errors(prior, fault):
        output = run(batch_BCHW)
        values_BCHW = output[:, None] if output.ndim == 3 else output
        if values_BCHW.ndim != 4 or values_BCHW.shape[:2] != (prior.batch_size, prior.channels):
            raise UserError(
                f"its output has the shape {output.shape}, not {prior.batch_size} images x {prior.channels} channels x "
                "height x width; set channels or model.output"
            )
        return scaled(values_BCHW, prior.scale)


@contextmanager
def _user_errors(prior: Learned, fault: str) -> Iterator[None]:
    """Converts every error to a `UserError` with prior and file; `fault` describes an error of a library."""
    prior_and_file = f"the prior {prior.name!r}, {prior.model.file}"
    try:
        yield
    except UserError as error:
        raise UserError(f"{prior_and_file}: {error}") from error
    except Exception as error:  # a user's model may raise any error
        first_line = (str(error).strip().splitlines() or ["no message"])[0]
        raise UserError(f"{prior_and_file}: {fault} ({type(error).__name__}: {first_line})") from error


def scaled(values_BCHW: Array, scale: Scale) -> Array:
    """The values mapped to [0, 1] as `Learned.scale` says; NaN stays NaN.

    Raises `UserError` if `unit` exceeds [0, 1] by more than `SLACK`.
    """
    if scale == "sigmoid":
        return np.asarray(np.float32(1) / (1 + np.exp(-np.clip(values_BCHW, -60, 60))), np.float32)
    if scale == "softmax":
        share_BCHW = np.exp(values_BCHW - values_BCHW.max(1, keepdims=True))
        return share_BCHW / share_BCHW.sum(1, keepdims=True)
    if scale == "unit":
        lowest, highest = float(values_BCHW.min()), float(values_BCHW.max())
        if lowest < -SLACK or highest > 1 + SLACK:
            raise UserError(
                f"its values are from {lowest:.3g} to {highest:.3g}, and scale=unit needs [0, 1]: set scale to "
                "sigmoid, softmax, largest or minmax"
            )
        return np.clip(values_BCHW, 0, 1)
    if scale == "minmax":
        values_BCHW = values_BCHW - values_BCHW.min((2, 3), keepdims=True)
    return np.clip(values_BCHW / np.maximum(values_BCHW.max((2, 3), keepdims=True), np.float32(1e-12)), 0, 1)


def checksum(model: TimmModel | OnnxModel) -> str:
    """SHA-256 of the model's current files, 64 hex digits; a file is read again only if its size or time changed.

    Raises `FileNotFoundError` if a file is missing, and errors of onnx for a file that is not an ONNX model.
    """

    def state(path: Path) -> tuple[Path, int, int]:
        status = path.stat()
        return path.absolute(), status.st_size, status.st_mtime_ns

    own = state(Path(model.file))
    external = _external_data(*own) if isinstance(model, OnnxModel) else ()
    return _digest(own, *map(state, external))


@lru_cache(maxsize=64)
def _digest(*files: tuple[Path, int, int]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _external_data(path: Path, _size: int, _changed_ns: int) -> tuple[Path, ...]:
    """The files of an ONNX model's external tensors, sorted by name."""
    import onnx  # noqa: PLC0415 (slow to import, and only for ONNX)
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data  # noqa: PLC0415

    graph = onnx.load_model(path, load_external_data=False).graph
    names = {ExternalDataInfo(tensor).location for tensor in graph.initializer if uses_external_data(tensor)}
    return tuple(path.parent / name for name in sorted(names))
