"""Summarize what is attached to a model: parameter counts, targets, and fused blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..bases.pipeline import PipelineModel, as_module
from ..formats.peft_experts import dropped, note
from ..layers.bases import parameter_count
from ..layers.expert_weight import ExpertWeight
from ..layers.fused import fused
from ..layers.fused.fused import Fused
from ..layers.layer import child_name
from ..layers.targets import module_names
from ..layers.unreached import Unreached, unreached
from ..layers.updates.update import LiveUpdate
from .state import Attached, Weights, architecture_of, layer_at, names_of, saved_parameters, state_of


@dataclass(frozen=True)
class Row:
    """One adapted module, or one saved parameter (rank None). `parameters`: number of elements; `experts`: how many
    matrices the weight is a stack of, 0 for others. `counted`: what `rank` counts.
    """

    adapter: str
    name: str
    shape: str
    rank: int | None
    parameters: int
    experts: int = 0
    counted: str = "rank"  # what `rank` is: "rank", "tokens"


@dataclass(frozen=True)
class Summary:
    """What is attached to a model; print it. `trainable` and `total`: elements of the model's parameters.

    `skipped`: module -> why it is not adapted. `unreached`: weights that no adapter can reach, such as the experts of a
    mixture of experts; None if they are less than a hundredth of the base.
    """

    trainable: int
    total: int
    rows: list[Row]
    active: dict[str, Weights]
    skipped: dict[str, str]
    fused: list[Fused]
    unreached: Unreached | None = None
    notes: list[str] = field(default_factory=list)  # what else to know before the adapter is used elsewhere
    components: list[str] = field(default_factory=list)  # of a pipeline
    expert_names: Collection[str] = ()  # of weights of experts, adapted or not

    @property
    def experts(self) -> str:
        """Say which weights of experts are adapted, and count the parameters of these updates; "" if none."""
        rows = [row for row in self.rows if row.experts]
        if not rows:
            return ""
        counts = "/".join(map(str, sorted({row.experts for row in rows})))
        endings = ", ".join(sorted({_ending(row.name) for row in rows}))
        elements = sum(row.parameters for row in rows)
        return f"{len(rows)} weights of {counts} experts ({endings}), {elements:,} parameters"

    @property
    def experts_skipped(self) -> list[str]:
        """One line for all weights of experts of an ending that were skipped for one reason."""
        return _by_ending({name: why for name, why in self.skipped.items() if name in self.expert_names})

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0
        active = names_of(self.active) if self.active else "the base alone"
        lines = [f"{self.trainable:,} trainable of {self.total:,} parameters ({share:.3g} %); active: {active}"]
        for component in self.components:
            rows = [row for row in self.rows if row.name.partition(".")[0] == component]
            elements = sum(row.parameters for row in rows)
            lines.append(f"  {component}: {f'{len(rows)} modules, {elements:,}' if rows else 'not adapted'}")
            lines += _grouped(rows, "    ")
        lines += [] if self.components else _grouped(self.rows, "  ")
        lines += [f"  skipped: {line}" for line in _by_ending(self.skipped)]
        lines += [f"  not reached: {self.unreached}"] if self.unreached else []
        lines += [f"  {row}" for row in self.fused]
        lines += [f"  note: {text}" for text in self.notes]
        return "\n".join(lines)


def _grouped(rows: Sequence[Row], indent: str) -> list[str]:
    """One line for all modules of an ending, a shape and a rank."""
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for row in rows:
        # a saved parameter's last name ("weight") would say nothing
        last = _ending(row.name) if row.rank else row.name
        size = f"{row.counted} {row.rank}" if row.rank else "saved"
        groups.setdefault((row.adapter, last, row.shape, size), []).append(row.parameters)
    width = max((len(k[1]) for k in groups), default=0)
    return [
        f"{indent}{adapter}: {last:<{width}}  {len(counts):>4} x {shape:<14} {size:<9} {sum(counts):>12,}"
        for (adapter, last, shape, size), counts in groups.items()
    ]


def _ending(name: str) -> str:
    """The last part of a module's name; the last two if that is a number ("to_out.0")."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def summary(model: Any) -> Summary:
    """Count trainable and total parameters, list each adapter's targets, and say which blocks are fused (and why others
    are not). Raises StateError if no adapter is attached.
    """
    model = as_module(model)
    state = state_of(model)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for name, attached in state.adapters.items():
        skipped.update(attached.skipped)
        for m in attached.modules:
            layer = layer_at(model, m)
            child: LiveUpdate = layer._modules[child_name(name)]
            sizes = child.shape_on(layer)
            experts = sizes[0] if isinstance(layer, ExpertWeight) else 0
            count = sum(p.numel() for p in child.parameters())
            rows.append(Row(name, m, _shape(sizes), child.rank, count, experts, child.counted))
        for full, parameter in saved_parameters(model, state, name):
            rows.append(Row(name, full, _shape(parameter.shape), None, parameter.numel()))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved_names = {full for attached in state.adapters.values() for full in attached.saved}
    missed = unreached(model, saved_names)
    total = parameter_count(model)
    notes = [text for a in state.adapters.values() if (text := _note(model, a)) is not None]
    components = list(model.components) if isinstance(model, PipelineModel) else []
    expert_names = {name for name, module in module_names(model).items() if isinstance(module, ExpertWeight)}
    return Summary(
        trainable,
        total,
        rows,
        dict(state.active),
        skipped,
        fused.report(model),
        missed,
        notes,
        components,
        expert_names,
    )


def _note(model: nn.Module, attached: Attached) -> str | None:
    """Say what PEFT would not load of an adapter."""
    if attached.config.variant != "lora":
        return None
    converted = [m for m in attached.modules if not isinstance(layer_at(model, m), ExpertWeight)]
    return note(dropped(architecture_of(model), converted), len(attached.modules))


def _by_ending(skipped: dict[str, str]) -> list[str]:
    """One line for all modules of an ending that were skipped for one reason; the full name of a single one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for module, why in skipped.items():
        groups.setdefault((_ending(module), why), []).append(module)
    return [
        f"{modules[0]} ({why})" if len(modules) == 1 else f"{len(modules)} x {ending} ({why}), first {modules[0]}"
        for (ending, why), modules in groups.items()
    ]


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
