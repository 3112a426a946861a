"""Every command, in the order a user meets them."""

from __future__ import annotations

from typing import Annotated

import typer

from ..version import VERSION
from . import (
    bench,
    card,
    chat,
    combine,
    compare,
    convert,
    data_show,
    demo,
    doctor,
    edit,
    eval,
    export,
    extract,
    generate,
    init,
    inspect,
    merge,
    plan,
    push,
    resize,
    sweep,
    train,
)

app = typer.Typer(
    name="lorakit",
    help="Low-rank adaptation (LoRA): from a dataset to a trained, checked, merged adapter.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(requested: bool) -> None:
    if requested:
        print(f"lorakit {VERSION}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


data_app = typer.Typer(help="show data as the model sees it", no_args_is_help=True, rich_markup_mode=None)
data_app.command("show", short_help="print rows with the trained tokens marked")(data_show.show)

app.command("demo", short_help="train, evaluate and merge in a few minutes, on the embedded model")(demo.demo)
app.command("init", short_help="write a commented config file")(init.init)
app.add_typer(data_app, name="data")
app.command("plan", short_help="estimate a run's memory and time before it starts")(plan.plan)
app.command("doctor", short_help="show what this machine supports: versions, devices, precisions, a compiler")(
    doctor.doctor
)
app.command("train", short_help="train one adapter, or resume a run")(train.train)
app.command("sweep", short_help="train many adapters at once, and compare them")(sweep.sweep)
app.command("eval", short_help="evaluate base and adapters side by side")(eval.evaluate)
app.command("generate", short_help="answer one prompt")(generate.generate)
app.command("chat", short_help="chat with a model")(chat.chat)
app.command("inspect", short_help="show what an adapter or a model contains")(inspect.inspect)
app.command("compare", short_help="compare two adapters")(compare.compare)
app.command("combine", short_help="combine several adapters into one")(combine.combine)
app.command("resize", short_help="lower an adapter's rank")(resize.resize)
app.command("edit", short_help="scale, negate, prune or rename an adapter")(edit.edit)
app.command("extract", short_help="extract a LoRA from a fine-tuned checkpoint")(extract.extract)
app.command("merge", short_help="merge an adapter into a checkpoint")(merge.merge)
app.command("convert", short_help="convert an adapter to another format")(convert.convert)
app.command("export", short_help="write an adapter for vLLM, llama.cpp, ComfyUI, ..., checked and verified")(
    export.export
)
app.command("card", short_help="write a model card for an adapter")(card.card)
app.command("push", short_help="upload an adapter to the Hugging Face hub")(push.push)
app.command("bench", short_help="benchmark lorakit and its peers on your machine")(bench.bench)
