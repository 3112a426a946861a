"""LyCORIS' kinds of update: ΔW from the tensors of a file against what LyCORIS' modules compute, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lorakit.adapter.dense import Dense
from lorakit.adapter.loha import Loha
from lorakit.adapter.lokr import Lokr
from lorakit.adapter.lora import Factors
from lorakit.errors import AdapterError
from lorakit.formats import kohya, lycoris

LINEAR, CONV, NORM = (12, 8), (12, 8, 3, 3), (12,)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def alpha(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float16)


def test_a_tucker_locon_is_the_convolutions_one_after_another():
    torch.manual_seed(0)
    down, mid, up, image = random(4, 8, 1, 1), random(4, 4, 3, 3), random(12, 4, 1, 1), random(2, 8, 6, 6)
    found = lycoris.update(
        "k", {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": alpha(2.0)}, CONV
    )
    chain = F.conv2d(F.conv2d(F.conv2d(image, down), mid, padding=1), up) * (2.0 / 4)
    assert isinstance(found, Factors)
    assert (found.kind, found.rank, found.alpha) == ("conv", 4, 2.0)
    torch.testing.assert_close(F.conv2d(image, found.delta(), padding=1), chain)


def test_a_tucker_locon_in_half_precision_loses_nothing_to_folding():
    down, mid, up = random(4, 8, 1, 1).half(), random(4, 4, 3, 3).half(), random(12, 4, 1, 1).half()
    found = lycoris.update("k", {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, CONV)
    exact = torch.einsum("inkl,oi,nj->ojkl", mid.double(), up.double()[:, :, 0, 0], down.double()[:, :, 0, 0])
    torch.testing.assert_close(found.delta().double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("given", ["matrix", "conv"])
def test_low_rank_factors_take_the_form_of_the_real_module(given):
    ones = (1, 1) if given == "conv" else ()
    linear = lycoris.update(
        "k", {"lora_down.weight": random(4, 8, *ones), "lora_up.weight": random(12, 4, *ones)}, LINEAR
    )
    conv = lycoris.update(
        "k", {"lora_down.weight": random(4, 8, *ones), "lora_up.weight": random(12, 4, *ones)}, (12, 8, 1, 1)
    )
    assert (linear.kind, linear.A.shape, linear.B.shape, linear.alpha) == ("linear", (4, 8), (12, 4), 4.0)
    assert (conv.kind, conv.A.shape, conv.B.shape) == ("conv", (4, 8, 1, 1), (12, 4, 1, 1))


@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_loha(shape):
    columns = 8 if shape == LINEAR else 72
    parts = {
        "hada_w1_a": random(12, 3),
        "hada_w1_b": random(3, columns),
        "hada_w2_a": random(12, 3),
        "hada_w2_b": random(3, columns),
    }
    found = lycoris.update("k", parts | {"alpha": alpha(1.5)}, shape)
    expected = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"]) * 0.5
    assert isinstance(found, Loha)
    torch.testing.assert_close(found.delta(), expected.reshape(shape))


def test_loha_in_tucker_form():
    t, a, b = (
        [random(3, 3, 3, 3) for _ in range(2)],
        [random(3, 12) for _ in range(2)],
        [random(3, 8) for _ in range(2)],
    )
    parts = {
        f"hada_{n}": x
        for n, x in (("t1", t[0]), ("t2", t[1]), ("w1_a", a[0]), ("w2_a", a[1]), ("w1_b", b[0]), ("w2_b", b[1]))
    }
    found = lycoris.update("k", parts, CONV)
    halves = [torch.einsum("pqkl,po,qi->oikl", t[i], a[i], b[i]) for i in range(2)]
    torch.testing.assert_close(found.delta(), halves[0] * halves[1])


@pytest.mark.parametrize("first", ["whole", "product"])
@pytest.mark.parametrize(
    "shape, second",
    [(LINEAR, "whole"), (LINEAR, "product"), (CONV, "whole"), (CONV, "product"), (CONV, "tucker"), (CONV, "old whole")],
)
def test_lokr(first, second, shape):
    kernel = shape[2:]
    r = 2
    parts = {"lokr_w1": random(3, 2)} if first == "whole" else {"lokr_w1_a": random(3, r), "lokr_w1_b": random(r, 2)}
    w1 = parts["lokr_w1"] if first == "whole" else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if second == "tucker":
        core, a, b = random(r, r, *kernel), random(r, 4), random(r, 4)
        parts |= {"lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
        w2 = torch.einsum("pqkl,po,qi->oikl", core, a, b)
    elif second.endswith("whole"):
        w2 = random(4, 4, *kernel) if second == "whole" else random(4, 36)
        parts["lokr_w2"] = w2
    else:
        a, b = random(4, r), random(r, 4 * (9 if kernel else 1))
        w2 = a @ b
        parts |= {"lokr_w2_a": a, "lokr_w2_b": b}
    found = lycoris.update("k", parts | {"alpha": alpha(3.0)}, shape)
    scale = 1.0 if first == "whole" and second.endswith("whole") else 3.0 / r
    assert isinstance(found, Lokr)
    torch.testing.assert_close(found.delta(), torch.kron(w1, w2.flatten(1)).reshape(shape) * scale)


def test_lokr_of_two_whole_factors_takes_no_notice_of_a_senseless_alpha():
    parts = {"lokr_w1": random(3, 2), "lokr_w2": random(4, 4), "alpha": torch.tensor(float("inf"))}
    found = lycoris.update("k", parts, LINEAR)
    found.check("k")
    torch.testing.assert_close(found.delta(), torch.kron(parts["lokr_w1"], parts["lokr_w2"]))


def test_whole_changes_and_those_of_norms():
    weight, bias = random(12, 8), random(12)
    found = lycoris.update("k", {"diff": weight, "diff_b": bias}, LINEAR)
    assert isinstance(found, Dense)
    assert torch.equal(found.delta(), weight)
    assert torch.equal(found.bias, bias)
    norm = lycoris.update("k", {"w_norm": bias, "b_norm": bias}, NORM)
    assert torch.equal(norm.delta(), bias)
    assert lycoris.update("k", {"diff_b": bias}, LINEAR).weight is None


def test_low_rank_with_a_bias_stays_low_rank_beside_it():
    down, up, bias = random(4, 8), random(12, 4), random(12)
    found = lycoris.update(
        "k", {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha(2.0), "diff_b": bias}, LINEAR
    )
    torch.testing.assert_close(found.delta(), up @ down * 0.5)
    assert torch.equal(found.bias, bias)
    assert found.parameters == down.numel() + up.numel() + bias.numel()


@pytest.mark.parametrize(
    "shape, scale, expected",
    [
        (LINEAR, (12, 1), [12, 1]),
        (LINEAR, (1, 8), [1, 8]),
        (LINEAR, (12,), [12, 1]),
        (CONV, (12, 1, 1, 1), [12, 1]),
        ((12, 8, 1, 1), (1, 8, 1, 1), [1, 8]),
    ],
)
def test_doras_magnitude_is_told_by_its_shape(shape, scale, expected):
    parts = {
        "lora_down.weight": random(4, *shape[1:]),
        "lora_up.weight": random(12, 4, *(1,) * (len(shape) - 2)),
        "dora_scale": random(*scale),
    }
    found = lycoris.update("k", parts, shape)
    found.check("k")
    assert list(found.magnitude.shape) == expected


def test_numbers_of_8_bits_are_read_exactly():
    down, up = random(4, 8).to(torch.float8_e4m3fn), random(12, 4).to(torch.float8_e5m2)
    found = lycoris.update("k", {"lora_down.weight": down, "lora_up.weight": up}, LINEAR)
    found.check("k")
    assert torch.equal(found.A.float(), down.float())
    assert torch.equal(found.B.float(), up.float())


@pytest.mark.parametrize("shape", [LINEAR, CONV, (12, 8, 1, 1)])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff"])
def test_what_is_written_is_what_was_read(kind, shape):
    tail = shape[2:]
    columns = 8 * (9 if tail == (3, 3) else 1)
    parts = {
        "lora": {
            "lora_down.weight": random(4, *shape[1:]),
            "lora_up.weight": random(12, 4, *(1,) * len(tail)),
            "alpha": alpha(2.0),
        },
        "loha": {f"hada_w{i}_{x}": random(*s) for i in "12" for x, s in (("a", (12, 3)), ("b", (3, columns)))}
        | {"alpha": alpha(1.0)},
        "lokr": {
            "lokr_w1": random(3, 2),
            "lokr_w2_a": random(4, 2),
            "lokr_w2_b": random(2, columns // 2),
            "alpha": alpha(1.0),
        },
        "diff": {"diff": random(*shape), "diff_b": random(12)},
    }[kind]
    written = lycoris.tensors_of("k", lycoris.update("k", parts, shape), shape)
    assert written.keys() == {f"k.{suffix}" for suffix in parts}
    assert all(torch.equal(written[f"k.{suffix}"], t.to(written[f"k.{suffix}"].dtype)) for suffix, t in parts.items())


def test_alpha_is_in_the_weights_dtype_unless_that_would_change_it():
    assert lycoris.scalar(8.0, torch.bfloat16).dtype == torch.bfloat16
    assert lycoris.scalar(8.0, torch.bfloat16).shape == ()
    assert lycoris.scalar(257.0, torch.bfloat16).dtype == torch.float32
    assert lycoris.scalar(0.1, torch.float16).item() == 0.1


LORA = {"lora_down.weight": (4, 8), "lora_up.weight": (12, 4)}


@pytest.mark.parametrize(
    "shapes, names",
    [
        ({"lora_down.weight": (4, 8)}, "k.lora_up.weight"),
        ({"lora_up.weight": (4, 8)}, "k.lora_down.weight"),
        ({"alpha": ()}, "alpha"),
        (LORA | {"lora_up.weight": (12, 5)}, "lora_up"),
        (LORA | {"alpha": (3,)}, "k.alpha"),
        (LORA | {"dora_scale": (5, 1)}, "k.dora_scale"),
        (LORA | {"lora_mid.weight": (4, 5, 3, 3)}, "k.lora_mid.weight"),
        (LORA | {"hada_w1_a": (12, 3)}, "hada_w1_a"),
        (LORA | {"lora_down.weight": (4, 8, 3, 3)}, "k.lora_down.weight"),
        (LORA | {"lora_down.weight": (4,)}, "k.lora_down.weight"),
        (LORA | {"lora_down.weight": (0, 8)}, "k.lora_down.weight"),
        (LORA | {"lora_dwn.weight": (4, 8)}, "lora_down.weight"),
        ({"oft_blocks": (2, 4, 4)}, "k.oft_blocks"),
        ({"hada_w1_a": (12, 3), "hada_w1_b": (3, 8), "hada_w2_a": (12, 3)}, "k.hada_w2_b"),
        ({"lokr_w1": (3, 2)}, "k.lokr_w2"),
        ({"lokr_w1": (3, 2), "lokr_w2_a": (4, 2)}, "k.lokr_w2_b"),
    ],
)
def test_malformed_tensors_are_refused_with_the_keys_name(shapes, names):
    with pytest.raises(AdapterError, match=names.replace(".", r"\.")):
        lycoris.update("k", {suffix: torch.ones(shape) for suffix, shape in shapes.items()}, LINEAR)


def test_a_few_bytes_cannot_claim_a_huge_change():
    parts = {
        "lora_down.weight": torch.ones(1, 100_000),
        "lora_up.weight": torch.ones(100_000, 1),
        "diff_b": torch.ones(100_000),
    }
    with pytest.raises(AdapterError, match="10,000,000,000 elements"):
        lycoris.update("k", parts, LINEAR)


KEYS = [
    "lora_unet_conv_in",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "lora_unet_joint_blocks_0_x_block_attn_qkv",
    "lora_unet_single_blocks_0_linear1",
    "lora_unet_final_layer_adaLN_modulation_1",
    "lora_unet_down_blocks_0_resnets_0_norm1",
]
SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 6, 9]), max_size=5)
SUFFIXES = st.sampled_from(
    [list(kind) for kind in (lycoris.LORA, lycoris.LOHA, lycoris.LOKR, lycoris.DENSE, lycoris.SUFFIXES)]
)
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    SIZES,
    st.sampled_from(
        [torch.float32, torch.float32, torch.float64, torch.float16, torch.float8_e4m3fn, torch.int32, torch.complex64]
    ),
    st.sampled_from([0.0, 1.0, 2.0, -1.0, float("nan"), float("inf")]),
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(KEYS),
    SUFFIXES.flatmap(lambda kind: st.dictionaries(st.sampled_from([*kind, "alpha"]), TENSORS, min_size=1)),
)
def test_any_tensors_under_known_keys_are_an_adapter_or_an_adapter_error(key, tensors):
    said = "file.safetensors"
    try:
        adapter = kohya.read("file.safetensors", {f"{key}.{suffix}": tensor for suffix, tensor in tensors.items()}, {})
        for update in adapter.updates.values():
            if update.changes_weight and not update.needs_base:
                update.delta()
    except AdapterError as error:
        said = str(error)
    assert said.startswith("file.safetensors")
