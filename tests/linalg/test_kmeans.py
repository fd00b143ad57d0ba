"""k-means against all partitions of a few points, and what its callers rely on."""

from __future__ import annotations

import itertools

import torch

from llmc.linalg import kmeans


def inertia(points: torch.Tensor, labels: torch.Tensor) -> float:
    parts = [points[labels == label] for label in labels.unique()]
    return float(sum((part - part.mean(0)).square().sum() for part in parts))


def test_the_partition_is_the_best_of_all():
    points = torch.randn(8, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    best = min(inertia(points, torch.tensor(labels)) for labels in itertools.product(range(3), repeat=8))
    assert abs(inertia(points, kmeans(points, 3)) - best) < 1e-12


def test_every_number_occurs_also_where_points_coincide():
    points = torch.tensor([[0.0, 0.0]] * 5 + [[1.0, 2.0]] * 3)
    labels = kmeans(points, 4)
    assert labels.unique().tolist() == [0, 1]
    assert len(labels[:5].unique()) == len(labels[5:].unique()) == 1


def test_a_seed_gives_the_same_clusters():
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kmeans(points, 7, seed=1), kmeans(points, 7, seed=1))
