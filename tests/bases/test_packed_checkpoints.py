"""Loading GPTQ and AWQ checkpoints with lorakit's own linears, and saving them again."""

from __future__ import annotations

import json

import packed_checkpoints as checkpoints
import pytest
import quantized
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import lorakit as lk
from lorakit.bases.own_linear import AwqLinear, GptqLinear
from lorakit.bases.packed import own_config
from lorakit.errors import LorakitError

LAYOUTS = {
    "gptq": checkpoints.gptq_config(),
    "gptq, activation order": checkpoints.gptq_config(desc_act=True, sym=False),
    "gptq_v2 of 8 bits": checkpoints.gptq_config(bits=8, checkpoint_format="gptq_v2", sym=False),
    "gptq of 3 bits": checkpoints.gptq_config(bits=3),
    "gptq of 2 bits, one group": checkpoints.gptq_config(bits=2, group_size=-1),
    "awq": checkpoints.awq_config(),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def made(request, tmp_path_factory):
    """A checkpoint's folder, and the model of its dequantized weights in float32."""
    return checkpoints.save(tmp_path_factory.mktemp("packed"), LAYOUTS[request.param])


def loaded(folder, dtype=torch.float32):
    return lk.load_base(folder, dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outputs_are_those_of_the_dequantized_weights(made, dtype):
    folder, dense = made
    model = loaded(folder, dtype)
    assert {type(m) for n, m in model.named_modules() if n.endswith("_proj")} <= {GptqLinear, AwqLinear}
    assert not model.training
    ours, theirs = tiny.logits(model), tiny.logits(dense)
    assert ours.dtype == dtype
    near = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert (ours.float() - theirs).norm() <= near * theirs.norm()


def test_saved_again_it_is_the_checkpoint_to_the_bit(made, tmp_path):
    folder, _ = made
    loaded(folder, torch.float16).save_pretrained(tmp_path)
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path))
    assert tiny.same_bits(dict(sorted(before.items())), dict(sorted(after.items())))
    configs = [json.loads((each / "config.json").read_text()) for each in (folder, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    torch.testing.assert_close(tiny.logits(loaded(tmp_path)), tiny.logits(loaded(folder)))


def test_generate_and_its_settings(made):
    folder, dense = made
    model = loaded(folder)
    ids = tiny.example(model)["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), dense.generate(ids, **settings))
    assert model.generation_config.eos_token_id == dense.generation_config.eos_token_id


def test_the_scales_keep_their_precision(made):
    model = loaded(made[0], torch.bfloat16)
    scales = {m.scales.dtype for m in model.modules() if isinstance(m, GptqLinear | AwqLinear)}
    assert scales == {torch.float16}
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_any_class_of_transformers_loads_it(made):
    folder, dense = made
    config = own_config(AutoConfig.from_pretrained(folder))
    model = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32)
    inputs = tiny.example(dense)
    ours, theirs = (m(**inputs).last_hidden_state for m in (model, dense.model))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_conv1d_become_linears(tmp_path):
    original = quantized.gpt2()
    how = checkpoints.gptq_config()
    original.half().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, module in original.float().named_modules():
        if type(module).__name__ == "Conv1D":
            made = checkpoints.packed(module.weight.T.contiguous(), how)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{last}": tensor for last, tensor in made.items()}
            with torch.no_grad():
                module.weight.copy_(checkpoints.by_hand(made, how).T)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    model = loaded(tmp_path)
    assert model.transformer.h[0].attn.c_attn.was_conv1d
    torch.testing.assert_close(tiny.logits(model), tiny.logits(original), atol=1e-5, rtol=1e-5)


def changed(folder, to, **tensors):
    """A copy of a checkpoint with other tensors; None: without one."""
    held = load_file(folder / "model.safetensors") | tensors
    to.mkdir()
    save_file({n: t for n, t in held.items() if t is not None}, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


def test_damaged_checkpoints_are_refused_with_the_name(tmp_path):
    folder, _ = checkpoints.save(tmp_path / "good", checkpoints.gptq_config())
    at = "model.layers.1.mlp.up_proj"
    wrong = {
        f"{at}.qzeros": (torch.zeros(2, 15, dtype=torch.int32), rf"'{at}': qzeros is \[2, 15\], expected \[2, 16\]"),
        f"{at}.scales": (None, rf"'{at}' has a qweight, but no scales"),
        "model.layers.7.o_proj.qweight": (torch.zeros(8, 8).int(), "'model.layers.7.o_proj' has a qweight, but"),
        f"{at}.qweight": (torch.zeros(4, 128, dtype=torch.int32), "2 bits for each of 64 inputs, expected 4"),
    }
    for i, (name, (tensor, message)) in enumerate(wrong.items()):
        broken = changed(folder, tmp_path / str(i), **{name: tensor})
        with pytest.raises(LorakitError, match=message):
            loaded(broken)


def test_packed_weights_of_no_linear_are_refused(tmp_path):
    folder, _ = checkpoints.save(tmp_path / "good", checkpoints.gptq_config())
    held = load_file(folder / "model.safetensors")
    start = "model.layers.0.mlp.up_proj"
    extra = {n.replace(start, "model.layers.0.mlp.experts"): t.clone() for n, t in held.items() if n.startswith(start)}
    with pytest.raises(LorakitError, match=r"'model.layers.0.mlp.experts', which is no module(.|\n)*gptqmodel"):
        loaded(changed(folder, tmp_path / "experts", **extra))


def test_a_config_without_packed_weights_is_refused(tmp_path):
    model = quantized.llama()
    model.config.quantization_config = checkpoints.gptq_config()
    model.save_pretrained(tmp_path)
    with pytest.raises(LorakitError, match=r"says gptq, but no file has a packed(.|\n)*remove quantization_config"):
        loaded(tmp_path)
