"""How vLLM is started: its command line and its environment, as plain functions.

    vllm serve BASE --uds SOCKET --served-model-name base --generation-config vllm --enable-lora
         --max-loras 8 --max-cpu-loras 64 --max-lora-rank 16 --max-logprobs 20 --enable-prompt-tokens-details
         --structured-outputs-config '{"backend": "guidance", "disable_any_whitespace": true}'

--uds SOCKET               a Unix socket in a folder that only this user may enter. On a port, vLLM would answer any
                           program on the machine, and any web page that finds it: its key does not guard /invocations
--generation-config vllm   the model's generation_config.json would otherwise fill in whatever a request leaves open
--max-lora-rank            one of `VLLM_RANKS`, fixed for the life of the process: `rank_flag` chooses it
--structured-outputs-...   llguidance, as in the embedded engine, and no spaces between a JSON value's parts: a small
                           model may write line ends until its tokens are used up
VLLM_API_KEY               a random key for each start. In the environment, since a command line can be read by anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...bases.load import model_path
from ...errors import ConfigError, did_you_mean

BASE_NAME = "base"  # what vLLM calls the base; adapters are hashes, so that none can have this name
MAX_LOGPROBS = 20
_GRAMMARS = '{"backend": "guidance", "disable_any_whitespace": true}'
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Flags that only `command_line` may set.
_OURS = frozenset(
    {
        "--model",
        "--host",
        "--port",
        "--uds",
        "--api-key",
        "--root-path",
        "--ssl-keyfile",
        "--ssl-certfile",
        "--served-model-name",
        "--generation-config",
        "--override-generation-config",
        "--enable-lora",
        "--no-enable-lora",
        "--max-loras",
        "--max-cpu-loras",
        "--max-lora-rank",
        "--lora-modules",
        "--max-logprobs",
        "--logprobs-mode",
        "--structured-outputs-config",
        "--tokens-only",
        "--headless",
    }
)
_ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # otherwise /v1/load_lora_adapter is 404
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
# Not passed on. PYTHON...: this process's packages would shadow those of vLLM's environment. LORAKIT_...: the child has
# no use for our keys. SKIP_MODEL_NAME...: vLLM would answer for unknown adapters with the base. DEV_MODE opens calls
# that need no key.
_WITHHELD = (
    "PYTHONPATH",
    "PYTHONHOME",
    "LORAKIT_API_KEY",
    "LORAKIT_MANAGE_KEY",
    "VLLM_SKIP_MODEL_NAME_VALIDATION",
    "VLLM_SERVER_DEV_MODE",
)


@dataclass(frozen=True)
class VllmSettings:
    """What vLLM is started with.

    command: the program and its first arguments. extra: more flags for `vllm serve`, as they are.
    max_rank: the largest rank of any adapter or mix; see `rank_flag`.
    batched: adapters that one batch can mix; more of them wait for a turn. in_memory: adapters in the child's RAM.
    context, precision, rows: None leaves the choice to vLLM. rows: requests computed at once.
    """

    base: str
    command: tuple[str, ...] = ("vllm",)
    revision: str | None = None
    max_rank: int = 16
    batched: int = 8
    in_memory: int = 64
    context: int | None = None
    rows: int | None = None
    precision: str | None = None
    extra: tuple[str, ...] = ()


def rank_flag(ranks: Iterable[int], most: int | None = None) -> int:
    """Return the value for --max-lora-rank: the smallest that vLLM knows and that holds all `ranks`.

    most: a rank that was asked for, for adapters that are loaded later. Raises ConfigError if a rank is too large.
    """
    from ...export.rules import VLLM_RANKS  # imports torch

    ranks = list(ranks)
    largest = max([1, *ranks] if most is None else [most, *ranks])
    fitting = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    if fitting is None:
        raise ConfigError(
            f"vLLM serves ranks up to {VLLM_RANKS[-1]}, and {largest} is needed\n"
            f"  lorakit resize --rank {VLLM_RANKS[-1]} lowers an adapter's rank and reports the error"
        )
    return fitting


def command_line(settings: VllmSettings, socket: str) -> list[str]:
    """Return the argv of the child. socket: where it listens.

    Raises ConfigError for extra flags that would contradict ours, LorakitError for a base that is not a model folder.
    """
    _check_extra(settings.extra)
    precision = settings.precision
    optional = {
        "--revision": settings.revision,
        "--max-model-len": settings.context,
        "--max-num-seqs": settings.rows,
        "--dtype": None if precision is None else _DTYPES.get(precision, precision),
    }
    return [
        *settings.command,
        "serve",
        model_path(settings.base),
        # first, so that ours count if vLLM takes an abbreviation for one of them
        *settings.extra,
        *("--uds", socket),
        *("--served-model-name", BASE_NAME),
        *("--generation-config", "vllm"),
        "--enable-lora",
        *("--max-loras", str(settings.batched)),
        *("--max-cpu-loras", str(max(settings.in_memory, settings.batched))),
        *("--max-lora-rank", str(rank_flag([], settings.max_rank))),
        *("--max-logprobs", str(MAX_LOGPROBS)),
        "--enable-prompt-tokens-details",
        *("--structured-outputs-config", _GRAMMARS),
        *(part for flag, value in optional.items() if value is not None for part in (flag, str(value))),
    ]


def environment(key: str, ambient: Mapping[str, str]) -> dict[str, str]:
    """Return the child's environment: `ambient` (ours) without what would harm, with vLLM's settings and its key."""
    kept = {name: value for name, value in ambient.items() if name not in _WITHHELD}
    return {**kept, **_ENVIRONMENT, "VLLM_API_KEY": key}


def _check_extra(extra: Iterable[str]) -> None:
    for argument in extra:
        flag = argument.partition("=")[0].partition(".")[0].replace("_", "-")
        if flag in _OURS:
            raise ConfigError(
                f"'{argument}' cannot be passed on to vLLM: lorakit sets {flag} itself\n"
                "  lorakit serve has settings for the context, the precision, the rank and the number of adapters"
            )
        if flag == "--enable-auto-tool-choice" or flag.startswith("--chat-template"):
            raise ConfigError(
                f"'{argument}' has no effect: vLLM is sent token ids, and lorakit renders conversations itself"
                f"{did_you_mean(flag, ['--chat-template'])}\n  give --chat-template to lorakit serve"
            )
