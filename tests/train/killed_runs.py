"""Runs that are killed with SIGKILL, over and over, until one of them comes to its end. Used by `test_resume.py`.

    python killed_runs.py CONFIG.yaml HOW SEED KILLS        prints what happened as JSON

HOW "clock": the kill comes from outside, some random steps after the checkpoint it went on from and a random time
later. HOW "file": the run kills itself at a random one of its changes to files (a sync, a rename, a removal, half a
written file, ...), each other time at one inside a checkpoint's write. Each attempt is a process of its own, forked
from this one, which has everything imported: an attempt costs no start-up.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import transformers.models.llama.modeling_llama  # noqa: F401 (imported once, before the forks)
import yaml

from lorakit.train import resume
from lorakit.train.config import TrainConfig
from lorakit.train.progress import Progress
from lorakit.train.run_folder import RunFolder
from lorakit.train.train import train

CHANGES_OF_A_CHECKPOINT = 30  # about
CHANGES = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def attempt(config: TrainConfig, prepare: Callable[[], None] = lambda: None) -> int:
    """Start the run in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        prepare()
        code = 0 if train(config, Progress(quiet=True)).adapter else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Its exit code; minus the signal's number if one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_change(number: int, of_checkpoints: bool = False) -> Callable[[], None]:
    """Makes the process kill itself at so many changes to files from here on, or changes made while a checkpoint is
    saved.

    0: it is not killed, and tells how many changes there were.
    """
    done, saving = 0, False

    def note(after: Callable[[], None] = lambda: None) -> None:
        nonlocal done
        done += saving or not of_checkpoints
        if done == number and number:
            after()
            os.kill(os.getpid(), signal.SIGKILL)

    def prepare() -> None:
        for name in CHANGES:
            real = getattr(os, name)

            def change(*args, _real=real, **options):
                note()
                result = _real(*args, **options)
                note()
                return result

            setattr(os, name, change)
        save_file, write_text, log, save = safetensors.torch.save_file, Path.write_text, RunFolder.log, resume.save

        def save_half(tensors, path, *args, **options):
            save_file(tensors, path, *args, **options)
            note(lambda: os.truncate(path, os.path.getsize(path) // 2))

        def write_half(path, text, *args, **options):
            result = write_text(path, text, *args, **options)
            note(lambda: os.truncate(path, os.path.getsize(path) // 2))
            return result

        def log_half(folder, row):
            log(folder, row)
            note(lambda: os.truncate(folder.metrics, os.path.getsize(folder.metrics) - 9))

        def save_noted(*args, **options):
            nonlocal saving
            saving = True
            result = save(*args, **options)
            saving = False
            return result

        safetensors.torch.save_file, Path.write_text, RunFolder.log, resume.save = (
            save_half,
            write_half,
            log_half,
            save_noted,
        )
        if number == 0:
            exit_now = os._exit

            def tell(code):
                print(done, flush=True)
                exit_now(code)

            os._exit = tell

    return prepare


def killed_at_random(config: TrainConfig, how: str, seed: int, kills: int) -> dict:
    """Kill the run so many times, then let it end. Where each kill found it: (last step logged, last checkpoint,
    mid-write).
    """
    chance = random.Random(seed)
    folder = RunFolder(config.out)
    counted = config.replace(out=config.out + "-counted")
    changes = changes_of(counted) if how == "file" else 0
    shutil.rmtree(counted.out, ignore_errors=True)
    found: list[tuple[int, int, bool]] = []
    ends: list[int] = []
    while True:
        if len(found) == kills:
            pid = attempt(config)
        elif how == "clock":
            pid = attempt(config)
            wait_for(pid, folder, newest(folder) + chance.randint(0, 4))
            time.sleep(chance.uniform(0, 0.03))
            # a run that has ended waits for `ended` to hear of it, so this meets no stranger
            os.kill(pid, signal.SIGKILL)
        else:
            inside = len(found) % 2 == 1
            pid = attempt(
                config,
                killed_at_change(
                    chance.randint(1, CHANGES_OF_A_CHECKPOINT if inside else 2 * changes // kills), inside
                ),
            )
        code = ended(pid)
        ends.append(code)
        if code != -signal.SIGKILL:
            return {"ends": ends, "kills": found}
        writing = folder.checkpoints.is_dir() and any(
            p.name.startswith(resume.TEMPORARY) for p in folder.checkpoints.iterdir()
        )
        found.append((last_step(folder), newest(folder), bool(writing)))


def last_step(folder: RunFolder) -> int:
    return max((row["step"] for row in folder.rows()), default=0)


def newest(folder: RunFolder) -> int:
    return (resume.steps_in(folder.checkpoints) or [0])[-1]


def wait_for(pid: int, folder: RunFolder, step: int) -> None:
    """Until the run has logged this step, or has ended (which leaves it to be waited for)."""
    started = time.time()
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        # What an earlier attempt had logged beyond its checkpoint does not count.
        if folder.metrics.exists() and folder.metrics.stat().st_mtime > started and last_step(folder) >= step:
            return
        time.sleep(0.001)


def changes_of(config: TrainConfig) -> int:
    """How many changes to files an undisturbed run makes."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 1)
        inner = attempt(config, killed_at_change(0))
        os._exit(ended(inner))
    os.close(writer)
    with os.fdopen(reader) as told:
        number = int(told.read().split()[-1])
    if ended(pid) != 0:
        raise SystemExit("the undisturbed run failed")
    return number


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = TrainConfig(**yaml.safe_load(Path(sys.argv[1]).read_text()))
    print(json.dumps(killed_at_random(settings, sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
