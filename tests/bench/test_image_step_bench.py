"""The sides of the image-step table: the same UNet, the same adapters, the same gradients as diffusers with PEFT."""

from __future__ import annotations

import pytest
import torch

from lorakit.bench import image_step, suite
from lorakit.bench.image_step import Shape, batch, forward, lorakit_side, peft_side, unet

SMALL = Shape((16, 32), 8)


def with_pefts_factors(targets, layout):
    """Both sides with the same random factors, and pairs of these: (PEFT's, ours)."""
    theirs, ours = peft_side(unet(SMALL, layout=layout), targets), lorakit_side(unet(SMALL, layout=layout), targets)
    pairs, modules = [], dict(ours.named_modules())
    generator = torch.Generator().manual_seed(2)
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            mine = modules[name].lora_default
            for a, b in ((module.lora_A.default.weight, mine.A), (module.lora_B.default.weight, mine.B)):
                a.data.copy_(0.1 * torch.randn(a.shape, generator=generator))
                b.data.copy_(a)
                pairs.append((a, b))
    return theirs, ours, pairs


@pytest.mark.parametrize("layout", image_step.LAYOUTS)
@pytest.mark.parametrize("targets", image_step.TARGETS)
@pytest.mark.parametrize("rows", [1, 4])
def test_prediction_and_gradients_are_pefts(targets, layout, rows):
    theirs, ours, pairs = with_pefts_factors(image_step.TARGETS[targets], layout)
    assert len(pairs) == 2 * (32 if targets == "attention" else 71)
    assert {id(p) for p in ours.parameters() if p.requires_grad} == {id(b) for _, b in pairs}
    losses = [forward(model, batch(SMALL, rows, model, layout))() for model in (theirs, ours)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-5)
    for loss in losses:
        loss.backward()
    largest = max(float(a.grad.abs().max()) for a, _ in pairs)
    for a, b in pairs:
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5 * largest, rtol=1e-3)


def test_a_row_has_ratios_of_steps_and_passes(monkeypatch):
    times = {
        "floor": image_step.Times([(1.0, 1.0)], [(0.0, 0.0)], 1),
        "PEFT": image_step.Times([(2.0, 3.0)] * 3, [(1.0, 1.0)] * 3, 100),
        "lorakit": image_step.Times([(1.0, 2.0), (1.6, 2.0), (9.0, 2.0)], [(0.5, 1.0)] * 3, 90),
    }
    times["floor"] = times["floor"]._replace(passes=[(1.0, 1.0)] * 3)
    seen = []
    monkeypatch.setattr(image_step, "measure", lambda *a: seen.append(a) or times)
    (row, _) = image_step.run(quick=True, precisions=[torch.float32])
    assert (row["step over PEFT"], row["elapsed over PEFT"], row["passes over PEFT"]) == (0.7, 0.75, 0.8)
    assert (row["floor over PEFT"], row["kept over PEFT"]) == (0.5, 0.9)
    assert [call[2] for call in seen] == list(image_step.TARGETS.values())


def test_a_step_is_measured_on_every_side():
    results = image_step.measure(SMALL, 1, image_step.ATTENTION, "contiguous", torch.float32, rounds=1)
    assert list(results) == ["floor", "PEFT", "lorakit"]
    assert all(times.kept > 0 and times.passes[0][1] > 0 for times in results.values())
    assert suite.measures_precisions("image-step")
