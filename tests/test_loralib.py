"""`lorakit.loralib` against loralib 0.1.2 itself: forward, gradients, start values, state dicts; then what only ours
can do.
"""

from __future__ import annotations

import copy
import io

import loralib
import pytest
import torch
from torch import nn

import lorakit.loralib as lora
from lorakit.errors import ConfigError, StateError

IDS = torch.tensor([[1, 5, 5, 0], [2, 7, 9, 3]])
FAN = {"fan_in_fan_out": True}
OPTIONS = {"stride": 2, "padding": 2, "dilation": 2, "padding_mode": "reflect"}
CASES = {  # name: (class, positional arguments, keyword arguments, input)
    "linear": ("Linear", (12, 8), {"r": 3, "lora_alpha": 6}, torch.randn(2, 5, 12)),
    "linear, dropout, no bias": ("Linear", (12, 8), {"r": 3, "lora_dropout": 0.4, "bias": False}, torch.randn(4, 12)),
    "linear, fan_in_fan_out": ("Linear", (12, 8), {"r": 3, **FAN}, torch.randn(2, 5, 12)),
    "linear, one vector": ("Linear", (12, 8), {"r": 3}, torch.randn(12)),
    "linear, not merging": ("Linear", (12, 8), {"r": 3, "merge_weights": False}, torch.randn(4, 12)),
    "linear, r = 0": ("Linear", (12, 8), {}, torch.randn(4, 12)),
    "merged linear": (
        "MergedLinear",
        (12, 24),
        {"r": 2, "lora_alpha": 6, "enable_lora": [True, False, True]},
        torch.randn(2, 5, 12),
    ),
    "merged linear, all": (
        "MergedLinear",
        (12, 24),
        {"r": 2, "enable_lora": [True, True], "lora_dropout": 0.3},
        torch.randn(2, 5, 12),
    ),
    "merged linear, fan_in_fan_out": (
        "MergedLinear",
        (12, 24),
        {"r": 2, "enable_lora": [False, True, True], **FAN},
        torch.randn(4, 12),
    ),
    "embedding": ("Embedding", (10, 8), {"r": 3, "lora_alpha": 2, "padding_idx": 0}, IDS),
    "embedding, r = 0": ("Embedding", (10, 8), {}, IDS),
    "conv2d": ("Conv2d", (4, 6, 3), {"r": 2, "lora_alpha": 3, "padding": 1}, torch.randn(2, 4, 7, 6)),
    "conv2d, groups": ("Conv2d", (4, 6, 3), {"r": 2, "groups": 2, **OPTIONS}, torch.randn(2, 4, 9, 8)),
    "conv2d, as many groups as the kernel is wide": (
        "Conv2d",
        (4, 6, 2),
        {"r": 2, "groups": 2},
        torch.randn(2, 4, 5, 5),
    ),
    "conv2d, 1x1, groups": ("Conv2d", (4, 6, 1), {"r": 2, "groups": 2, "lora_dropout": 0.5}, torch.randn(2, 4, 5, 5)),
    "conv1d, 1": ("Conv1d", (4, 6, 1), {"r": 2, "bias": False}, torch.randn(2, 4, 5)),
    "conv3d, 1": ("Conv3d", (4, 6, 1), {"r": 2}, torch.randn(2, 4, 3, 4, 3)),
}


def pair(case: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """(ours, theirs, x) in float64, with the same values, ΔW not zero, everything trainable."""
    name, args, kwargs, x = CASES[case]
    ours, theirs = (getattr(library, name)(*args, **kwargs).double() for library in (lora, loralib))
    generator = torch.Generator().manual_seed(1)
    for parameter in ours.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.requires_grad_(True)
    theirs.load_state_dict(ours.state_dict())
    for parameter in theirs.parameters():
        parameter.requires_grad_(True)
    return ours, theirs, x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient_equal_loralib_in_training(case):
    ours, theirs, x = pair(case)
    results = []
    for layer in (ours, theirs):
        inputs = x.clone().requires_grad_(x.is_floating_point())
        torch.manual_seed(0)  # for dropout
        y = layer(inputs)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        results.append({"y": y, "x": inputs.grad, **{n: p.grad for n, p in layer.named_parameters()}})
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_and_the_merged_weight_equal_loralib(case):
    ours, theirs, x = pair(case)
    ours.eval()
    theirs.eval()
    assert ours.merged == theirs.merged
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_start_and_the_same_parameters_train(case):
    name, args, kwargs, _ = CASES[case]
    layers = []
    for library in (lora, loralib):
        torch.manual_seed(3)
        layers.append(getattr(library, name)(*args, **kwargs))
    ours, theirs = layers
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }
    for attribute in ("r", "lora_alpha", "scaling", "merged", "merge_weights", "fan_in_fan_out", "enable_lora"):
        assert getattr(ours, attribute, None) == getattr(theirs, attribute, None), attribute


def test_a_reset_makes_the_update_zero_again():
    for name, args, kwargs, x in CASES.values():
        layer = getattr(lora, name)(*args, **kwargs)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        layer.reset_parameters()
        if layer.r:
            y = layer.eval()(x)
            layer.train().scaling = 0.0
            assert torch.equal(y, layer.eval()(x)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [c for c in CASES if "not merging" not in c])
def test_training_mode_gives_every_bit_back(case, dtype):
    ours, _, _ = pair(case)
    ours.to(dtype)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    for _ in range(5):
        ours.eval()
        merged = {k: v.clone() for k, v in ours.state_dict().items()}
        ours.train()
    after = ours.state_dict()
    assert all(torch.equal(after[k].view(torch.uint8), v.view(torch.uint8)) for k, v in before.items())
    changed = [k for k in before if not torch.equal(merged[k], before[k])]
    assert changed == ([k for k in before if k.endswith("weight")] if ours.r else [])  # else nothing was tested


# ------------------------------------------------------------------------------- whole models


class Net(nn.Module):
    """Every kind of layer, some without LoRA."""

    def __init__(self, library):
        super().__init__()
        self.embed = library.Embedding(10, 12, r=2)
        self.qkv = library.MergedLinear(12, 36, r=2, lora_alpha=4, enable_lora=[True, False, True])
        self.out = library.Linear(12, 12, r=3, lora_alpha=4)
        self.plain = library.Linear(12, 12)
        self.conv = library.Conv2d(1, 4, 3, r=2, padding=1)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(48, 5)

    def forward(self, ids):
        q, k, v = self.qkv(self.embed(ids)).chunk(3, -1)
        h = self.norm(self.plain(self.out(torch.softmax(q @ k.mT, -1) @ v)))
        return self.head(self.conv(h[:, None]).movedim(1, -2).flatten(-2))


def random_net(library) -> nn.Module:
    torch.manual_seed(0)
    net = Net(library)
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return net


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_training_run_and_its_checkpoint_equal_loralibs(bias):
    states = []
    for library in (lora, loralib):
        net = random_net(library)
        library.mark_only_lora_as_trainable(net, bias=bias)
        if bias == "lora_only":  # loralib forgets it (see below)
            net.conv.conv.bias.requires_grad_(True)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(4):
            net.train()
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(IDS).flatten(0, 1), IDS.flatten() % 5).backward()
            optimizer.step()
            net.eval()
            net(IDS)
        states.append((library.lora_state_dict(net, bias=bias), net(IDS)))
    (ours, our_y), (theirs, their_y) = states
    torch.testing.assert_close(our_y, their_y)
    forgotten = {"plain.bias", "conv.conv.bias"} if bias == "lora_only" else set()
    assert set(ours) == set(theirs) | forgotten
    assert any(k.endswith(".bias") for k in ours) == (bias != "none")
    torch.testing.assert_close({k: ours[k] for k in theirs}, dict(theirs))


@pytest.mark.parametrize("writer, reader", [(lora, loralib), (loralib, lora)])
def test_checkpoints_load_both_ways(writer, reader):
    source, target = random_net(writer), Net(reader)
    writer.mark_only_lora_as_trainable(source, "all")
    base = {k: v for k, v in source.state_dict().items() if "lora_" not in k}
    assert not target.load_state_dict(base, strict=False).unexpected_keys
    assert not target.load_state_dict(writer.lora_state_dict(source, "all"), strict=False).unexpected_keys
    torch.testing.assert_close(target(IDS), source(IDS))
    torch.testing.assert_close(target.eval()(IDS), source.eval()(IDS))


def test_only_lora_parameters_and_the_asked_biases_train():
    frozen = {}
    for bias in ("none", "all", "lora_only"):
        net = Net(lora)
        lora.mark_only_lora_as_trainable(net, bias)
        frozen[bias] = {n for n, p in net.named_parameters() if not p.requires_grad}
        trained = {n for n, p in net.named_parameters() if p.requires_grad}
        assert set(lora.lora_state_dict(net, bias)) == trained
    assert frozen["none"] - frozen["lora_only"] == {"qkv.bias", "out.bias", "plain.bias", "conv.conv.bias"}
    assert frozen["lora_only"] - frozen["all"] == {"norm.bias", "head.bias"}


def test_an_unknown_bias_is_refused_before_anything_is_frozen():
    net = nn.Sequential(nn.Linear(2, 2))
    for call in (lora.mark_only_lora_as_trainable, lora.lora_state_dict):
        with pytest.raises(ConfigError, match="did you mean 'lora_only'"):
            call(net, bias="loraonly")
    assert net[0].weight.requires_grad


def test_settings_that_make_no_layer_are_refused():
    with pytest.raises(ConfigError, match="enable_lora has 3 entries and out_features is 10"):
        lora.MergedLinear(4, 10, r=2, enable_lora=[True, False, True])
    with pytest.raises(ConfigError, match="r is -1"):
        lora.Linear(4, 10, r=-1)


# --------------------------------------------------------------- where loralib is at fault


CONVS = [
    (lora.Conv1d, nn.functional.conv1d, 3, {}, (2, 4, 9)),
    (lora.Conv1d, nn.functional.conv1d, 5, {"groups": 2, "padding": 2}, (2, 4, 9)),
    (lora.Conv2d, nn.functional.conv2d, (3, 1), {"padding": (1, 0), "stride": 2}, (2, 4, 6, 5)),
    (lora.Conv2d, nn.functional.conv2d, (1, 3), {"groups": 2}, (2, 4, 6, 5)),
    (lora.Conv3d, nn.functional.conv3d, 3, {"padding": 1}, (2, 4, 4, 4, 4)),
    (lora.Conv3d, nn.functional.conv3d, (1, 2, 3), {"dilation": 2}, (2, 4, 3, 5, 7)),
    (lora.Conv1d, nn.functional.conv1d, 3, {}, (4, 9)),  # not batched
]


@pytest.mark.parametrize("cls, function, kernel, options, shape", CONVS)
def test_convolutions_that_fail_in_loralib_add_the_documented_update(cls, function, kernel, options, shape):
    layer = cls(4, 6, kernel, r=2, lora_alpha=3, **options).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    weight = layer.weight + 1.5 * (layer.lora_B @ layer.lora_A).view(layer.weight.shape)
    expected = function(x, weight, layer.bias, **options)
    torch.testing.assert_close(y, expected)
    inputs = (x, layer.lora_A, layer.lora_B)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g))
    torch.testing.assert_close(layer.eval()(x), expected)
    assert layer.merged


def test_a_square_kernel_given_as_a_tuple_has_loralibs_shapes():
    assert lora.Conv2d(4, 6, (3, 3), r=2).lora_A.shape == loralib.Conv2d(4, 6, 3, r=2).lora_A.shape


def test_a_packed_projection_never_builds_its_full_update():
    layer = lora.MergedLinear(64, 192, r=2, enable_lora=[True, False, True])
    nn.init.normal_(layer.lora_B)
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.extend(tuple(t.shape) for t in (out if isinstance(out, list | tuple) else [out]))
            return out

    with Watch():
        layer(torch.randn(5, 64))
    assert (5, 192) in shapes
    assert not {(192, 64), (128, 64)} & set(shapes)


def test_a_packed_projection_with_nothing_enabled_is_an_ordinary_linear():
    layer, x = lora.MergedLinear(4, 6, r=2), torch.randn(3, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.eval()(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("keys", ["plain", "0.1.2", "repository"])
def test_a_convolution_reads_every_name_its_weight_has_had(keys):
    values = {"weight": torch.randn(6, 4, 3, 3), "bias": torch.randn(6)}
    state = {f"0.{n}": v for n, v in values.items()} if keys != "0.1.2" else {}
    state |= {f"0.conv.{n}": v for n, v in values.items()} if keys != "plain" else {}
    model = nn.Sequential(lora.Conv2d(4, 6, 3, r=2))
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["0.lora_A", "0.lora_B"]
    assert not result.unexpected_keys
    assert torch.equal(model[0].conv.weight, values["weight"])
    assert torch.equal(model[0].bias, values["bias"])
    if keys == "repository":
        state["0.weight"] = state["0.weight"] + 1
        with pytest.raises(RuntimeError, match=r"'0\.weight' and '0\.conv\.weight' differ"):
            model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("merged_file", [False, True])
@pytest.mark.parametrize("merged_model", [False, True])
def test_a_checkpoint_of_either_mode_loads_in_either_mode(merged_file, merged_model):
    source = random_net(lora).train(not merged_file)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = Net(lora).train(not merged_model)
    target.load_state_dict(torch.load(file))
    assert target.out.merged == merged_model
    torch.testing.assert_close(target(IDS), source(IDS))
    torch.testing.assert_close(target.train()(IDS), source.train()(IDS))
    torch.testing.assert_close(dict(target.state_dict()), dict(source.state_dict()))


def test_factors_loaded_in_evaluation_mode_take_effect_at_once():
    source, target = random_net(lora), Net(lora)
    target.load_state_dict({k: v for k, v in source.state_dict().items() if "lora_" not in k}, strict=False)
    base = {k: v.clone() for k, v in target.state_dict().items() if "lora_" not in k}
    target.eval()
    target.load_state_dict(lora.lora_state_dict(source), strict=False)
    torch.testing.assert_close(target(IDS), source(IDS))
    target.train()
    assert all(torch.equal(target.state_dict()[k], v) for k, v in base.items())


def test_a_change_of_precision_while_merged_is_one_of_the_base_and_the_factors():
    net = random_net(lora)
    expected = copy.deepcopy(net).bfloat16().state_dict()
    net.eval().bfloat16()
    assert net.out.merged
    net.train()
    assert all(torch.equal(net.state_dict()[k], v) for k, v in expected.items())


def test_factors_changed_while_merged_are_told_and_nothing_is_lost():
    layer = random_net(lora).out.eval()
    merged = layer.weight.clone()
    layer.lora_B.data += 1
    with pytest.raises(StateError, match="factors have changed since the merge"):
        layer.train()
    assert torch.equal(layer.weight, merged)
    layer.lora_B.data -= 1


def test_a_reset_while_merged_leaves_the_layer_usable():
    layer = random_net(lora).out.eval()
    layer.reset_parameters()
    fresh = layer.weight.clone()
    assert torch.equal(layer.train().weight, fresh)


def test_a_model_can_be_copied_and_pickled_merged_or_not():
    for mode in (True, False):
        net = random_net(lora).train(mode)
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        for twin in (copy.deepcopy(net), torch.load(file, weights_only=False)):
            assert torch.equal(twin(IDS), net(IDS))
            assert torch.equal(twin.train().out.weight, copy.deepcopy(net).train().out.weight)


def test_channels_last_weights_merge_and_come_back():
    layer = lora.Conv2d(4, 6, 3, r=2).to(memory_format=torch.channels_last)
    nn.init.normal_(layer.lora_B)
    before, x = layer.weight.clone(), torch.randn(2, 4, 6, 6)
    trained = layer(x)
    torch.testing.assert_close(layer.eval()(x), trained)
    assert torch.equal(layer.train().weight, before)


def test_an_embedding_that_rescales_its_rows_computes_the_same_in_both_modes():
    layer = lora.Embedding(10, 8, r=3, max_norm=1.0)
    nn.init.normal_(layer.lora_A)
    A, trained = layer.lora_A.clone(), layer(IDS)
    assert torch.equal(layer.eval()(IDS), trained)
    assert not layer.merged
    assert torch.equal(layer.lora_A, A)
    assert torch.equal(layer.train()(IDS), trained)


def test_a_model_built_without_memory_is_merged_once_it_has_weights():
    with torch.device("meta"):
        net = Net(lora).eval()
    net.to_empty(device="cpu").load_state_dict(random_net(lora).state_dict())
    torch.testing.assert_close(net.eval()(IDS), random_net(lora)(IDS))
    assert net.out.merged


def test_mixed_precision_regions_run_every_layer():
    net = random_net(lora)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(IDS)
        y.float().sum().backward()
    torch.testing.assert_close(y.float(), net(IDS), atol=0.1, rtol=0.1)
    assert all(p.grad is not None for n, p in net.named_parameters() if "lora_" in n)


def test_a_layer_of_ones_own_counts_through_loralayer():
    class Own(nn.Linear, lora.LoRALayer):
        def __init__(self):
            nn.Linear.__init__(self, 4, 4)
            lora.LoRALayer.__init__(self, r=2, lora_alpha=1, lora_dropout=0.0, merge_weights=True)
            self.lora_A = nn.Parameter(torch.zeros(2, 4))

    model = nn.Sequential(Own())
    lora.mark_only_lora_as_trainable(model, "lora_only")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.bias", "0.lora_A"]
    assert set(lora.lora_state_dict(model, "lora_only")) == {"0.bias", "0.lora_A"}
