"""What every format of quantized weights in checkpoint files must do (`checkpoint.quantized.format`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.checkpoint.quantized.found import format_for, formats, kinds
from lorakit.io.stream import DTYPES, NAMES
from lorakit.ops.quantized import gptq
from lorakit.ops.quantized.blockwise import Blockwise

SHAPE = (96, 64)
# of each kind, settings that differ from the usual ones too
CASES = [
    *((kind, None) for kind in kinds()),
    ("nf4", Blockwise("nf4", True)),
    ("fp4", Blockwise("fp4", True, 128, torch.float32)),
    ("gptq", gptq.Settings(3, 32, False)),
    ("gptq", gptq.Settings(8, -1, True, False)),
    ("gptq", gptq.Settings(2, 64, False)),
]


@pytest.fixture(params=CASES, ids=[f"{kind}{'' if s is None else '-' + str(i)}" for i, (kind, s) in enumerate(CASES)])
def case(request):
    kind, settings = request.param
    format = format_for(kind)
    return format, settings if settings is not None else format.new_settings(kind, None, torch.float32)


def weight(shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.05


def quantized(case, W: Tensor, rows: int | None = None, like=None) -> dict[str, Tensor]:
    format, settings = case
    return format.quantized(W.split(rows or len(W)), tuple(W.shape), settings, like)


def dequantized(case, tensors) -> Tensor:
    format, settings = case
    return format.dequantized(format.cut(format.opened(tensors), SHAPE, 0, SHAPE[0], settings), settings)


def shapes_of(tensors):
    return {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def test_names_are_the_formats_own_and_there_are_no_two_of_a_kind():
    assert sorted(kinds()) == sorted(set(kinds()))
    for format in formats():
        assert format.marker.startswith(format.names)
        assert format.main.startswith(format.names)
        for kind in format.kinds:
            assert format.kind(format.new_settings(kind, None, torch.float32)) == kind


def test_settings_are_read_from_the_config_it_writes_and_by_no_other_format(case):
    format, settings = case
    config = format.config(settings, ["lm_head"])
    read = format.settings(config)
    assert format.kind(read) == format.kind(settings)
    for name in ("bits", "group_size", "symmetric", "plus_one", "double"):
        assert getattr(read, name, None) == getattr(settings, name, None)
    assert [other for other in formats() if other is not format and other.settings(config) is not None] == []
    assert format.settings({"quant_method": "hqq"}) is None


def test_its_tensors_are_those_announced(case):
    format, settings = case
    tensors = quantized(case, weight())
    assert shapes_of(tensors) == dict(format.written(SHAPE, settings, None))
    assert all(name.startswith(format.names) for name in tensors)
    assert format.marker in tensors
    again = quantized(case, weight(), like=tensors)
    assert shapes_of(again) == dict(format.written(SHAPE, settings, shapes_of(tensors)))
    small = {name: t for name, t in tensors.items() if t.nbytes < 4096}
    own, shape = format.of_module(shapes_of(tensors), small, settings)
    assert shape == SHAPE
    assert format.kind(own) == format.kind(settings)


def test_rows_can_be_read_and_written_by_themselves(case):
    format, settings = case
    W, step = weight(), format.step(SHAPE, settings)
    assert SHAPE[0] > step
    tensors = quantized(case, W)
    full, opened = dequantized(case, tensors), format.opened(tensors)
    for start in range(0, SHAPE[0], step):
        stop = min(start + step, SHAPE[0])
        part = format.dequantized(format.cut(opened, SHAPE, start, stop, settings), settings)
        assert torch.equal(part, full[start:stop])
    in_parts = quantized(case, W, step)
    assert in_parts.keys() == tensors.keys()
    assert all(torch.equal(in_parts[name], tensors[name]) for name in tensors)


def test_an_element_is_off_by_no_more_than_it_says(case):
    format, settings = case
    W, tensors = weight(), quantized(case, weight())
    cut = format.cut(format.opened(tensors), SHAPE, 0, SHAPE[0], settings)
    back = format.dequantized(cut, settings)
    errors = format.errors(cut, back, settings)
    assert back.dtype == torch.float32
    assert errors.shape == back.shape
    assert bool(((back - W).abs() <= errors * 1.01 + 1e-6).all())
    assert errors.mean() < 10 * (back - W).square().mean().sqrt()  # and not by far more than it is


def test_what_lies_on_its_values_stays_when_it_is_quantized_again(case):
    """Without ΔW nothing may change: for formats that keep scales to the bit, else within what double quantization of
    scales rounds.
    """
    tensors = quantized(case, weight())
    once = dequantized(case, tensors)
    again = dequantized(case, quantized(case, once, like=tensors))
    double = getattr(case[1], "double", False)
    torch.testing.assert_close(again, once, atol=0.02 * float(once.abs().max()) if double else 1e-6, rtol=0)


def test_every_dtype_it_writes_is_one_of_the_files():
    for format in formats():
        for kind in format.kinds:
            written = format.written(SHAPE, format.new_settings(kind, None, torch.float32), None)
            assert all(dtype in DTYPES for dtype, _ in written.values())
