"""The styles change pictures and keep their shape and range."""

from __future__ import annotations

import pytest

from lorakit.reproduce.emoji.pictures import scenes
from lorakit.reproduce.emoji.styles import STYLES


@pytest.mark.parametrize("name", STYLES)
def test_styles_keep_shape_and_range_and_change_the_picture(name):
    pictures = scenes("validation", 0, 4).pictures
    styled = STYLES[name](pictures)
    assert styled.shape == pictures.shape
    assert styled.amin() >= -1
    assert styled.amax() <= 1
    assert (styled - pictures).abs().mean() > 0.1
