"""`lorakit doctor`: show what this machine supports."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..version import VERSION

if TYPE_CHECKING:
    from ..doctor.fused import FusedPart
    from ..doctor.machine import Machine
    from ..doctor.quantizers import Quantizer
    from ..doctor.versions import Extra, Library


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
    pins: Annotated[
        bool, typer.Option("--pins", help="print the tested releases as a constraints file for pip")
    ] = False,
) -> None:
    """Show what this machine supports: library versions, devices, precisions, threads, compiler, extras, disk.

    The exit code is 0 if everything required works, and 1 if a required library is missing, broken or not supported.
    """
    from ..doctor import versions

    if pins:
        print(versions.pins(), end="")
        return
    system = platform.platform()
    if not json_output:  # before the imports that take seconds
        print(f"lorakit {VERSION}, Python {platform.python_version()}, {system}\n", flush=True)
    python = versions.python()
    libraries = [*([python] if python.fix else []), *versions.required()]
    extras = versions.extras()
    works = not any(lib.fix for lib in libraries)
    machine = fused = quantized = None
    if all(lib.state not in versions.BAD for lib in libraries if lib.name in ("torch", "numpy")):
        from ..doctor.machine import look

        machine = look()
    if works:
        from ..doctor.fused import fused_report
        from ..doctor.quantizers import quantizers

        quantized, fused = quantizers(), fused_report()
    if json_output:
        print(
            json.dumps(
                {
                    "lorakit": VERSION,
                    "python": platform.python_version(),
                    "platform": system,
                    "works": works,
                    "libraries": [{**asdict(lib), "fix": lib.fix} for lib in libraries],
                    "extras": [{**asdict(extra), "lacking": extra.lacking, "fix": extra.fix} for extra in extras],
                    "machine": asdict(machine) if machine else None,
                    "quantizers": [asdict(each) for each in quantized or ()],
                    "fused": [asdict(part) for part in fused or ()],
                }
            )
        )
    else:
        _print(libraries, extras, machine, quantized, fused)
    raise typer.Exit(0 if works else 1)


def _print(
    libraries: list[Library],
    extras: list[Extra],
    machine: Machine | None,
    quantized: list[Quantizer] | None,
    fused: list[FusedPart] | None,
) -> None:
    from rich.console import Console

    from ..doctor import show

    console = Console(width=None if sys.stdout.isatty() else 140)  # in a pipe, keep one row per line
    sections = [show.libraries(libraries), show.extras(extras)]
    if machine is not None:
        sections += [show.devices(machine.devices), show.precisions(machine.precisions), show.machine(machine)]
    if quantized:
        sections.append(show.quantizers(quantized))
    if fused:
        sections.append(show.fused(fused))
    for section in sections:
        console.print(section)
        console.print()
    console.print(show.summary(libraries))
