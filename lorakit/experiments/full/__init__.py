"""Write folders that repeat the paper's experiments at their own size, with the user's copy of weights and data.

Each file of this folder has `files()`: the texts of a README, of configs for `lorakit train` and of a script that runs
them. The configs hold the paper's hyperparameters (Hu et al. 2021, Tables 9 to 12), each with where it was checked.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from ...errors import ConfigError, did_you_mean, listing
from ...io.atomic import write_text

NAMES = ("roberta-glue", "gpt2-e2e", "gpt3-shapes")
README = "README.md"


def files(name: str) -> dict[str, str]:
    """Return the texts of an experiment's files, by name. Raises ConfigError if there is no such experiment."""
    if name not in NAMES:
        near = did_you_mean(name, NAMES)
        raise ConfigError(f"--full: no experiment is named '{name}'{near}\n  known: {listing(NAMES)}")
    return import_module(f".{name.replace('-', '_')}", __name__).files()


def write(name: str, folder: Path) -> Path:
    """Write an experiment's files into `folder`, and return it. Files that are there already are not overwritten.

    Raises ConfigError if there is no such experiment, or a file of another content is there.
    """
    texts = files(name)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder (--out)")
    changed = [
        file for file, text in texts.items() if (folder / file).exists() and (folder / file).read_text("utf8") != text
    ]
    if changed:
        raise ConfigError(
            f"{folder} has {listing(changed)} with another content\n  give another folder (--out), or delete them"
        )
    for file, text in texts.items():
        write_text(folder / file, text)
    return folder
