"""A file system that says no at any point of a verb: one clear message, exit code 1, and what was there is still there.

The n-th call that writes fails, for every n until the verb comes to its end undisturbed.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lorakit.cli import run

TRAIN = ["--steps", "2", "--save-every", "1", "--eval-every", "1", "--validation", "0.1", "--sample-tokens", "1"]
SHORT = [
    "--rank",
    "2",
    "--batch-size",
    "2",
    "--learning-rate",
    "1e-3",
    "--precision",
    "fp32",
    "--threads",
    "1",
    "--quiet",
]


class FullDisk:
    """Makes the n-th write of this process below a folder fail. `calls`: the writes so far."""

    def __init__(self, patched: pytest.MonkeyPatch, folder: Path, at: int):
        self.folder, self.at, self.calls = str(folder), at, 0
        for module, name in (
            (os, "fsync"),
            (os, "replace"),
            (os, "rename"),
            (os, "mkdir"),
            (os, "link"),
            (safetensors.torch, "save_file"),
            (torch, "save"),
        ):
            patched.setattr(module, name, self._failing(getattr(module, name)))
        for module in (builtins, io):
            patched.setattr(
                module, "open", self._failing(open, lambda file, mode="r", *_, **__: set(mode) & set("wax+"))
            )
        patched.setattr(
            os, "open", self._failing(os.open, lambda path, flags, *_, **__: flags & (os.O_WRONLY | os.O_RDWR))
        )

    def _failing(self, real, writes=lambda *_, **__: True):
        def call(*args, **options):
            target = args[1] if real in (_SAVE_FILE, _SAVE) else args[0]
            here = isinstance(target, int) or str(target).startswith(self.folder)
            if here and writes(*args, **options):
                self.calls += 1
                if self.calls == self.at:
                    raise OSError(
                        errno.ENOSPC, os.strerror(errno.ENOSPC), *([] if isinstance(target, int) else [str(target)])
                    )
            return real(*args, **options)

        return call


def _is_for_writing(file, mode="r", *_, **__):
    return bool(set(mode) & set("wax+"))


def _has_flags_for_writing(path, flags, *_, **__):
    return bool(flags & (os.O_WRONLY | os.O_RDWR))


_SAVE_FILE, _SAVE = safetensors.torch.save_file, torch.save


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def verbs(model, data, trained):
    """verb -> its arguments before OUT and after it."""
    adapter = str(trained / "adapter")
    train = ["--model", model, "--data", data, *TRAIN, *SHORT]
    return {
        "convert": (["convert", adapter], ["--to", "mlx"]),
        "convert to a file": (["convert", adapter], ["--to", "loralib"]),
        "export": (["export", adapter], ["--for", "peft", "--verify"]),
        "merge": (["merge", model, adapter], []),
        "train": (["train", "--out"], train),
        "sweep": (["sweep", "--out"], [*train[:-1], "--quiet", "--seed", "0,1"]),
    }


@pytest.mark.parametrize(
    "verb, force",
    [("convert", False), ("convert to a file", True), ("export", False), ("merge", False), ("merge", True)],
)
def test_a_full_disk_is_one_message_and_out_is_as_it_was(lorakit, verbs, tmp_path, monkeypatch, verb, force):
    before, after = verbs[verb]
    out = tmp_path / ("out.pt" if "file" in verb else "out")
    if force:
        assert run([*before, str(out), *after]) == 0
        if out.is_dir():
            (out / "lorakit.json").write_text("{}")  # so that it differs from what is written
    old = contents(tmp_path) | ({out.name: out.read_bytes()} if out.is_file() else {})
    for n in range(1, 200):
        with monkeypatch.context() as patched:
            disk = FullDisk(patched, tmp_path, n)
            code, _, err = lorakit(*before, out, *after, *(["--force"] if force else []))
        if disk.calls < n:
            break
        if code == 0:  # it went on without, for example with a copy in place of a link
            assert out.exists()
            shutil.rmtree(out) if out.is_dir() else out.unlink()
            if force:
                for name, value in old.items():
                    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
                    (tmp_path / name).write_bytes(value)
            continue
        assert code == 1, (n, err)
        assert err.startswith(f"lorakit: cannot write {out}"), (n, err)
        assert "no space left on the disk" in err
        assert len(err.splitlines()) <= 2, (n, err)
        assert contents(tmp_path) == old, n
    assert code == 0
    assert n > 5


@pytest.mark.parametrize("verb, step", [("train", 13), ("sweep", 67)])
def test_a_run_on_a_full_disk_stops_with_one_message_and_can_be_resumed(
    lorakit, verbs, tmp_path, monkeypatch, verb, step
):
    """At every few of its writes: each attempt trains."""
    before, after = verbs[verb]
    assert run([*before, str(tmp_path / "undisturbed"), *after]) == 0
    expected = (tmp_path / "undisturbed" / "adapter" / "adapter_model.safetensors").read_bytes()
    failed = 0
    for n in range(1, 9999, step):
        out = tmp_path / f"out-{n}"
        with monkeypatch.context() as patched:
            disk = FullDisk(patched, out, n)
            code, _, err = lorakit(*before, out, *after)
        if disk.calls < n:
            break
        if code != 0:
            failed += 1
            assert code == 1, (n, err)
            assert err.startswith("lorakit: cannot write "), (n, err)
            assert "no space left on the disk" in err
            assert len(err.splitlines()) <= 2, (n, err)
            if failed % 3 == 1:
                assert lorakit(*before, out, *after)[0] == 0, n
                assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == expected
                assert not list(out.rglob(".*")), n
    assert failed > 2
