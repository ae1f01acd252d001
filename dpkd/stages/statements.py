"""Expert statements against the data set: checked before the work that they would spoil, and recorded with it.

Loads no heavy package: the driver of a run asks it too.
"""

from typing import Any

from dpkd.data.attributes import AttributeTable, read_attributes
from dpkd.data.shards import MANIFEST_NAME, Dataset
from dpkd.data.sources.records import nearest
from dpkd.errors import UserError
from dpkd.io import storage
from dpkd.log import logger
from dpkd.settings import DataSettings, Settings

MAX_NAMED = 5
"""Classes that a line names; more are counted."""


def attribute_table(data: DataSettings) -> AttributeTable | None:
    """The table that `data.attributes` names, if it does; raises `UserError` for a table at fault."""
    return None if data.attributes is None else read_attributes(data.attributes)


def refuse_unknown_classes(dataset: Dataset, settings: Settings) -> None:
    """Raises `UserError` where the table lacks a class that is trained on, or an objective names one that is not."""
    data, trained = settings.data, trained_classes(dataset, settings.data)
    table = attribute_table(data)
    if table is not None:
        table.rows(trained)
    for key, objective in settings.objectives.items():
        for field, names in objective.needs().classes.items():
            for name in names:
                if name not in trained:
                    near = nearest(name, trained) or f" (it has: {', '.join(trained[:MAX_NAMED]) or 'no label'})"
                    raise UserError(
                        f"{key}.{field} names {name!r}, of which the split {data.train!r} has no sample{near}: mend it"
                    )


def log_unused_rows(dataset: Dataset, data: DataSettings) -> None:
    """Says which rows of the table are of no class of the data set: no fault, as a table may serve several of them."""
    table, classes = attribute_table(data), dataset.manifest.classes
    unused = [name for name in table.classes if name not in classes] if table is not None else []
    if table is not None and unused:
        named = ", ".join(f"{name!r}{nearest(name, classes)}" for name in unused[:MAX_NAMED])
        more = f" and {len(unused) - MAX_NAMED} more" if len(unused) > MAX_NAMED else ""
        logger.info(f"data.attributes {table.path}: rows of no class of the data set train nothing: {named}{more}")


def trained_classes(dataset: Dataset, data: DataSettings) -> list[str]:
    """Classes of which the training split has labelled samples, in the data set's order."""
    counts = dataset.split(data.train).info.class_counts
    return [name for name, count in zip(dataset.manifest.classes, counts, strict=True) if count]


def recorded_attributes(data: DataSettings, *, url: str, everywhere: bool) -> dict[str, Any]:
    """What results depend on of the table, as plain values: the rows trained on, or `everywhere` all of them.

    So classes may be described later on for the zero-shot evaluation, under networks that stand. Before there is a
    data set at `url` all rows count. Raises `UserError` for a table at fault.
    """
    table = attribute_table(data)
    assert table is not None, "settings see to it that there is a table"
    packed = storage.exists(storage.join(url, MANIFEST_NAME))
    classes = table.classes if everywhere or not packed else trained_classes(Dataset.open(url), data)
    return {"names": list(table.names), "classes": {k: v for k, v in table.known().items() if k in classes}}
