"""What the tables of `lorakit reproduce` have in common: names, budgets, findings, and the interface of a table's file.

A table is a module of this package that defines the names of `Experiment`. Its `run` returns plain data, which is
stored; tables, findings and plots are made from that data alone, so that they can be redrawn without training.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from ..errors import ConfigError, did_you_mean, listing

if TYPE_CHECKING:
    from ..analysis.tables import Table
    from .work import Work

PAPER = "Hu et al. 2021, arXiv 2106.09685"
NAMES = {
    "e2e": "methods against trainable parameters on E2E NLG (table 3, figure 2)",
    "matrices": "which weight matrices to adapt at an equal budget (table 5)",
    "ranks": "which rank, with the seeds' noise beside it (tables 6, 15 and 18)",
    "subspaces": "subspaces of different ranks and seeds (figures 3 and 4)",
    "amplification": "ΔW against W (table 7)",
    "few_data": "few training rows (table 16)",
    "latency": "merged and unmerged LoRA against bottleneck adapters (table 1)",
    "gpt3": "parameters, optimizer state and checkpoints of the paper's models, counted (sections 1, 4.2 and 5)",
    "memory": "weights, gradients, optimizer state and activations, predicted and measured (section 4.2)",
    "address": "Taiwanese addresses in Chinese to fields, and what else the model still does (not in the paper)",
}

Verdict = Literal["agrees", "disagrees", "within noise", "not shown"]
Result = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """How much a table trains. `seeds`: how many; `steps`: optimizer steps of a run; `rows`: test rows for which texts
    are generated. None where a table has no such thing.
    """

    seeds: int | None = None
    steps: int | None = None
    rows: int | None = None

    def with_given(self, given: Mapping[str, int | None]) -> Budget:
        """Return the budget with the given values in place of the defaults, where the table has such a setting."""
        own = {name: value for name, value in given.items() if value is not None and getattr(self, name) is not None}
        return replace(self, **own)

    @property
    def half(self) -> int:
        """Half of the steps, at least one: those of a run that tries a learning rate."""
        assert self.steps is not None
        return max(1, self.steps // 2)

    def flags(self) -> str:
        """Return the budget as flags of the command line."""
        return "".join(f" --{name} {value}" for name, value in asdict(self).items() if value is not None)


@dataclass(frozen=True)
class Finding:
    """A claim of the paper, whether the figures here agree with it, and the figures that say so."""

    claim: str
    verdict: Verdict
    figures: str


class Experiment(Protocol):
    """The module of a table."""

    TITLE: str  # what the rows compare and how; one paragraph
    BUDGET: Budget

    def run(self, work: Work) -> Result:
        """Measure, and return plain data."""

    def tables(self, result: Result) -> Sequence[Table]:
        """Build the tables."""

    def findings(self, result: Result) -> Sequence[Finding]:
        """Compare with the paper."""


def check_name(name: str) -> str:
    """Return the table's name, in which hyphens may stand for underscores. Raises ConfigError if there is none."""
    known = name.replace("-", "_")
    if known not in NAMES:
        raise ConfigError(
            f"no table is named '{name}'{did_you_mean(name, NAMES)}\n  known: {listing(NAMES, len(NAMES))}"
        )
    return known


def load(name: str) -> Experiment:
    """Import the module of a table. Raises ConfigError if no table has this name."""
    return cast(Experiment, importlib.import_module(f".{check_name(name)}", __package__))


def budgets(names: Sequence[str], given: Mapping[str, int | None]) -> dict[str, Budget]:
    """Return each table's budget. Raises ConfigError for a setting that none of the tables has."""
    own = {name: load(name).BUDGET for name in names}
    for setting, value in given.items():
        if value is not None and all(getattr(budget, setting) is None for budget in own.values()):
            raise ConfigError(
                f"--{setting} has no effect on {listing(list(names), len(names))}, which need no {setting}\n"
                f"  omit --{setting}"
            )
    return {name: budget.with_given(given) for name, budget in own.items()}
