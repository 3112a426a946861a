"""Ctrl-C: the step is finished, the run saved, and the command that goes on printed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from lorakit.train import loop
from lorakit.train.interrupt import catching_signals
from lorakit.train.progress import Progress
from lorakit.train.resume import steps_in
from lorakit.train.run_folder import RunFolder
from lorakit.train.train import train

QUIET = Progress(quiet=True)
COMMAND = [sys.executable, "-c", "from lorakit.cli import main; main()"]


def test_the_first_signal_is_a_wish_and_the_second_an_order():
    with pytest.raises(KeyboardInterrupt), catching_signals() as interrupt:  # noqa: PT012
        assert interrupt.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_that_were_there_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with catching_signals():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_nothing_is_caught():
    wanted = []

    def work():
        with catching_signals() as interrupt:
            wanted.append(interrupt.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert wanted == [None]


def interrupt_after(monkeypatch, step: int) -> None:
    """Ctrl-C in the middle of a step."""
    real, steps = loop.Loop._step, []

    def stepped(self, going):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, going)

    monkeypatch.setattr(loop.Loop, "_step", stepped)


def test_the_step_is_finished_and_saved_and_the_run_goes_on_to_the_same_bits(make_config, tmp_path, monkeypatch):
    config = make_config(steps=6, dropout=0.1)
    undisturbed = train(config.replace(out=str(tmp_path / "undisturbed")), QUIET)
    interrupt_after(monkeypatch, 3)
    result = train(config, QUIET)
    assert (result.adapter, result.stopped, result.step) == (None, "SIGINT", 3)
    folder = RunFolder(config.out)
    assert steps_in(folder.checkpoints)[-1] == 3
    assert not folder.adapter.exists()
    monkeypatch.undo()
    again = train(config, QUIET)
    files = [r.adapter / "adapter_model.safetensors" for r in (again, undisturbed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [row["step"] for row in folder.rows() if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_signal_in_the_last_step_lets_the_run_finish(make_config, monkeypatch):
    interrupt_after(monkeypatch, 2)
    result = train(make_config(steps=2), QUIET)
    assert result.stopped is None
    assert result.adapter is not None


def test_ctrl_c_at_the_command_line_prints_the_command_that_goes_on(make_config, tmp_path):
    config = make_config(steps=120, eval_every=1000, sample_tokens=0, out=str(tmp_path / "a run"))
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(config.model_dump()))
    # A shell's background jobs ignore Ctrl-C from the start, and a test may be one.
    default = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(
        [*COMMAND, "train", "--config", file],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default,
    )
    folder = RunFolder(config.out)
    until = time.monotonic() + 60
    while not folder.rows():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    step = steps_in(folder.checkpoints)[-1]
    assert 1 <= step < 120
    *_, told, after = out.splitlines()
    assert told == f"stopped by SIGINT after step {step} of 120; saved"
    command = after.removeprefix("next: ").partition("   #")[0]
    from lorakit.cli import run

    program, *arguments = shlex.split(command)
    assert (program, arguments) == ("lorakit", ["train", "--config", f"{config.out}/config.yaml"])
    assert run([*arguments, "--quiet"]) == 0
    undisturbed = train(config.replace(out=str(tmp_path / "undisturbed")), QUIET)
    assert (folder.adapter / "adapter_model.safetensors").read_bytes() == (
        undisturbed.adapter / "adapter_model.safetensors"
    ).read_bytes()
