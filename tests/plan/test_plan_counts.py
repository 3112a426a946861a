"""Published counts, from configs of models that cannot be loaded here."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lorakit.bases.stored_weights import storage
from lorakit.config import LoraConfig, Quantization
from lorakit.methods import method_of
from lorakit.model.attach import attach
from lorakit.plan.packed import Packing
from lorakit.plan.planner import Planner, PlanSettings
from lorakit.tasks import causal_lm
from lorakit.train.config import TrainConfig

CUDA = torch.device("cuda")


def lora(**settings):
    """Puts such an adapter on a model."""
    return lambda model: attach(model, LoraConfig(**settings))


def nothing(model) -> None:
    """Full fine-tuning: all of the base trains."""


def llama_3_8b(layers: int = 32):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )


def gpt_3():
    from transformers import GPT2Config

    return GPT2Config(vocab_size=50257, n_embd=12288, n_layer=96, n_head=96, n_positions=2048)


def planner(base, **changes) -> Planner:
    values = {
        "dtype": torch.bfloat16,
        "device": CUDA,
        "task": causal_lm,
        "config": TrainConfig(data="-"),
        "overhead": 0,
        "attach": lora(),
    } | changes
    return Planner(base, PlanSettings(**values))


def test_llama_3_8b_with_rank_8_on_q_and_k_trains_3_407_872_parameters():
    """As transformers and PEFT's documentation print for it."""
    made = planner(llama_3_8b(), attach=lora(rank=8, targets=["q_proj", "k_proj"]))
    estimate = made.estimate(1, 512)
    assert estimate.trained == 3_407_872
    assert estimate.parameters == 8_030_261_248
    assert estimate.parts["weights"] == pytest.approx(2 * 8_030_261_248, rel=1e-6)
    assert estimate.parts["adapter"] == 4 * 3_407_872  # float32 masters


def test_gpt_3_with_rank_4_on_q_and_v_makes_a_checkpoint_of_about_35_mb():
    """Hu et al. 2021, section 4.2: 'with r = 4 and only the query and value projection matrices being adapted, the
    checkpoint size is reduced by roughly 10,000x (from 350GB to 35MB)'. That is 96 layers x 2 matrices x 4 x (12288 +
    12288) numbers in 16 bits: 37.7 MB, or 36.0 MiB."""
    config = TrainConfig(data="-", rank=4, targets=["c_attn"], packed={"c_attn": [True, False, True]})
    shell = planner(
        gpt_3(),
        dtype=torch.float16,
        attach=partial(method_of("lora").attach, config=config, name="a", task_type="CAUSAL_LM"),
    ).shell
    trained = sum(p.numel() for p in shell.trained())
    assert trained == 96 * 2 * 4 * (12288 + 12288) == 18_874_368
    assert 2 * trained / 2**20 == pytest.approx(35, rel=0.03)
    assert shell.base_parameters() == pytest.approx(175e9, rel=0.005)
    assert shell.frozen_bytes() == pytest.approx(350e9, rel=0.005)


@pytest.mark.parametrize("optimizer, copies", [("sgd", 1), ("lion", 1), ("muon", 1), ("adamw", 2)])
def test_each_optimizer_keeps_its_copies_of_what_is_trained(optimizer, copies):
    made = planner(llama_3_8b(2), config=TrainConfig(data="-", optimizer=optimizer))
    estimate = made.estimate(1, 64)
    assert estimate.parts["optimizer"] == copies * estimate.trained_bytes == copies * 4 * estimate.trained


def test_four_bits_are_for_the_linear_weights_but_not_for_the_head_and_the_embeddings():
    made = planner(llama_3_8b(2))
    packing = Packing(storage(Quantization(quantize="nf4")))
    plain, four = made.estimate(1, 64), made.stored(packing).estimate(1, 64)
    linear = 2 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    saved = plain.parts["weights"] - four.parts["weights"]
    assert saved / linear == pytest.approx(2 - 4.127 / 8, abs=1e-3)
    assert (four.method, four.storage) == ("nf4 lora", "nf4")
    assert {p: four.parts[p] for p in ("adapter", "optimizer")} == {p: plain.parts[p] for p in ("adapter", "optimizer")}


def test_full_fine_tuning_holds_weights_gradients_and_two_copies():
    estimate = planner(llama_3_8b(2), attach=nothing, dtype=torch.float32, batch=8).estimate(1, 64)
    size = 4 * estimate.parameters
    assert estimate.trained == estimate.parameters
    assert (estimate.parts["weights"], estimate.parts["adapter"], estimate.parts["optimizer"]) == (
        pytest.approx(size, rel=1e-6),
        0,
        2 * size,
    )
    assert estimate.parts["gradients"] == size  # of the micro-batches before


def test_the_operations_of_a_step_are_those_of_its_matrix_products():
    """2 for forward and 2 for the input gradient, per weight and token; attention and the adapter add a little."""
    estimate = planner(llama_3_8b(4), attach=lora(rank=1, targets=["q_proj"])).estimate(1, 1024)
    head, layers = 128256 * 4096, 4 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    assert estimate.flops == pytest.approx(4 * 1024 * (head + layers), rel=0.05)


def test_more_memory_never_fits_less():
    from transformers import LlamaConfig

    made = planner(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
    )
    found = [made.most_rows(64, memory) for memory in (1_000, 5_000_000, 8_000_000)]
    assert found[0] == 0 < found[1] < found[2] < 256
    assert made.estimate(found[1], 64).total <= 5_000_000 < made.estimate(found[1] + 2, 64).total
    length = made.longest(4, 5_000_000)
    assert 0 < length < 256
    assert made.estimate(4, length).total <= 5_000_000 < made.estimate(4, length + 16).total


def test_the_most_rows_and_the_longest_length_of_a_model_with_many_positions():
    from transformers import LlamaConfig

    base = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131072,
    )
    plenty = 1 << 50
    assert planner(base).most_rows(16384, plenty) == 256  # 4 million tokens, whose labels the loss asks for
    assert planner(base).longest(16, plenty) == 131072
    assert planner(base).most_rows(16384, 64 << 20) < 256
