"""`lorakit card` and `lorakit push`: an adapter for other people."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from .files import base_folder
from .starting import starting

if TYPE_CHECKING:
    from ..share.push import Pushed

_License = Annotated[
    str | None, typer.Option("--license", "--licence", help="the hub's name of a licence: apache-2.0, mit, cc-by-4.0, ...")
]
_BaseModel = Annotated[str | None, typer.Option(help="the base's hub id, where the adapter names a local folder")]
_Alpha = Annotated[float | None, typer.Option(help="for files that do not hold it (loralib, old MLX)")]
_Base = Annotated[str | None, typer.Option(help="the base's folder, which reading a GGUF of a Llama needs")]
_Json = Annotated[bool, typer.Option("--json", help="print as JSON")]


def card(
    source: Annotated[str, typer.Argument(help="a run's folder, or an adapter in any format: folder, file or hub id")],
    out: Annotated[Path | None, typer.Option(help="the file to write; default: README.md beside the adapter")] = None,
    title: Annotated[str | None, typer.Option(help="the heading; default: what the adapter is for")] = None,
    description: Annotated[str | None, typer.Option(help="what it is good for, and what not (Markdown)")] = None,
    license: _License = None,
    base_model: _BaseModel = None,
    data: Annotated[str | None, typer.Option(help="the training data's name or hub id, where it is not known")] = None,
    repository: Annotated[str | None, typer.Option(help="OWNER/NAME, for the code on the card; lorakit push fills it in")] = None,
    evaluation: Annotated[Path | None, typer.Option("--eval", help="what `lorakit eval ROWS --adapter ADAPTER --json` printed")] = None,
    evaluated_on: Annotated[str | None, typer.Option("--eval-on", help="how its rows are called: a name or a hub id")] = None,
    alpha: _Alpha = None,
    base: _Base = None,
    force: Annotated[bool, typer.Option("--force", help="replace a README.md that lorakit did not write")] = False,
    json_output: _Json = False,
) -> None:
    """Write a model card: what the adapter is, how to use it, how it was trained and how good it is, as far as that is known."""
    with starting(f"reading {source}"):
        from ..errors import ConfigError
        from ..share import card_of, write

    made = card_of(
        source, title=title, description=description, license=license, base_model=base_model, data=data, repository=repository,
        evaluation=evaluation, evaluated_on=evaluated_on, alpha=alpha, base=base_folder(base),
    )  # fmt: skip
    if out is None and not Path(source).expanduser().exists():
        raise ConfigError(f"{source} is not here: say where its card is to be written (--out README.md)")
    path = out.expanduser() if out is not None else made.path
    write(made.text, path, force)
    if json_output:
        print(json.dumps({"card": str(path), "missing": made.missing}, ensure_ascii=False))
        return
    print(f"written: {path}")
    if made.missing:
        print("not on it, as it is not known:")
        for line in made.missing:
            print(f"  {line}")
    print(f"next: lorakit push {quote(source)} {repository or 'OWNER/NAME'}")


def push(
    source: Annotated[str, typer.Argument(help="a run's folder, or an adapter in any format: folder or file")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it is not there")],
    private: Annotated[bool, typer.Option("--private", help="a new repository is private")] = False,
    revision: Annotated[str | None, typer.Option(help="the branch; made if it is not there")] = None,
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    with_card: Annotated[bool, typer.Option("--card/--no-card", help="with a README.md: the one beside the adapter, or a new one")] = True,
    base_model: _BaseModel = None,
    license: _License = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be uploaded, and send nothing")] = False,
    alpha: _Alpha = None,
    base: _Base = None,
    json_output: _Json = False,
) -> None:
    """Upload an adapter to the Hugging Face hub, checked first, in one commit. The token: HF_TOKEN, or `hf auth login`."""
    with starting(f"reading {source}"):
        from ..share.push import push as pushed

    done = pushed(
        source, repository, private=private, revision=revision, message=message, card=with_card, dry_run=dry_run, base_model=base_model,
        license=license, alpha=alpha, base=base_folder(base), tell=None if json_output else lambda told: _tell(told, source),
    )  # fmt: skip
    if json_output:
        print(json.dumps(done.to_dict() | {"dry_run": dry_run}))
        return
    at = "" if done.revision == "main" else f"@{done.revision.replace('/', '%2F')}"
    if dry_run:
        print("nothing was sent")
        given = {
            "--private": private, "--revision": revision, "--message": message, "--no-card": not with_card, "--base-model": base_model,
            "--license": license, "--alpha": alpha, "--base": base,
        }  # fmt: skip
        words = [w for k, v in given.items() if v is not None and v is not False for w in ([k] if v is True else [k, quote(str(v))])]
        print(f"next: {' '.join(['lorakit push', quote(source), repository, *words])}")
        return
    what = "made" if done.created else "updated" if done.changed else "unchanged: it had all of this already"
    print(f"{what}: {done.url}" + (f" (commit {done.commit[:8]})" if done.commit and done.changed else ""))
    print(f"next: lorakit inspect {repository}{at}")


def _tell(pushed: Pushed, source: str) -> None:
    """What is going to be uploaded, before it is."""
    width = max(map(len, pushed.files))
    print(f"to {pushed.url}{'' if pushed.revision == 'main' else f', branch {pushed.revision}'}:")
    for name, size in pushed.files.items():
        note = f"  (the card, {pushed.card})" if name == "README.md" else ""
        print(f"  {name:<{width}}  {size:>12,} bytes{note}")
    if "README.md" not in pushed.files and pushed.card != "none":
        print(f"  the card stays {pushed.card}")
    if pushed.not_on_card:
        options = " ".join(pushed.not_on_card)
        if pushed.card == "none":
            print(f"without a card, there is no place for {options}")
        else:
            print(f"{options} changes nothing on the card, which stays {pushed.card}")
            print(f"  edit it, or write one here: lorakit card {quote(source)} {options}")
    for line in _first(pushed.mended):
        print(f"mended in the upload: {line}")
    for line in _first(pushed.left):
        print(f"left as it is: {line}")


def _first(lines: list[str], most: int = 20) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more (--json prints all)"]
