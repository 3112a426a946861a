"""Compare a sweep's settings over several seeds: which differences are larger than the seeds' noise.

Runs with the same seed have the same order of rows, so settings are compared seed by seed: d = loss - loss of the best
settings. The 95 % interval of the mean of d is ± t · sd(d) / √n, with Student's t for n - 1 degrees of freedom; a
difference is above noise if the interval excludes zero. Each comparison has its own chance of 5 % to be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from ...analysis.tables import Table
from .leaderboard import Entry, shown

SEED = "seed"
# The 97.5 % quantiles of Student's t, by degrees of freedom from 1; beyond the last one, the normal distribution's.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL = 1.96


@dataclass(frozen=True)
class Settings:
    """The runs that differ in their seed alone. `difference`: the mean loss above the best settings', on the seeds that
    both have; `within`: half of its 95 % interval, None for fewer than two seeds. Both are None for the best settings.
    """

    settings: Mapping[str, Any]
    group: str
    seeds: int
    failed: int
    mean: float | None
    deviation: float | None
    difference: float | None
    within: float | None

    @property
    def above_noise(self) -> bool | None:
        """Whether it is worse than the best settings by more than noise; None if that cannot be said."""
        return None if self.difference is None or self.within is None else self.difference > self.within

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return {**asdict(self), "above_noise": self.above_noise}


def over_seeds(ranked: Sequence[Entry], swept: Sequence[str]) -> list[Settings]:
    """Summarize runs over their seeds, the best mean first; empty if seeds were not swept beside other settings."""
    others = [setting for setting in swept if setting != SEED]
    if SEED not in swept or not others:
        return []
    result = []
    for group in dict.fromkeys(entry.group for entry in ranked):
        losses: dict[str, dict[int, float | None]] = {}
        settings: dict[str, dict[str, Any]] = {}
        for entry in ranked:
            if entry.group == group:
                own = {setting: entry.settings[setting] for setting in others}
                settings.setdefault(str(own), own)
                losses.setdefault(str(own), {})[entry.settings[SEED]] = entry.score
        scores = {key: {s: v for s, v in runs.items() if v is not None} for key, runs in losses.items()}
        order = sorted(scores, key=lambda key: fmean(scores[key].values()) if scores[key] else math.inf)
        best = scores[order[0]]
        for key in order:
            own_scores = scores[key]
            common = sorted(own_scores.keys() & best.keys())
            apart = [own_scores[seed] - best[seed] for seed in common] if key != order[0] else []
            result.append(
                Settings(
                    settings[key],
                    group,
                    len(own_scores),
                    len(losses[key]) - len(own_scores),
                    fmean(own_scores.values()) if own_scores else None,
                    stdev(own_scores.values()) if len(own_scores) > 1 else None,
                    fmean(apart) if apart else None,
                    half_interval(apart),
                )
            )
    return result


def half_interval(differences: Sequence[float]) -> float | None:
    """Return half of the 95 % interval of the mean of paired differences; None for fewer than two."""
    count = len(differences)
    if count < 2:
        return None
    t = _T[count - 2] if count - 2 < len(_T) else _NORMAL
    return t * stdev(differences) / math.sqrt(count)


def table(summary: Sequence[Settings], swept: Sequence[str]) -> Table:
    """Build the table over seeds. `swept`: the sweep's swept settings."""
    others = [setting for setting in swept if setting != SEED]
    grouped, failed = len({each.group for each in summary}) > 1, any(each.failed for each in summary)
    heads = [*(setting.replace("_", "\n") for setting in others), *(["ranked\nwithin"] * grouped), "seeds"]
    heads += [*(["failed"] * failed), "mean\nloss", "seeds'\ndeviation", "above\nthe best", "95 %", ""]
    rows = []
    for each in summary:
        cells = [*(shown(each.settings[setting]) for setting in others), *([each.group] * grouped), str(each.seeds)]
        cells += [str(each.failed)] * failed
        cells += ["" if each.mean is None else f"{each.mean:.4f}"]
        cells += ["" if each.deviation is None else f"{each.deviation:.4f}"]
        cells += ["" if each.difference is None else f"{each.difference:+.4f}"]
        cells += ["" if each.within is None else f"± {each.within:.4f}", _verdict(each)]
        rows.append(cells)
    return Table("over seeds, compared with the best", heads, rows)


def _verdict(each: Settings) -> str:
    if each.mean is None:
        return "all failed"
    if each.difference is None:
        return "best"
    if each.above_noise is None:
        return "one seed: no telling"
    return "worse" if each.above_noise else "within noise"
