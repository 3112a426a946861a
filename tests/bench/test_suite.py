"""The common part of `lorakit bench`: names, missing peers, tables and plots."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lorakit.bases import device
from lorakit.bench import suite
from lorakit.config import Choice
from lorakit.errors import ConfigError

WIRED = [name for name in suite.NAMES if (Path(suite.__file__).parent / f"{name.replace('-', '_')}.py").exists()]


def shown(rows) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(suite.table(rows))
    return out.getvalue()


def running(monkeypatch, run):
    """Replace the latency table's `run`."""
    monkeypatch.setattr(suite.load("latency"), "run", run)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"'trainstep'; did you mean 'train-step'\?") as error:
        suite.load("trainstep")
    assert all(name in str(error.value) for name in suite.NAMES)


@pytest.mark.parametrize("name", WIRED)
def test_every_table_has_a_title_and_imports_without_peers(name):
    code = (
        "import sys\n"
        "for peer in ('peft', 'loralib', 'trl', 'diffusers'): sys.modules[peer] = None\n"
        f"from lorakit.bench import suite; bench = suite.load({name!r}); assert len(bench.TITLE) > 40 and "
        "callable(bench.run)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_peer_is_named_with_the_command_that_installs_it(monkeypatch):
    def run(quick):
        raise ModuleNotFoundError("No module named 'trl.trainer'", name="trl.trainer")

    running(monkeypatch, run)
    with pytest.raises(suite.MissingPeer, match=r"trl is not installed\n  pip install 'lorakit\[bench\]'"):
        suite.measure("latency", quick=True)


def test_another_missing_module_is_not_taken_for_a_peer(monkeypatch):
    def run(quick):
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    running(monkeypatch, run)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        suite.measure("latency", quick=True)


def test_need_raises_for_a_missing_peer(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trl" else object())
    suite.need("peft")
    with pytest.raises(suite.MissingPeer, match="trl"):
        suite.need("peft", "trl")


def test_a_table_rounds_numbers_shows_gaps_as_dashes_and_omits_lists():
    text = shown(
        [
            {"what": "a", "ms": 1234.56, "ratio": 0.12345, "curve": [1, 2]},
            {"what": "b", "ms": None, "ratio": 3, "new": "x"},
        ]
    )
    assert "1,235" in text
    assert "0.123" in text
    assert "–" in text
    assert "curve" not in text
    assert "new" in text


def test_the_machine_line_names_processor_gpu_and_versions():
    facts = suite.machine()
    line = suite.machine_line(facts)
    assert facts["cpu"]
    assert f"{facts['cores']} cores" in line
    assert f"torch {facts['torch']}" in line
    assert "not measured" in suite.machine_line(facts | {"gpu": None})
    assert "H200" in suite.machine_line(facts | {"gpu": "NVIDIA H200"})


def test_a_table_without_a_plot_saves_none(monkeypatch, tmp_path):
    monkeypatch.delattr(suite.load("latency"), "plot")
    assert suite.save_plot("latency", [], tmp_path / "plots") is None
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    "requested, native, expected",
    [
        ("fp32", torch.bfloat16, [torch.float32]),
        ("bf16", torch.float32, [torch.bfloat16]),
        ("all", torch.float32, [torch.float32, torch.bfloat16]),
        (None, torch.bfloat16, [torch.float32, torch.bfloat16]),
        (None, torch.float32, [torch.float32]),
    ],
)
def test_precisions_are_those_requested_or_native(monkeypatch, requested, native, expected):
    monkeypatch.setattr(
        device, "choose_dtype", lambda precision, device: Choice(native, "the CPU has no bf16 arithmetic")
    )
    measured, notice = suite.precisions(requested)
    assert list(measured) == expected
    assert bool(notice) == (requested is None and native == torch.float32)
    assert not notice or "--precision all" in notice


def test_precisions_are_passed_only_to_tables_that_take_them(monkeypatch):
    running(monkeypatch, lambda quick, precisions=(): [{"precisions": precisions}])
    assert suite.measure("latency", True, (torch.float32,)) == [{"precisions": (torch.float32,)}]
    running(monkeypatch, lambda quick: [{"quick": quick}])
    assert suite.measure("latency", True, (torch.float32,)) == [{"quick": True}]


@pytest.mark.parametrize("name", ["train-step", "image-step", "joint", "trainer"])
def test_tables_that_take_precisions_are_recognised(name):
    assert suite.measures_precisions(name)


def test_a_training_step_is_measured_with_and_without_dropout_in_each_precision(monkeypatch):
    from lorakit.bench import train_step

    seen = []
    sides = {"floor": (1.0, 1), "PEFT": (2.0, 2)}
    monkeypatch.setattr(train_step, "measure", lambda shape, dtype, dropout, *a: seen.append((dtype, dropout)) or sides)
    train_step.run(True)
    assert seen == [(torch.float32, 0.0), (torch.float32, 0.1), (torch.bfloat16, 0.0), (torch.bfloat16, 0.1)]
    seen.clear()
    train_step.run(True, [torch.float32])
    assert seen == [(torch.float32, 0.0), (torch.float32, 0.1)]
