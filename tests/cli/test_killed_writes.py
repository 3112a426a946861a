"""A verb that is killed while it writes leaves no OUT, or the old one, and the next call works without --force."""

from __future__ import annotations

import os
import signal

import pytest
import tiny
from tiny import randomise_factors

import lorakit as lk
from lorakit.cli import run

CHANGES = ("fsync", "rename", "replace", "link", "mkdir", "rmdir", "unlink", "open")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with an adapter of a tiny Llama, another one, the base, and the base with the adapter merged into it."""
    folder = tmp_path_factory.mktemp("files")
    tiny.llama().save_pretrained(folder / "base")
    for seed, name in enumerate(("adapter", "other")):
        model = lk.attach(tiny.llama(), lk.LoraConfig(rank=8, alpha=8, targets=["q_proj", "v_proj"]))
        lk.capture(randomise_factors(model, seed)).save(folder / name)
    assert run(["merge", str(folder / "base"), str(folder / "adapter"), str(folder / "tuned")]) == 0
    return folder


VERBS = {
    "convert to a folder": ["convert", "adapter", "out", "--to", "mlx"],
    "convert to a file": ["convert", "adapter", "out.gguf", "--to", "gguf", "--base", "base"],
    "export": ["export", "adapter", "out", "--for", "vllm"],
    "export --verify": ["export", "adapter", "out", "--for", "peft", "--verify", "--base", "base"],
    "export to Ollama": ["export", "adapter", "out", "--for", "ollama", "--model", "x", "--base", "base"],
    "combine": ["combine", "adapter", "other", "--out", "out"],
    "edit": ["edit", "adapter", "out", "--scale", "2"],
    "resize": ["resize", "adapter", "out", "--rank", "2"],
    "extract": ["extract", "base", "tuned", "out", "--rank", "2"],
    "merge": ["merge", "base", "adapter", "out"],
}


def killed(args: list[str], at: int) -> int:
    """Run the verb in a forked process that kills itself at its n-th change to files. Returns the exit code."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        done = 0

        def counted(name):
            real = getattr(os, name)

            def change(*args, **options):
                nonlocal done
                done += name != "open" or bool(args[1] & (os.O_WRONLY | os.O_RDWR))
                if done == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return change

        for name in CHANGES:
            setattr(os, name, counted(name))
        code = 9
        try:
            code = run(args)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_verb_leaves_no_out_and_the_next_call_works(files, tmp_path, monkeypatch, verb):
    for name in ("adapter", "other", "base", "tuned"):
        (tmp_path / name).symlink_to(files / name)
    monkeypatch.chdir(tmp_path)
    args = VERBS[verb]
    out = next(arg for arg in args if arg.startswith("out"))
    inputs = {"adapter", "other", "base", "tuned"}
    kills = 0
    for at in (1, 3, 6, 9, 12, 15, 18, 21):
        code = killed(args, at)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        written = f"{out}/adapter.gguf" if "Ollama" in verb else out
        if os.path.exists(written):  # killed while clearing up: all of it is there
            assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {*inputs, out}
            assert run(["inspect", written, *(["--base", "base"] if "gguf" in written else [])]) == 0 or verb == "merge"
            assert run([*args, "--force"]) == 0
        else:
            assert run(args) == 0
        assert {p.name for p in tmp_path.iterdir()} == {*inputs, out}
        assert run([*args, "--force"]) == 0
        os.rename(out, f"done-{at}")
        inputs.add(f"done-{at}")
    assert kills >= 3
