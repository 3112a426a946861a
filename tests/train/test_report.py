"""`report.html`: well-formed, with the curves and the samples, and nothing that the data could inject."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from lorakit.train.config import TrainConfig
from lorakit.train.progress import Progress
from lorakit.train.report import write_report
from lorakit.train.run_folder import RunFolder
from lorakit.train.train import train


class Page(HTMLParser):
    """Tags with their attributes, and the text of each cell; fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "polyline", "circle", "line", "br"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def curve(self, name: str) -> list[tuple[float, float]]:
        points = next(a["points"] for t, a in self.tags if t == "polyline" and a["class"] == name)
        return [tuple(map(float, point.split(","))) for point in points.split()]


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.path.mkdir()
    return made


def test_a_run_ends_with_a_page_of_its_losses_samples_and_settings(make_config):
    config = make_config(steps=5, eval_every=2, learning_rate=0.004)
    train(config, Progress(quiet=True))
    folder = RunFolder(config.out)
    page = Page(folder.report.read_text())
    train_curve, held_curve = page.curve("train"), page.curve("held")
    assert (len(train_curve), len(held_curve)) == (5, 3)
    losses = [row["loss"] for row in folder.rows() if "loss" in row]
    highest = losses.index(max(losses))
    assert train_curve[highest][1] == min(y for _, y in train_curve + held_curve)  # up is small in SVG
    assert [x for x, _ in train_curve] == sorted(x for x, _ in train_curve)
    assert all(0 <= x <= 800 and 0 <= y <= 300 for x, y in train_curve + held_curve)
    sampled = json.loads(folder.sampled()[-1][1].read_text())
    text = " ".join(page.words)
    assert all(row["prompt"].strip() in text for row in sampled)
    assert re.search(r"learning_rate\s+0\.004", text)
    assert not {"script", "link", "img"} & {tag for tag, _ in page.tags}


def test_what_rows_and_settings_hold_is_text_not_markup(folder):
    evil = "<script>alert(1)</script>&\"'"
    folder.log({"step": 1, "loss": 2.0})
    folder.samples.mkdir()
    (folder.samples / "step-1.json").write_text(json.dumps([{"prompt": evil, "base": evil, "tuned": evil}]))
    write_report(folder, TrainConfig(data=evil))
    page = Page(folder.report.read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.words.count(evil) == 4


def test_the_newest_samples_are_shown_by_number_not_by_name(folder):
    folder.samples.mkdir()
    for step in (9, 10):
        (folder.samples / f"step-{step}.json").write_text(
            json.dumps([{"prompt": f"at {step}", "base": "b", "tuned": "t"}])
        )
    write_report(folder, TrainConfig(data="x"))
    assert "at 10" in Page(folder.report.read_text()).words


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": 3.0}], [{"step": s, "loss": 1.0} for s in (1, 2)]])
def test_runs_with_hardly_a_number_still_get_a_page(folder, rows):
    for row in rows:
        folder.log(row)
    write_report(folder, TrainConfig(data="x"))
    text = folder.report.read_text()
    Page(text)
    assert "nan" not in text.lower().replace("nan,", "")
    assert ("Nothing was logged" in text) == (not rows)
    assert "There are no samples" in text


def test_the_curve_of_a_run_without_held_out_rows_is_drawn(make_config):
    config = make_config(steps=3, validation=0)
    train(config, Progress(quiet=True))
    page = Page(RunFolder(config.out).report.read_text())
    assert len(page.curve("train")) == 3
    assert page.curve("held") == []
