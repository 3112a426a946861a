"""The tensors of a checkpoint and of one fine-tuned from it, side by side, under an adapter's names.

transformers folders    tensor by tensor; the architecture gives their names and kinds
diffusers pipelines     component by component, the component's name in front
single files            module by module (`single_file`), then the tensors that belong to no denoiser or text encoder
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapter.algebra.svd import norm_squared
from ..adapter.lora import FactorShapes
from ..adapter.update import halves_swapped
from ..errors import LorakitError, listing
from ..formats import names
from ..io.stream import MERGEABLE, Slot
from .base import Base
from .modules import Layout, layout_of
from .parts import PIPELINE, Part, open_parts
from .single_file import WeightRows, bias_rows, module_rows
from .tied_weights import declared

_OTHER_PARTS = ("vae", "safety_checker", "image_encoder")  # of a pipeline, for which there are no adapters


@dataclass(frozen=True)
class Pair:
    """A parameter in both checkpoints.

    factor_shapes: those of its low-rank factors; None if it has none. adaptable: whether an adapter can hold its
    change. swapped: the file stores the second half of its rows first.
    """

    name: str
    before: Slot
    after: Slot
    factor_shapes: FactorShapes | None
    adaptable: bool = True
    swapped: bool = False

    def change(self) -> tuple[Tensor, float]:
        """Return (ΔW [first axis, -1] in float32 (float64 stays), ‖W‖_F). Zeros for integer tensors. Raises
        LorakitError for NaN or infinity.
        """
        before, after = self.before, self.after
        if before.dtype not in MERGEABLE:
            return torch.zeros(1, 1), 0.0
        wide = torch.float64 if "F64" in (before.dtype, after.dtype) else torch.float32
        rows = before.shape[0] if before.shape else 1
        delta = torch.empty(rows, math.prod(before.shape) // max(rows, 1), dtype=wide)
        size = 0.0
        for (at, old), (_, new) in zip(before.rows(), after.rows(), strict=True):
            torch.sub(new.to(wide), old.to(wide), out=delta[at])
            size += norm_squared(old)
        if not torch.isfinite(delta).all():
            raise LorakitError(
                f"'{self.name}' holds values that are not finite (NaN or infinity) in {before.path.parent} or "
                f"{after.path.parent}"
            )
        return halves_swapped(delta) if self.swapped else delta, math.sqrt(size)


def image_pairs(base: Path, tuned: Path) -> list[Pair] | None:
    """Pair the tensors of a diffusion model's two checkpoints; None if they are folders of a language model.

    Raises LorakitError if they are of different kinds, or of different models.
    """
    kinds = [_kind(path) for path in (base, tuned)]
    if kinds == ["folder", "folder"]:
        return None
    if kinds[0] != kinds[1]:
        raise LorakitError(f"{base} is a {kinds[0]} and {tuned} a {kinds[1]}: expected two checkpoints of one kind")
    if kinds[0] == "pipeline":
        return list(_of_pipelines(base, tuned))
    return list(_of_files(open_parts(base, ())[0].base, open_parts(tuned, ())[0].base))


def model_pairs(before: Base, after: Base) -> tuple[list[Pair], Layout]:
    """Pair the tensors of a language model's two checkpoint folders; return the pairs and the base's layout.

    Raises LorakitError as `common` does.
    """
    layout = layout_of(before)
    slots = {name: (before.tensors[name], after.tensors[name]) for name in common(before, after)} | _once_tied(
        before, after
    )
    pairs = []
    for name, (old, new) in slots.items():
        own = layout.own(name)
        shapes = layout.factor_shapes(own, old.shape) if own.endswith(".weight") else None
        pairs.append(Pair(own, old, new, shapes))
    return pairs, layout


def common(before: Base, after: Base) -> list[str]:
    """Return the names of the tensors that both have. Raises LorakitError if one lacks a tensor of the other, except
    for tied weights (`_once_tied`), or if shapes differ.
    """
    known = _once_tied(before, after)
    lone = {
        n: b
        for b, other in ((before, after), (after, before))
        for n in b.tensors
        if n not in other.tensors and n not in known
    }
    if lone:
        lines = [f"'{n}' is only in {b.folder}" for n, b in lone.items()]
        raise LorakitError(
            f"the two checkpoints hold different tensors, {len(lone)} in all: {listing(lines, 3)}\n"
            "  is one of them the base of the other?"
        )
    names = [n for n in before.tensors if n in after.tensors]
    for n in names:
        _check_alike(n, before.tensors[n], after.tensors[n])
    return names


def _once_tied(before: Base, after: Base) -> dict[str, tuple[Slot, Slot]]:
    """Find weights that one checkpoint stores separately and the other tied to another: (before, after) by name."""
    lone = [n for b, other in ((before, after), (after, before)) for n in b.tensors if n not in other.tensors]
    if not lone:
        return {}
    twins = {a: b for user, holder in declared(before).items() for a, b in ((user, holder), (holder, user))}
    found = {}
    for name in lone:
        slots = [b.tensors.get(name) or b.tensors.get(twins.get(name, "")) for b in (before, after)]
        if slots[0] is not None and slots[1] is not None:
            _check_alike(name, slots[0], slots[1])
            found[name] = (slots[0], slots[1])
    return found


def _of_pipelines(base: Path, tuned: Path) -> Iterator[Pair]:
    parts = [{part.name: part for part in open_parts(path, (), everything=True)} for path in (base, tuned)]
    lone = sorted(parts[0].keys() ^ parts[1].keys())
    if lone:
        raise LorakitError(
            f"only one of {base} and {tuned} has the component '{lone[0]}'\n  is one of them the base of the other?"
        )
    slots = []
    for name, part in parts[0].items():
        for tensor in common(part.base, parts[1][name].base):
            old, new = (p[name].base.tensors[tensor] for p in parts)
            slots.append((part.called(_with_level(part, tensor)), old, new))
    model = _model_of({own: old.shape for own, old, _ in slots})
    for own, old, new in slots:
        module, component = own.rpartition(".")[0], own.partition(".")[0]
        # Adapters of a known model change the modules of its lists, which have no token or position embeddings.
        adaptable = module in names.shapes(model) if model is not None else component not in _OTHER_PARTS
        yield Pair(own, old, new, _factor_shapes(own, old.shape), adaptable)


def _model_of(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the diffusion model of these parameters, by names and widths: SD1 and SD2 share the UNet's names."""
    sizes = {
        n.rpartition(".")[0]: s for n, s in shapes.items() if n.startswith(("unet.", "transformer.")) and len(s) > 1
    }
    return names.model_of(sizes, {module: (size[0], size[1]) for module, size in sizes.items()})


def _of_files(before: Base, after: Base) -> Iterator[Pair]:
    if before.single_file != after.single_file:
        raise LorakitError(
            f"{before.folder} is a {before.single_file} and {after.folder} a {after.single_file}: one is not the base "
            "of the other"
        )
    here, there = (module_rows(b.single_file, b.shapes) for b in (before, after))
    lone = sorted(here.keys() ^ there.keys())
    if lone:
        raise LorakitError(
            f"only one of {before.folder} and {after.folder} holds {listing(lone, 3)}\n"
            "  is one of them the base of the other?"
        )
    seen = set()
    for module, rows in here.items():
        bias = bias_rows(before.single_file, module, before.shapes)
        for own, at in ((f"{module}.weight", rows), (f"{module}.bias", bias)):
            if at is None or at.tensor not in after.tensors or at.transposed:
                continue
            _check_alike(at.tensor, before.tensors[at.tensor], after.tensors[at.tensor])
            seen.add(at.tensor)
            old, new = (_slot(b, at) for b in (before, after))
            yield Pair(own, old, new, _factor_shapes(own, old.shape), swapped=at.swapped)
    for name, slot in before.tensors.items():  # EMA weights, say, may be in only one of them
        if name not in seen and name in after.tensors:
            _check_alike(name, slot, after.tensors[name])
            yield Pair(name, slot, after.tensors[name], None, adaptable=False)


def _slot(base: Base, rows: WeightRows) -> Slot:
    return base.tensors[rows.tensor].part(rows.start, rows.stop)


def _with_level(part: Part, tensor: str) -> str:
    """Return CLIP's names with the level `text_model.`, which files of late versions of transformers lack."""
    is_clip = (part.base.architecture or "").startswith("CLIP")
    return f"text_model.{tensor}" if is_clip and not tensor.startswith(("text_model.", "text_projection.")) else tensor


def _factor_shapes(name: str, shape: tuple[int, ...]) -> FactorShapes | None:
    if not name.endswith(".weight") or len(shape) < 2 or 0 in shape:
        return None
    if "embedding.weight" in name and name.startswith("text_encoder"):
        return FactorShapes("embedding", shape[:1])
    return FactorShapes.of_shape(shape)


def _kind(path: Path) -> str:
    return "single file" if path.is_file() else "pipeline" if (path / PIPELINE).is_file() else "folder"


def _check_alike(name: str, a: Slot, b: Slot) -> None:
    """Raise LorakitError unless the two are float tensors of the same shape, or have the same bytes."""
    if a.shape != b.shape:
        raise LorakitError(
            f"'{name}' has shape {list(a.shape)} in {a.path.parent} and {list(b.shape)} in {b.path.parent}\n"
            "  was a vocabulary resized? resize the base in the same way (model.resize_token_embeddings), and save "
            "it first"
        )
    if (a.dtype not in MERGEABLE or b.dtype not in MERGEABLE) and (a.dtype != b.dtype or not _same(a, b)):
        raise LorakitError(
            f"'{name}' is stored as {a.dtype} and as {b.dtype}, with different values; expected float tensors"
        )


def _same(a: Slot, b: Slot) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.copied(), b.copied(), strict=True))
