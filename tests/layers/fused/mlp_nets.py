"""Small MLPs in a row with an adapter, and the comparison of what is fused with what is not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from fused_models import kinds
from torch import Tensor, nn

import lorakit as lk
from lorakit.layers.fused import fused


class Mlp(nn.Module):
    """As Llama's."""

    def __init__(self, act: nn.Module | None = None, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12, bias), nn.Linear(8, 12, bias), nn.Linear(12, 8, bias)
        self.act = nn.SiLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Packed(nn.Module):
    """As Phi-3's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down, self.act = nn.Linear(8, 24, bias=False), nn.Linear(12, 8, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(up * self.act(gate))


class Named(nn.Module):
    """Linears of other names, in another order; with an identity and a dropout that drops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.w3, self.drop, self.w2, self.w1 = nn.Linear(8, 12), nn.Dropout(0.0), nn.Linear(12, 8), nn.Linear(8, 12)
        self.same, self.f = nn.Identity(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.w2(self.same(self.f(self.w1(x)) * self.w3(x))))


class Net(nn.Module):
    """Layers in a row, with a residual around each."""

    def __init__(self, *layers: nn.Module, dtype: torch.dtype = torch.float64, **lora) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layers)
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)
        self.to(dtype)
        targets = [n for n, m in self.named_modules() if isinstance(m, nn.Linear)]
        lk.attach(self, lk.LoraConfig(**{"rank": 2, "targets": targets} | lora))
        with torch.no_grad():
            for name, p in self.named_parameters():
                if "lora_" in name:
                    p.normal_(std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).to(x.dtype)
        return x


def net(cls: Callable[[], nn.Module], **how) -> Net:
    torch.manual_seed(0)
    return Net(cls(), cls(), **how)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    y = model(x)
    of = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), of, materialize_grads=True)]


def compare(model: nn.Module) -> None:
    """Values and gradients with those of a copy in which nothing is fused, in training and evaluation, for small and
    large inputs.
    """
    twin = copy.deepcopy(model)
    fused.release(twin)
    assert kinds(twin) == {}
    for size in (1e-3, 1.0, 30.0):
        x = size * torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        for training in (True, False):
            for a, e in zip(results(model.train(training), x), results(twin.train(training), x), strict=True):
                torch.testing.assert_close(a, e)


def is_fused(model: nn.Module) -> list[bool]:
    return [f"layers.{i}" in kinds(model) for i in range(len(model.layers))]
