"""`lorakit doctor`: one screen of facts, an exit code a script can use, and fixes on the lines they concern."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lorakit.doctor import fused, versions
from lorakit.version import VERSION


def without(name: str) -> subprocess.CompletedProcess[str]:
    """`lorakit doctor` in a Python where this cannot be imported; it prints when that is tried."""
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


def test_every_section_is_there_and_all_can_work(lorakit):
    code, out, error = lorakit("doctor")
    assert (code, error) == (0, "")
    assert out.startswith(f"lorakit {VERSION}, Python ")
    for words in ("transformers", "as tested", "tensorboard", "used", "bf16", "CPU kernels", "threads", "torch.compile", "free of"):
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
    assert {extra["name"] for extra in facts["extras"]} == {"tensorboard", "wandb", "gguf", "bench", "test"}
    assert facts["machine"]["devices"][-1]["kind"] == "cpu"
    assert {p["name"] for p in facts["machine"]["precisions"]} == {"fp32", "bf16", "fp16"}
    assert facts["machine"]["threads"]["cores"] >= 1
    assert isinstance(facts["fused"], list)


def test_without_torch_the_first_line_and_the_fix_are_printed_and_the_exit_code_is_1():
    done = without("torch")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"lorakit {VERSION}, Python ")  # before torch is imported
    assert "tried: torch" in lines
    row = next(n for n, line in enumerate(lines) if line.startswith("torch "))
    assert "broken (ModuleNotFoundError: it is gone)" in lines[row]
    assert "pip install --force-reinstall 'torch==" in lines[row + 1]
    assert lines[-1].startswith("lorakit does not work here yet: torch")


def test_a_library_that_the_command_line_itself_needs_is_named():
    done = without("typer")
    assert done.returncode == 1
    assert done.stderr.startswith("lorakit: the library 'typer'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("installed, word", [(None, "missing"), ("4.57", "does not fit")])
def test_a_release_outside_the_bounds_fails_with_the_command_that_mends_it(lorakit, monkeypatch, installed, word):
    monkeypatch.setattr(versions, "installed", lambda name: installed if name == "transformers" else "99")
    monkeypatch.setattr(versions, "judge", judged(versions.judge))
    code, out, _ = lorakit("doctor")
    assert code == 1
    line = next(line for line in out.splitlines() if line.startswith("transformers"))
    assert word in line
    assert "pip install 'transformers==" in out


def judged(real):
    """Every library but transformers is as tested, whatever the machine has."""
    return lambda requirement, here, tested: real(requirement, here if requirement.startswith("transformers") else tested, tested)


def test_what_is_fused_has_a_section_where_there_is_something_to_say(lorakit, monkeypatch):
    parts = [fused.FusedPart("Llama", "attention", False, "its code is not known here"), fused.FusedPart("Llama", "gated MLP", True)]
    monkeypatch.setattr(fused, "fused_report", lambda: parts)
    code, out, _ = lorakit("doctor")
    assert code == 0
    line = next(line for line in out.splitlines() if "its code is not known here" in line)
    assert line.split()[:2] == ["Llama", "attention"]


def test_pins_are_what_pip_takes(lorakit):
    code, out, _ = lorakit("doctor", "--pins")
    assert (code, out) == (0, versions.pins())
