"""Try an adapter's regular expressions on its own module names before they are used.

PEFT's `rank_pattern` and `target_modules` may be regular expressions, and a pattern such as "(a+)+b" takes longer than
anybody waits. Python's `re` has no time limit and holds the interpreter lock while it matches, so one such adapter
would stop all answers. A child process can be ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from ...errors import AdapterError, listing

SECONDS = 3.0  # starting Python takes 0.02 to 0.5, a thousand ordinary patterns on a thousand names 1
_SUFFIXES = (".weight", ".lora_A", ".lora_B", ".default")
_PREFIX = "base_model.model."
_TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for rule in (re.compile(rf"(.*\\.)?({pattern})$"), re.compile(f"(?:{pattern})$")):
        for name in names:
            rule.match(name)
"""


def check_quick(patterns: Sequence[str], keys: Sequence[str]) -> None:
    """Raise AdapterError for patterns that are not regular expressions, or take too long on these tensors' modules."""
    modules = sorted({_module(key) for key in keys})
    asked = json.dumps([list(patterns), modules])
    try:
        tried = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY],
            input=asked.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AdapterError(
            f"adapter_config.json: its regular expressions ({_shown(patterns)}) take more than {SECONDS:g} s to match "
            f"{len(modules)} module names\n  expected names, or patterns without a repetition inside a repetition"
        ) from error
    if tried.returncode:
        raise AdapterError(f"adapter_config.json: not all of {_shown(patterns)} are regular expressions")


def _module(key: str) -> str:
    """Return the module's name in a tensor's key."""
    name = key.removeprefix(_PREFIX)
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _shown(patterns: Sequence[str]) -> str:
    return listing((repr(pattern[:60]) for pattern in patterns), 3)
