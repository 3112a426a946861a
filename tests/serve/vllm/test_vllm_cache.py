"""The cache of exported adapters: written once and whole, bounded, and never deleted under whoever uses it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lorakit.errors import AdapterError, WriteError
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
    return ExportCache(tmp_path / "cache", most=1000)


def folders(cache: ExportCache) -> set[Path]:
    return {path for path in cache.folder.iterdir() if path.is_dir()}


def test_a_folder_is_written_once(cache):
    write = Writer()
    path = cache.hold("key", write)
    assert cache.hold("key", write) == path
    assert cache.release("key") == 100 + (path / RECORD).stat().st_size
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
        (path / RECORD).unlink()
    else:
        (path / RECORD).write_text("[]")
    assert cache.hold("key", write) == path
    assert write.calls == 2
    assert (path / "adapter_model.safetensors").stat().st_size == 100


def test_a_failed_write_leaves_nothing(cache):
    def write(path: Path) -> None:
        raise AdapterError("it does not fit")

    with pytest.raises(AdapterError, match="does not fit"):
        cache.hold("key", write)
    assert folders(cache) == set()
    assert cache.hold("key", Writer()).is_dir()


def test_the_least_recently_used_go_first_and_those_in_use_stay(cache):
    cache.most = 1300  # a record has some 75 bytes
    for at, key in enumerate("abc"):
        path = cache.hold(key, Writer(250))
        os.utime(path / RECORD, (at, at))
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
        print(ExportCache(Path(sys.argv[1])).hold("theirs", lambda path: path.mkdir()), flush=True)
        sys.stdin.read()
    """)
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(cache.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    theirs = Path(other.stdout.readline().strip())
    cache.most = 10
    cache.hold("ours", Writer())
    assert theirs.is_dir()
    other.communicate("")
    cache.hold("more", Writer())
    assert not theirs.is_dir()


@pytest.mark.parametrize("key", ["../../etc/passwd", "a/b", "x" * 500, "\0", "ключ"])
def test_any_key_is_a_folder_of_the_cache(cache, key):
    assert cache.hold(key, Writer()).parent == cache.folder


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
