"""Adapters that PEFT 0.6.1 wrote give the outputs that it recorded (see fixtures/peft_0.6.1/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import AdapterError

FOLDER = Path(__file__).parents[1] / "fixtures" / "peft_0.6.1"
X = torch.arange(90).reshape(9, 10)


class PeftMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(x.float()).relu()).log_softmax(-1)


class PeftConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(5, 10, 3)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.conv2d(x.float().reshape(2, 5, 3, 3)).relu().flatten(1)).log_softmax(-1)


@pytest.mark.parametrize("kind, make", [("ia3_mlp", PeftMlp), ("lora_mlp", PeftMlp), ("lora_conv2d", PeftConv)])
def test_the_recorded_output_is_reproduced(kind, make):
    folder = FOLDER / kind / "0.6.1"
    recorded = torch.load(folder / "output.pt", map_location="cpu", weights_only=True)
    torch.manual_seed(0)
    model = make()
    base = model(X)
    lk.attach(model, lk.Adapter.load(folder))
    torch.testing.assert_close(model(X), recorded, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(base, recorded, atol=1e-2)
    lk.merge(model)
    torch.testing.assert_close(model(X), recorded, atol=1e-4, rtol=1e-4)


def test_another_kind_of_adapter_is_refused_by_name(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "OFT"}')
    with pytest.raises(AdapterError, match=r"adapter_config.json: peft_type is 'OFT'; lorakit reads LORA adapters"):
        lk.Adapter.load(tmp_path)
