"""Small sources and a pool without processes, for the tests of packing and of what reads packed data."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dpkd.data.settings import FolderSource
from dpkd.data.shards import Dataset
from dpkd.launch.pool import Item, Pool, Result
from dpkd.report.quarantine import Quarantine
from dpkd.settings import DataSettings
from dpkd.stages.pack import pack


class SerialPool:
    """The pool protocol in this process, for speed; `last_first` turns the order of the work around."""

    num_workers = 1

    def __init__(self, *, last_first: bool = False) -> None:
        self.last_first = last_first

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        numbers = range(len(items))
        for number in reversed(numbers) if self.last_first else numbers:
            yield number, function(items[number])


def image_bytes(seed: int, *, size: tuple[int, int] = (20, 16), image_format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def mask_bytes(*, size: tuple[int, int] = (20, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, 255).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(root: Path, *, counts: dict[str, int], masks: bool = False) -> Path:
    """Images at `<root>/<folder>/<number>.jpg`, as many as `counts` says for each folder."""
    for number, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / folder / f"{i:03d}.jpg").write_bytes(image_bytes(1000 * number + i))
            if masks:
                (root / folder / f"{i:03d}.mask.png").write_bytes(mask_bytes())
    return root


def make_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A tar by the standard library: {key: {extension: bytes}}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def tar_sample(seed: int, **meta: Any) -> dict[str, bytes]:
    return {"jpg": image_bytes(seed), "json": json.dumps(meta).encode()}


def pack_at(
    source: Path | Any,
    destination: Path | str,
    *,
    pool: Pool | None = None,
    seed: int = 0,
    limit: float = 0.5,
    **data: Any,
) -> Dataset:
    """Packs with few samples a shard; the quarantine stands beside the destination."""
    settings = DataSettings(
        source=FolderSource(path=str(source)) if isinstance(source, Path) else source,
        **{"samples_per_shard": 4, "val": None, "test": None, **data},
    )
    beside = Path(f"{destination}.quarantine.jsonl") if "://" not in str(destination) else Path("/dev/null")
    quarantine = Quarantine(beside, limit=limit)
    return pack(
        settings,
        str(destination),
        seed=seed,
        pool=pool or SerialPool(),
        quarantine=quarantine,
        progress=lambda done, total: None,
    )


def reasons(destination: Path) -> dict[str, str]:
    """item -> reason of the quarantine beside a destination."""
    path = Path(f"{destination}.quarantine.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["item"]: entry["reason"] for entry in map(json.loads, lines)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
