"""What a model of the user's computes of an image: class attention of a ViT, depth, learned edges.

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
"""A loaded model: images BCHW, float32 and normalised, to its output."""
Scale = Literal["unit", "sigmoid", "softmax", "largest", "minmax"]

SLACK = 0.1
"""How far beyond 0 and 1 values of `scale=unit` may be: resampling inside a model overshoots."""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class TimmModel(Config):
    """A timm model; `arguments` go to `timm.create_model` as they are."""

    kind: Literal["timm"] = "timm"
    name: str
    arguments: dict[str, Any] = {}
    file: str
    """The weights: a local safetensors file or PyTorch state dict, or the network.safetensors of a run of dpkd."""
    sha256: str | None = None
    """SHA-256 of the file, which is refused if it differs; none takes what is there."""
    output: Literal["attention", "energy", "features"] = "attention"
    """`attention` is the last block's class attention (ViT), `energy` Σ f² of the patch features (any model), both in
    shares of their largest value; `features` the patch features themselves."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def load(self, size: tuple[int, int], *, device: str) -> Run:
        """The timm model as a function of images BCHW of that size; on the CPU it takes one thread.

        Raises `UserError` where the weights do not fit the model, or it has no class attention and that is its output.
        """
        # here, not at the top: torch must not load with the settings
        import torch  # noqa: PLC0415

        from dpkd.models.attention import attention_layer, with_attention  # noqa: PLC0415
        from dpkd.models.backbone import Backbone  # noqa: PLC0415
        from dpkd.models.settings import ModelSettings  # noqa: PLC0415
        from dpkd.models.weights import load_weights  # noqa: PLC0415

        settings = ModelSettings(name=self.name, arguments=self.arguments)
        backbone = Backbone(settings, num_classes=0, image_size=size[0])
        load_weights(backbone.timm, self.file)
        if self.output == "attention" and attention_layer(backbone) is None:
            raise UserError(f"the timm model {self.name!r} has no class attention that can be read; set output=energy")
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
    """SHA-256 of the file, followed by those that hold its external data; refused if it differs."""
    output: str | int | None = None
    """Name or position of the output where there are several."""

    def load(self, size: tuple[int, int], *, device: str) -> Run:  # noqa: ARG002 (the file knows it)
        """The ONNX model as a function of images BCHW; on the CPU it takes one thread.

        Raises `UserError` where onnxruntime has no provider for the device, or the model has not the output; and what
        onnxruntime raises for a file that is no model.
        """
        import onnxruntime  # noqa: PLC0415

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # the pool has a process for every core
        options.log_severity_level = 3
        provider = PROVIDERS[device.partition(":")[0]]
        session = onnxruntime.InferenceSession(self.file, options, providers=[provider])
        if provider not in session.get_providers():  # onnxruntime takes another in silence
            raise UserError(
                f"onnxruntime could not start {provider}: install onnxruntime-gpu in the place of onnxruntime, or set "
                "device=cpu for this prior"
            )
        names = [output.name for output in session.get_outputs()]
        choices: dict[str | int | None, str] = {name: name for name in names}
        choices |= {**dict(enumerate(names)), **dict(enumerate(names, -len(names)))}
        if len(names) == 1:
            choices[None] = names[0]
        if self.output not in choices:
            raise UserError(f"model.output={self.output!r} names none of its {len(names)} outputs: {', '.join(names)}")
        image = session.get_inputs()[0]
        dtype = np.float16 if image.type == "tensor(float16)" else np.float32

        def run(image_BCHW: Array) -> Array:
            inputs = {image.name: image_BCHW.astype(dtype, copy=False)}
            return np.asarray(session.run([choices[self.output]], inputs)[0], np.float32)

        return run


class Learned(PriorConfig):
    """An output of a model, as the map `learned-<of>` in [0, 1], on the grid of the model or of `stride`.

    Images are stretched to `size`, and run in batches that are filled up to `batch_size`, so that the map of an image
    depends on its place in the batch alone, and not on the other images. The map of the mirrored image is the mirrored
    map as far as the model treats left and right alike. Weights and their licence are the user's.
    """

    kind: Literal["learned"] = "learned"
    of: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """What the map shows; it names the map."""
    model: Annotated[TimmModel | OnnxModel, Field(discriminator="kind")]
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

        Raises `UserError` that names the file where it is missing, or is not the one of `sha256`.
        """
        with _named(self, "it cannot be read as a model"):
            try:
                digest = checksum(self.model)
            except FileNotFoundError as error:
                if self.model.sha256 is not None:
                    return self  # stored maps need no model; computing one reports the missing file
                raise UserError(
                    f"{error.filename} is missing: give the path of the weights or, where all maps are prepared, "
                    "model.sha256 as priors.json has it"
                ) from error
            if self.model.sha256 not in (None, digest):
                raise UserError(f"its sha256 is {digest}, and model.sha256 is {self.model.sha256}; correct one")
        return self.model_copy(update={"model": self.model.model_copy(update={"sha256": digest})})

    def identity(self) -> str:
        """What the maps depend on, as JSON: not the path of the weights, nor the batch size, nor the device."""
        assert self.model.sha256 is not None, "a prior is sealed before it is named"
        return self.model_dump_json(exclude={"model": {"file"}, "batch_size": True, "device": True})

    def map(self, image: ImageViews) -> Map:
        """The map of an image, float32; raises ValueError where the model gives values that are not finite."""
        (map_HWC,) = self.maps([image], device="cpu")
        if not np.isfinite(map_HWC).all():
            raise ValueError(f"{self.name}: the model gives values that are not finite")
        return map_HWC

    def maps(self, images: Sequence[ImageViews], *, device: str) -> list[Map]:
        """The maps of at most `batch_size` images, float32, by the model on `device`, a device of torch.

        Values that are not finite pass. Raises `UserError` where the model cannot be used, before its first map.
        """
        maps: list[Map] = []
        for values_CHW, image in zip(_values(self, _loaded(self, device), images), images, strict=False):
            map_HWC = np.ascontiguousarray(values_CHW.transpose(1, 2, 0))
            maps.append(map_HWC if self.stride is None else cell_means(map_HWC, grid_size(image, self.stride)))
        return maps


@lru_cache(maxsize=4)
def _loaded(prior: Learned, device: str) -> Run:
    """The model on a device, loaded once a process and tried on blank images before any map is taken from it."""
    with _named(prior, "it cannot be loaded; every worker needs a whole copy at this place"):
        digest = checksum(prior.model)
        if prior.model.sha256 not in (None, digest):
            raise UserError(f"its sha256 on this machine is {digest}, not {prior.model.sha256}: copy it here again")
        run = prior.model.load(prior.input_size, device=device)
    blank_BCHW = _values(prior, run, [])
    with _named(prior, "it fails"):
        if not np.isfinite(blank_BCHW).all():
            raise UserError("the model gives values that are not finite for blank images; check mean, std and weights")
    return run


def _values(prior: Learned, run: Run, images: Sequence[ImageViews]) -> Array:
    """The model's output in [0, 1] for a full batch: the images, then blank ones of the mean colour.

    Raises `UserError` where the output is no map of the prior's channels.
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
    what = f"the model does not run on float32 of {batch_BCHW.shape}: set size, colour and batch_size to what it takes"
    with _named(prior, what):
        output = run(batch_BCHW)
        values_BCHW = output[:, None] if output.ndim == 3 else output
        if values_BCHW.ndim != 4 or values_BCHW.shape[:2] != (prior.batch_size, prior.channels):
            raise UserError(
                f"its output has the shape {output.shape}, and {prior.batch_size} images x {prior.channels} channels x "
                "height x width belong there; set channels, or another model.output"
            )
        return scaled(values_BCHW, prior.scale)


@contextmanager
def _named(prior: Learned, what: str) -> Iterator[None]:
    """Turns every error into a `UserError` that names prior and file; `what` describes an error of a library."""
    place = f"the prior {prior.name!r}, {prior.model.file}"
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except Exception as error:  # a model of the user's may raise anything
        first_line = (str(error).strip().splitlines() or ["no message"])[0]
        raise UserError(f"{place}: {what} ({type(error).__name__}: {first_line})") from error


def scaled(values_BCHW: Array, scale: Scale) -> Array:
    """The values in [0, 1], each channel of each image by itself; NaN stays NaN.

    `unit` clips, `sigmoid` and `softmax` (over channels) are the functions, `largest` divides by the largest value,
    `minmax` takes the smallest to 0 and the largest to 1. Raises `UserError` where `unit` would clip much.
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
                f"its values go from {lowest:.3g} to {highest:.3g}, and scale=unit is for those in [0, 1]: "
                "set scale to sigmoid, softmax, largest or minmax"
            )
        return np.clip(values_BCHW, 0, 1)
    if scale == "minmax":
        values_BCHW = values_BCHW - values_BCHW.min((2, 3), keepdims=True)
    return np.clip(values_BCHW / np.maximum(values_BCHW.max((2, 3), keepdims=True), np.float32(1e-12)), 0, 1)


def checksum(model: TimmModel | OnnxModel) -> str:
    """SHA-256 of the model's files as they are now, 64 hex digits; read again only where size or date have changed.

    Raises `FileNotFoundError` where one is missing, and what onnx raises for a file that is no ONNX model.
    """
    state = _state(Path(model.file))
    external = _external_data(*state) if isinstance(model, OnnxModel) else ()
    return _digest(state, *(_state(path) for path in external))


def _state(path: Path) -> tuple[Path, int, int]:
    """What changes whenever a file does: its absolute path, size, and time of change."""
    status = path.stat()
    return path.absolute(), status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _digest(*files: tuple[Path, int, int]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _external_data(path: Path, _size: int, _changed_ns: int) -> tuple[Path, ...]:
    """The files beside an ONNX model that hold its larger tensors, by name."""
    import onnx  # noqa: PLC0415 (slow to load, and only for such models)
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data  # noqa: PLC0415

    graph = onnx.load_model(path, load_external_data=False).graph
    names = {ExternalDataInfo(tensor).location for tensor in graph.initializer if uses_external_data(tensor)}
    return tuple(path.parent / name for name in sorted(names))
