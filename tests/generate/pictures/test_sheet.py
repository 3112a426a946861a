"""Which pictures a grid has, and where."""

from __future__ import annotations

import pytest

from lorakit.errors import ConfigError
from lorakit.generate.pictures.sheet import Value, sheet


def values(adapters=1, scales=1, prompts=1, seeds=1):
    counts = {"adapter": adapters, "scale": scales, "prompt": prompts, "seed": seeds}
    return {axis: [Value(n, f"{axis} {n}") for n in range(count)] for axis, count in counts.items()}


def test_a_single_picture():
    one = sheet(values())
    assert (one.rows, one.columns) == ([""], [""])
    assert one.pictures == [{"adapter": 0, "scale": 0, "prompt": 0, "seed": 0}]


def test_prompts_are_columns_and_the_rest_rows():
    grid = sheet(values(scales=3, prompts=2))
    assert grid.rows == ["scale 0", "scale 1", "scale 2"]
    assert grid.columns == ["prompt 0", "prompt 1"]
    assert grid.cells[2][1] == {"adapter": 0, "scale": 2, "prompt": 1, "seed": 0}
    three = sheet(values(adapters=2, prompts=2, seeds=2))
    assert three.rows == ["adapter 0, seed 0", "adapter 0, seed 1", "adapter 1, seed 0", "adapter 1, seed 1"]
    assert len(three.pictures) == 8


def test_without_prompts_the_last_axis_is_the_columns():
    grid = sheet(values(scales=2, seeds=3))
    assert grid.rows == ["scale 0", "scale 1"]
    assert grid.columns == ["seed 0", "seed 1", "seed 2"]


def test_the_axes_may_be_chosen():
    grid = sheet(values(scales=2, prompts=2, seeds=2), ["prompt", "seed"])
    assert grid.columns == ["seed 0", "seed 1"]
    assert grid.rows == ["prompt 0, scale 0", "prompt 0, scale 1", "prompt 1, scale 0", "prompt 1, scale 1"]
    assert {tuple(p.values()) for p in grid.pictures} == {(0, s, p, n) for s in (0, 1) for p in (0, 1) for n in (0, 1)}
    down = sheet(values(seeds=3), ["seed"])
    assert (down.rows, down.columns) == (["seed 0", "seed 1", "seed 2"], [""])


def test_one_axis_is_a_row_a_column_or_wrapped():
    assert sheet(values(prompts=6)).columns == [f"prompt {n}" for n in range(6)]
    assert sheet(values(prompts=7)).rows == [f"prompt {n}" for n in range(7)]
    assert len(sheet(values(seeds=12)).columns) == 4
    assert sheet(values(seeds=9)).rows == ["seeds 0 to 2", "seeds 3 to 5", "seeds 6 to 8"]
    seeds = sheet(values(seeds=13))
    assert seeds.rows == ["seeds 0 to 2", "seeds 3 to 5", "seeds 6 to 8", "seeds 9 to 11", "seed 12"]
    assert [len(row) for row in seeds.cells] == [3] * 5
    assert seeds.cells[4][1:] == [None] * 2
    assert [p["seed"] for p in seeds.pictures] == list(range(13))


@pytest.mark.parametrize(
    "axes, message", [(["sed"], "did you mean 'seed'"), (["seed", "seed"], "names 'seed' twice"), ([""], "no axis ''")]
)
def test_axes_that_are_none(axes, message):
    with pytest.raises(ConfigError, match=message):
        sheet(values(seeds=2), axes)
