"""A lock ends with its process, however that ends, and two processes never both hold it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lorakit.errors import WriteError
from lorakit.io import lock
from lorakit.io.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from lorakit.io.lock import locked

with locked(Path(sys.argv[1]), "OUT", "do something else"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock `tmp_path / "lock"`."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "lock"], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_a_lock_that_is_held_is_refused_with_its_process(other, tmp_path):
    with (
        pytest.raises(WriteError, match=rf"OUT is being written by process {other.pid}\n  wait until it has ended, or"),
        locked(tmp_path / "lock", "OUT", "do something else"),
    ):
        pytest.fail("both hold it")


@pytest.mark.parametrize("has_flock", [True, False])
def test_it_ends_with_its_process(other, tmp_path, monkeypatch, has_flock):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "lock").exists()
    if not has_flock:
        monkeypatch.setattr(lock, "fcntl", None)
    with locked(tmp_path / "lock", "OUT", "x"):
        assert (tmp_path / "lock").read_text().split()[0] == str(os.getpid())
    assert not (tmp_path / "lock").exists()


def test_without_locks_of_the_file_system_the_process_id_decides(other, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.raises(WriteError, match="is being written"), locked(tmp_path / "lock", "OUT", "x"):
        pytest.fail("both hold it")


def test_one_process_cannot_hold_it_twice(tmp_path):
    with (
        locked(tmp_path / "lock", "OUT", "x"),
        pytest.raises(WriteError, match="is being written"),
        locked(tmp_path / "lock", "OUT", "x"),
    ):
        pytest.fail("held twice")
    with locked(tmp_path / "lock", "OUT", "x"):
        pass


def test_many_processes_take_turns(tmp_path):
    """Each adds a line while it holds the lock; none ever sees a half-written one."""
    code = """
import sys, time
from pathlib import Path
from lorakit.errors import WriteError
from lorakit.io.lock import locked
folder, done = Path(sys.argv[1]), 0
while done < 20:
    try:
        with locked(folder / "lock", "OUT", "x"):
            file = folder / "busy"
            file.open("x").close()
            file.unlink()
            done += 1
    except WriteError:
        time.sleep(0.001)
"""
    children = [subprocess.Popen([sys.executable, "-c", code, tmp_path]) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
