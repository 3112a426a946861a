"""`report.html`: well-formed, with the curves and the samples, and nothing that the data could inject."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from lorakit.train.chart import ticks
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
    assert all(0 <= x <= 800 and 0 <= y <= 320 for x, y in train_curve + held_curve)
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


def test_the_page_says_what_was_trained_on_what_and_how_well(make_config):
    config = make_config(steps=4, eval_every=2)
    train(config, Progress(quiet=True))
    folder = RunFolder(config.out)
    page = Page(folder.report.read_text())
    text = " ".join(page.words)
    best = min(row["held_out_loss"] for row in folder.rows() if "held_out_loss" in row)
    tokens = sum(row["tokens"] for row in folder.rows() if "loss" in row)
    assert re.search(rf"best held-out loss\s+{best:.4f}\s+step [24]", text)
    assert re.search(rf"trained tokens\s+{tokens:,}\s+[\d,]+ a second", text)
    assert re.search(r"training time\s+\d+ s", text)
    assert "32,032 parameters" in text
    assert "19 rows to train on, 5 held out" in text
    assert f"{config.model}, trained on rows.jsonl" in text


def test_both_axes_are_labelled_and_steps_are_whole_numbers(folder):
    for step in (1, 2, 3):
        folder.log({"step": step, "loss": 2.5 - step / 4})
    write_report(folder, TrainConfig(data="x"))
    words = [word.strip() for word in Page(folder.report.read_text()).words]
    at = words.index("step", words.index("Loss"))
    assert "loss" in words[at : at + 4]
    ticks = [word for word in words[words.index("Loss") : at] if re.fullmatch(r"[\d.]+", word)]
    assert [tick for tick in ticks if "." not in tick] == ["0", "1", "2", "3"]
    assert {"1.8", "2.2"} & set(ticks)


def test_the_best_evaluation_is_marked_where_its_curve_is(folder):
    for step, loss in ((2, 3.0), (4, 1.0), (6, 2.0)):
        folder.log({"step": step, "loss": loss, "seconds": step})
        folder.log({"step": step, "held_out_loss": loss, "held_out_perplexity": None})
    write_report(folder, TrainConfig(data="x"))
    page = Page(folder.report.read_text())
    (best,) = [a for t, a in page.tags if t == "circle" and a["class"] == "best"]
    assert (float(best["cx"]), float(best["cy"])) == page.curve("held")[1]


def test_long_words_wrap_and_line_breaks_stay(folder):
    folder.samples.mkdir()
    sample = {"prompt": "a\nb", "base": "x" * 500, "tuned": "\x1b[31mred"}
    (folder.samples / "step-1.json").write_text(json.dumps([sample]))
    write_report(folder, TrainConfig(data="x"))
    text = folder.report.read_text()
    assert "a\nb" in text
    assert "\x1b" not in text
    assert "overflow-wrap: anywhere" in text
    assert "white-space: pre-wrap" in text


def test_the_page_follows_the_screen(folder):
    write_report(folder, TrainConfig(data="x"))
    text = folder.report.read_text()
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_a_long_curve_is_drawn_as_means(folder):
    for step in range(1, 2502):
        folder.log({"step": step, "loss": 1.0 + step % 2})
    write_report(folder, TrainConfig(data="x"))
    text = folder.report.read_text()
    points = Page(text).curve("train")
    assert len(points) == 834  # 2,501 steps, three to a point
    assert "mean of 3 steps" in text


@pytest.mark.parametrize(
    "low, high, whole, expected",
    [
        (0, 30, True, [0, 10, 20, 30]),
        (0, 2, True, [0, 1, 2]),
        (1.3, 3.46, False, [1, 1.5, 2, 2.5, 3, 3.5]),
        (0.00012, 0.00019, False, [0.00012, 0.00014, 0.00016, 0.00018, 0.0002]),
    ],
)
def test_ticks_are_round_numbers_around_the_values(low, high, whole, expected):
    assert ticks(low, high, whole=whole) == pytest.approx(expected)
