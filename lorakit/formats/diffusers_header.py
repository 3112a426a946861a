"""The header entry "lora_adapter_metadata" of diffusers' LoRA files, both ways.

    {"unet.r": 8, "unet.lora_alpha": 16, "unet.rank_pattern": {"^mid_block...to_q": 4}, "unet.alpha_pattern": {...},
    "text_encoder.r": ...}

diffusers removes the component and passes the rest to `peft.LoraConfig`, so names and patterns are PEFT's: a key
matches a module's name by `re.match(rf"(.*\\.)?({key})$", name)`, and the first match counts. Files of one model
(`save_lora_adapter`) have no component.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapter.lora import factors_of
from ..adapter.update import Update
from ..errors import AdapterError

KEY = "lora_adapter_metadata"
_PLAIN = re.compile(r"(?:[\w-]|\\?\.)+")
# A regular expression from a file must not run for hours: no repeated groups, few repetitions. Plain names are looked
# up instead.
_LONGEST_REGEX, _MOST_REPETITIONS = 1000, 4
_REPEATED_GROUP, _REPETITION = re.compile(r"\)[*+?{]|\\[1-9]|\(\?(?!:)"), re.compile(r"[*+{]")


class HeaderAlphas:
    """The alphas of a file's modules, from its header."""

    def __init__(self, where: Path, described: Mapping[str, Any]) -> None:
        self._where, self._described = where, described
        self._patterns: dict[str, _Pattern] = {}

    def of(self, module: str, rank: int) -> tuple[float, bool]:
        """(alpha, rslora) of a module with its component in front. alpha is `rank` if the header has no alpha for that
        component. AdapterError for a wrong value.
        """
        component, _, name = module.partition(".")
        prefix = f"{component}." if any(key.startswith(f"{component}.") for key in self._described) else ""
        if prefix not in self._patterns:
            self._patterns[prefix] = _Pattern(
                f"{self._where}, its header's {prefix}alpha_pattern", self._described.get(f"{prefix}alpha_pattern")
            )
        # transformers 5 has no level `text_model`, so the file's patterns may be for names without it.
        names = dict.fromkeys((name, name.removeprefix("text_model.")))
        alpha = self._patterns[prefix].first(names, self._described.get(f"{prefix}lora_alpha", rank))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not (math.isfinite(alpha) and alpha > 0):
            raise AdapterError(
                f"{self._where}: its header gives '{module}' the alpha {alpha!r}; expected a positive number"
            )
        return float(alpha), self._described.get(f"{prefix}use_rslora") is True


class _Pattern:
    """PEFT's alpha_pattern, indexed by name because a file may have as many keys as modules."""

    def __init__(self, where: str, pattern: Any) -> None:
        if not isinstance(pattern or {}, Mapping):
            raise AdapterError(f"{where} is {pattern!r}; expected an object of module names and numbers")
        self._names: dict[str, tuple[int, Any]] = {}  # a name, anchored by "^" or fitting as an ending
        self._regexes: list[tuple[int, re.Pattern[str], Any]] = []
        for at, (key, value) in enumerate((pattern or {}).items()):
            name = key.removesuffix("$")
            if _PLAIN.fullmatch(name.removeprefix("^")):
                self._names.setdefault(name.replace("\\.", "."), (at, value))
                continue
            try:
                if (
                    len(key) > _LONGEST_REGEX
                    or _REPEATED_GROUP.search(key)
                    or len(_REPETITION.findall(key)) > _MOST_REPETITIONS
                ):
                    raise re.error("it repeats groups or is too long, and could take forever")
                self._regexes.append((at, re.compile(rf"(.*\.)?({key})$"), value))
            except re.error as error:
                raise AdapterError(
                    f"{where}: the key '{key[:100]}' is no regular expression to match names with: {error}"
                ) from error

    def first(self, names: Mapping[str, Any], default: Any) -> Any:
        """The value of the first key that matches any of a module's names."""
        hits = []
        for name in names:
            parts = name.split(".")
            endings = [".".join(parts[i:]) for i in range(len(parts))]
            hits += [self._names[key] for key in (f"^{name}", *endings) if key in self._names]
            hits += [(at, value) for at, regex, value in self._regexes if regex.match(name)]
        return min(hits, key=lambda hit: hit[0])[1] if hits else default


def describe(updates: Mapping[str, Update]) -> dict[str, Any]:
    """The arguments of `peft.LoraConfig` that give each module of one component its rank and scale."""
    modules = factors_of(updates)
    ranks, alphas = Counter(f.A.shape[0] for f in modules.values()), Counter(f.alpha for f in modules.values())
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_anchored(name): f.A.shape[0] for name, f in modules.items() if f.A.shape[0] != rank},
        "alpha_pattern": {_anchored(name): _number(f.alpha) for name, f in modules.items() if f.alpha != alpha},
        "target_modules": sorted(name.removeprefix("text_model.") for name in modules),
        "use_dora": any(u.variant == "dora" for u in updates.values()),
    }


def _anchored(name: str) -> str:
    """A pattern's key that matches only this module: without "^", "proj_out" would match all names that end so. A text
    encoder's key has no "^", because the level `text_model` may be missing in the reading program.
    """
    return name.removeprefix("text_model.") if name.startswith("text_model.") else f"^{name}"


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
