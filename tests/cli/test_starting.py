"""A command prints its first line before it imports torch, which takes seconds; a usage error needs neither."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lorakit
from lorakit.cli.shared.starting import starting

VERBS = {
    "demo": ["demo", "--out", "nowhere"],
    "plan": ["plan"],
    "train": ["train", "--data", "rows.jsonl"],
    "sweep": ["sweep", "--data", "rows.jsonl", "--rank", "4,8"],
    "eval": ["eval", "rows.jsonl"],
    "generate": ["generate", "hello"],
    "image generate": ["image", "generate", "a panda"],
    "chat": ["chat"],
    "serve": ["serve", "--port", "0"],
    "inspect": ["inspect", "adapter"],
    "compare": ["compare", "a", "b"],
    "combine": ["combine", "a", "b", "--out", "c"],
    "resize": ["resize", "a", "b", "--rank", "2"],
    "edit": ["edit", "a", "b", "--scale", "2"],
    "extract": ["extract", "base", "tuned", "out"],
    "merge": ["merge", "base", "a", "out"],
    "convert": ["convert", "a", "b", "--to", "kohya"],
    "export": ["export", "a", "b", "--for", "vllm"],
    "card": ["card", "a"],
    "push": ["push", "a", "me/mine"],
    "bench": ["bench", "latency"],
    "reproduce": ["reproduce", "ranks"],
    "data show": ["data", "show", "rows.jsonl"],
}


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """Run `lorakit ARGS` in a process with a fake torch that prints TORCH on import and exits."""
    folder = tmp_path_factory.mktemp("torchless")
    (folder / "torch.py").write_text("import sys\nprint('TORCH', file=sys.stderr, flush=True)\nraise SystemExit(7)\n")
    path = os.pathsep.join([str(folder), str(Path(lorakit.__file__).parents[1])])

    def call(args):
        code = f"import lorakit.cli; lorakit.cli.main({args!r})"
        return subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": path},
            cwd=folder,
            capture_output=True,
            text=True,
        )

    return call


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_prints_its_first_line_before_importing_torch(without_torch, verb):
    done = without_torch(VERBS[verb])
    first, *rest = done.stderr.splitlines()
    assert first.startswith("lorakit: ")
    assert first.endswith(" ...")
    assert "TORCH" in rest
    assert done.stdout == ""


@pytest.mark.parametrize("verb", ["train", "sweep"])
def test_quiet_prints_nothing(without_torch, verb):
    assert without_torch([*VERBS[verb], "--quiet"]).stderr.splitlines() == ["TORCH"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["train"], "no training data"),
        (["bench", "latencies"], "did you mean 'latency'"),
        (["reproduce", "rank"], "did you mean 'ranks'"),
        (["edit", "a", "b"], "edit has nothing to change"),
        (["merge", "base", "out"], "merge expects BASE"),
        (["eval", "rows.jsonl", "--columns", "x"], "expected NAME=VALUE"),
        (["plan", "--rnk", "8"], "--rank"),
    ],
)
def test_a_usage_error_comes_before_the_first_line_and_torch(without_torch, args, message):
    done = without_torch(args)
    assert done.returncode == 2
    assert message in done.stderr
    assert "TORCH" not in done.stderr
    assert " ...\n" not in done.stderr


def test_only_the_called_commands_module_is_imported(without_torch):
    code = (
        "import sys, lorakit.cli.app as a; a.app_for(['convert', 'a', 'b'])\n"
        "print([m for m in ('pydantic', 'lorakit.cli.train', 'lorakit.cli.merge') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_exits_with_130_and_no_traceback(verb, tmp_path):
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)\n")  # what is running when Ctrl-C comes
    code = f"import lorakit.cli; lorakit.cli.main({VERBS[verb]!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(lorakit.__file__).parents[1])])},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr.readline().endswith(" ...\n")
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert error == "lorakit: stopped by Ctrl-C\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_line_is_cleared(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with starting("reading"):
        assert terminal.getvalue() == "lorakit: reading ..."
    assert terminal.getvalue() == "lorakit: reading ...\r\x1b[2K"
