"""A network on disk: a folder with its weights and its spec.

    <folder>/model.safetensors    every tensor of the network's state dict, by name
    <folder>/network.json         {"format_version": 1, "weights_sha256": "…", "spec": {…}, "checksum": …}; written last

The weights are valid only with a `network.json` that has their checksum.
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.record import checked, parse_checked
from dpkd.models.network import Network, build_network
from dpkd.models.settings import NetworkSpec

FORMAT_VERSION = 1
WEIGHTS_NAME = "model.safetensors"
SPEC_NAME = "network.json"


def save_network(folder: Path, spec: NetworkSpec, state: Mapping[str, Tensor]) -> None:
    """Writes a network's state dict and spec to a folder; after an interrupted write, the folder does not load.

    Raises `StorageError` if the folder cannot be written.
    """
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()})
    head = {
        "format_version": FORMAT_VERSION,
        "weights_sha256": storage.digest(data),
        "spec": spec.model_dump(mode="json"),
    }
    storage.write_bytes_atomic(folder / WEIGHTS_NAME, data)
    storage.write_bytes_atomic(folder / SPEC_NAME, checked(head))


def load_network(folder: Path) -> Network:
    """The network written by `save_network`, with its spec, on CPU and in evaluation mode.

    Raises `UserError` with the file if it is missing or damaged, or has another format or other tensors than the spec.
    """
    path, weights = folder / SPEC_NAME, folder / WEIGHTS_NAME
    try:
        head = parse_checked(storage.read_bytes(path))
        if head["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version is {head['format_version']}, and this dpkd reads {FORMAT_VERSION}; "
                "use the dpkd version in versions.json of its run"
            )
        spec, checksum = NetworkSpec.model_validate(head["spec"]), head["weights_sha256"]
        data = storage.read_bytes(weights)
    except NO_FILE as error:
        missing = path if not path.is_file() else weights
        raise UserError(f"{missing} is missing: run its stage again") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); run its stage again") from error
    if storage.digest(data) != checksum:
        raise UserError(f"{weights} is damaged: its checksum differs from {SPEC_NAME}; run its stage again")
    start = spec.model.model_copy(update={"pretrained": False})  # the weights on disk replace all pretrained ones
    network = build_network(spec.model_copy(update={"model": start}), seed=0)
    network.spec = spec
    try:
        network.load_state_dict(safetensors.torch.load(data))
    except RuntimeError as error:
        raise UserError(
            f"{weights} has other tensors than its spec ({str(error)[:500]}); "
            "use the timm version in versions.json of its run"
        ) from error
    return network.eval()
