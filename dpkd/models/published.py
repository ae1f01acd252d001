"""The published weights of timm's models: downloaded once, before any work, or refused with the file to fetch."""

from contextlib import suppress
from typing import Any

import timm
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.utils import logging

from dpkd.errors import UserError
from dpkd.log import logger

FILES = ("model.safetensors", "pytorch_model.bin")


def fetch_weights(name: str) -> None:
    """Downloads the published weights of a model to the cache of the Hugging Face hub, where timm finds them.

    Raises `UserError` if there are none, and if they cannot be downloaded.
    """
    try:
        published: Any = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"timm has no weights of {name!r}: {error}") from error
    if published is None or not published.has_weights:
        raise UserError(f"timm has no published weights of {name!r}: set model.pretrained=false")
    repository = published.hf_hub_id
    if not repository:
        return  # timm downloads them from a URL of its own
    files = [published.hf_hub_filename] if published.hf_hub_filename else FILES
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        return
    logger.info(f"weights of {name}: asked for at huggingface.co/{repository}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the error below says what many lines of retries would
    try:
        for file in files:
            with suppress(RemoteEntryNotFoundError):
                hf_hub_download(repository, file)
                return
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"the weights of {name!r} are not on this machine, and huggingface.co cannot be reached: where it can, run "
            f"`hf download {repository} {files[0]}`, then copy the file here and give it as `weights` with "
            "model.pretrained=false, or copy the cache (HF_HOME)"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    raise UserError(f"huggingface.co/{repository} has none of {', '.join(files)}: give the weights as a file")
