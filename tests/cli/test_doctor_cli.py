"""`lorakit doctor`: one screen of facts, an exit code for scripts, and each fix on the line it concerns."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lorakit.doctor import fused, versions
from lorakit.version import VERSION


def without(name: str) -> subprocess.CompletedProcess[str]:
    """Run `lorakit doctor` in a Python that cannot import `name`; it prints each attempt."""
    code = (
        "import sys\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {name!r}:\n"
        "            print('tried:', name, flush=True)\n"
        "            raise ModuleNotFoundError('it is gone', name=name)\n"
        "sys.meta_path.insert(0, Gone())\n"
        "from lorakit.cli import main\n"
        "main(['doctor'])"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_every_section_is_printed(lorakit):
    code, out, error = lorakit("doctor")
    assert (code, error) == (0, "")
    assert out.startswith(f"lorakit {VERSION}, Python ")
    for words in (
        "transformers",
        "as tested",
        "tensorboard",
        "used",
        "bf16",
        "CPU kernels",
        "threads",
        "torch.compile",
        "free of",
    ):
        assert words in out, words
    assert "\x1b[" not in out  # in a pipe: no colours
    assert out.splitlines()[-1].startswith(("lorakit works here", "  to install the tested ones"))


def test_json_holds_the_same_facts(lorakit):
    code, out, _ = lorakit("doctor", "--json")
    facts = json.loads(out)
    assert (code, facts["works"], facts["lorakit"]) == (0, True, VERSION)
    torch = next(lib for lib in facts["libraries"] if lib["name"] == "torch")
    assert torch["fix"] == ""
    assert torch["installed"] == versions.installed("torch")
    assert {extra["name"] for extra in facts["extras"]} == {
        "tensorboard",
        "wandb",
        "gguf",
        "image",
        "bench",
        "quant",
        "serve",
        "test",
    }
    assert facts["machine"]["devices"][-1]["kind"] == "cpu"
    assert {p["name"] for p in facts["machine"]["precisions"]} == {"fp32", "bf16", "fp16"}
    assert facts["machine"]["threads"]["cores"] >= 1
    assert isinstance(facts["fused"], list)


def test_without_torch_it_prints_the_fix_and_exits_with_1():
    done = without("torch")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"lorakit {VERSION}, Python ")  # before torch is imported
    assert "tried: torch" in lines
    row = next(n for n, line in enumerate(lines) if line.startswith("torch "))
    assert "broken (ModuleNotFoundError: it is gone)" in lines[row]
    assert "pip install --force-reinstall 'torch==" in lines[row + 1]
    assert lines[-1].startswith("lorakit does not work here yet: torch")


def test_a_missing_library_of_the_command_line_is_named():
    done = without("typer")
    assert done.returncode == 1
    assert done.stderr.startswith("lorakit: the required library 'typer' is not installed")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("installed, word", [(None, "missing"), ("4.57", "does not fit")])
def test_an_unsupported_release_fails_with_the_command_that_fixes_it(lorakit, monkeypatch, installed, word):
    monkeypatch.setattr(versions, "installed", lambda name: installed if name == "transformers" else "99")
    monkeypatch.setattr(versions, "judge", judged(versions.judge))
    code, out, _ = lorakit("doctor")
    assert code == 1
    line = next(line for line in out.splitlines() if line.startswith("transformers"))
    assert word in line
    assert "pip install 'transformers==" in out


def judged(real):
    """Judge every library except transformers as tested, whatever is installed."""
    return lambda requirement, here, tested: real(
        requirement, here if requirement.startswith("transformers") else tested, tested
    )


def test_fused_modules_have_a_section(lorakit, monkeypatch):
    parts = [
        fused.FusedPart("Llama", "attention", False, "its code is not known here"),
        fused.FusedPart("Llama", "gated MLP", True),
    ]
    monkeypatch.setattr(fused, "fused_report", lambda: parts)
    code, out, _ = lorakit("doctor")
    assert code == 0
    line = next(line for line in out.splitlines() if "its code is not known here" in line)
    assert line.split()[:2] == ["Llama", "attention"]


def test_pins_are_a_constraints_file(lorakit):
    code, out, _ = lorakit("doctor", "--pins")
    assert (code, out) == (0, versions.pins())
