"""Several adapters on one model: saved weights side by side, and what training one does to the others."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn.parallel import DistributedDataParallel

import lorakit as lk
from lorakit.errors import StateError

HEAD = lk.LoraConfig(rank=2, targets=["query"], save_modules=["classifier"])
NORMS = lk.LoraConfig(rank=2, targets=["value"], save_modules=["LayerNorm"])


def trained(model, config, name, seed):
    return tiny.randomise_factors(lk.attach(model, config, name), seed)


def test_adapters_that_save_different_modules_are_active_together(tiny_bert):
    trained(tiny_bert, HEAD, "head", 1)
    trained(tiny_bert, NORMS, "norms", 2)
    lk.activate(tiny_bert, {"head": 1.0, "norms": 1.0})
    head, norms = lk.capture(tiny_bert, "head"), lk.capture(tiny_bert, "norms")
    plain = tiny.bert()
    plain.load_state_dict({**head.saved, **norms.saved}, strict=False)
    for value, name in ((head, "head"), (norms, "norms")):
        lk.attach(plain, lk.Adapter(value.config.replace(save_modules=[]), value.updates), name)
    lk.activate(plain, {"head": 1.0, "norms": 1.0})
    torch.testing.assert_close(tiny.logits(tiny_bert), tiny.logits(plain))
    lk.merge(tiny_bert)
    torch.testing.assert_close(tiny.logits(tiny_bert), tiny.logits(plain), atol=1e-5, rtol=1e-5)
    lk.unmerge(tiny_bert)
    lk.merge(tiny_bert)
    lk.detach(tiny_bert, merged="keep")
    torch.testing.assert_close(tiny.logits(tiny_bert), tiny.logits(plain), atol=1e-5, rtol=1e-5)
    for name, value in {**head.saved, **norms.saved}.items():
        assert torch.equal(tiny_bert.state_dict()[name], value)


def test_two_that_save_the_same_module_are_refused_by_name(tiny_bert):
    trained(tiny_bert, HEAD, "a", 1)
    trained(tiny_bert, HEAD.replace(save_modules=["classifier", "LayerNorm"]), "b", 2)
    with pytest.raises(StateError, match=r"'a' replaces weights of the base \(classifier.weight.*\), and so does 'b'"):
        lk.activate(tiny_bert, {"a": 1.0, "b": 1.0})
    with pytest.raises(StateError, match=r"'a' replaces weights of the base .*cannot be scaled"):
        lk.activate(tiny_bert, {"a": 0.5})


def loss_of(model):
    return model(**tiny.example(model)).logits.square().sum()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_inactive_adapter_has_no_gradient_and_does_not_move(tiny_bert, decay):
    """Also with momentum of its own from before, and with weight decay."""
    trained(tiny_bert, HEAD, "a", 1)
    trained(tiny_bert, HEAD, "b", 2)
    optimizer = torch.optim.AdamW([p for p in tiny_bert.parameters() if p.requires_grad], lr=0.1, weight_decay=decay)
    for name, other in (("a", "b"), ("b", "a"), ("a", "b")):
        lk.activate(tiny_bert, name)
        before = lk.capture(tiny_bert, other)
        own = lk.capture(tiny_bert, name)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(tiny_bert).backward()
            optimizer.step()
        optimizer.zero_grad()
        after = lk.capture(tiny_bert, other)
        for m, update in after.updates.items():
            assert all(torch.equal(t, before.updates[m].tensors()[k]) for k, t in update.tensors().items())
        assert all(torch.equal(value, before.saved[n]) for n, value in after.saved.items())
        moved = lk.capture(tiny_bert, name)
        assert not torch.equal(moved.saved["classifier.weight"], own.saved["classifier.weight"])


def test_an_adapter_that_no_row_uses_has_no_gradient(tiny_bert):
    for seed, name in enumerate("abc"):
        trained(tiny_bert, HEAD, name, seed)
    with lk.route(tiny_bert, ["a", "b"]):
        loss_of(tiny_bert).backward()
    gradients = {n: p.grad is not None for n, p in tiny_bert.named_parameters() if "lora_a." in n or "lora_c." in n}
    assert gradients
    assert all(has == ("lora_a." in n) for n, has in gradients.items())


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_with_an_inactive_trainable_adapter_as_the_docs_say(tiny_llama, one_process):
    """`find_unused_parameters=True`, since DDP waits for the gradients of all that requires one."""
    config = lk.LoraConfig(rank=2, targets=["q_proj"])
    trained(tiny_llama, config, "a", 1)
    trained(tiny_llama, config, "b", 2)
    wrapped = DistributedDataParallel(tiny_llama, find_unused_parameters=True)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    before = lk.capture(tiny_llama, "a")
    for _ in range(2):
        wrapped(**tiny.example(tiny_llama)).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = lk.capture(tiny_llama, "a")
    assert all(torch.equal(f.A, before.factors[m].A) for m, f in after.factors.items())


def test_attach_and_capture_say_what_sharding_forbids(tiny_llama, one_process):
    from torch.distributed.fsdp import fully_shard

    config = lk.LoraConfig(rank=2, targets=["q_proj"])
    lk.attach(tiny_llama, config)
    for layer in tiny_llama.model.layers:
        fully_shard(layer)
    fully_shard(tiny_llama)
    loss_of(tiny_llama).backward()  # training a sharded model works
    with pytest.raises(StateError, match=r"lora_default.A' is sharded over processes.*(\n.*)*full_state_dict=True"):
        lk.capture(tiny_llama)
    sharded = tiny.llama()
    fully_shard(sharded)
    with pytest.raises(StateError, match=r"sharded over processes.*(\n.*)*attach the adapter to the whole model first"):
        lk.attach(sharded, config)


def test_attaching_to_a_tensor_parallel_model_says_so(tiny_llama):
    tiny_llama._tp_size = 2
    with pytest.raises(StateError, match=r"tensor-parallel over 2 processes.*(\n.*)*load the model without tp_plan"):
        lk.attach(tiny_llama, lk.LoraConfig(rank=2))
    assert not lk.adapters(tiny_llama)
