"""Classes that public weights were trained on: few-shot figures on such classes are not valid."""

from collections.abc import Collection, Iterable
from typing import Annotated

from pydantic import AfterValidator

SUBSETS = {"imagenet-1k": "imagenet1k", "imagenet-12k": "imagenet12k", "imagenet-21k": "imagenet21k"}
"""Data sets that timm knows, with its names."""


def _known(name: str) -> str:
    if name.casefold().startswith("imagenet") and name not in SUBSETS:
        raise ValueError(f"{name!r} is no data set that dpkd knows ({', '.join(SUBSETS)})")
    return name


Seen = Annotated[str, AfterValidator(_known)]
"""A class, or one of `SUBSETS`."""


def seen_among(classes: Collection[str], seen: Iterable[str]) -> list[str]:
    """The classes among `seen`, which has names of classes and of `SUBSETS`, sorted; case does not count.

    A class of ImageNet has the name of its synset (`n01443537`) or one of its words (`goldfish`, `gold_fish`).
    """
    names = {_plain(name) for name in seen if name not in SUBSETS}
    for subset in SUBSETS.keys() & seen:
        from timm.data.imagenet_info import ImageNetInfo  # noqa: PLC0415  (loads torch)

        info = ImageNetInfo(SUBSETS[subset])
        names.update(info.label_names())
        names.update(_plain(word) for text in info.label_descriptions() for word in text.split(", "))
    return sorted(name for name in classes if _plain(name) in names)


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()
