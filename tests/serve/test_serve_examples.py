"""The systemd unit and the container file call `lorakit serve` as it is, and systemd finds nothing wrong."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.cli.serve import serve

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "serve"
UNIT = (EXAMPLES / "lorakit.service").read_text(encoding="utf8")
CONTAINER = (EXAMPLES / "Containerfile").read_text(encoding="utf8")


def options(words):
    return {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}


def setting(name):
    return re.findall(rf"^{name}=(.*)$", UNIT.replace("\\\n", " "), re.MULTILINE)


def seconds(words):
    return float(words[words.index("--drain") + 1])


def test_the_units_flags_exist_and_its_keys_are_not_on_the_command_line():
    program, verb, *words = shlex.split(setting("ExecStart")[0])
    assert (Path(program).name, verb) == ("lorakit", "serve")
    assert options(words) <= set(inspect.signature(serve).parameters)
    assert {"%d/api-key", "%d/manage-key"} <= set(words)
    assert [line.partition(":")[0] for line in setting("LoadCredential")] == ["api-key", "manage-key"]


def test_the_unit_waits_longer_than_the_server_drains():
    assert seconds(shlex.split(setting("ExecStart")[0])) + 10 < float(setting("TimeoutStopSec")[0])


@pytest.mark.parametrize(
    "name, value", [("DynamicUser", "yes"), ("ProtectSystem", "strict"), ("NoNewPrivileges", "yes")]
)
def test_the_unit_is_hardened(name, value):
    assert setting(name) == [value]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_finds_nothing_wrong(tmp_path):
    unit = tmp_path / "lorakit.service"
    unit.write_text(UNIT.replace("/opt/lorakit/bin/lorakit", sys.executable), encoding="utf8")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    about_it = [line for line in done.stderr.splitlines() if "lorakit" in line]
    assert about_it == []
    assert done.returncode == 0 or not about_it


def test_the_containers_flags_exist_and_it_stops_in_time():
    words = json.loads(re.search(r"^CMD (\[.*\])$", CONTAINER, re.MULTILINE)[1])
    assert json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", CONTAINER, re.MULTILINE)[1]) == ["lorakit", "serve"]
    assert options(words) <= set(inspect.signature(serve).parameters)
    assert seconds(words) < 10  # then SIGKILL comes
    assert "--no-index" in CONTAINER
