"""The training loop: gradients of accumulated steps, precision, what is saved, when it stops, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import tiny_lm
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.bases.load import load_model
from lorakit.data.batches import batch_order
from lorakit.errors import ConfigError, DataError, TrainError
from lorakit.tasks import causal_lm
from lorakit.tasks.task import weight_of
from lorakit.tasks.text.causal_loss import summed_loss
from lorakit.tasks.text.perplexity import perplexity
from lorakit.train import divergence, loop, optimizer
from lorakit.train.progress import Progress
from lorakit.train.run import Run
from lorakit.train.run_folder import RunFolder
from lorakit.train.setup import set_up
from lorakit.train.train import train

QUIET = Progress(quiet=True)
CPU = torch.device("cpu")


def rows_of(config) -> list[dict]:
    return RunFolder(config.out).rows()


def checkpoint_of(config, step: int) -> tuple[dict, dict]:
    """(trained parameters, optimizer state) after a step."""
    folder = RunFolder(config.out).checkpoints / f"step-{step}"
    return load_file(folder / "trainable.safetensors"), load_file(folder / "optimizer.safetensors")


# ------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_the_gradient_of_a_step_is_that_of_all_its_trained_tokens_however_it_is_accumulated(
    make_config, tmp_path, micro_batch
):
    """AdamW's first average is a tenth of the gradient: that is read,
    and compared with one pass over the whole batch.
    """
    config = make_config(batch_size=8, micro_batch=micro_batch, group_by_length=False, steps=1, validation=0, clip=0)
    train(config, QUIET)
    job = set_up(config.replace(out=str(tmp_path / "again")))
    rows = job.batch(0)
    assert len({sum(r.trained) for r in rows}) > 3  # unequal shares: a mean of means would differ
    (summed_loss(job.model, job.task.collate(rows, job.base)) / weight_of(rows)).backward()
    expected = {n: p.grad for n, p in job.model.named_parameters() if p.requires_grad}
    _, optimizer = checkpoint_of(config, 1)
    for name, gradient in expected.items():
        torch.testing.assert_close(10 * optimizer[f"{name}.exp_avg"], gradient, rtol=1e-4, atol=1e-6)
    assert rows_of(config)[0]["tokens"] == weight_of(rows)


def test_accumulating_1x8_and_8x1_ends_with_the_same_parameters(make_config, tmp_path):
    ends = []
    for micro_batch in (1, 8):
        config = make_config(
            batch_size=8,
            micro_batch=micro_batch,
            group_by_length=False,
            steps=4,
            validation=0,
            out=str(tmp_path / f"m{micro_batch}"),
        )
        train(config, QUIET)
        ends.append((checkpoint_of(config, 4)[0], rows_of(config)))
    (a, rows_a), (b, rows_b) = ends
    for name in a:
        # By norms: where a gradient is nearly zero, Adam divides rounding by rounding.
        assert (a[name] - b[name]).norm() <= 5e-4 * a[name].norm(), name
    for one, other in zip(rows_a, rows_b, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


def test_the_logged_loss_is_the_batchs_mean_over_its_trained_tokens(make_config):
    config = make_config(steps=1, validation=0)
    train(config, QUIET)
    job = set_up(config.replace(out=config.out + "-again"))
    expected = perplexity(job.model, job.batch(0), tiny_lm.PAD).loss
    assert rows_of(config)[0]["loss"] == pytest.approx(expected, abs=2e-5)


def test_large_gradients_are_clipped_and_logged_as_they_were(make_config, tmp_path):
    averages = {}
    for clip in (0.0, 0.5):
        config = make_config(steps=1, validation=0, clip=clip, out=str(tmp_path / f"clip{clip}"))
        train(config, QUIET)
        tensors = [t for n, t in checkpoint_of(config, 1)[1].items() if n.endswith(".exp_avg")]
        averages[clip] = 10 * float(torch.stack([t.norm() for t in tensors]).norm())
        assert rows_of(config)[0]["gradient_norm"] == pytest.approx(averages[0.0], rel=1e-3)
    assert averages[0.0] > 1
    assert averages[0.5] == pytest.approx(0.5, rel=1e-3)


def test_gradient_checkpointing_changes_nothing_but_memory(make_config, tmp_path):
    ends = []
    for on in (False, True):
        config = make_config(steps=3, dropout=0.2, gradient_checkpointing=on, out=str(tmp_path / str(on)))
        train(config, QUIET)
        ends.append(checkpoint_of(config, 3)[0])
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------- batches


def test_a_batch_is_a_function_of_seed_and_step_and_holds_rows_of_like_length(make_config, tmp_path):
    job = set_up(make_config(validation=0))
    there = [job.batch(step) for step in range(18)]
    back = [job.batch(step) for step in reversed(range(18))][::-1]
    assert there == back
    lengths = [len(item.ids) for item in job.train]
    for epoch in range(3):
        wanted = batch_order(lengths, 4, 0, epoch, True)
        assert there[6 * epoch : 6 * epoch + 6] == [[job.train[i] for i in batch] for batch in wanted]
        seen = [item.row.number for batch in there[6 * epoch : 6 * epoch + 6] for item in batch]
        assert sorted(seen) == list(range(1, 25))
    assert there[:6] != there[6:12]
    other = set_up(make_config(validation=0, seed=1, out=str(tmp_path / "other")))
    assert [other.batch(step) for step in range(6)] != there[:6]

    def spread(batches) -> int:
        return sum(max(len(i.ids) for i in b) - min(len(i.ids) for i in b) for b in batches)

    loose = set_up(make_config(validation=0, group_by_length=False, out=str(tmp_path / "loose")))
    assert spread(there[:6]) < spread([loose.batch(step) for step in range(6)])


# ------------------------------------------------------------------------------------- precision and method


def test_a_bf16_base_trains_float32_factors_and_keeps_its_own_bits(make_config):
    config = make_config(precision="bf16", steps=8)
    job = set_up(config)
    base = tiny.bits(job.model)
    assert all(t.dtype == torch.bfloat16 for n, t in base.items() if t.is_floating_point() and "rotary" not in n)
    with loop.contextlib.closing(loop.Loop([Run(job, QUIET)])) as training:
        training.go(loop.Interrupt())
    assert tiny.same_bits(tiny.bits(job.model), base)
    saved = load_file(RunFolder(config.out).adapter / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert {t.dtype for t in checkpoint_of(config, 8)[1].values()} == {torch.float32}
    losses = [row["loss"] for row in rows_of(config) if "loss" in row]
    assert losses[-1] < losses[0] - 0.3


def test_the_saved_adapter_is_what_was_trained_and_says_how(make_config, data_file):
    config = make_config(steps=5, patience=0)
    result = train(config, QUIET)
    assert (result.step, result.steps, result.stopped) == (5, 5, None)
    adapter = lk.Adapter.load(result.adapter)
    assert adapter.config.base == config.model
    assert adapter.metadata["recipe"]["rank"] == 4
    assert adapter.metadata["data"]["name"] == data_file.name
    assert adapter.metadata["metrics"]["held_out_loss"] == result.best_loss
    assert not {"out", "threads", "seconds"} & {*adapter.metadata["recipe"], *adapter.metadata["metrics"]}
    job = set_up(config.replace(out=config.out + "-again"))
    fresh = lk.attach(load_model(config.model, torch.float32, CPU), adapter)
    assert perplexity(fresh, job.held_out, tiny_lm.PAD).loss == pytest.approx(result.best_loss, abs=1e-5)


def test_full_fine_tuning_saves_a_model_that_loads(make_config):
    config = make_config(method="full", steps=4, learning_rate=1e-2, precision="bf16", patience=0)
    result = train(config, QUIET)
    assert result.adapter == RunFolder(config.out).model
    model = load_model(str(result.adapter), torch.float32, CPU)
    parameters, _ = checkpoint_of(config, 4)
    assert {t.dtype for t in parameters.values()} == {torch.float32}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name])
    assert not (RunFolder(config.out).adapter).exists()
    assert not RunFolder(config.out).samples.exists()  # no base is left to answer beside it


def test_biases_and_whole_modules_train_too(make_config, tmp_path):
    folder = tiny_lm.save(tmp_path / "gpt2", tiny_lm.gpt2())
    config = make_config(model=folder, targets=["c_attn"], bias="lora_only", save_modules=["ln_f"], steps=3)
    adapter = lk.Adapter.load(train(config, QUIET).adapter)
    fresh = tiny_lm.gpt2()
    for name in ("transformer.h.0.attn.c_attn.bias", "transformer.ln_f.weight"):
        assert not torch.equal(adapter.saved[name], fresh.get_parameter(name))


# ------------------------------------------------------------------------------------- metrics and stopping


def test_metrics_have_each_step_once_with_the_same_keys(make_config):
    config = make_config(steps=6, eval_every=4)
    result = train(config, QUIET)
    rows = rows_of(config)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(set(row) == {"step", "loss", "learning_rate", "gradient_norm", "tokens", "seconds"} for row in steps)
    held = [row for row in rows if "held_out_loss" in row]
    assert [row["step"] for row in held] == [4, 6]  # and at the end
    assert all(set(row) == {"step", "held_out_loss", "held_out_perplexity"} for row in held)
    for row in held:
        assert row["held_out_perplexity"] == pytest.approx(math.exp(row["held_out_loss"]), rel=1e-4)
    assert result.loss == pytest.approx(steps[-1]["loss"], abs=1e-5)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [row["learning_rate"] for row in steps] == [
        5e-3 * optimizer.rate_factor(config, step, 6) for step in range(6)
    ]


def fake_held_out(monkeypatch, losses) -> None:
    """Held-out losses as given, one evaluation after the other. The base's own, to compare with, is not asked for."""
    told = iter(losses)
    monkeypatch.setattr(divergence, "may_be_worse", lambda loss, first, margin: False)
    monkeypatch.setattr(causal_lm, "evaluate", lambda *args: {"loss": next(told), "perplexity": 1.0})


def test_early_stopping_saves_the_adapter_of_the_best_held_out_loss(make_config, monkeypatch):
    fake_held_out(monkeypatch, [5.0, 4.0, 4.5, 4.2, 4.1])
    config = make_config(steps=40, eval_every=1, patience=3, keep=9)
    result = train(config, QUIET)
    assert (result.stopped, result.step, result.best_step, result.best_loss) == ("early", 5, 2, 4.0)
    best, last = checkpoint_of(config, 2)[0], checkpoint_of(config, 5)[0]
    saved = lk.attach(load_model(config.model, torch.float32, CPU), lk.Adapter.load(result.adapter))
    parameters = dict(saved.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in best.items())
    assert not any(torch.equal(last[name], value) for name, value in best.items())


def test_the_best_adapter_is_saved_also_when_the_run_is_not_stopped(make_config, monkeypatch):
    fake_held_out(monkeypatch, [5.0, 4.0, 4.5])
    config = make_config(steps=3, eval_every=1, patience=0, keep=9)
    result = train(config, QUIET)
    assert (result.stopped, result.step, result.best_step) == (None, 3, 2)
    saved = lk.attach(load_model(config.model, torch.float32, CPU), lk.Adapter.load(result.adapter))
    best = checkpoint_of(config, 2)[0]
    assert all(torch.equal(dict(saved.named_parameters())[name], value) for name, value in best.items())


def test_patience_zero_never_stops(make_config, monkeypatch):
    fake_held_out(monkeypatch, [1.0] + [9.0] * 20)
    assert train(make_config(steps=12, eval_every=1, patience=0), QUIET).step == 12


def test_without_validation_the_last_parameters_are_saved(make_config):
    config = make_config(validation=0, steps=3)
    result = train(config, QUIET)
    assert (result.best_loss, result.best_step) == (None, None)
    assert not any("held_out_loss" in row for row in rows_of(config))
    assert len(set_up(config).train) == 24
    saved = lk.attach(load_model(config.model, torch.float32, CPU), lk.Adapter.load(result.adapter))
    last = checkpoint_of(config, 3)[0]
    assert all(torch.equal(dict(saved.named_parameters())[name], value) for name, value in last.items())


def test_validation_may_be_a_file(make_config, tmp_path):
    held = tiny_lm.write_rows(tmp_path / "held.jsonl", tiny_lm.rows(30)[24:])
    config = make_config(validation=str(held), steps=2)
    result = train(config, QUIET)
    job = set_up(config)
    assert (len(job.train), len(job.held_out)) == (24, 6)
    assert {item.row.file for item in job.held_out} == {str(held)}
    assert result.best_loss is not None


# ------------------------------------------------------------------------------------- what does not work


def test_a_loss_that_is_not_finite_stops_with_step_rows_and_advice_and_keeps_the_last_checkpoint(
    make_config, monkeypatch, data_file
):
    config = make_config(steps=8, eval_every=2)
    real, calls = causal_lm.losses, []

    def broken(*args):
        losses = real(*args)
        calls.append(type(losses) is torch.Tensor)  # and not of the plan, which has no numbers
        return losses * (math.nan if sum(calls) > 8 else 1)  # two micro-batches a step: step 5

    monkeypatch.setattr(causal_lm, "losses", broken)
    with pytest.raises(TrainError) as error:
        train(config, QUIET)
    said = str(error.value)
    job = set_up(config)
    assert "the loss is nan at step 5" in said
    assert f"{RunFolder(config.out).checkpoints}/step-4" in said
    assert all(f"{data_file}, row {item.row.number}" in said for item in job.batch(4))
    assert "lower learning rate" in said
    assert [row["step"] for row in rows_of(config) if "loss" in row] == [1, 2, 3, 4]
    monkeypatch.setattr(causal_lm, "losses", real)
    again = train(config, QUIET)  # the kept checkpoint serves: the run goes on from it
    assert again.step == 8
    undisturbed = train(config.replace(out=config.out + "-undisturbed"), QUIET)
    files = [r.adapter / "adapter_model.safetensors" for r in (again, undisturbed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_base_with_infinite_weights_stops_at_the_first_step(make_config, tmp_path):
    model = tiny_lm.llama()
    with torch.no_grad():
        model.lm_head.weight[5] = math.inf
    config = make_config(model=tiny_lm.save(tmp_path / "broken", model), validation=0)
    with pytest.raises(TrainError, match=r"the loss is (nan|inf) at step 1.*\n?.*no checkpoint had been written"):
        train(config, QUIET)


def test_a_gradient_that_is_not_finite_updates_nothing(make_config, monkeypatch):
    config = make_config(steps=2, validation=0, micro_batch=4)
    job = set_up(config)
    before = {n: p.clone() for n, p in job.model.named_parameters()}
    real = causal_lm.losses

    def broken(*args):
        loss = real(*args)
        loss.register_hook(lambda g: g * math.inf)
        return loss

    monkeypatch.setattr(causal_lm, "losses", broken)
    with (
        loop.contextlib.closing(loop.Loop([Run(job, QUIET)])) as training,
        pytest.raises(TrainError, match="the gradient is"),
    ):
        training.go(loop.Interrupt())
    assert all(torch.equal(before[n], p) for n, p in job.model.named_parameters())


def test_one_row_and_nothing_to_validate_on_is_a_clear_error(make_config, tmp_path):
    data = tiny_lm.write_rows(tmp_path / "one.jsonl", tiny_lm.rows(1))
    with pytest.raises(DataError, match="there is only one row"):
        train(make_config(data=data), QUIET)
    assert train(make_config(data=data, validation=0, steps=2), QUIET).step == 2


@pytest.mark.parametrize(
    "content, message",
    [(None, "no such file"), ("", "empty"), ("{\n", "row 1|line 1"), ('{"a": 1}\n', "unknown shape")],
)
def test_data_that_cannot_be_read_is_named(make_config, tmp_path, content, message):
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        train(make_config(data=data), QUIET)
    assert str(data) in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_and_a_single_step_work(make_config):
    config = make_config(batch_size=500, micro_batch=7, steps=1, validation=0)
    result = train(config, QUIET)
    assert result.step == 1
    assert rows_of(config)[0]["tokens"] == weight_of(set_up(config).train)


def test_rows_longer_than_the_models_positions_are_refused_before_the_first_step(make_config, tmp_path):
    long = {"prompt": "p" * 70, "completion": "c" * 70}
    held = tiny_lm.write_rows(tmp_path / "held.jsonl", [*tiny_lm.rows(4), long])
    folder = tiny_lm.save(tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 10_000}))
    with pytest.raises(TrainError, match=r"held.jsonl, row 5: 141 tokens, .* has 96 positions") as error:
        train(make_config(model=folder, data=held), QUIET)
    assert "max_length" in str(error.value)


def test_held_out_rows_longer_than_the_training_rows_may_be_are_left_out_and_counted(make_config, tmp_path):
    long = {"prompt": "p" * 40, "completion": " " + "c" * 40}
    held = tiny_lm.write_rows(tmp_path / "held.jsonl", [*tiny_lm.rows(4), long])
    job = set_up(make_config(validation=str(held)))
    assert len(job.held_out) == 4
    assert job.data.notes == {f"of {held} are longer than 48 tokens and are not evaluated": 1}


def test_a_length_limit_above_the_models_positions_is_refused_at_once(make_config, monkeypatch):
    monkeypatch.setattr("lorakit.data.read.read_rows", lambda *_: pytest.fail("the data were read"))
    with pytest.raises(ConfigError, match=r"max_length: 4000 is more than the 96 positions of .*\n  give 96 or less"):
        train(make_config(max_length=4000, steps=1), QUIET)


def test_an_encoder_decoder_base_is_refused(make_config, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=258, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(TrainError, match="encoder-decoder"):
        train(make_config(model=tiny_lm.save(tmp_path / "t5", t5)), QUIET)


def test_a_target_that_matches_nothing_leaves_a_folder_that_can_be_used_again(make_config):
    with pytest.raises(lk.LorakitError, match="q_pro"):
        train(make_config(targets=["q_pro"]), QUIET)
    assert train(make_config(targets=["q_proj"], steps=1), QUIET).step == 1


def test_a_bad_sample_prompt_is_said_before_training(make_config):
    with pytest.raises((ConfigError, DataError), match="sample prompt"):
        train(make_config(sample_prompts=["x" * 95], sample_tokens=8), QUIET)
