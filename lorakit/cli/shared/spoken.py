"""Say an error of the library in the words of the command line: flags in place of settings and arguments.

TrainConfig.rank: expected ...               --rank: expected ...
pass force=True (--force)                    pass --force
cut them instead (on_long: cut)              cut them instead (--on-long cut)
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_ARGUMENT = re.compile(r"\b\w+=[^\s()]+ \((--[\w-]+[^()]*)\)")  # rank=16 (--rank 16)
_ALSO = re.compile(r"(--[\w-]+(?: [\w.{}-]+)?) \(\w+=[^\s()]+\)")  # --force (force=True)
_CLASS = r"\b(?:\w+Config|Quantization)"  # of settings
_NO_SETTING = re.compile(rf"{_CLASS} has no setting ")
_WHOLE = re.compile(rf"{_CLASS}\.settings: ")
# Settings of one word whose `name: value` is said of the setting alone; "validation: all rows ..." is a sentence.
_PLAIN = {"clip", "method", "precision", "quantize", "rank", "seed", "task", "threads", "track", "memory"}
# A value, after which a clause ends: `on_long: cut`, but not `method: full trains all weights`.
_VALUE = r"[\w'\[-][^\s,;)]*(?:[,;)\n]|$| or | and )"
_CHANGED = re.compile(r"^  (\w+): was ", re.MULTILINE)  # a resumed run's differences


def in_flags(message: str, settings: Iterable[str]) -> str:
    """Return an error's message with flags. `settings`: the names of a run's settings."""
    names = sorted(settings, key=len, reverse=True)
    message = _ARGUMENT.sub(r"\1", message)
    message = _ALSO.sub(r"\1", message)
    message = _NO_SETTING.sub("there is no setting ", message)
    message = _WHOLE.sub("", message)
    one = "|".join(names)
    message = re.sub(rf"{_CLASS}\.({one})\b(?:\.\d+)?", lambda m: _flag(m[1]), message)
    message = _CHANGED.sub(lambda m: f"  {_flag(m[1])}: was " if m[1] in names else m[0], message)
    # `on_long: cut`, but not `data: was ...`, paths, or the names of columns
    pairs = "|".join(name for name in names if "_" in name or name in _PLAIN)
    message = re.sub(rf"(?<![\w./'\"-])({pairs}): (?={_VALUE})", lambda m: f"{_flag(m[1])} ", message)
    two_words = "|".join(name for name in names if "_" in name)
    return re.sub(rf"(?<![\w./'\"-])({two_words})(?![\w.'\"/(=])", lambda m: _flag(m[1]), message)


def _flag(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"
