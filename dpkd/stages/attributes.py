"""The table of class attributes: checked against the data set, recorded with the stages, and scored zero-shot.

Loads no heavy package, because the driver of a run calls it too. Axes: N sample, K class, A attribute.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpkd.data.attributes import AttributeTable, read_attributes
from dpkd.data.shards import MANIFEST_NAME, Dataset
from dpkd.data.sources.records import nearest
from dpkd.errors import UserError
from dpkd.evaluation.attributes import zero_shot_accuracy
from dpkd.io import storage
from dpkd.log import logger
from dpkd.models.settings import NetworkSpec
from dpkd.settings import DataSettings, Settings

MAX_NAMED = 5
"""Classes that a line names; more are counted."""


def attribute_table(data: DataSettings) -> AttributeTable | None:
    """The table that `data.attributes` names, or None; raises `UserError` for a faulty table."""
    return None if data.attributes is None else read_attributes(data.attributes)


def trained_classes(dataset: Dataset, data: DataSettings) -> list[str]:
    """Classes of which the training split has labelled samples, in the data set's order."""
    counts = dataset.split(data.train).info.class_counts
    return [name for name, count in zip(dataset.manifest.classes, counts, strict=True) if count]


def refuse_unknown_classes(dataset: Dataset, settings: Settings) -> None:
    """Raises `UserError` where the table lacks a class that is trained on, or an objective names one that is not."""
    trained, table = trained_classes(dataset, settings.data), attribute_table(settings.data)
    if table is not None:
        table.rows(trained)
    for key, objective in settings.objectives.items():
        for field, names in objective.needs().classes.items():
            for name in names:
                if name not in trained:
                    near = nearest(name, trained) or f" (it has: {', '.join(trained[:MAX_NAMED]) or 'no label'})"
                    raise UserError(
                        f"{key}.{field} names {name!r}, of which the split {settings.data.train!r} has no "
                        f"sample{near}: mend it"
                    )


def log_unused_rows(dataset: Dataset, data: DataSettings) -> None:
    """Logs the rows of the table whose class the data set lacks: no fault, as a table may serve several data sets."""
    table, classes = attribute_table(data), dataset.manifest.classes
    unused = [name for name in table.classes if name not in classes] if table is not None else []
    if table is not None and unused:
        named = ", ".join(f"{name!r}{nearest(name, classes)}" for name in unused[:MAX_NAMED])
        more = f" and {len(unused) - MAX_NAMED} more" if len(unused) > MAX_NAMED else ""
        logger.info(f"data.attributes {table.path}: rows of no class of the data set train nothing: {named}{more}")


def recorded_attributes(data: DataSettings, *, url: str, everywhere: bool) -> dict[str, Any]:
    """The part of the table that results depend on, as plain values: the rows trained on, or `everywhere` all rows.

    So classes may be added later for the zero-shot evaluation of trained networks. Without a data set at `url` all rows
    count. Raises `UserError` for a faulty table.
    """
    table = attribute_table(data)
    assert table is not None, "settings require a table of attributes"
    packed = storage.exists(storage.join(url, MANIFEST_NAME))
    classes = table.classes if everywhere or not packed else trained_classes(Dataset.open(url), data)
    return {"names": list(table.names), "classes": {k: v for k, v in table.known().items() if k in classes}}


def zero_shot(
    specs: Mapping[str, NetworkSpec],
    embedded: Mapping[str, Mapping[str, NDArray[np.float32]]],
    label_N: NDArray[np.int64],
    *,
    dataset: Dataset,
    data: DataSettings,
    split: str,
) -> dict[str, dict[str, float]]:
    """Accuracy of each network on the split's classes that the table describes and training did not see.

    `embedded` holds logits `attributes` NA by network. A network that predicts none has no figure; with fewer than two
    such classes there is none at all. Raises `UserError` for a network that was trained on other attributes than the
    table has.
    """
    table, learned = attribute_table(data), {name: spec for name, spec in specs.items() if spec.attributes}
    if table is None or not learned:
        return {}
    names, trained, known = dataset.manifest.classes, trained_classes(dataset, data), table.known()
    unseen = [label for label in np.unique(label_N[label_N >= 0]).tolist() if names[label] not in trained]
    class_K = np.array([label for label in unseen if known.get(names[label])])
    if len(class_K) < len(unseen):
        left_out = ", ".join(names[label] for label in unseen if label not in class_K)
        logger.info(f"evaluate {split}: data.attributes says nothing of {left_out}: left out of zero-shot accuracy")
    if len(class_K) < 2:
        return {}
    figures = {}
    for name, spec in learned.items():
        if spec.attributes != table.names:
            raise UserError(
                f"{name} was trained on the attributes {', '.join(spec.attributes)}, and data.attributes {table.path} "
                f"has {', '.join(table.names)}: give the earlier table back, or train anew in another run.dir"
            )
        value_KA = table.rows([names[label] for label in class_K])
        # an attribute that is known of no trained class was never learned
        value_KA[:, np.isnan(table.rows(spec.classes)).all(0)] = np.nan
        figures[name] = zero_shot_accuracy(embedded[name]["attributes"], label_N, class_K=class_K, value_KA=value_KA)
    return figures
