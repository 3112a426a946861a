"""The cache of exported adapters: written once and whole, bounded, and never deleted under whoever uses it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorakit.errors import AdapterError, WriteError
from lorakit.serve.vllm import cache as module
from lorakit.serve.vllm.cache import RECORD, ExportCache, default_folder


class Writer:
    """Writes a folder of one file, and counts."""

    def __init__(self, size: int = 100):
        self.size = size
        self.calls = 0

    def __call__(self, path: Path) -> None:
        self.calls += 1
        path.mkdir()
        (path / "adapter_model.safetensors").write_bytes(b"x" * self.size)


@pytest.fixture
def cache(tmp_path: Path) -> ExportCache:
    return ExportCache(tmp_path / "cache", max_bytes=1000)


def folders(cache: ExportCache) -> set[Path]:
    """The adapters' folders that the cache has, finished or not."""
    return {path / "adapter" for path in cache.folder.iterdir() if path.is_dir()}


def test_a_folder_is_written_once(cache):
    write = Writer()
    path = cache.hold("key", write)
    assert cache.hold("key", write) == path
    cache.release("key")
    cache.release("key")  # once more: nothing
    assert cache.hold("key", write) == path
    assert ExportCache(cache.folder).hold("key", write) == path  # another server
    assert write.calls == 1


@pytest.mark.parametrize("damage", ["cut", "no record", "record of rubbish", "missing"])
def test_a_damaged_folder_is_written_again(cache, damage):
    write = Writer()
    path = cache.hold("key", write)
    cache.release("key")
    if damage == "cut":
        os.truncate(path / "adapter_model.safetensors", 50)
    elif damage == "missing":
        (path / "adapter_model.safetensors").unlink()
    elif damage == "no record":
        (path.parent / RECORD).unlink()
    else:
        (path.parent / RECORD).write_text("[]")
    assert cache.hold("key", write) == path
    assert write.calls == 2
    assert (path / "adapter_model.safetensors").stat().st_size == 100


@pytest.mark.parametrize("after", ["nothing", "a part", "what it staged beside it"])
def test_a_failed_write_leaves_nothing(cache, after):
    def write(path: Path) -> None:
        if after != "nothing":
            Writer()(path if after == "a part" else path.with_name(".staged"))
        raise AdapterError("it does not fit")

    with pytest.raises(AdapterError, match="does not fit"):
        cache.hold("key", write)
    assert folders(cache) == set()
    assert cache.hold("key", Writer()).is_dir()


def test_a_disk_that_is_full_before_the_record_leaves_nothing(cache, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_text", full)
        with pytest.raises(WriteError, match="no space left"):
            cache.hold("key", Writer())
    assert folders(cache) == set()


def test_what_a_killed_server_left_is_deleted_and_nothing_of_others(cache):
    path = cache.hold("half", Writer())
    (path.parent / RECORD).unlink()  # killed before the end
    cache.release("half")
    shutil.copytree(path, path.with_name(".staged"))
    (cache.folder / "notes").mkdir()  # somebody's
    kept = cache.hold("whole", Writer())
    assert folders(cache) == {kept, cache.folder / "notes" / "adapter"}


def test_a_folder_that_another_process_deletes_meanwhile_is_passed_over(cache, monkeypatch):
    gone = cache.hold("gone", Writer()).parent
    cache.release("gone")
    sizes = module._bytes

    def deleted(folder: Path) -> int:
        shutil.rmtree(gone, ignore_errors=True)
        return sizes(folder)

    monkeypatch.setattr(module, "_bytes", deleted)
    assert cache.hold("key", Writer(1500)).is_dir()


def test_a_hold_that_fails_holds_nothing(cache, monkeypatch):
    def broken(self: ExportCache) -> None:
        raise PermissionError("the folder cannot be listed")

    with monkeypatch.context() as patched:
        patched.setattr(ExportCache, "_evict", broken)
        with pytest.raises(PermissionError):
            cache.hold("key", Writer())
    cache.max_bytes = 0
    cache.hold("other", Writer())
    assert len(folders(cache)) == 1


def test_letting_go_does_not_wait_for_what_is_written(cache):
    """`release` is called in the event loop: all streams would stand still."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(path: Path) -> None:
        begun.set()
        assert go_on.wait(20)
        Writer()(path)

    cache.hold("key", Writer())
    with ThreadPoolExecutor(2) as threads:
        writing = threads.submit(cache.hold, "slow", slow)
        try:
            assert begun.wait(20)
            threads.submit(cache.release, "key").result(5)
            assert not writing.done()
        finally:
            go_on.set()
        assert writing.result(20).is_dir()


def test_two_servers_that_want_the_same_share_it(cache):
    """The second waits until the first has written it, and not until the first has let go."""
    begun, go_on, second = threading.Event(), threading.Event(), Writer()

    def slow(path: Path) -> None:
        begun.set()
        assert go_on.wait(20)
        Writer()(path)

    with ThreadPoolExecutor(2) as threads:
        writing = threads.submit(cache.hold, "key", slow)
        assert begun.wait(20)
        waiting = threads.submit(ExportCache(cache.folder).hold, "key", second)
        go_on.set()
        assert waiting.result(20) == writing.result(20)
    assert second.calls == 0


def test_the_least_recently_used_go_first_and_those_in_use_stay(cache):
    cache.max_bytes = 1300  # a record has some 75 bytes
    for at, key in enumerate("abc"):
        path = cache.hold(key, Writer(250))
        os.utime(path.parent / RECORD, (at + 1, at + 1))
    paths = {key: cache.hold(key, Writer()) for key in "abc"}
    for key in "bc":
        cache.release(key)
    cache.hold("d", Writer(400))
    assert folders(cache) == {paths["a"], paths["c"], cache.hold("d", Writer())}
    cache.release("c")
    cache.hold("e", Writer(900))  # more than allowed with a and d, which are in use
    assert folders(cache) == {paths["a"], cache.hold("d", Writer()), cache.hold("e", Writer())}


def test_a_folder_that_another_process_uses_stays(cache, tmp_path):
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from lorakit.serve.vllm.cache import ExportCache
        print(ExportCache(Path(sys.argv[1])).hold("theirs", lambda path: path.mkdir()).parent, flush=True)
        sys.stdin.read()
    """)
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(cache.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    theirs = Path(other.stdout.readline().strip())
    cache.max_bytes = 10
    cache.hold("ours", Writer())
    assert theirs.is_dir()
    other.communicate("")
    cache.hold("more", Writer())
    assert not theirs.is_dir()


@pytest.mark.parametrize("key", ["../../etc/passwd", "a/b", "x" * 500, "\0", "ключ"])
def test_any_key_is_a_folder_of_the_cache(cache, key):
    assert cache.hold(key, Writer()).parent.parent == cache.folder


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"):
        ExportCache(tmp_path / "file" / "cache").hold("key", Writer())


def test_the_default_is_below_the_users_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "lorakit" / "vllm"


def test_the_folder_is_for_its_user_alone(cache):
    cache.hold("key", Writer())
    assert cache.folder.stat().st_mode & 0o077 == 0
