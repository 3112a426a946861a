"""The facts on the terminal: a table a section, and what to do on the line it concerns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..plan.units import show_bytes
from .versions import BAD, Extra, Library

if TYPE_CHECKING:  # machine.py imports torch, and this must show that there is none
    from .fused import FusedPart
    from .machine import Device, Machine, Precision

_STATES = {
    "tested": ("as tested", "green"), "newer": ("newer than tested", "yellow"), "older": ("older than tested", "yellow"),
    "untested": ("", "white"), "missing": ("missing", "bold red"), "outside": ("does not fit", "bold red"), "broken": ("broken", "bold red"),
}  # fmt: skip


def libraries(found: Sequence[Library]) -> Table:
    """Required libraries: what is here, what was tested, what fits."""
    table = _table("library", "installed", "tested", "needed", "")
    for lib in found:
        table.add_row(lib.name, lib.installed or "–", lib.tested or "–", lib.needed, _verdict(lib))
    return table


def extras(found: Sequence[Extra]) -> Table:
    """What each extra needs, and the command for what is lacking."""
    table = _table("extra", "", "libraries")
    for extra in found:
        state = Text("installed", style="green") if not extra.lacking else Text("incomplete", style="yellow")
        words = ", ".join(_library(lib) for lib in extra.libraries)
        table.add_row(extra.name, state, Text(f"{words}\n{extra.fix}" if extra.fix else words))
    return table


def devices(found: Sequence[Device]) -> Table:
    table = _table("device", "", "memory", "free", "")
    for device in found:
        table.add_row(
            device.kind, device.name, _bytes(device.memory), _bytes(device.free), Text("used" if device.used else "", style="green")
        )
    return table


def precisions(found: Sequence[Precision]) -> Table:
    table = _table("precision", "", "", "")
    for precision in found:
        how = Text("native", style="green") if precision.native else Text("emulated", style="yellow")
        table.add_row(precision.name, how, precision.why, Text("--precision auto" if precision.used else "", style="green"))
    return table


def machine(found: Machine) -> Table:
    """Processor, threads, compiler and disk, a row each."""
    table, threads, compiler = _table("machine", ""), found.threads, found.compiler
    table.add_row("CPU kernels", f"{found.kernels}; the processor has {', '.join(found.instructions) or 'none of the sets we know'}")
    physical = f", {threads.physical} physical" if threads.physical and threads.physical != threads.cores else ""
    limit = f", {threads.limit:g} cores' time (cgroup)" if threads.limit else ""
    table.add_row("threads", f"{threads.torch} of {threads.cores} cores{physical}{limit}; {threads.between_operations} between operations")
    for name, value in threads.variables.items():
        table.add_row("", f"{name}={value}")
    for note in threads.notes:
        table.add_row("", Text(note, style="yellow"))
    if compiler.usable:
        table.add_row("torch.compile", f"{compiler.path} ({compiler.version or 'its version is not known'})")
    else:
        table.add_row("torch.compile", Text(f"cannot be used: {compiler.why}", style="yellow"))
    for disk in found.disks:
        locked = Text("" if disk.writable else "; not writable", style="yellow")
        table.add_row(disk.what, Text(f"{show_bytes(disk.free)} free of {show_bytes(disk.total)} ({disk.path})") + locked)
    return table


def fused(found: Sequence[FusedPart]) -> Table:
    table = _table("model", "part", "", "")
    for part in found:
        how = Text("fused", style="green") if part.fused else Text("the model's own code", style="yellow")
        table.add_row(part.model, part.part, how, Text(part.why))
    return table


def summary(found: Sequence[Library]) -> Text:
    """The last line: whether all can work, and what else to know about versions."""
    bad = [lib.name for lib in found if lib.state in BAD]
    if bad:
        return Text(f"not all can work: {', '.join(bad)}; the commands above mend it", style="bold red")
    other = [lib.name for lib in found if lib.state in ("newer", "older")]
    if not other:
        return Text("all can work, with the releases that lorakit is tested with", style="bold green")
    return Text(
        f"all can work; {', '.join(other)} {'is' if len(other) == 1 else 'are'} not the tested release{'' if len(other) == 1 else 's'}\n"
        "  the tested ones: lorakit doctor --pins > constraints.txt && pip install -c constraints.txt lorakit", style="bold"
    )  # fmt: skip


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
    said = words if lib.state not in ("tested", "untested") else ""
    return " ".join(part for part in (lib.name, lib.installed or "", f"({said})" if said else "") if part)


def _bytes(size: int | None) -> str:
    return "not known" if size is None else show_bytes(size)
