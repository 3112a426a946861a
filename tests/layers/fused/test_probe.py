"""The probe: it tells what differs, whatever the size or mode it differs in, and leaves everything as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorakit.layers.fused.probe import mismatch, twin, unknown_attribute


class Doubled(nn.Module):
    """2 · x."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def probe(module: nn.Module, run=lambda x: 2 * x, tolerance: float = 1e-12, gradients: float = 1e-12) -> str | None:
    return mismatch(
        twin(module, dict(module._parameters), dict(module._modules)), run, (4, 3), torch.float64, tolerance, gradients
    )


def test_what_computes_the_same_fits():
    assert probe(Doubled()) is None
    assert probe(Doubled(), tolerance=0.0) is None


OTHERS = {
    "another factor": lambda x: 2.001 * x,
    "a tiny difference": lambda x: 2 * x + 1e-9,
    "a clamp above": lambda x: 2 * x.clamp(-7, 7),
    "a floor below": lambda x: 2 * torch.where(x.abs() < 1e-3, 0.0, x),
    "dropout": lambda x: nn.functional.dropout(2 * x, 0.01, True),
    "another shape": lambda x: (2 * x)[0],
    "another type": lambda x: (2 * x).float(),
    "no gradient": lambda x: (2 * x).detach(),
    "another gradient": lambda x: 2 * x.detach() + x - x.detach(),
    "nothing": lambda x: None,
    "a pair": lambda x: (2 * x, None),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_computes_something_else_is_said_to(other):
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return OTHERS[other](x)

    assert probe(Other()) is not None
    assert "forward" in Other.__dict__


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_what_differs_in_one_mode_only_is_a_misfit(mode):
    class Moody(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x if self.training == mode else 2 * x

    assert "values" in probe(Moody())


def test_the_reason_names_what_differs():
    assert "values" in probe(Doubled(2.001))
    assert "gradients" in probe(Doubled(), run=lambda x: 2 * x.detach() + x - x.detach())


def test_a_forward_that_raises_is_a_misfit_and_no_error():
    class Picky(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask

    class Lost(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("layer")

    assert "TypeError" in probe(Picky())
    assert "KeyError" in probe(Lost())


def test_a_forward_that_notes_something_on_the_module_is_a_misfit():
    class Noting(Doubled):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return 2 * x

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return 2 * x

    module = Noting()
    assert "changes the module" in probe(module)
    assert not hasattr(module, "last"), "the probe ran on a twin"
    counting = Counting()
    made = twin(counting, {}, {})
    made.__dict__["_buffers"] = dict(counting._buffers)
    assert "changes the module" in mismatch(made, lambda x: 2 * x, (4, 3), torch.float64, 0.0, 0.0)


def test_bits_are_compared_where_no_tolerance_is_given():
    x = torch.randn(4, 3, dtype=torch.float64)
    assert not torch.equal(0.1 * x + 0.2 * x, 0.3 * x)
    assert probe(Doubled(0.3), run=lambda x: 0.1 * x + 0.2 * x) is None
    assert probe(Doubled(0.3), run=lambda x: 0.1 * x + 0.2 * x, tolerance=0.0) is not None


def test_a_twin_has_the_attributes_and_neither_hooks_nor_mode():
    module = Doubled(3.0).eval()
    module.extra = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: pytest.fail("called"))
    made = twin(module, {"weight": nn.Parameter(torch.ones(2))}, {})
    assert type(made) is Doubled
    assert made.training
    assert made.factor == 3.0
    assert list(made._parameters) == ["weight"]
    assert not made._modules
    assert torch.equal(made(torch.ones(2)), torch.full((2,), 3.0))
    assert list(module._modules) == ["extra"]
    assert not module.training


@pytest.mark.parametrize(
    "value, odd",
    [(2.0, False), (True, True), (2, True), (None, True), ("a", True), (len, True), ([2.0], True)],
    ids=repr,
)
def test_attributes_of_other_values_or_types_are_unknown(value, odd):
    module = Doubled()
    module.factor = value
    assert unknown_attribute(module, [2.0]) == ("factor" if odd else None)


def test_what_libraries_note_on_modules_is_no_unknown_attribute():
    module = Doubled()
    module.config, module.layer_idx, module._is_hf_initialized = object(), 3, True
    assert unknown_attribute(module, [2.0]) is None
