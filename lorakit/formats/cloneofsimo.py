"""cloneofsimo's files (the first LoRA of Stable Diffusion, 2022): numbers instead of names, scale 1, textual-inversion
embeddings beside the factors.

    .safetensors   "unet:<i>:up" [out, r], "unet:<i>:down" [r, in], "text_encoder:<i>:up", ...; an embedding "<s1>"
                   [dim]
                   header: "unet": the adapted classes in JSON, "unet:<i>:rank", "<s1>": "<embed>"
    .pt            the pickled list [up0, down0, up1, down1, ...] of a UNet; `x.text_encoder.pt` that of a text encoder,
                   `x.ti.pt`
                   {"<token>": [dim]}; the three of one name are one adapter

The number is a module's index in the order in which diffusers' and transformers' classes of the time created them. UNet
of SD1 and SD2: the down blocks, the up blocks, the middle; in a transformer block attn1 (q, k, v, out), ff.net.0.proj,
attn2 (q, k, v, out); the oldest files have no ff. Later classes create attn2 before ff; the shapes show which it is.
Text encoder: layer by layer k, v, q, out.

Programs that read these files expect a pair for every adaptable module of the model, so modules that an adapter lacks
are written as zeros, and a pair of zeros is read as no update.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.lora import Factors
from ..config import LoraConfig
from ..errors import AdapterError, listing
from ..io.atomic import replacing
from ..io.json_object import parse_json
from ..io.tensors import read_pickled, read_tensors, write_tensors
from . import names
from .format import Format, ReadOptions, WriteOptions
from .scale import config_of, with_alpha_as_rank

EMBED = "<embed>"
SIDE_TEXT, SIDE_TOKENS = ".text_encoder.pt", ".ti.pt"
_KEY = re.compile(r"(?P<component>unet|text_encoder):(?P<at>\d{1,6}):(?P<half>up|down)")
_TOKEN = re.compile(r"<[^<>\s]+>")

Pair = tuple[Tensor, Tensor]  # down, up

_PLACES = [
    *(f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)),
    *(f"up_blocks.{i}.attentions.{j}" for i in (1, 2, 3) for j in range(3)),
    "mid_block.attentions.0",
]
_ATTENTIONS = [[f"attn{n}.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")] for n in (1, 2)]
_FEED_FORWARD = "ff.net.0.proj"
_IN_BLOCK = [
    [*_ATTENTIONS[0], _FEED_FORWARD, *_ATTENTIONS[1]],
    [*_ATTENTIONS[0], *_ATTENTIONS[1], _FEED_FORWARD],
    [*_ATTENTIONS[0], *_ATTENTIONS[1]],
]
UNET_ORDERS = [[f"{place}.transformer_blocks.0.{name}" for place in _PLACES for name in inside] for inside in _IN_BLOCK]
_CLASSES = {144: ["CrossAttention", "Attention", "GEGLU"], 128: ["CrossAttention", "Attention"]}


def text_order(layers: int) -> list[str]:
    """The modules of a CLIP text encoder with this many layers, in the files' order."""
    return [f"text_model.encoder.layers.{i}.self_attn.{x}_proj" for i in range(layers) for x in ("k", "v", "q", "out")]


def fits(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a `.safetensors` of this format, or of a dict of embeddings."""
    keys = list(keys)
    return any(_KEY.fullmatch(key) for key in keys) or (bool(keys) and all(_TOKEN.fullmatch(key) for key in keys))


def is_pickle_of_it(path: Path) -> bool:
    """Whether a file is a pickled list of tensors."""
    with open(path, "rb") as file:
        start = file.read(2)
    return start in (b"PK", b"\x80\x02") and path.suffix != ".npz" and isinstance(read_pickled(path), list)


def load(path: Path) -> Adapter:
    """Read a file of this format; a `.pt` with the files that belong to it. AdapterError naming the file at fault."""
    if not is_pickle_of_it(path):
        return read(path, *read_tensors(path))
    found = _from_list(path, read_pickled(path))
    embeddings: dict[str, Tensor] = {}
    for other in sides(path):
        if other.is_file():
            value = read_pickled(other)
            if isinstance(value, list):
                found |= _from_list(other, value)
            else:
                embeddings = value
    return _adapter(path, found, embeddings, {})


def sides(path: Path) -> list[Path]:
    """The files beside a `.pt` that belong to it: the text encoder's factors, and the textual-inversion embeddings."""
    stem = path.name.removesuffix(".pt")
    return [path.with_name(stem + side) for side in (SIDE_TEXT, SIDE_TOKENS)] if path.suffix == ".pt" else []


def read(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Adapter:
    """The adapter of a `.safetensors`, or of a dict of embeddings. AdapterError naming the file and the key at
    fault.
    """
    halves: dict[str, dict[int, dict[str, Tensor]]] = {"unet": {}, "text_encoder": {}}
    embeddings: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match:
            halves[match["component"]].setdefault(int(match["at"]), {})[match["half"]] = tensor
        elif header.get(key) == EMBED or _TOKEN.fullmatch(key):
            embeddings[key] = tensor
        else:
            raise AdapterError(
                f"{path}: key '{key}' is not in this format\n"
                "  expected unet:<i>:up, text_encoder:<i>:down or a token <s1>"
            )
    found: dict[str, Pair] = {}
    for component, numbered in halves.items():
        for at in range(len(numbered)):
            for half in ("down", "up"):
                if half not in numbered.get(at, {}):
                    raise AdapterError(
                        f"{path}: key '{component}:{at}:{half}' is missing; {len(numbered)} modules are numbered from "
                        "0, each with up and down"
                    )
        pairs = [(numbered[at]["down"], numbered[at]["up"]) for at in range(len(numbered))]
        found |= _named(path, component, pairs) if pairs else {}
    return _adapter(path, found, embeddings, header)


def losses(adapter: Adapter, path: Path | None = None) -> list[str]:
    """What this format cannot hold of an adapter, one line each. `path`: where it will be written; a `.pt` holds
    less.
    """
    known = {f"unet.{name}" for name in UNET_ORDERS[0]} | {
        f"text_encoder.{name}" for name in text_order(_layers(adapter))
    }
    nowhere = [module for module in adapter.factors if module not in known]
    lines = [f"cloneofsimo's order has no place for {len(nowhere)} modules: {listing(nowhere, 3)}"] if nowhere else []
    others = [module for module in adapter.updates if module not in adapter.factors]
    if others:
        lines.append(f"it holds low-rank factors only (`resize` converts any update): {listing(others, 3)}")
    dora = [module for module, u in adapter.updates.items() if u.variant == "dora"]
    lines += [f"it has no DoRA magnitudes: {listing(dora, 3)}"] if dora else []
    blocks = [m for m, f in adapter.factors.items() if m in known and (f.kind != "linear" or f.transposed)]
    lines += [f"it has pairs of matrices only, for linear layers: {listing(blocks, 3)}"] if blocks else []
    if adapter.saved:
        lines.append(f"it holds no saved weights: {listing(adapter.saved, 3)}")
    if path is not None and path.suffix == ".pt" and not any(m.startswith("unet.") for m in adapter.factors):
        lines.append(
            "its .pt starts with the UNet's modules, of which the adapter has none; a .safetensors does not need them"
        )
    return lines or _unfillable(adapter)


def write(adapter: Adapter, path: Path) -> Path:
    """Write `.safetensors`, or `.pt` with `.text_encoder.pt` and `.ti.pt` beside it, and return the path. AdapterError,
    and nothing written, if the format cannot hold all of the adapter.
    """
    lost = losses(adapter.check(), path)
    if lost:
        raise AdapterError("cloneofsimo's format cannot hold all of this adapter:\n  " + "\n  ".join(lost))
    pairs = {component: _numbered(adapter, component) for component in ("unet", "text_encoder")}
    if path.suffix == ".pt":
        return _write_pickles(path, pairs, adapter.embeddings)
    tensors: dict[str, Tensor] = dict(adapter.embeddings)
    header = dict.fromkeys(adapter.embeddings, EMBED)
    for component, numbered in pairs.items():
        if numbered:
            header[component] = json.dumps(_CLASSES[len(numbered)] if component == "unet" else ["CLIPAttention"])
        for at, (down, up) in enumerate(numbered):
            tensors[f"{component}:{at}:up"], tensors[f"{component}:{at}:down"] = up, down
            header[f"{component}:{at}:rank"] = str(down.shape[0])
    if adapter.metadata:
        header["lorakit"] = json.dumps(dict(adapter.metadata), sort_keys=True)
    write_tensors(path, tensors, header)
    return path


def _adapter(
    path: Path, found: Mapping[str, Pair], embeddings: Mapping[str, Tensor], header: Mapping[str, str]
) -> Adapter:
    factors = {
        m: Factors(down.detach(), up.detach(), float(down.shape[0]))
        for m, (down, up) in found.items()
        if down.any() or up.any()
    }
    for token, vectors in embeddings.items():
        if not vectors.is_floating_point() or vectors.dtype.itemsize == 1 or vectors.dim() not in (1, 2):
            raise AdapterError(
                f"{path}: token '{token}' has shape {list(vectors.shape)} and dtype {vectors.dtype}; expected vectors, "
                "[dim] or [n, dim]"
            )
    ours: dict[str, Any] = parse_json(header.get("lorakit", "{}"), f"{path} (its header)")
    try:
        config = config_of(factors) if factors else LoraConfig(rank=1, alpha=1)
        return Adapter(
            config, factors, metadata=ours, embeddings={t: v.detach() for t, v in embeddings.items()}
        ).check()
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def _from_list(path: Path, value: Sequence[Tensor] | Mapping[str, Tensor]) -> dict[str, Pair]:
    if isinstance(value, Mapping) or len(value) % 2 or not value:
        raise AdapterError(f"{path} holds {len(value)} tensors; expected a list of pairs, up and down")
    pairs = [(value[at + 1], value[at]) for at in range(0, len(value), 2)]
    # A text encoder's layers are all square and of the same size; a UNet's are not.
    text = len({(*up.shape[:1], *down.shape[1:]) for down, up in pairs}) == 1
    return _named(path, "text_encoder" if text else "unet", pairs)


def _named(path: Path, component: str, pairs: Sequence[Pair]) -> dict[str, Pair]:
    """The pairs by module name. AdapterError if their number or shapes do not fit the format's order."""
    for at, (down, up) in enumerate(pairs):
        for half, tensor in (("down", down), ("up", up)):
            if (
                tensor.dim() != 2
                or not tensor.is_floating_point()
                or tensor.dtype.itemsize == 1
                or down.shape[0] != up.shape[-1]
            ):
                raise AdapterError(
                    f"{path}: '{component}:{at}:{half}' has shape {list(tensor.shape)} and dtype {tensor.dtype}; "
                    "expected the pair "
                    "up [out, r], down [r, in] of a linear layer (those of convolutions, from an extended injection, "
                    "are not read)"
                )
    if component == "text_encoder":
        orders = [text_order(len(pairs) // 4)] if len(pairs) % 4 == 0 else []
        expected = "four for each layer"
    else:
        orders = [order for order in UNET_ORDERS if len(order) == len(pairs)]
        expected = "144, or 128 without feed-forwards, in a UNet of SD1 or SD2"
    if not orders:
        raise AdapterError(f"{path}: {len(pairs)} modules numbered as {component}; expected {expected}")
    wrong = [_misfit(order, pairs) for order in orders]
    if None not in wrong:
        first = wrong[0] or 0
        down, up = pairs[first]
        raise AdapterError(
            f"{path}: '{component}:{first}' has up {list(up.shape)} and down {list(down.shape)}, which is not the "
            "shape of "
            f"{orders[0][first]}, the module of that number\n  was it made for another model than SD1 or SD2?"
        )
    return {f"{component}.{name}": pair for name, pair in zip(orders[wrong.index(None)], pairs)}


def _misfit(order: Sequence[str], pairs: Sequence[Pair]) -> int | None:
    """The first index whose shape contradicts those before it, or None. In a block of width C all are [C, C], except ff
    [8 C, C] and attn2's k and v [C, D], where D is the text encoder's width.
    """
    widths: dict[str, int] = {}
    for at, (name, (down, up)) in enumerate(zip(order, pairs)):
        size = (up.shape[0], down.shape[1])
        block = "" if name.startswith("text_model") else name.split(".attentions")[0]
        width = widths.setdefault(block, size[1])
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            expected = (width, widths.setdefault("text", size[1]))
        else:
            expected = (8 * width if name.endswith(_FEED_FORWARD) else width, width)
        if size != expected:
            return at
    return None


def _layers(adapter: Adapter) -> int:
    """The number of text encoder layers in the file's order: the model's, or those that the adapter has."""
    found = [
        int(m.split(".")[4]) + 1
        for m in adapter.factors
        if re.match(r"text_encoder\.text_model\.encoder\.layers\.\d{1,4}\.", m)
    ]
    model = _model(adapter)
    real = (
        sum(m.endswith(".self_attn.k_proj") and m.startswith("text_encoder.") for m in names.shapes(model))
        if model
        else 0
    )
    return max((*found, real)) if found else 0


def _model(adapter: Adapter) -> str | None:
    """The model, "sd1" or "sd2", by the adapter's widths; in a tie by its metadata. None if neither fits."""
    sizes = {m: (f.B.shape[0], f.A.shape[1]) for m, f in adapter.factors.items()}
    fit = [
        model
        for model in ("sd1", "sd2")
        if all(names.shapes(model)[m] == size for m, size in sizes.items() if m in names.shapes(model))
    ]
    said = adapter.metadata.get("model")
    return said if said in fit else next(iter(fit), None)


def _order(adapter: Adapter, component: str) -> list[str]:
    """The full names in the file's order; [] if the adapter has no module of this component."""
    mine = [m for m in adapter.factors if m.startswith(f"{component}.")]
    if not mine:
        return []
    if component == "text_encoder":
        order = text_order(_layers(adapter))
    else:
        order = UNET_ORDERS[0 if any(m.endswith(_FEED_FORWARD) for m in mine) else 2]
    return [f"{component}.{name}" for name in order]


def _unfillable(adapter: Adapter) -> list[str]:
    """A line for modules that must be written as zeros, if their widths are not known."""
    lacking = [
        m for component in ("unet", "text_encoder") for m in _order(adapter, component) if m not in adapter.factors
    ]
    if not lacking or _model(adapter) is not None:
        return []
    return [
        f"it needs all modules of its order, and the widths of {listing(lacking, 3)} are not known: this is neither "
        "SD1 nor SD2"
    ]


def _numbered(adapter: Adapter, component: str) -> list[Pair]:
    """The pairs in the file's order with scale 1; zeros of rank 1 for modules that the adapter lacks."""
    model = _model(adapter)
    dtype = next((f.A.dtype for f in adapter.factors.values()), torch.float32)
    pairs = []
    for module in _order(adapter, component):
        if module in adapter.factors:
            f = with_alpha_as_rank(adapter.factors[module])
            pairs.append((f.A, f.B))
        else:
            assert model is not None
            out, inputs = names.shapes(model)[module][:2]
            pairs.append((torch.zeros(1, inputs, dtype=dtype), torch.zeros(out, 1, dtype=dtype)))
    return pairs


def _write_pickles(path: Path, pairs: Mapping[str, Sequence[Pair]], embeddings: Mapping[str, Tensor]) -> Path:
    text, tokens = sides(path)
    lists: dict[Path, Any] = {
        path: [t.detach().cpu().clone() for down, up in pairs["unet"] for t in (up, down)],
        text: [t.detach().cpu().clone() for down, up in pairs["text_encoder"] for t in (up, down)],
        tokens: {token: t.detach().cpu().clone() for token, t in embeddings.items()},
    }
    for file, value in lists.items():
        if value:
            with replacing(file) as temporary:
                torch.save(value, temporary)
    return path


class Cloneofsimo(Format):
    """cloneofsimo's files, behind the interface of all formats."""

    name = "cloneofsimo"

    def owns(self, path: Path) -> bool:
        return not path.is_dir() and is_pickle_of_it(path)

    def fits(self, path: Path, keys: Sequence[str]) -> bool:
        return fits(keys)

    def read(self, path: Path, options: ReadOptions) -> Adapter:
        return load(path)

    def losses(self, adapter: Adapter, path: Path | None = None) -> list[str]:
        return losses(adapter, path)

    def write(self, adapter: Adapter, path: Path, options: WriteOptions) -> Path:
        return write(adapter, path)

    def stale(self, path: Path) -> list[str]:
        return [side.name for side in sides(path)]


FORMAT = Cloneofsimo()
