"""Facts about the machine: thread counts that do not suit it, what a compiler needs."""

from __future__ import annotations

import os
import shutil
import stat
import sys

import pytest
import torch

from lorakit.bases.device import choose_device, choose_dtype
from lorakit.doctor import machine


def test_the_device_marked_as_used_is_the_chosen_one():
    found = machine.devices()
    (used,) = [device for device in found if device.used]
    assert used.kind == choose_device().value.type
    assert found[-1].kind == "cpu"
    assert found[-1].memory is None or found[-1].memory >= found[-1].free > 0


def test_the_precision_marked_as_used_is_the_chosen_one():
    (used,) = [p for p in machine.precisions() if p.used]
    dtype = choose_dtype("auto", choose_device().value).value
    assert {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[used.name] == dtype
    assert used.native
    assert all(p.why for p in machine.precisions())


@pytest.mark.parametrize(
    "count, available, limit, variables, fix",
    [
        (2, 2, None, {}, None),
        (64, 64, 2.0, {}, "export OMP_NUM_THREADS=2"),
        (64, 64, 0.5, {}, "export OMP_NUM_THREADS=1"),
        (16, 4, None, {"OMP_NUM_THREADS": "16"}, "export OMP_NUM_THREADS=4"),
        (1, 8, None, {"OMP_NUM_THREADS": "1"}, "unset OMP_NUM_THREADS"),
        (1, 8, None, {}, "export OMP_NUM_THREADS=8"),
        (1, 1, None, {}, None),
        (4, 8, None, {"OMP_NUM_THREADS": "4"}, None),
    ],
)
def test_a_thread_count_that_does_not_suit_the_cores_gets_a_fix(count, available, limit, variables, fix):
    notes = machine.thread_notes(count, available, limit, variables)
    assert len(notes) == (fix is not None)
    assert all(fix in note for note in notes)


def test_a_missing_compiler_is_reported_with_a_fix(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = machine.compiler()
    assert not found.usable
    assert "no-such-compiler" in found.why
    assert "install" in found.why


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for the compiler")
def test_a_compiler_needs_pythons_headers_and_has_a_version(monkeypatch, tmp_path):
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\necho my compiler 7\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in machine.compiler().why
    (tmp_path / "Python.h").touch()
    found = machine.compiler()
    assert (found.usable, found.path, found.version, found.why) == (True, str(script), "my compiler 7", "")


@pytest.mark.parametrize(
    "name, value, end",
    [("HF_HUB_CACHE", "x/hub", "x/hub"), ("HF_HOME", "home", "home/hub"), ("XDG_CACHE_HOME", "c", "c/huggingface/hub")],
)
def test_the_cache_folder_is_huggingface_hubs(name, value, end, tmp_path, monkeypatch):
    import subprocess

    for other in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, str(tmp_path / value))
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True
    ).stdout.strip()
    assert str(machine.hub_cache()) == theirs == str(tmp_path / end)


def test_free_space_is_that_of_the_nearest_existing_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "made" / "yet"))
    here, cache = machine.disks()
    assert here.path == str(tmp_path)
    assert cache.path.endswith("yet")
    assert here.total == cache.total == shutil.disk_usage(tmp_path).total
    assert 0 < cache.free <= cache.total
