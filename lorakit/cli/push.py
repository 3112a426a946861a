"""`lorakit push`: upload an adapter to the Hugging Face hub."""

from __future__ import annotations

import json
from contextlib import ExitStack
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from .shared.files import base_folder
from .shared.next import command
from .shared.output import say
from .shared.share import Alpha, Base, BaseModel, Json, License
from .shared.starting import starting

if TYPE_CHECKING:
    from ..share.push import Pushed


def push(
    source: Annotated[str, typer.Argument(help="a run's folder, or an adapter in any format: folder or file")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; created if missing")],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
    revision: Annotated[str | None, typer.Option(help="the branch; created if missing")] = None,
    message: Annotated[str | None, typer.Option(help="the commit message")] = None,
    with_card: Annotated[
        bool, typer.Option("--card/--no-card", help="upload a README.md: the one next to the adapter, or a new one")
    ] = True,
    base_model: BaseModel = None,
    license: License = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would be uploaded, and send nothing")] = False,
    alpha: Alpha = None,
    base: Base = None,
    json_output: Json = False,
) -> None:
    """Check an adapter and upload it to the Hugging Face hub in one commit.

    The token is HF_TOKEN or that of `hf auth login`.
    """
    with ExitStack() as until_announced:
        until_announced.enter_context(starting(f"reading {source}"))
        from ..share.push import push as pushed

        def announce(what: Pushed) -> None:
            until_announced.close()
            _announce(what, source)

        done = pushed(
            source,
            repository,
            private=private,
            revision=revision,
            message=message,
            card=with_card,
            dry_run=dry_run,
            base_model=base_model,
            license=license,
            alpha=alpha,
            base=base_folder(base),
            tell=None if json_output else announce,
        )
    if json_output:
        print(json.dumps(done.to_dict() | {"dry_run": dry_run}))
        return
    at = "" if done.revision == "main" else f"@{done.revision.replace('/', '%2F')}"
    if dry_run:
        print("nothing was sent")
        options = {
            "private": private,
            "revision": revision,
            "message": message,
            "no_card": not with_card,
            "base_model": base_model,
            "license": license,
            "alpha": alpha,
            "base": base,
        }
        print(f"next: {command('push', source, repository, **options)}")
        return
    what = "created" if done.created else "updated" if done.changed else "unchanged, it has all of this already"
    print(f"{what}: {done.url}" + (f" (commit {done.commit[:8]})" if done.commit and done.changed else ""))
    print(f"next: lorakit inspect {repository}{at}")


def _announce(pushed: Pushed, source: str) -> None:
    """Print what will be uploaded, before it is."""
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
            say(f"{options} has no effect: no card is uploaded")
        else:
            say(f"{options} does not change the card, which stays {pushed.card}")
            print(f"  edit it, or write one here: lorakit card {quote(source)} {options}")
    for line in _first(pushed.mended):
        say(f"changed in the upload: {line}")
    for line in _first(pushed.left):
        say(f"left unchanged: {line}")


def _first(lines: list[str], most: int = 20) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more (--json prints all)"]
