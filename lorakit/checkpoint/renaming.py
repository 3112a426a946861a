"""Map an adapter's names to the files' tensor names, which may differ in their prefix.

A model calls a weight `transformer.h.0.attn.c_attn.weight`; GPT-2's file has `h.0.attn.c_attn.weight`, a wrapped model
adds `model.`, a multimodal checkpoint has `language_model.model.` instead of `model.language_model.`. One prefix is
replaced by another, the same for all targets, and only if exactly one replacement finds all of them. Both must be names
that models are known to be wrapped in (`LEVELS`): behind any other prefix, as in `vision.layers.0`, is another module.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..errors import TargetError, listing

# The names that transformers' classes, and those around them, give the model within.
LEVELS = frozenset(
    {
        "model",
        "transformer",
        "transformer_2",
        "unet",
        "language_model",
        "text_model",
        "base_model",
        "gpt_neox",
        "backbone",
        "bert",
        "roberta",
        "distilbert",
        "electra",
        "albert",
        "deberta",
        "mpnet",
        "esm",
        "rwkv",
        "biogpt",
        "llm",
        "thinker",
    }
)


@dataclass(frozen=True)
class Renaming:
    """Replaces the prefix `old` of an adapter's name by the files' `new`; other names stay."""

    old: str = ""
    new: str = ""

    def __call__(self, name: str) -> str:
        return self.new + name[len(self.old) :] if name.startswith(self.old) else name

    @property
    def known(self) -> bool:
        """Whether both beginnings are names that models are known to be wrapped in."""
        return {part for side in (self.old, self.new) for part in side.split(".") if part} <= LEVELS


def find_renaming(
    names: Collection[str], tensors: Collection[str], where: object, allowed: Collection[Renaming] | None = None
) -> Renaming:
    """Find the renaming under which every one of `names` is one of `tensors`. Raises TargetError if there is none, or
    several.

    where: the checkpoint, for errors. allowed: the only renamings to try, besides none.
    """
    same = Renaming()
    if all(name in tensors for name in names):
        return same
    # A name within a numbered layer is the least ambiguous; "embed_tokens.weight" could be the end of many others.
    anchor = next((name for name in names if _stem(name) is not None and name not in tensors), next(iter(names)))
    found: dict[tuple[str, ...], Renaming] = {}
    for renaming in _candidates(anchor, tensors) if allowed is None else allowed:
        mapped = tuple(renaming(name) for name in names)
        if all(name in tensors for name in mapped):
            found.setdefault(mapped, renaming)
    sure = [renaming for renaming in found.values() if renaming.known or allowed is not None]
    if len(sure) == 1:
        return sure[0]
    if len(found) == 1:
        mapped, renaming = next(iter(found.items()))
        raise TargetError(
            f"the adapter's '{_module(next(iter(names)))}' is not in {where}; '{_module(mapped[0])}' is, and what "
            f"stands before it ('{renaming.new or renaming.old}') is no name that models are known to be wrapped in\n"
            f"  if that module is meant: lorakit edit ADAPTER OUT --rename '{_rename_option(renaming, mapped)}'"
        )
    if found:
        ways = "\n".join(f"  as {mapped[0]}" for mapped in found)
        raise TargetError(
            f"the adapter's '{_module(next(iter(names)))}' could be several tensors of {where}:\n"
            f"{ways}\n"
            "  is it the right base?"
        )
    raise _missing(names, tensors, where)


def _candidates(name: str, tensors: Iterable[str]) -> Iterable[Renaming]:
    """Yield every replacement of a prefix that turns `name` into the name of a tensor."""
    parts = name.split(".")
    stem = _stem(name)
    # Without a layer number only adding or removing a prefix is safe.
    last = stem if stem is not None else len(parts) - 2
    for cut in range(max(last, 0) + 1):
        old, rest = "".join(f"{p}." for p in parts[:cut]), ".".join(parts[cut:])
        for tensor in tensors:
            if tensor == rest or tensor.endswith("." + rest):
                new = tensor[: len(tensor) - len(rest)]
                if stem is not None or not old or not new:
                    yield Renaming(old, new)


def _stem(name: str) -> int | None:
    """Return the index of the part before the first number: 1 in `model.layers.3.mlp.up_proj.weight`."""
    parts = name.split(".")
    return next((max(i - 1, 0) for i, part in enumerate(parts) if part.isdigit()), None)


def _missing(names: Collection[str], tensors: Collection[str], where: object) -> TargetError:
    missing = [name for name in names if name not in tensors]
    alike = difflib.get_close_matches(missing[0], [t for t in tensors if t.endswith(".weight")], n=3, cutoff=0.5)
    near = f"\n  the nearest tensors are {', '.join(alike)}" if alike else f"\n  its tensors are {listing(tensors, 5)}"
    return TargetError(
        f"{len(missing)} of the adapter's {len(names)} weights are not in {where}: "
        f"{listing([_module(n) for n in missing], 3)}{near}\n"
        "  is it an adapter for another model?"
    )


def _rename_option(renaming: Renaming, mapped: tuple[str, ...]) -> str:
    """OLD=NEW for `lorakit edit`, which renames what names begin with."""
    old, new = renaming.old.rstrip("."), renaming.new.rstrip(".")
    if old and new:
        return f"{old}={new}"
    first = mapped[0][len(renaming.new) :].split(".")[0]
    return f"{old}.{first}={first}" if old else f"{first}={new}.{first}"


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")
