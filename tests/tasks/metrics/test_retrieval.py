"""Ranks and recall, counted by hand."""

from __future__ import annotations

import pytest
import torch

from lorakit.tasks.metrics.retrieval import ranks_of, recall_at


def test_ranks_and_recall_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.2, 0.3, -torch.inf]])
    ranks = ranks_of(scores, torch.tensor([0, 2, 0]))
    assert ranks == [1, 2, 2]
    assert recall_at(ranks, 1) == pytest.approx(1 / 3)
    assert recall_at(ranks, 2) == 1


def test_a_model_that_scores_everything_alike_finds_nothing():
    assert ranks_of(torch.zeros(2, 4), torch.tensor([0, 3])) == [4, 4]


def test_no_queries_have_no_recall():
    with pytest.raises(ValueError, match="no queries"):
        recall_at([], 1)
