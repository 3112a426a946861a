"""The command line: parse the arguments, call the library, print the result.

`--help` and `--version` do not import torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from typing import Any

INTERRUPTED = 130  # the shells' code for a process that Ctrl-C ended


def main(args: list[str] | None = None) -> None:
    """Run `lorakit ARGS` and exit with `run`'s code."""
    # Let idle OpenMP threads spin only briefly before they sleep. Endless spinning (the default) is many times slower
    # on a busy machine; sleeping at once makes a training step of the embedded model 1.3 times as long on an idle one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _show_own_warnings_as_notes()
    # transformers imports torchao where it is installed. That warns of its kernels for GPUs that are not there, and
    # torch of torchao's enums. bitsandbytes' operations for CPUs warn, and only of this, that a faster kernel cannot be
    # fetched from the hub.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    code = run(sys.argv[1:] if args is None else args)
    if code == INTERRUPTED:
        # Not sys.exit: Python ends itself by SIGINT, so with another code, if Ctrl-C came inside any exec() (as in the
        # making of a dataclass); and threads that are still at work would be waited for.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _show_own_warnings_as_notes() -> None:
    """Print lorakit's warnings without the file and the line of code that Python puts in front."""
    from ..errors import LorakitWarning

    formatted = warnings.formatwarning

    def note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
        own = issubclass(category, LorakitWarning)
        return f"lorakit: note: {message}\n" if own else formatted(message, category, *where, **more)

    warnings.formatwarning = note


def run(args: list[str]) -> int:
    """Run `lorakit ARGS` and return the exit code.

    0: success; 1: the job failed; 2: a usage error (ConfigError); 130: Ctrl-C; 143: training stopped by SIGTERM.
    """
    from ..errors import ConfigError, LorakitError, StoppedError
    from .shared.output import complain

    try:
        from .app import app_for

        app = app_for(args)
    except KeyboardInterrupt:
        return _interrupted()
    except ModuleNotFoundError as error:  # an incomplete installation gets a message instead of a traceback
        name = (error.name or "").partition(".")[0]
        if name in ("", "lorakit"):
            raise
        print(
            f"lorakit: the required library '{name}' is not installed\n  pip install lorakit installs it",
            file=sys.stderr,
        )
        return 1
    try:
        app(args, prog_name="lorakit")  # typer prints usage errors itself, with the nearest option, and exits with 2
    except SystemExit as stop:
        # typer exits so after Ctrl-C. A run that saved and said so exits with 130 itself.
        if stop.code == INTERRUPTED and isinstance(getattr(stop.__context__, "__cause__", None), KeyboardInterrupt):
            return _interrupted()
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except LorakitError as error:
        from ..train.config import TrainConfig
        from .shared.spoken import in_flags

        complain(f"lorakit: {in_flags(str(error), TrainConfig.model_fields)}")
        if isinstance(error, StoppedError):
            from ..train.interrupt import exit_code

            return exit_code(error.signal)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # no space, no permission: the message names the file
        complain(f"lorakit: {error}")
        return 1
    return 0


def _interrupted() -> int:
    """Say that Ctrl-C stopped the command. Returns the exit code."""
    print("lorakit: stopped by Ctrl-C", file=sys.stderr)
    return INTERRUPTED
