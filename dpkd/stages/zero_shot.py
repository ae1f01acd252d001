"""Zero-shot figures of the networks that predict attributes. Axes: N sample, K class, A attribute."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpkd.errors import UserError
from dpkd.evaluation.attributes import zero_shot_accuracy
from dpkd.log import logger
from dpkd.models.settings import NetworkSpec
from dpkd.stages.embed import Embedded
from dpkd.stages.run import Run
from dpkd.stages.statements import attribute_table, trained_classes


def zero_shot(
    run: Run,
    specs: Mapping[str, NetworkSpec],
    embedded: Mapping[str, Embedded],
    label_N: NDArray[np.int64],
    *,
    split: str,
    tables: dict[str, dict[str, Any]],
) -> None:
    """Adds the accuracy on the split's classes that the table describes and training did not see, where two or more.

    Raises `UserError` for a network that was trained on other attributes than the table has.
    """
    table = attribute_table(run.data)
    learnt = {name: spec for name, spec in specs.items() if spec.attributes}
    if table is None or not learnt:
        return
    names, trained, known = run.dataset.manifest.classes, trained_classes(run.dataset, run.data), table.known()
    labels = np.unique(label_N[label_N >= 0]).tolist()
    unseen = [label for label in labels if names[label] not in trained]
    class_K = np.array([label for label in unseen if known.get(names[label])])
    if len(class_K) < len(unseen) and run.world.rank == 0:
        left_out = ", ".join(names[label] for label in unseen if label not in class_K)
        logger.info(f"evaluate {split}: data.attributes says nothing of {left_out}: left out of zero-shot accuracy")
    if len(class_K) < 2:
        return
    for name, spec in learnt.items():
        if spec.attributes != table.names:
            raise UserError(
                f"{name} was trained on the attributes {', '.join(spec.attributes)}, and data.attributes {table.path} "
                f"has {', '.join(table.names)}: give the earlier table back, or train anew in another run.dir"
            )
        attribute_NA = embedded[name].attribute_NA
        assert attribute_NA is not None, "a network with attributes predicts them"
        value_KA = table.rows([names[label] for label in class_K])
        # what no class trained on is known to have or lack was never learnt
        value_KA[:, np.isnan(table.rows(spec.classes)).all(0)] = np.nan
        figures = zero_shot_accuracy(attribute_NA, label_N, class_K=class_K, value_KA=value_KA)
        tables[name].setdefault("zero_shot", {})[split] = figures
