"""Labels in any script: with an installed font, or with a note in the figure; never with a warning per character."""

from __future__ import annotations

import warnings

import pytest

from lorakit.analysis.fonts import MISSING, fonts_for
from lorakit.analysis.heatmap import grids, plot

NOWHERE = "\U0010fffd"  # a private character


def test_labels_that_the_usual_font_has_need_no_other():
    import matplotlib

    before = list(matplotlib.rcParams["font.family"])
    with fonts_for(["‖ΔW‖", "q_proj é"]) as missing:
        assert missing is None
        assert matplotlib.rcParams["font.family"] == ["DejaVu Sans"]
    assert list(matplotlib.rcParams["font.family"]) == before


def test_a_character_without_a_font_is_noted_in_the_figure():
    with fonts_for(["a", NOWHERE]) as missing:
        assert missing == MISSING


@pytest.mark.parametrize("title", ["注意力", "어텐션", NOWHERE])
def test_any_title_is_drawn_without_warnings(title, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = plot(grids({f"model.layers.{i}.{title}": float(i) for i in range(3)}, "norm"), tmp_path / "a.png", title)
    assert path.stat().st_size > 1000
