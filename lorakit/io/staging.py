"""Write a file, or a folder of files, beside its destination and rename it into place: all of it is there, or none.

    .OUT.writing/lock      held while OUT is written; see `lock`
                 new/OUT   what is being written, and what belongs beside OUT
                 old/OUT   the OUT that is replaced, until the new one is in place

A killed process leaves `.OUT.writing` behind, unlocked. The next one that writes OUT clears it, and puts back an OUT
that was moved aside. One that is still at work holds the lock, so that its folder is never taken for a leftover.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import LorakitError, WriteError
from .atomic import refused_write, sync_folder
from .lock import locked

FIX = "give another OUT"


def resolved(path: str | Path) -> Path:
    """Return an absolute path without links. Raises WriteError for links that lead in a circle."""
    path = Path(path).expanduser()
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a RuntimeError up to Python 3.12
        raise WriteError(f"{path} cannot be followed: its links lead in a circle\n  give another path") from error


@contextlib.contextmanager
def staged(out: str | Path, stale: Collection[str] = (), fresh: bool = False) -> Iterator[Path]:
    """Yield a path of OUT's name to write at: a file or a folder. It becomes OUT when the block ends without an error.

    Files of an OUT folder that are not written again stay, unless `fresh`. What else the block leaves in the path's
    folder is moved beside OUT with it. `stale`: names of files, in an OUT folder or beside an OUT file, that are
    deleted where the block does not write them. Raises WriteError if another process is writing OUT, or where it cannot
    be written; OUT is as it was after any error.
    """
    out = resolved(out)
    if out.exists() and not (out.is_file() or out.is_dir()):
        raise WriteError(f"{out} is not a regular file (a device or a pipe) and is not replaced\n  give another name")
    within = _is_fixed(out)
    home = out if within else out.parent
    work = home / f".{out.name}.writing"
    new, old = work / "new", work / "old"
    try:
        with _made(home), _held(work, out):
            _clear(work, home)
            new.mkdir()
            old.mkdir()
            try:
                yield new / out.name
                _sync(new)
                kept = [] if fresh or not out.is_dir() else [p for p in out.iterdir() if p.name not in stale]
                if within:
                    _fill(new / out.name, out, [p.name for p in kept])
                else:
                    _keep(kept, new / out.name)
                    sides = [] if out.is_dir() else [name for name in stale if name != out.name]
                    _move(new, home, [*sides, out.name], old)
            finally:
                _clear(work, home)
    except LorakitError as error:  # the message is to name OUT, not a path inside the temporary folder
        shown = str(error).replace(f"{new}{os.sep}", f"{out.parent}{os.sep}")
        raise (type(error)(shown) if shown != str(error) else error) from error.__cause__
    except OSError as error:
        named = out if error.filename is None else Path(os.fsdecode(error.filename))
        if not (named.is_relative_to(work) or out.is_relative_to(named)):
            raise  # about something that was read
        raise refused_write(out, error) or error from error


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it, and delete them again after an error."""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # not empty, or never made
                path.rmdir()
        raise


@contextlib.contextmanager
def _held(work: Path, out: Path) -> Iterator[None]:
    """Make the folder `work` and hold its lock; delete it in the end."""
    with contextlib.ExitStack() as stack:
        while True:
            work.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(work / "lock", str(out), FIX))
                break
            except FileNotFoundError:  # the process that was at work here deleted the folder just now
                continue
        try:
            yield
        finally:
            stack.close()
            with contextlib.suppress(OSError):  # another process may have begun to use it
                work.rmdir()


def _clear(work: Path, home: Path) -> None:
    """Put back what was moved aside and not replaced, and delete the rest."""
    if (work / "old").is_dir():
        for entry in (work / "old").iterdir():
            if not os.path.lexists(home / entry.name):
                os.rename(entry, home / entry.name)
    for folder in (work / "new", work / "old"):
        shutil.rmtree(folder, ignore_errors=True)


def _is_fixed(out: Path) -> bool:
    """Whether OUT is a folder that cannot be replaced as such: a mount, one we are in, or one in a read-only folder."""
    here = Path.cwd()
    return out.is_dir() and (
        os.path.ismount(out) or out in (here, *here.parents) or not os.access(out.parent, os.W_OK | os.X_OK)
    )


def _keep(paths: Iterable[Path], folder: Path) -> None:
    """Add files and folders that are not in `folder` to it. Hard links, as a copy may be large."""
    if folder.is_dir():
        for path in paths:
            to = folder / path.name
            if path.is_dir() and not path.is_symlink():
                to.mkdir(exist_ok=True)
                _keep(path.iterdir(), to)
            elif not os.path.lexists(to):
                _link(path, to)
        sync_folder(folder)


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to, follow_symlinks=False)
    except OSError:  # a file system without hard links, or another one
        shutil.copy2(path, to, follow_symlinks=False)


def _sync(folder: Path) -> None:
    """fsync all files and folders in `folder`."""
    for where, _, files in os.walk(folder):
        for name in files:
            with open(Path(where) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(where))


def _move(new: Path, home: Path, names: Sequence[str], old: Path) -> None:
    """Move all of `new` to `home`, and delete those of `names` there that are not in it. After an error, all is back.

    The last of `names` is moved last.
    """
    ordered = [*sorted({entry.name for entry in new.iterdir()} - set(names)), *names]
    for name in ordered:
        _check_kind(new / name, home / name)
    done: list[str] = []
    try:
        for name in ordered:
            done.append(name)
            if (home / name).exists():
                _set_aside(home / name, old / name)
            if (new / name).exists():
                os.replace(new / name, home / name)
            elif (home / name).is_file():
                (home / name).unlink()
        sync_folder(home)
    except BaseException:
        for name in done:
            if (old / name).exists():
                if (home / name).is_dir():
                    os.rename(home / name, new / name)
                os.replace(old / name, home / name)
            elif not (new / name).exists() and os.path.lexists(home / name):
                os.rename(home / name, new / name)
        raise
    shutil.rmtree(old, ignore_errors=True)  # before `_clear`, which would put back what was deleted


def _set_aside(path: Path, to: Path) -> None:
    """Keep what `path` is as `to`. A file stays where it is too, so that it can be replaced in one call."""
    if path.is_file():
        try:
            os.link(path, to)
            return
        except OSError:  # a file system without hard links
            pass
    os.rename(path, to)


def _check_kind(entry: Path, to: Path) -> None:
    if to.is_dir() and not entry.is_dir():
        raise WriteError(f"{to} is a folder; expected a file name\n  {FIX}")
    if to.is_file() and entry.is_dir():
        raise WriteError(f"{to} is a file; expected a folder name\n  {FIX}")


def _fill(written: Path, out: Path, kept: Collection[str]) -> None:
    """Replace the files of a folder that stays, one by one. `kept`: its entries to keep."""
    names = {path.name for path in written.iterdir()} | set(kept)
    for path in sorted(written.rglob("*")):
        to = out / path.relative_to(written)
        if path.is_dir():
            to.mkdir(exist_ok=True)
        else:
            os.replace(path, to)
    for path in out.iterdir():
        if path.is_file() and path.name not in names:
            path.unlink()
    sync_folder(out)
