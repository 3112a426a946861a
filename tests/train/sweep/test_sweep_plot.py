"""A sweep's plot: steps are whole numbers, and settings in any script are drawn."""

from __future__ import annotations

import warnings

from matplotlib.figure import Figure

from lorakit.train.sweep import sweep_plot
from lorakit.train.sweep.leaderboard import Entry


def entry(name: str, loss: float, **settings) -> Entry:
    curve = [(step, loss + 1 / step) for step in (1, 2, 3)]
    return Entry(name, "", settings, loss, 3, loss, 3, 3, None, None, 1e-3, 10, 1.0, "adapter", curve)


RUNS = [entry("data=数据,rank=2", 1.0, data="数据.jsonl", rank=2), entry("data=$x,rank=4", 2.0, data="$x", rank=4)]


def test_the_steps_on_the_axis_are_whole_numbers():
    ax = Figure().add_subplot()
    sweep_plot._curves(ax, RUNS)
    ticks = ax.get_xticks()
    assert all(tick == round(tick) for tick in ticks)
    assert {1, 2, 3} <= set(ticks)


def test_names_in_any_script_and_with_dollar_signs_are_drawn_without_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sweep_plot.plot(RUNS, ["data", "rank"], tmp_path / "plot.png", "扫描")
    assert (tmp_path / "plot.png").stat().st_size > 1000
