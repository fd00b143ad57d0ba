"""Points into clusters of neighbours."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def kmeans(points: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Cluster points by Lloyd's algorithm from ten k-means++ starts, the best kept (scikit-learn's ``KMeans``).

    Args:
        points: ``[n, features]``, any float dtype; taken in float64.
        clusters: how many; fewer where there are fewer distinct points.
        seed: of the starts. The result doesn't depend on the number of threads.

    Returns:
        The cluster of each point, ``[n]`` int64 on the CPU; every number from 0 to the largest occurs.
    """
    # A second to import, which only runs that cluster should wait for.
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    exact = points.double().cpu().numpy()
    number = min(clusters, len(np.unique(exact, axis=0)))
    with threadpool_limits(limits=1):  # threads add up in any order
        labels = KMeans(n_clusters=number, n_init=10, random_state=seed).fit_predict(exact)
    return torch.from_numpy(np.unique(labels, return_inverse=True)[1]).long()
