"""Bases that are quantized, in a plan: their bytes are those of the loaded model; a step has its temporary ones too."""

from __future__ import annotations

import packed_checkpoints
import pytest
import quantized
import tiny_lm
import torch

import lorakit as lk
from lorakit.bases.limits import resident
from lorakit.bases.load import load_config
from lorakit.bases.stored_weights import storage_of
from lorakit.config import Quantization
from lorakit.errors import TrainError
from lorakit.methods import method_of
from lorakit.plan.shell import PlanError
from lorakit.plan.step import training_step
from lorakit.train.config import TrainConfig
from lorakit.train.memory import packing_of, planner_for
from lorakit.train.progress import Progress
from lorakit.train.train import train

CPU = torch.device("cpu")
LINEARS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)  # elements


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    quantized.llama(vocabulary=258, positions=tiny_lm.POSITIONS).save_pretrained(path)
    tiny_lm.tokenizer().save_pretrained(path)
    return path


def settings(folder, **changes) -> TrainConfig:
    values = {"data": "-", "model": str(folder), "rank": 4, "precision": "fp32", "validation": 0}
    return TrainConfig(**values | changes)


def planned(folder, **changes):
    config = settings(folder, **changes)
    return planner_for(config, method_of(config.method).precision(config, CPU).value, CPU, held=0)


def loaded_bytes(model) -> int:
    """The bytes of all tensors that a loaded base holds: also those of quantization states, and of torchao's."""
    found = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            state = getattr(tensor, "quant_state", None)
            names = getattr(tensor, "tensor_data_names", None)
            inner = [getattr(tensor, name) for name in names] if names else [tensor.data]
            if names:
                more = [getattr(tensor, name, None) for name in getattr(tensor, "optional_tensor_data_names", ())]
                inner += [t for t in more if t is not None]
            if state is not None:
                inner += [state.absmax, state.code]
                inner += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            if getattr(tensor, "SCB", None) is not None:
                inner.append(tensor.SCB)
            found |= {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in inner}
    return sum(found.values())


def load(folder, kind, **options):
    if kind == "torchao-int8":
        pytest.importorskip("torchao", reason="torchao is not installed")
    elif kind is not None:
        quantized.library()
    return lk.load_base(folder, quantize=kind, device="cpu", **options)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "kind, double", [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True), ("torchao-int8", True)]
)
def test_weights_have_the_bytes_of_the_loaded_model(folder, kind, double, dtype):
    model = load(folder, kind, double=double, dtype=dtype)
    made = planned(folder, quantize=kind, double=double, precision=dtype)
    # torch rounds nothing up; a scalar's storage may be larger than its element
    assert made.shell.weight_bytes == pytest.approx(loaded_bytes(model), abs=64)
    assert made.shell.packed == 14
    assert made.name == f"{kind} lora"


@pytest.mark.parametrize(
    "how", [packed_checkpoints.gptq_config(), packed_checkpoints.awq_config()], ids=["gptq", "awq"]
)
def test_checkpoints_that_are_quantized_are_counted_from_their_config(tmp_path, how):
    path, _ = packed_checkpoints.save(tmp_path, how)
    model = lk.load_base(path, dtype="bf16", device="cpu")
    made = planned(path, precision="bf16")
    assert made.shell.weight_bytes == loaded_bytes(model)
    assert made.name == f"{how['quant_method']} lora"


def test_a_bitsandbytes_checkpoint_is_counted_with_its_own_precision_to_multiply_in(folder, tmp_path):
    load(folder, "nf4", dtype="bf16", compute_dtype="fp32").save_pretrained(tmp_path)
    model = lk.load_base(tmp_path, dtype="bf16", device="cpu")
    made = planned(tmp_path, precision="bf16")
    assert made.shell.weight_bytes == pytest.approx(loaded_bytes(model), abs=64)
    assert made.settings.packing.compute == torch.float32


def test_bits_a_weight_are_those_of_the_paper():
    config = Quantization(quantize="nf4"), Quantization(quantize="nf4", double=False)
    rows, columns = 4096, 16384
    from lorakit.bases.stored_weights import storage

    double, plain = (8 * storage(how).size(rows, columns, 2) / (rows * columns) for how in config)
    assert plain == pytest.approx(4.5, abs=1e-4)
    assert double == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize(
    "how, bits",
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4.156),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4.156),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, 4.5),
        ({"quant_method": "quanto", "weights": "int8"}, 8),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}, "targets": ["Linear"]}},
            },
            4.125,
        ),
        ({"quant_method": "fbgemm_fp8"}, None),
        ({"quant_method": "compressed-tensors"}, None),
        ({"quant_method": "gptq", "bits": None}, None),
        ({"quant_method": "awq", "bits": 4, "group_size": "128"}, None),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": "4"}}}, None),
    ],
)
def test_other_libraries_storage_is_read_from_the_config(how, bits):
    from transformers import LlamaConfig

    stored = storage_of(LlamaConfig(quantization_config=how))
    if bits is None:
        assert stored.size is None
        return
    rows, columns = 4096, 16384
    assert 8 * stored.size(rows, columns, 2) / (rows * columns) == pytest.approx(bits, rel=3e-3)


def test_storage_of_unknown_size_is_said_and_not_guessed(folder, tmp_path):
    config = load_config(str(folder))
    config.quantization_config = {"quant_method": "fbgemm_fp8"}
    config.save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="stored as fbgemm_fp8 are not known"):
        planned(tmp_path)


def test_a_step_has_one_dense_weight_at_a_time_int8_the_inputs_too_and_torchao_all_weights(folder):
    rows, length = 4, 64

    def stretches(kind):
        planner = planned(folder, quantize=kind, targets=["q_proj"])
        return training_step(planner.shell, planner._batch(rows, length), planner._loss, False).stretches

    dense, nf4, int8, torchao = map(stretches, (None, "nf4", "int8", "torchao-int8"))
    largest = 4 * 64 * 128  # bytes of the gate's and the others' weight, made again in backward
    assert nf4["layers"]["working"] >= largest
    assert nf4["loss"]["activations"] >= dense["loss"]["activations"]
    kept = int8["loss"]["activations"] - nf4["loss"]["activations"]
    # The output projection's and the MLP's last one's are kept for nothing else; norms keep their input, not their
    # output, which the others' is.
    assert 2 * 4 * rows * length * 64 <= kept <= 2 * 4 * rows * length * (3 * 64 + 128)
    weights = torchao["loss"]["activations"] - nf4["loss"]["activations"]
    assert weights == 4 * (LINEARS - 64 * 64 - 2 * 32 * 64)  # the first q, k and v have an input without gradient


def test_a_run_that_does_not_fit_is_told_that_it_would_quantized(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16, pad_token_id=0, eos_token_id=1))
    tiny_lm.save(tmp_path / "model", model)
    data = tiny_lm.write_rows(tmp_path / "rows.jsonl", tiny_lm.rows(8))
    config = tiny_lm.config(tmp_path / "model", data, tmp_path / "run", micro_batch=1, validation=0, sample_tokens=0)
    made = planner_for(config, torch.float32, CPU, held=resident())
    nf4 = made.stored(packing_of(config, made.base, Quantization(quantize="nf4")))
    between = (nf4.estimate(1, 40).total + made.estimate(1, 40).total) // 2
    with pytest.raises(TrainError, match="quantize: nf4 fits, and needs about"):
        train(config.replace(memory=f"{between}B"), Progress(quiet=True))
