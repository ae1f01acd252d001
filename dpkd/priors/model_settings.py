"""The models of the user's that a learned prior can run: where their weights stand, and which output counts."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dpkd.config import Config
from dpkd.errors import UserError

BLOCK_BYTES = 1 << 22


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


class TorchModel(Config):
    """A program of `torch.export.save` (.pt2), or TorchScript."""

    kind: Literal["torch"] = "torch"
    file: str
    sha256: str | None = None
    """SHA-256 of the file, which is refused if it differs; none takes what is there."""
    output: str | int | None = None
    """Key or position of the output where there are several."""


class OnnxModel(Config):
    """An ONNX model with one image input."""

    kind: Literal["onnx"] = "onnx"
    file: str
    sha256: str | None = None
    """SHA-256 of the file, followed by those that hold its external data; refused if it differs."""
    output: str | int | None = None
    """Name or position of the output where there are several."""


Model = Annotated[TimmModel | TorchModel | OnnxModel, Field(discriminator="kind")]


def checksum(model: TimmModel | TorchModel | OnnxModel) -> str:
    """SHA-256 of the model's files as they are now, 64 hex digits; read again only where size or date have changed.

    Raises `FileNotFoundError` where one is missing, and `UserError` for one that is no ONNX model.
    """
    path = Path(model.file)
    if path.is_dir():
        raise UserError("it is a folder: name the file of the weights in it")
    return _digest(tuple(_state(each) for each in (path, *_external_data(model, _state(path)))))


def _state(path: Path) -> tuple[str, int, int]:
    """What changes whenever a file does."""
    status = path.stat()
    return str(path.absolute()), status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in files:
        with Path(name).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _external_data(model: TimmModel | TorchModel | OnnxModel, _state: tuple[str, int, int]) -> tuple[Path, ...]:
    """The files beside an ONNX model that hold its larger tensors, by name."""
    if not isinstance(model, OnnxModel):
        return ()
    import onnx  # noqa: PLC0415 (slow to load, and only for such models)
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data  # noqa: PLC0415

    path = Path(model.file)
    try:
        graph = onnx.load_model(path, load_external_data=False).graph
    except Exception as error:  # protobuf and onnx have no error in common
        raise UserError(f"it cannot be read as an ONNX model ({error})") from error
    names = {ExternalDataInfo(tensor).location for tensor in graph.initializer if uses_external_data(tensor)}
    return tuple(path.parent / name for name in sorted(names))
