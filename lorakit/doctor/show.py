"""Print the facts: one table per section, and each fix on the line it concerns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..plan.units import show_bytes
from .versions import BAD, Extra, Library

if TYPE_CHECKING:  # machine.py imports torch, and this file has to work without it
    from .fused import FusedPart
    from .machine import Device, Machine, Precision
    from .quantizers import Quantizer

_STATES = {
    "tested": ("as tested", "green"),
    "newer": ("newer than tested", "yellow"),
    "older": ("older than tested", "yellow"),
    "untested": ("", "white"),
    "missing": ("missing", "bold red"),
    "outside": ("does not fit", "bold red"),
    "broken": ("broken", "bold red"),
}


def libraries(items: Sequence[Library]) -> Table:
    """Table of the required libraries: installed, tested and required versions."""
    table = _table("library", "installed", "tested", "needed", "")
    for lib in items:
        table.add_row(lib.name, lib.installed or "–", lib.tested or "–", lib.needed, _verdict(lib))
    return table


def extras(items: Sequence[Extra]) -> Table:
    """Table of the extras, and the command that installs what is missing."""
    table = _table("extra", "", "libraries")
    for extra in items:
        state = Text("installed", style="green") if not extra.lacking else Text("incomplete", style="yellow")
        names = ", ".join(_library(lib) for lib in extra.libraries)
        table.add_row(extra.name, state, Text(f"{names}\n{extra.fix}" if extra.fix else names))
    return table


def devices(items: Sequence[Device]) -> Table:
    """Table of the devices and their memory."""
    table = _table("device", "", "memory", "free", "")
    for device in items:
        used = Text("used" if device.used else "", style="green")
        table.add_row(device.kind, device.name, _bytes(device.memory), _bytes(device.free), used)
    return table


def precisions(items: Sequence[Precision]) -> Table:
    """Table of the precisions on the chosen device."""
    table = _table("precision", "", "", "")
    for precision in items:
        support = Text("native", style="green") if precision.native else Text("emulated", style="yellow")
        used = Text("--precision auto" if precision.used else "", style="green")
        table.add_row(precision.name, support, precision.why, used)
    return table


def machine(facts: Machine) -> Table:
    """Table of processor, threads, compiler and disks, one row each."""
    table, threads, compiler = _table("machine", ""), facts.threads, facts.compiler
    instructions = ", ".join(facts.instructions) or "none of the known instruction sets"
    table.add_row("CPU kernels", f"{facts.kernels}; the processor has {instructions}")
    physical = f", {threads.physical} physical" if threads.physical and threads.physical != threads.cores else ""
    limit = f", {threads.limit:g} cores of CPU time (cgroup)" if threads.limit else ""
    within = f"{threads.torch} threads on {threads.cores} cores{physical}{limit}"
    table.add_row("threads", f"{within}; {threads.between_operations} inter-op threads")
    for name, value in threads.variables.items():
        table.add_row("", f"{name}={value}")
    for note in threads.notes:
        table.add_row("", Text(note, style="yellow"))
    if compiler.usable:
        table.add_row("torch.compile", f"{compiler.path} ({compiler.version or 'version not known'})")
    else:
        table.add_row("torch.compile", Text(f"cannot be used: {compiler.why}", style="yellow"))
    for disk in facts.disks:
        space = Text(f"{show_bytes(disk.free)} free of {show_bytes(disk.total)} ({disk.path})")
        table.add_row(disk.what, space + Text("" if disk.writable else "; not writable", style="yellow"))
    return table


def quantizers(items: Sequence[Quantizer]) -> Table:
    """Table of the ways of storing a base's weights."""
    table = _table("quantized", "", "")
    for each in items:
        state = Text("works", style="green") if each.usable else Text("not here", style="yellow")
        table.add_row(f"--quantize {each.name}" if each.loads else each.name, state, Text(each.why))
    return table


def fused(items: Sequence[FusedPart]) -> Table:
    """Table of the fused parts by model."""
    table = _table("model", "part", "", "")
    for part in items:
        state = Text("fused", style="green") if part.fused else Text("the model's own code", style="yellow")
        table.add_row(part.model, part.part, state, Text(part.why))
    return table


def summary(items: Sequence[Library]) -> Text:
    """Return the last line: whether lorakit works here, and which versions differ from the tested ones."""
    bad = [lib.name for lib in items if lib.state in BAD]
    if bad:
        verb = "needs" if len(bad) == 1 else "need"
        return Text(
            f"lorakit does not work here yet: {', '.join(bad)} {verb} fixing, see the commands above", style="bold red"
        )
    other = [lib.name for lib in items if lib.state in ("newer", "older")]
    if not other:
        return Text("lorakit works here, with the releases it is tested with", style="bold green")
    differ = f"{', '.join(other)} {'is not the tested release' if len(other) == 1 else 'are not the tested releases'}"
    install = "lorakit doctor --pins > constraints.txt && pip install -c constraints.txt lorakit"
    return Text(f"lorakit works here; {differ}\n  to install the tested ones: {install}", style="bold")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    return table


def _verdict(lib: Library) -> Text:
    words, style = _STATES[lib.state]
    text = Text(words, style=style)
    if lib.why:
        text.append(f" ({lib.why})", style="red")
    if lib.fix:
        text.append(f"\n{lib.fix}", style="default")
    return text


def _library(lib: Library) -> str:
    words, _ = _STATES[lib.state]
    note = f"({words})" if lib.state not in ("tested", "untested") else ""
    return " ".join(part for part in (lib.name, lib.installed or "", note) if part)


def _bytes(size: int | None) -> str:
    return "not known" if size is None else show_bytes(size)
