"""What is staged is there as a whole or not at all, whatever happens, and what was there before stays until then."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.errors import LorakitError, WriteError
from lorakit.io.staging import resolved, staged


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def write(out: Path, text: str = "new") -> None:
    with staged(out) as path:
        path.mkdir()
        (path / "a").write_text(text)
        (path / "b").write_text(text)
        path.with_name("beside").write_text(text)


def test_a_folder_a_file_and_what_belongs_beside_it(tmp_path):
    write(tmp_path / "x" / "out")
    with staged(tmp_path / "file") as path:
        path.write_text("one")
    assert tree(tmp_path) == {"x/out/a": "new", "x/out/b": "new", "x/beside": "new", "file": "one"}


def test_other_files_of_the_folder_stay_unless_it_is_fresh(tmp_path):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "mine").write_text("mine")
    (out / "sub" / "too").write_text("mine")
    (out / "a").write_text("old")
    write(out)
    assert tree(out) == {"a": "new", "b": "new", "mine": "mine", "sub/too": "mine"}
    with staged(out, fresh=True) as path:
        path.mkdir()
        (path / "c").write_text("new")
    assert tree(out) == {"c": "new"}


def test_stale_names_go_unless_they_are_written_again(tmp_path):
    for name in ("x.pt", "x.ti.pt", "x.te.pt", "other", "out/a.bin", "out/mine"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    with staged(tmp_path / "x.pt", ["x.ti.pt", "x.te.pt"]) as path:
        path.write_text("new")
        path.with_name("x.te.pt").write_text("new")
    with staged(tmp_path / "out", ["a.bin"]) as path:
        path.mkdir()
        (path / "a").write_text("new")
    assert tree(tmp_path) == {"x.pt": "new", "x.te.pt": "new", "other": "old", "out/a": "new", "out/mine": "old"}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_after_an_error_all_is_as_it_was(tmp_path, error):
    write(tmp_path / "out", "old")
    for out in (tmp_path / "out", tmp_path / "deep" / "er" / "new"):
        with pytest.raises(error), staged(out) as path:  # noqa: PT012
            path.mkdir()
            (path / "a").write_text("half")
            raise error
    assert tree(tmp_path) == {"out/a": "old", "out/b": "old", "beside": "old"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["beside", "out"]


@pytest.mark.parametrize("what", ["rename", "replace", "fsync", "link"])
def test_a_system_that_says_no_at_any_point_leaves_all_as_it_was(tmp_path, monkeypatch, what):
    """The n-th call fails, for every n until one attempt comes to its end."""
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "mine").write_text("old")
    old = tree(tmp_path)
    real = getattr(os, what)
    for n in range(1, 99):
        calls = iter(range(1, 999))

        def failing(*args, _calls=calls, _n=n, **options):
            if next(_calls) == _n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(os, what, failing)
            said = None
            try:
                write(tmp_path / "out")
            except WriteError as error:
                said = str(error)
        if said is None:
            break
        assert "no space left on the disk" in said
        assert tree(tmp_path) == old, n
    assert tree(tmp_path) == {"out/a": "new", "out/b": "new", "beside": "new", "out/mine": "old"}
    assert n > 1 or what == "link"  # without links, files are copied or moved


KILLED = """
import os, signal, sys
from pathlib import Path
from lorakit.io.staging import staged

count = 0
for name in ("rename", "replace", "fsync", "link", "unlink", "rmdir", "mkdir"):
    def call(*args, _real=getattr(os, name), **options):
        global count
        count += 1
        if count == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return _real(*args, **options)
    setattr(os, name, call)

with staged(sys.argv[1]) as path:
    path.mkdir()
    for file in (path / "a", path / "b", path.with_name("beside")):
        file.write_text("new")
"""


@pytest.mark.parametrize("before", ["old", None])
def test_a_killed_write_leaves_the_old_or_the_new_and_the_next_one_clears_up(tmp_path, before):
    """Killed at each of its changes to files, with an OUT that is replaced and without one."""
    attempts = []
    for at in range(1, 99):
        folder = tmp_path / str(at)
        if before:
            write(folder / "out", before)
        else:
            folder.mkdir()
        code = subprocess.run([sys.executable, "-c", KILLED, folder / "out", str(at)]).returncode
        if code == 0:
            break
        assert code == -signal.SIGKILL
        found = tree(folder / "out") if (folder / "out").exists() else None
        wholes = [{"a": text, "b": text} for text in ("new", before)]
        attempts.append(found)
        # Moved aside, and the new one not there yet: the next write puts it back.
        assert found in wholes or (found is None and (not before or tree(folder / ".out.writing" / "old" / "out")))
        with pytest.raises(ZeroDivisionError), staged(folder / "out"):
            raise ZeroDivisionError
        if before:
            assert tree(folder / "out") in wholes
        write(folder / "out", "again")
        assert tree(folder) == {"out/a": "again", "out/b": "again", "beside": "again"}
        assert sorted(p.name for p in folder.iterdir()) == ["beside", "out"]
    assert len(attempts) > 10


def test_a_live_process_is_not_cleared_away_and_the_second_is_refused(tmp_path):
    with staged(tmp_path / "out") as path:
        path.write_text("first")
        with pytest.raises(WriteError, match=r"/out is being written by process \d+\n  wait until it has ended, or"):
            write(tmp_path / "out")
        assert path.read_text() == "first"
    assert tree(tmp_path) == {"out": "first"}


def test_a_mounted_folder_is_filled_since_it_cannot_be_moved(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a", "mine", "stale"):
        (out / name).write_text("old")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(out))
    inode = out.stat().st_ino
    with staged(out, ["stale"]) as path:
        (path / "sub").mkdir(parents=True)
        (path / "a").write_text("new")
        (path / "sub" / "b").write_text("new")
    assert tree(tmp_path) == {"out/a": "new", "out/mine": "old", "out/sub/b": "new"}
    assert out.stat().st_ino == inode
    assert sorted(p.name for p in out.iterdir()) == ["a", "mine", "sub"]


def test_the_folder_one_is_in_is_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with staged(".") as path:
        path.mkdir()
        (path / "a").write_text("new")
    assert [p.name for p in Path.cwd().iterdir()] == ["a"]


def test_links_in_a_circle_and_devices_are_named(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "a" / "out"):
        with pytest.raises(WriteError, match="its links lead in a circle"):
            resolved(path)
        with pytest.raises(WriteError, match="its links lead in a circle"):
            write(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WriteError, match="not a regular file"):
        write(tmp_path / "pipe")


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "there") == {"a": "new", "b": "new"}


def test_errors_name_out_and_not_the_temporary_folder(tmp_path):
    with pytest.raises(LorakitError) as error, staged(tmp_path / "out") as path:
        raise LorakitError(f"{path}/a is wrong")
    assert str(error.value) == f"{tmp_path}/out/a is wrong"
    assert not list(tmp_path.iterdir())
