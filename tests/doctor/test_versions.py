"""Installed libraries are judged by our bounds and the tested releases; the pins are the tested releases."""

from __future__ import annotations

import pytest

from lorakit.doctor import versions


@pytest.mark.parametrize(
    "here, state",
    [
        ("1.4", "tested"),
        ("1.4.0", "tested"),
        ("1.4+cpu", "tested"),
        ("1.3.9", "older"),
        ("1.5", "newer"),
        ("1.4.post1", "newer"),
        ("0.9", "outside"),
        ("2.0", "outside"),
        (None, "missing"),
    ],
)
def test_a_version_is_judged_by_bounds_and_tested_release(here, state):
    assert versions.judge("Some_Lib>=1.0,<2", here, "1.4").state == state


def test_a_release_within_bounds_needs_no_tested_one():
    assert versions.judge("lib>=1", "3", None).state == "untested"


def test_the_fix_installs_the_tested_release():
    assert versions.judge("lib>=1,<2", "2.5", "1.4").fix == "pip install 'lib==1.4'"
    assert versions.judge("lib>=1,<2", None, None).fix == "pip install 'lib>=1,<2'"
    assert versions.judge("lib>=1,<2", "1.4", "1.4").fix == ""


def test_a_library_whose_import_fails_is_broken_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "half_built.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    found = versions.importable(versions.Library("half_built", "1.0", "1.0", ">=1", "tested"))
    assert (found.state, found.why) == ("broken", "RuntimeError: operator torchvision::nms does not exist")
    assert found.fix == "pip install --force-reinstall 'half_built==1.0'"
    works = versions.judge("pyyaml>=6", "6.0", "6.0")
    assert versions.importable(works) == works


def test_an_extra_lists_its_missing_libraries(monkeypatch):
    monkeypatch.setattr(
        versions, "installed", lambda name: None if name == "trl" else "1.0" if name == "peft" else "99"
    )
    bench = next(extra for extra in versions.extras() if extra.name == "bench")
    assert bench.lacking == ["trl"]
    assert bench.fix == "pip install 'lorakit[bench]'"
    complete = next(extra for extra in versions.extras() if extra.name == "gguf")
    assert (complete.lacking, complete.fix) == ([], "")


def test_pins_are_a_constraints_file_with_exact_versions():
    from packaging.requirements import Requirement

    pins = {pin.name: pin.specifier for pin in map(Requirement, versions.pins().splitlines())}
    assert {"torch", "transformers", "peft"} <= pins.keys()
    assert all(str(pin).startswith("==") for pin in pins.values())
