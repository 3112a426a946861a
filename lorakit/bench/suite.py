"""The common part of `lorakit bench`'s tables: their names, the machine, peers that may be missing, how rows are shown.

A table is a module of this package with `TITLE` (what its rows compare), `run(quick) -> rows` (plain values by column),
and optionally `plot(rows, axes)`. A table that measures in several precisions has `run(quick, precisions)`. Lists among
a row's values are for the JSON and the plot; the printed table leaves them out.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..errors import ConfigError, LorakitError, did_you_mean, listing

if TYPE_CHECKING:
    import torch

    from ..analysis.tables import Table

NAMES = {
    "train-step": "one training step: time, and bytes kept for backward",
    "image-step": "one training step of a diffusion UNet, against diffusers and PEFT",
    "trainer": "training runs from start to end, against TRL",
    "attach": "attaching, loading and switching adapters; start-up",
    "mixed": "batches that mix adapters",
    "joint": "several adapters trained at once",
    "latency": "base, merged, unmerged and bottleneck adapters (Hu et al. 2021, table 1)",
    "experts": "LoRA on a mixture of experts, against PEFT",
    "dora": "DoRA against LoRA, lorakit's and PEFT's",
    "starts": "PiSSA and OLoRA, lorakit's and PEFT's",
    "products": "LoHa, LoKr, VeRA and adapted attention, lorakit's and PEFT's",
    "serve": "the server's engine, against transformers and PEFT; HTTP; cold adapters",
    "plan": "predicted against measured memory",
    "requantize": "what is left of an adapter when merged weights are quantized again, against PEFT",
}
PEERS = ("peft", "loralib", "trl", "diffusers")
LONGEST = 80  # characters of a text that has a column of the table; longer ones are remarks below it
INSTALL = "pip install 'lorakit[bench]'"

Row = dict[str, Any]


class Bench(Protocol):
    """The module of a table."""

    TITLE: str

    @property
    def run(self) -> Callable[..., list[Row]]: ...


class MissingPeer(LorakitError):
    """A package that a table compares with is not installed."""

    def __init__(self, name: str):
        super().__init__(f"not measured: {name} is not installed\n  {INSTALL}")


def check_name(name: str) -> None:
    """Raise ConfigError if no table has this name."""
    if name not in NAMES:
        raise ConfigError(
            f"no benchmark is named '{name}'{did_you_mean(name, NAMES)}\n  known: {listing(NAMES, len(NAMES))}"
        )


def load(name: str) -> Bench:
    """Import the module of a table. Raises ConfigError if no table has this name."""
    check_name(name)
    return cast(Bench, importlib.import_module(f".{name.replace('-', '_')}", __package__))


def precisions(requested: str | None) -> tuple[tuple[torch.dtype, ...], str]:
    """Return the precisions to measure in, and a notice for the user if one is left out.

    requested: fp32, bf16 or all; None means those that the machine multiplies natively, as others take minutes a step.
    """
    import torch

    from ..bases.device import choose_device, choose_dtype

    both = (torch.float32, torch.bfloat16)
    if requested in ("fp32", "bf16"):
        return (both[requested == "bf16"],), ""
    native = choose_dtype("auto", choose_device().value)
    if requested == "all" or native.value == torch.bfloat16:
        return both, ""
    return both[:1], f"bf16 is left out: {native.reason}, so a step would take minutes; --precision all measures it too"


def measures_precisions(name: str) -> bool:
    """Whether a table measures in several precisions."""
    return "precisions" in inspect.signature(load(name).run).parameters


def measure(name: str, quick: bool, precisions: Sequence[torch.dtype] | None = None) -> list[Row]:
    """Run a table, in all precisions by default. Raises MissingPeer if a package it compares with is not installed."""
    try:
        if precisions is not None and measures_precisions(name):
            return load(name).run(quick, precisions)
        return load(name).run(quick)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in PEERS:
            raise MissingPeer(missing) from None
        raise


def need(*peers: str) -> None:
    """Raise MissingPeer if a package is not installed, before a run rather than in the middle of it."""
    for peer in peers:
        if importlib.util.find_spec(peer) is None:
            raise MissingPeer(peer)


def machine() -> dict[str, Any]:
    """Return what the measurements depend on: processor, threads, load, and versions."""
    import torch

    from ..doctor.machine import cores, cpu_name
    from ..doctor.versions import installed
    from ..version import VERSION

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    load_average = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "load": load_average,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lorakit": VERSION,
        **{peer: installed(peer) for peer in ("transformers", *PEERS)},
    }


def machine_line(facts: Row) -> str:
    """Describe the facts of `machine` in two lines."""
    gpu = facts["gpu"] or "no GPU found, so GPU: not measured"
    load = "" if facts["load"] is None else f"; load {facts['load']:g} at the start"
    peers = ", ".join(f"{p} {facts[p]}" for p in ("transformers", *PEERS) if facts[p])
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads; {gpu}{load}\n"
        f"lorakit {facts['lorakit']}, torch {facts['torch']}, {peers}"
    )


def table(rows: Sequence[Row]) -> Table:
    """Return rows as a table; a column's name wraps above its figures."""
    import textwrap

    from ..analysis.tables import Table

    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if _is_short(name, rows)]
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    return Table("", [textwrap.fill(column, 9) for column in columns], cells)


def remarks(rows: Sequence[Row]) -> list[str]:
    """Return the texts that are too long for a column, each once, behind their column's name."""
    texts = ((name, row[name]) for row in rows for name in row if isinstance(row[name], str))
    return list(dict.fromkeys(f"{name}: {text}" for name, text in texts if not _is_short(name, rows)))


def _is_short(name: str, rows: Sequence[Row]) -> bool:
    """Whether every value of a column fits into a table."""
    values = [row.get(name) for row in rows]
    return not any(isinstance(v, list) or (isinstance(v, str) and len(v) > LONGEST) for v in values)


def save_plot(name: str, rows: Sequence[Row], folder: Path) -> Path | None:
    """Save the table's plot as FOLDER/NAME.png and return the path; None if it has no plot."""
    plot = getattr(load(name), "plot", None)
    if plot is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    plot(rows, axes)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
