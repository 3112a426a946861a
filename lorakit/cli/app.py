"""Every command, in the order a user meets them.

Only the module of the command that is called is imported, so that its first line is printed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, NamedTuple

import typer

from ..version import VERSION
from . import image


class Command(NamedTuple):
    """Where a command's function is in this folder, and what `lorakit --help` says of it."""

    module: str
    function: str
    help: str


COMMANDS = {
    "demo": Command("demo", "demo", "train, evaluate and merge in a few minutes, on the embedded model"),
    "init": Command("init", "init", "write a commented config file"),
    "data show": Command("data_show", "show", "print rows with the trained tokens marked"),
    "plan": Command("plan", "plan", "estimate a run's memory and time before it starts"),
    "doctor": Command("doctor", "doctor", "show what this machine supports: versions, devices, precisions, a compiler"),
    "train": Command("train", "train", "train one adapter, or resume a run"),
    "sweep": Command("sweep", "sweep", "train many adapters at once, and compare them"),
    "eval": Command("eval", "evaluate", "evaluate base and adapters side by side"),
    "predict": Command("predict", "predict", "write labels, scores or answers for each row of a file"),
    "generate": Command("generate", "generate", "answer one prompt"),
    "chat": Command("chat", "chat", "chat with a model"),
    "serve": Command("serve", "serve", "serve a base and its adapters over HTTP, in OpenAI's API"),
    "inspect": Command("inspect", "inspect", "show what an adapter or a model contains"),
    "compare": Command("compare", "compare", "compare two adapters"),
    "combine": Command("combine", "combine", "combine several adapters into one"),
    "resize": Command("resize", "resize", "lower an adapter's rank"),
    "edit": Command("edit", "edit", "scale, negate, prune or rename an adapter"),
    "extract": Command("extract", "extract", "extract a LoRA from a fine-tuned checkpoint"),
    "merge": Command("merge", "merge", "merge an adapter into a checkpoint"),
    "convert": Command("convert", "convert", "convert an adapter to another format"),
    "export": Command("export", "export", "write an adapter for vLLM, llama.cpp, ComfyUI, ..., checked and verified"),
    "card": Command("card", "card", "write a model card for an adapter"),
    "push": Command("push", "push", "upload an adapter to the Hugging Face hub"),
    **{f"image {verb}": Command(f"image.{verb}", verb, text) for verb, text in image.VERBS.items()},
    "bench": Command("bench", "bench", "benchmark lorakit and its peers on your machine"),
    "reproduce": Command("reproduce", "reproduce", "repeat the paper's experiments on the embedded model"),
}
# The first word of commands of two.
GROUPS = {"data": "show data as the model sees it", "image": "train on pictures, and draw them"}


def app_for(args: Sequence[str]) -> typer.Typer:
    """Build the command line for a call: the command it names, or all of them if its first word names none."""
    first = next((arg for arg in args if not arg.startswith("-")), "")
    named = {name: command for name, command in COMMANDS.items() if name.split()[0] == first}
    app = typer.Typer(
        name="lorakit",
        help="Low-rank adaptation (LoRA): from a dataset to a trained, checked, merged adapter.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_main)
    groups: dict[str, typer.Typer] = {}
    for name, command in (named or COMMANDS).items():
        *group, verb = name.split()
        parent = app
        if group:
            parent = groups.get(group[0]) or typer.Typer(
                help=GROUPS[group[0]], no_args_is_help=True, rich_markup_mode=None
            )
            if group[0] not in groups:
                app.add_typer(parent, name=group[0])
                groups[group[0]] = parent
        module = import_module(f".{command.module}", __package__)
        parse = getattr(module, "CommandClass", None)  # of a command that reads its arguments in a way of its own
        parent.command(verb, short_help=command.help, cls=parse)(getattr(module, command.function))
    return app


def _version(requested: bool) -> None:
    if requested:
        print(f"lorakit {VERSION}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass
