"""Reading an adapter's files: what is hashed is what is parsed, and nothing outside is opened."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import served_adapters
from read_adapters import config, read, refused
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.errors import AdapterError
from lorakit.serve import sources
from lorakit.serve.guard.adapter_files import HTTP, LOCAL
from lorakit.serve.sources import PREFIX, FileSource, files_at, remove_abandoned

# ------------------------------------------------------------------------------------------ good files


def test_a_folder_is_read_as_adapter_load_reads_it(folder):
    got = read(folder)
    assert got.adapter.digest() == lk.Adapter.load(folder).digest()
    assert got.adapter.metadata["data"]["end_tokens"] == ["<end>"]
    files = ("adapter_config.json", "adapter_model.safetensors", "lorakit.json")
    assert got.size == sum((folder / name).stat().st_size for name in files)


def test_the_key_is_that_of_the_contents(folder, tmp_path):
    keys = [read(folder).key, read(Path(shutil.copytree(folder, tmp_path / "copy"))).key]
    assert keys[0] == keys[1]
    assert len(keys[0]) == 64
    (folder / "README.md").write_text("not a part of it")
    assert read(folder).key == keys[0]
    for name in ("adapter_config.json", "lorakit.json"):
        (folder / name).write_text((folder / name).read_text() + "\n")
        keys.append(read(folder).key)
    save_file(
        {k: t + 1 for k, t in load_file(folder / "adapter_model.safetensors").items()},
        folder / "adapter_model.safetensors",
    )
    keys.append(read(folder).key)
    assert len(set(keys)) == 4


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_single_files_are_read_by_any_name(format, tmp_path):
    names = {"kohya": "text_model.encoder.layers.0.self_attn.q_proj"}
    made = served_adapters.value()
    update = next(iter(made.updates.values()))
    name = f"text_encoder.{names['kohya']}"
    made = lk.Adapter(made.config, {name: update})
    path = made.save(tmp_path / "one.safetensors", format=format)
    shutil.copy(path, tmp_path / "other.safetensors")
    first, second = read(path), read(tmp_path / "other.safetensors")
    assert first.key == second.key
    assert first.adapter.digest() == lk.Adapter.load(path).digest()


def test_a_run_stands_for_its_result(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder, run / "adapter")
    shutil.copytree(folder, run / "checkpoints" / "step-5")
    (run / "config.yaml").write_text("rank: 2\n")
    assert read(run).key == read(folder).key


def test_what_was_read_is_in_memory_of_its_own(folder):
    """safetensors maps files into memory; a file that is cut short afterwards would end the process (SIGBUS)."""
    got = read(folder)
    digest = got.adapter.digest()
    os.truncate(folder / "adapter_model.safetensors", 8)
    assert got.adapter.digest() == digest
    if sys.platform.startswith("linux"):
        assert "adapter_model" not in Path("/proc/self/maps").read_text()


def test_files_that_are_written_while_they_are_read_do_not_end_the_process(folder):
    """In a child process, because the failure is a signal."""
    code = f"""
import os, threading, sys
from pathlib import Path
from random import Random
from lorakit.serve.guard.adapter_files import HTTP
from lorakit.serve.sources import files_at, read_adapter
from lorakit.errors import AdapterError
folder = Path({str(folder)!r}); file = folder / "adapter_model.safetensors"; content = file.read_bytes()
stop = False
def rewrite():
    while not stop:
        file.write_bytes(content)                  # cut to nothing, then filled, as torch and safetensors write
thread = threading.Thread(target=rewrite); thread.start()
counts = [0, 0]
for _ in range(60):
    try:
        read_adapter(files_at(folder, "sql", None, HTTP)); counts[0] += 1
    except AdapterError:
        counts[1] += 1
stop = True; thread.join()
print(*counts)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(map(int, done.stdout.split())) == 60


def test_nothing_is_left_of_the_copies(folder, tmp_path, monkeypatch):
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))
    read(folder)
    (folder / "adapter_config.json").write_text("{")
    refused(folder)
    assert not list((tmp_path / "copies").iterdir())


# ------------------------------------------------------------------------------------------ the engine's source


def test_a_source_gives_its_first_values_once_and_then_reads(folder):
    got = read(folder)
    source = FileSource(got.key, [files_at(folder, "sql", None, HTTP)], first=got.adapter)
    assert source.read() is got.adapter
    again = source.read()
    assert again is not got.adapter
    assert again.digest() == got.adapter.digest()


def test_a_source_refuses_other_contents_and_says_how_to_go_on(folder):
    source = FileSource(read(folder).key, [files_at(folder, "sql", None, HTTP)])
    served_adapters.write(folder, seed=1)
    with pytest.raises(AdapterError, match=r"changed since it was loaded(.|\n)*load_inplace"):
        source.read()
    shutil.rmtree(folder)
    with pytest.raises(AdapterError, match="cannot be opened"):
        source.read()


def test_a_source_with_several_places_takes_the_one_that_is_as_it_was(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    key = read(folder).key
    source = FileSource(key, [files_at(folder, "sql", None, HTTP), files_at(copy, "copy", None, HTTP)])
    served_adapters.write(folder, seed=1)
    assert source.read().digest() == lk.Adapter.load(copy).digest()


# ------------------------------------------------------------------------------------------ links, pipes, folders


def test_links_out_of_the_boundary_are_refused_file_by_file(folder, tmp_path):
    secret = tmp_path / "secret.safetensors"
    shutil.move(folder / "adapter_model.safetensors", secret)
    (folder / "adapter_model.safetensors").symlink_to(secret)
    assert "leads out" in refused(folder, boundary=folder)
    assert read(folder, LOCAL).size  # the command line may


@pytest.mark.parametrize("inner", ["adapter", "virtual_tokens"])
def test_names_of_files_behind_a_folder_s_link_out_of_the_boundary_are_not_shown(inner, tmp_path):
    secret, run = tmp_path / "secret", tmp_path / "root" / "run"
    secret.mkdir()
    (secret / "salaries.xlsx").write_text("x")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("a: 1")
    (run / inner).symlink_to(secret)
    message = refused(run, boundary=tmp_path / "root")
    assert "salaries" not in message
    assert "config.yaml" in message


def test_a_link_to_a_folder_within_the_boundary_is_followed(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("a: 1")
    (run / "adapter").symlink_to(folder)
    assert read(run, boundary=tmp_path).key == read(folder).key


def test_code_beside_an_adapter_is_neither_read_nor_run(folder):
    """`auto_map` and `trust_remote_code` are how transformers is made to run a repository's code."""
    (folder / "modeling_evil.py").write_text("raise SystemExit('was run')")
    key = read(folder).key
    config(folder, auto_map={"AutoModel": "modeling_evil.Model", "AutoConfig": "x/y--evil.C"}, trust_remote_code=True)
    assert files_at(folder, "sql", folder, HTTP).names == files_at(folder, "sql", None, HTTP).names
    assert not [name for name in files_at(folder, "sql", None, HTTP).names if name.endswith(".py")]
    before = set(sys.modules)
    got = read(folder)
    assert got.key != key
    assert not {name for name in set(sys.modules) - before if "evil" in name}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"])
def test_what_is_refused_for_its_beginning_is_not_copied_before(name, folder, monkeypatch):
    """A copy of 4 GiB would be that much of the disk for temporary files, which is memory in many containers."""
    copied = []
    real = sources._write
    monkeypatch.setattr(sources, "_write", lambda target, chunk: (copied.append(len(chunk)), real(target, chunk)))
    for old in folder.glob("adapter_model*"):
        old.unlink()
    beginning = {"safetensors": (5 << 20).to_bytes(8, "little") + b'{"a":', "bin": b"\x80\x02", "json": b"{"}
    with open(folder / name, "wb") as file:
        file.write(beginning[name.rpartition(".")[2]])
        file.truncate(64 << 20)
    if name.endswith(".json"):
        (folder / "adapter_model.safetensors").write_bytes(b"x")
    said = {"safetensors": "its header has 5,242,880 bytes", "bin": "is a pickle", "json": "expected at most 1,048,576"}
    assert said[name.rpartition(".")[2]] in refused(folder)
    assert sum(copied) < 1 << 20


def test_pipes_devices_and_folders_in_place_of_files_are_refused(folder):
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    assert "not a regular file" in refused(folder)
    weights.unlink()
    weights.symlink_to("/dev/zero")
    assert "not a regular file" in refused(folder, LOCAL)
    weights.unlink()
    weights.mkdir()
    assert "no weights" in refused(folder)


def test_folders_without_an_adapter_say_what_they_hold(tmp_path):
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "notes.txt").write_text("x")
    assert "notes.txt" in refused(tmp_path / "sql")
    for number in (1, 2):
        served_adapters.value(number).save(tmp_path / "sql" / f"{number}.safetensors", format="loralib")
    assert "several files" in refused(tmp_path / "sql")


def test_copies_that_a_killed_server_left_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in (f"{PREFIX}old", f"{PREFIX}new", "other"):
        (tmp_path / name / "inner").mkdir(parents=True)
        if not name.endswith("new"):
            os.utime(tmp_path / name, (0, 0))
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "other")
    remove_abandoned()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{PREFIX}link", f"{PREFIX}new", "other"]
