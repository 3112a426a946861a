"""How a run was launched: how many processes a launcher started, and errors for what is not in force.

torchrun, accelerate, MPI and Slurm tell a process by its environment which one of how many it is. A process that does
not hear of the others would train alone, and write into the same folder as they do.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import TrainError

# The variables with the number of processes. Slurm's is that of the job step: a job may have more tasks than that.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_RANKS = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
# What torch says when it cannot reach a process any more, by gloo, NCCL or its key-value store.
_LOST = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|TCPStore|recvBytes|remote process", re.I
)


def asked_for(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes the launcher started, as far as it says; 1 without a launcher."""
    sizes = (environment.get(name, "") for name in SIZES)
    return max([int(size) for size in sizes if size.isdigit()], default=1)


def check_launch(world: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raise TrainError unless this process is one of as many as were asked for. `world`: the number in use."""
    for name, what in _SHARDED.items():
        if environment.get(name, "").lower() in ("1", "true", "yes", "y", "on"):
            raise TrainError(
                f"accelerate's settings ask for {what} ({name}), which lorakit train does not use: each process holds "
                "a full copy of the model\n"
                "  choose data parallelism (accelerate config), or: torchrun --nproc-per-node N -m lorakit train ..."
            )
    asked = asked_for(environment)
    if asked != world:
        name = next(name for name in SIZES if environment.get(name) == str(asked))
        raise TrainError(
            f"{asked} processes were started, and this one runs "
            f"{'alone' if world == 1 else f'as one of {world}'}: they would not train together\n"
            f"  start them with: torchrun --nproc-per-node {asked} -m lorakit train ...\n"
            f"  (for runs that are meant to be separate, each with its own --out: unset {name})"
        )
    # accelerate launch sets an address to meet at when it is asked for several processes. On a CPU it starts one.
    alone = not any(name in environment for name in _RANKS)
    if world == 1 and alone and "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        raise TrainError(
            "accelerate launch was asked for several processes and started this one alone, as it does on a CPU\n"
            "  start them with: torchrun --nproc-per-node N -m lorakit train ...\n"
            "  (or, if one is meant: omit --num_processes, and MASTER_ADDR from the environment)"
        )


@contextmanager
def peers(world: int, resume: str) -> Iterator[None]:
    """Turn torch's error about a process that is gone into one line. `resume`: the command that resumes the run."""
    try:
        yield
    except RuntimeError as error:
        if world == 1 or isinstance(error, TrainError) or not _LOST.search(str(error)):
            raise
        raise TrainError(
            "another process of this run ended (its own message says why), so this one stops too; checkpoints are "
            f"kept\n  this resumes the run: {resume}"
        ) from error


def command(world: int, out: str, verb: str = "train") -> str:
    """The command that starts a run folder's config again, in as many processes."""
    own = f"{verb} --config {shlex.quote(out + '/config.yaml')}"
    return f"lorakit {own}" if world == 1 else f"torchrun --nproc-per-node {world} -m lorakit {own}"
