"""Heads of networks, as objectives ask for them."""

from collections.abc import Mapping, Sequence

from dpkd.models.settings import HeadSpec


def heads(
    targets: Mapping[str, int] | None = None,
    *,
    teacher_dim: int | None = None,
    teacher_patch_dim: int | None = None,
    attributes: int = 0,
    regions: Sequence[str] = (),
) -> dict[str, HeadSpec]:
    """Heads for prior maps, a teacher's widths, attributes and regions."""
    found = {f"prior/{name}": HeadSpec(reads="patch", width=width) for name, width in (targets or {}).items()}
    if teacher_dim:
        found["to_teacher/embedding"] = HeadSpec(reads="embedding", width=teacher_dim)
        found["to_teacher/patch"] = HeadSpec(reads="patch", width=teacher_patch_dim or teacher_dim)
    if attributes:
        found["attributes"] = HeadSpec(reads="embedding", width=attributes)
    return found | {f"region/{name}": HeadSpec(reads="patch", width=1) for name in regions}
