"""The effective rank of embeddings, which needs no label: a network whose embeddings collapse has a low one."""

import numpy as np
from numpy.typing import NDArray

COLLAPSED = 1.5
"""An effective rank below which nearly all embeddings lie on one line."""


def effective_rank(embedding_ND: NDArray[np.floating]) -> float:
    """RankMe (Garrido et al. 2023): exp of the entropy of the normalised singular values; from 1 to min(N, D).

    It is 0 if all embeddings are zero.
    """
    value_D = np.linalg.svd(embedding_ND.astype(np.float64), compute_uv=False)
    share_D = value_D[value_D > 0] / max(value_D.sum(), np.finfo(np.float64).tiny)
    return float(np.exp(-(share_D * np.log(share_D)).sum())) if len(share_D) else 0.0
