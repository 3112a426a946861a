"""`import lorakit.loralib as lora`: the layers of Microsoft's loralib (Hu et al. 2021), for code written against it.

    Linear, Embedding    ΔW = s · B A, or its transpose             A [r, in]            B [out, r]
    MergedLinear         the same for n of the output's equal parts A [n·r, in]          B [n·out/parts, r]
    Conv2d, square k×k   ΔW = s · (B A) in the weight's shape       A [r·k, in·k]        B [out/groups·k, r·k]
    other convolutions   the same, K = the kernel's size            A [r, in·K]          B [out/groups, r]

s = lora_alpha / r.

`eval()` merges ΔW into the weight, `train()` takes it out again to the last bit (loralib's rounding drifts). Where the
two differ, and why, is in docs/loralib.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError, did_you_mean
from .ops.delta import delta, delta_rows
from .ops.exact import Undo, add_, adding, subtract_
from .ops.linear import add_low_rank, add_packed
from .ops.packed import expand_packed

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]

BIAS = ("none", "all", "lora_only")
_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MERGED = "lora_merged"  # in a state dict's metadata: its weight holds ΔW


class LoRALayer:
    """The settings that every LoRA layer has. A layer of your own may inherit them to count as one."""

    r = 0
    merged = False

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool):
        if r < 0:
            raise ConfigError(f"r is {r}; expected a rank of at least 1, or 0 for a layer without LoRA")
        self.r = r
        self.lora_alpha = lora_alpha
        # A module even where there is none to apply, so that the layer can be pickled.
        self.lora_dropout: nn.Module = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.merged = False
        self.merge_weights = merge_weights


class _MergingLayer(LoRALayer, nn.Module):
    """A layer whose `eval` adds ΔW to the weight and whose `train` subtracts it; state dicts and `to` follow."""

    scaling: float
    _undo: Undo | None = None
    _loading = (False, False)

    def _add_factors(self, shape_a: tuple[int, int], shape_b: tuple[int, int]) -> None:
        self.lora_A = nn.Parameter(self._weight.new_zeros(shape_a))
        self.lora_B = nn.Parameter(self._weight.new_zeros(shape_b))
        self.scaling = self.lora_alpha / self.r
        self._weight.requires_grad = False
        self.register_load_state_dict_post_hook(_after_load)

    @property
    def _adapted(self) -> bool:
        return "lora_A" in self._parameters

    def _delta_rows(self) -> Callable[[slice], Tensor]:
        """Return a function of a slice of rows that gives those rows of ΔW as [rows, -1]."""
        raise NotImplementedError(f"{type(self).__name__} does not say what ΔW is")

    def train(self, mode: bool = True):
        super().train(mode)
        if self.merge_weights and mode:
            self._unmerge()
        elif self.merge_weights:
            self._merge()
        return self

    @torch.no_grad()
    def _merge(self) -> None:
        if self.merged or self._weight.is_meta:
            return
        if self._adapted:
            self._undo = add_(self._weight, adding(self._delta_rows()))
        self.merged = True

    @torch.no_grad()
    def _unmerge(self) -> None:
        if self._undo is not None:
            subtract_(self._weight, adding(self._delta_rows()), self._undo, f"a {type(self).__name__} by train()")
            self._undo = None
        self.merged = False

    @property
    def _weight(self) -> nn.Parameter:
        return self.get_parameter("weight")

    def _apply(self, fn, recurse=True):
        # A change of device or precision concerns the base and the factors, not their sum.
        merged = self.merged
        self._unmerge()
        super()._apply(fn, recurse)
        if merged:
            self._merge()
        return self

    # State dicts. In eval mode they hold the merged weight, as loralib's do, and say so in their metadata, so that
    # loading knows. Whatever is loaded is the base and the factors; a merged layer is merged again afterwards.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._undo is not None and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][_MERGED] = True

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        self._loading = self.merged, bool(local_metadata.get(_MERGED))
        self._unmerge()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@torch.no_grad()
def _after_load(layer: _MergingLayer, _incompatible: Any) -> None:
    merge, holds_delta = layer._loading
    layer._loading = (False, False)
    weight = layer._weight
    if holds_delta:
        change = layer._delta_rows()(slice(None)).view(weight.shape)
        weight.copy_(weight.to(change.dtype) - change)
    if merge:
        layer._merge()


class Linear(_MergingLayer, nn.Linear):
    """`nn.Linear` with a rank-r update. `fan_in_fan_out`: the weight is stored as [in, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ):
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self._finish(fan_in_fan_out, r, out_features)

    def _finish(self, fan_in_fan_out: bool, ranks: int, rows: int) -> None:
        """Add A [ranks, in] and B [rows, r] unless they are empty, initialise all, and store the weight as asked."""
        self.fan_in_fan_out = fan_in_fan_out
        if ranks > 0:
            self._add_factors((ranks, self.in_features), (rows, self.r))
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T.contiguous()

    def reset_parameters(self) -> None:
        self._unmerge()
        nn.Linear.reset_parameters(self)
        if self._adapted:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        if self.merged or not self._adapted:
            return y
        return self._add_update(y, self.lora_dropout(x))

    def _add_update(self, y: Tensor, x: Tensor) -> Tensor:
        return add_low_rank(y, x, self.lora_A, self.lora_B, self.scaling)

    def _delta_rows(self) -> Callable[[slice], Tensor]:
        return lambda rows: delta_rows(self.lora_A, self.lora_B, self.scaling, rows, self.fan_in_fan_out)


class MergedLinear(Linear):
    """A linear of several projections of equal size (q, k, v); each with `enable_lora` has an update of rank r."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ):
        if not enable_lora or out_features % len(enable_lora):
            raise ConfigError(
                f"enable_lora has {len(enable_lora)} entries and out_features is {out_features}\n"
                "  expected one entry for each of the output's equal parts, e.g. [True, False, True] for q, k, v"
            )
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.enable_lora = [bool(enabled) for enabled in enable_lora]
        enabled = sum(self.enable_lora)
        self._finish(fan_in_fan_out, r * enabled, out_features // len(enable_lora) * enabled)

    def _add_update(self, y: Tensor, x: Tensor) -> Tensor:
        return add_packed(y, x, self.lora_A, self._blocks(), self.scaling, tuple(self.enable_lora))

    def _blocks(self) -> Tensor:
        """B as [n, out/parts, r]."""
        return self.lora_B.view(sum(self.enable_lora), -1, self.r)

    def _delta_rows(self) -> Callable[[slice], Tensor]:
        B = expand_packed(self._blocks().detach(), tuple(self.enable_lora))  # [out, n·r]
        return lambda rows: delta_rows(self.lora_A, B, self.scaling, rows, self.fan_in_fan_out)


class Embedding(_MergingLayer, nn.Embedding):
    """`nn.Embedding` with a rank-r update; A [r, vocab] starts at zero and B [dim, r] normal."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ):
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        # With max_norm each lookup rescales rows of the weight in place; what was merged could not be taken out again.
        LoRALayer.__init__(self, r, lora_alpha, 0, merge_weights and self.max_norm is None)
        if r > 0:
            self._add_factors((r, num_embeddings), (embedding_dim, r))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._unmerge()
        nn.Embedding.reset_parameters(self)
        if self._adapted:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.Embedding.forward(self, x)
        if self.merged or not self._adapted:
            return y
        options = self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, self.sparse
        rows = F.embedding(x, self.lora_A.T, *options)  # [..., r]
        return torch.add(y, F.linear(rows, self.lora_B), alpha=self.scaling)

    def _delta_rows(self) -> Callable[[slice], Tensor]:
        return lambda rows: delta_rows(self.lora_A, self.lora_B, self.scaling, rows, transposed=True)


class ConvLoRA(_MergingLayer):
    """A convolution `conv` with an update of its weight. As in loralib, `lora_dropout` is accepted without effect."""

    conv_class: type[nn.Module]
    conv: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ):
        nn.Module.__init__(self)
        self.conv = self.conv_class(in_channels, out_channels, kernel_size, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if r > 0:
            kernel, per_group = self.conv.kernel_size, out_channels // self.conv.groups
            side = kernel[0]
            if kernel == (side, side):
                self._add_factors((r * side, in_channels * side), (per_group * side, r * side))
            else:
                self._add_factors((r, in_channels * math.prod(kernel)), (per_group, r))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._unmerge()
        self.conv.reset_parameters()
        if self._adapted:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self._adapted:
            return self.conv(x)
        A, B, weight = self.lora_A, self.lora_B, self.conv.weight
        # ΔW is B after A: a convolution to r channels, then 1x1
        if self.conv.groups == 1 and B.shape[0] == weight.shape[0]:
            down = self.conv._conv_forward(x, A.view(-1, *weight.shape[1:]), None)
            up = _CONV[weight.dim() - 2](down, B.view(*B.shape, *(1 for _ in weight.shape[2:])))
            return torch.add(self.conv(x), up, alpha=self.scaling)
        # The rows of a k×k kernel's B A cut across its channels and kernel rows. Only with in % k = 0 are they two
        # convolutions (k groups, then 1x1), and that was no faster than building ΔW: 8.4 against 10.9 ms forward and
        # backward for 96 channels of 16x16, but 157 against 141 ms for 192 of 32x32 (k = 3, one CPU thread).
        changed = torch.add(weight, (B @ A).view(weight.shape), alpha=self.scaling)
        return self.conv._conv_forward(x, changed, self.conv.bias)

    @property
    def weight(self) -> Tensor:
        return self.conv.weight

    @property
    def bias(self) -> Tensor | None:
        return self.conv.bias

    def _delta_rows(self) -> Callable[[slice], Tensor]:
        # With groups a row of B A is no row of the weight, so it is built whole, once; kernels are small.
        change = delta(self.lora_A, self.lora_B, self.scaling, self.conv.weight.shape).flatten(1)
        return lambda rows: change[rows]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        # A plain model's checkpoint has `weight`, loralib 0.1.2's `conv.weight`, that of its repository both, for one
        # parameter.
        for name in ("weight", "bias"):
            plain, own = prefix + name, f"{prefix}conv.{name}"
            if plain in state_dict:
                value = state_dict.pop(plain)
                if own in state_dict and not torch.equal(value, state_dict[own]):
                    errors = args[-1]  # load_state_dict raises one error with all of these
                    errors.append(f"the checkpoint holds two values for one parameter: '{plain}' and '{own}' differ")
                state_dict.setdefault(own, value)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Conv1d(ConvLoRA):
    conv_class = nn.Conv1d


class Conv2d(ConvLoRA):
    conv_class = nn.Conv2d


class Conv3d(ConvLoRA):
    conv_class = nn.Conv3d


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze every parameter without "lora_" in its name, but not the biases that `bias` names.

    bias: "none", "all" or "lora_only" (of the layers with LoRA). Raises ConfigError for any other.
    """
    _check_bias(bias)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(False)
    if bias == "all":
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.requires_grad_(True)
    elif bias == "lora_only":
        for module in model.modules():
            own = getattr(module, "bias", None)
            if isinstance(module, LoRALayer) and own is not None:
                own.requires_grad_(True)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Return the part of the state dict that `mark_only_lora_as_trainable(model, bias)` leaves trainable."""
    _check_bias(bias)
    state = model.state_dict()
    chosen = {key for key in state if "lora_" in key}
    if bias == "all":
        chosen |= {key for key in state if "bias" in key}
    elif bias == "lora_only":
        chosen |= {key[: key.rindex("lora_")] + "bias" for key in chosen}
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, LoRALayer):
                chosen.add(".".join(filter(None, (name, "conv" if isinstance(module, ConvLoRA) else "", "bias"))))
    return {key: value for key, value in state.items() if key in chosen}


def _check_bias(bias: str) -> None:
    if bias not in BIAS:
        raise ConfigError(f"bias is {bias!r}{did_you_mean(str(bias), BIAS)}\n  expected one of: {', '.join(BIAS)}")
