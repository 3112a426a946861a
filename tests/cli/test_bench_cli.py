"""`lorakit bench`: what it prints and writes, and how it reports what is missing."""

from __future__ import annotations

import json

import pytest
import torch

from lorakit.bench import suite

ROWS = [{"side": "base", "ms": 12.5, "losses": [1.0, 2.0]}, {"side": "other", "ms": 25.0, "losses": [3.0]}]


@pytest.fixture
def fake(monkeypatch):
    """Replace the table `latency` by fixed rows; returns the list of its calls."""
    calls = []
    module = suite.load("latency")
    monkeypatch.setattr(module, "run", lambda quick=False: calls.append(quick) or ROWS)
    monkeypatch.setattr(module, "plot", lambda rows, axes: axes.bar([r["side"] for r in rows], [r["ms"] for r in rows]))
    return calls


def test_a_table_is_printed_with_machine_title_and_command(lorakit, fake):
    code, out, _ = lorakit("bench", "latency", "--quick")
    assert (code, fake) == (0, [True])
    for words in (
        "threads",
        "torch",
        "base",
        "12.5",
        "lorakit bench latency --quick",
        suite.load("latency").TITLE.split("\n")[0][:60],
    ):
        assert words in out


def test_json_has_the_machine_and_all_rows(lorakit, fake, tmp_path):
    assert lorakit("bench", "latency", "--json", tmp_path / "b.json")[0] == 0
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["machine"]["torch"]
    assert written["tables"]["latency"]["rows"] == ROWS
    assert fake == [False]


def test_plots_are_drawn_into_the_folder(lorakit, fake, tmp_path):
    code, out, _ = lorakit("bench", "latency", "--plots", tmp_path / "plots")
    assert code == 0
    assert (tmp_path / "plots" / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert "latency.png" in out


def test_a_wrong_name_is_a_usage_error_before_anything_runs(lorakit, fake):
    code, _, err = lorakit("bench", "latency", "latencies")
    assert (code, fake) == (2, [])
    assert "did you mean 'latency'" in err


def test_a_missing_peer_is_reported_and_the_other_tables_run(lorakit, fake, monkeypatch):
    def run(quick=False):
        raise suite.MissingPeer("peft")

    monkeypatch.setattr(suite.load("attach"), "run", run)
    code, out, _ = lorakit("bench", "attach", "latency")
    assert (code, fake) == (1, [False])
    assert "not measured: peft is not installed" in out
    assert "pip install 'lorakit[bench]'" in out
    assert "12.5" in out


def test_a_file_for_plots_is_refused_before_anything_runs(lorakit, fake, tmp_path):
    (tmp_path / "plots").write_text("")
    code, _, err = lorakit("bench", "latency", "--plots", tmp_path / "plots")
    assert (code, fake) == (2, [])
    assert "is a file" in err


def test_the_requested_precision_reaches_the_table_and_its_command(lorakit, monkeypatch):
    seen = []
    monkeypatch.setattr(
        suite.load("latency"), "run", lambda quick=False, precisions=(): seen.append(precisions) or ROWS
    )
    code, out, _ = lorakit("bench", "latency", "--precision", "fp32")
    assert (code, seen) == (0, [(torch.float32,)])
    assert "lorakit bench latency --precision fp32" in out


def test_an_omitted_precision_is_reported_for_tables_with_several(lorakit, fake, monkeypatch):
    monkeypatch.setattr(suite, "precisions", lambda asked: ((torch.float32,), "bf16 is left out"))
    assert "left out" not in lorakit("bench", "latency")[1]
    monkeypatch.setattr(suite.load("latency"), "run", lambda quick=False, precisions=(): ROWS)
    assert "bf16 is left out" in lorakit("bench", "latency")[1]
