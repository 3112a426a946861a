"""Checkpoints of layers that are kept outside the device's memory come back with the same bits."""

from __future__ import annotations

import pytest
import tiny_lm
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import StateError
from lorakit.layers import offload as module
from lorakit.layers.offload import ToFiles, is_moved, offload, to_memory_or_files

IDS = torch.arange(2, 82).reshape(2, 40)
CPU = torch.device("cpu")


def checkpointed(dropout: float = 0.1):
    model = lk.attach(tiny_lm.llama(), lk.LoraConfig(rank=4, dropout=dropout)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("B"):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    return model


def gradients(model) -> list[torch.Tensor]:
    torch.manual_seed(7)  # dropout's masks, which are drawn again in backward
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture
def small(monkeypatch):
    """Tensors of the tiny model count as large."""
    monkeypatch.setattr(module, "SMALL", 64)


def test_gradients_are_the_same_to_the_bit_and_every_layer_s_input_is_written(small, tmp_path, monkeypatch):
    written, write = [], module._write

    def noted(tensor, folder):
        kept = write(tensor, folder)
        written.append((tuple(tensor.shape), isinstance(kept, torch.Tensor)))
        return kept

    monkeypatch.setattr(module, "_write", noted)
    expected, model = gradients(checkpointed()), checkpointed()
    offload(model, to_memory_or_files(CPU, tmp_path))
    found = gradients(model)
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert [shape for shape, stayed in written if not stayed] == [(2, 40, 32)] * 2  # an input for each of two layers
    assert list(tmp_path.iterdir()) == []  # the files have no names, so that a killed run leaves none


def test_parameters_and_small_tensors_stay():
    assert is_moved(torch.zeros(1 << 15))
    assert not is_moved(torch.zeros(1 << 14))
    assert not is_moved(nn.Parameter(torch.zeros(1 << 15)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_any_dtype_and_layout_comes_back(small, tmp_path, dtype):
    tensor = torch.arange(4096).reshape(64, 64).to(dtype).T
    with ToFiles(tmp_path):
        kept = module._write(tensor, tmp_path)
        assert not isinstance(kept, torch.Tensor)
        back = module._read(kept)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


def test_twice_is_as_once(tmp_path):
    model = checkpointed()
    offload(model, to_memory_or_files(CPU, tmp_path))
    first = model.model.layers[0].__dict__[module.CHECKPOINT]
    offload(model, to_memory_or_files(CPU, tmp_path))
    assert model.model.layers[0].__dict__[module.CHECKPOINT] is first


def test_a_model_that_does_not_checkpoint_is_refused(tmp_path):
    with pytest.raises(StateError, match="no layer is checkpointed"):
        offload(nn.Linear(2, 2), to_memory_or_files(CPU, tmp_path))


def test_a_full_disk_is_an_error_that_names_the_folder(small, tmp_path, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            self.closed = True

    file = Full()
    monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda **options: file)
    with pytest.raises(StateError, match=r"offload_activations: cannot write into .*No space left"):
        module._write(torch.zeros(64, 64), tmp_path)
    assert file.closed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: offload into the computer's memory needs one")
def test_a_gpu_s_checkpoints_lie_in_the_computer_s_memory():
    expected = [g.cpu() for g in gradients_on_gpu(False)]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, gradients_on_gpu(True), strict=True))


def gradients_on_gpu(offloaded: bool) -> list[torch.Tensor]:
    model = checkpointed(dropout=0.0).cuda()
    if offloaded:
        offload(model, to_memory_or_files(torch.device("cuda"), None))
    model(input_ids=IDS.cuda(), labels=IDS.cuda(), use_cache=False).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]
