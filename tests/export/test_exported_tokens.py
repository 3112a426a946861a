"""Trained tokens in what is exported: verified for PEFT, named for programs that do not take them."""

from __future__ import annotations

import pytest
import tiny_lm
import transformers

import lorakit as lk
from lorakit.errors import AdapterError
from lorakit.export.verify import contents, differences
from lorakit.io.tensors import read_tensors, write_tensors


@pytest.fixture
def exported(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_lm.save(tmp_path / "base"))
    lk.attach(model, lk.LoraConfig(rank=2, targets=["q_proj"], trainable_tokens=[9, 5]))
    adapter = lk.capture(model)
    adapter.save(tmp_path / "adapter")
    return adapter, tmp_path / "adapter"


def test_the_rows_are_read_back_by_independent_code(exported):
    adapter, folder = exported
    assert differences(*contents(folder, "peft", adapter), folder) == {"ΔW": 0.0}


def test_other_rows_and_missing_ones_are_found(exported):
    adapter, folder = exported
    file = folder / "adapter_model.safetensors"
    tensors, header = read_tensors(file)
    (key,) = [key for key in tensors if key.endswith("trainable_tokens_delta")]
    write_tensors(file, tensors | {key: tensors[key].flip(0)}, header)
    assert differences(*contents(folder, "peft", adapter), folder)["ΔW"] > 0.1
    write_tensors(file, tensors | {key: tensors[key][:1]}, header)
    with pytest.raises(AdapterError, match="has 1 rows for 2 tokens"):
        contents(folder, "peft", adapter)
