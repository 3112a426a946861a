"""The rules of the verdicts, on differences whose interval is known."""

from __future__ import annotations

import pytest

from lorakit.experiments.seeds import Difference
from lorakit.experiments.verdicts import MARGIN, alike, joined, lower, not_higher

WIDE = (0.01, 0.4)  # a small difference that says nothing, as its interval is wide


@pytest.mark.parametrize(
    "mean, within, is_lower, is_not_higher, is_alike",
    [
        (-0.3, 0.1, "agrees", "agrees", "disagrees"),
        (0.3, 0.1, "disagrees", "disagrees", "disagrees"),
        (0.0, 0.02, "within noise", "agrees", "agrees"),
        (*WIDE, "within noise", "within noise", "within noise"),
        (-0.2, 0.3, "within noise", "within noise", "within noise"),
        (0.04, 0.02, "disagrees", "within noise", "within noise"),  # significant, and perhaps within the margin
        (0.03, 0.01, "disagrees", "agrees", "agrees"),  # significant, and certainly within the margin
        (0.0, None, "within noise", "within noise", "within noise"),  # one seed
    ],
)
def test_a_difference_decides_only_what_its_interval_does(mean, within, is_lower, is_not_higher, is_alike):
    assert MARGIN == 0.05
    apart = Difference(mean, within)
    assert (lower(apart), not_higher(apart), alike(apart)) == (is_lower, is_not_higher, is_alike)


def test_a_claim_of_several_parts_holds_only_with_all_of_them():
    assert joined(["agrees", "agrees"]) == "agrees"
    assert joined(["agrees", "within noise"]) == "within noise"
    assert joined(["within noise", "disagrees"]) == "disagrees"
