"""A network on disk: a folder with its weights and what they were built from.

    <folder>/model.safetensors    every tensor of the network's state dict, by its name
    <folder>/network.json         {"format_version": 1, "weights_sha256": "…", "spec": {…}, "checksum": …}; written last

The weights count only together with a `network.json` that names their checksum.
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
    """Writes a network's state dict and spec into a folder; a write cut short leaves no network that loads.

    Raises `UserError` where the folder cannot be written.
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
    """The network that `save_network` wrote, with its spec, on CPU and in evaluation mode.

    Raises `UserError` that names the file: missing, of another format, damaged, or of other tensors than the spec's.
    """
    path, weights = folder / SPEC_NAME, folder / WEIGHTS_NAME
    try:
        head = parse_checked(storage.read_bytes(path))
        if head["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version is {head['format_version']}, this dpkd reads {FORMAT_VERSION}; "
                "load it with the version that wrote it (versions.json of its run)"
            )
        spec, checksum = NetworkSpec.model_validate(head["spec"]), head["weights_sha256"]
        data = storage.read_bytes(weights)
    except NO_FILE as error:
        missing = path if not path.is_file() else weights
        raise UserError(f"{missing} is missing: run the stage that makes it again") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); run its stage again") from error
    if storage.digest(data) != checksum:
        raise UserError(f"{weights} is not what {SPEC_NAME} beside it describes: damaged; run its stage again")
    start = spec.model.model_copy(update={"pretrained": False})  # the weights on disk replace them all
    network = build_network(spec.model_copy(update={"model": start}), seed=0)
    network.spec = spec
    try:
        network.load_state_dict(safetensors.torch.load(data))
    except RuntimeError as error:
        raise UserError(
            f"{weights} holds other tensors than its spec builds ({str(error)[:500]}); "
            "was it written with another timm? versions.json of its run tells which"
        ) from error
    return network.eval()
