"""Files that are whole at every moment."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO

from snncompress.errors import OptionError, StorageError


def as_path(path: object) -> Path:
    """A path that a user gave; raises OptionError for what is none."""
    if isinstance(path, (str, os.PathLike)) and isinstance(os.fspath(path), str) and os.fspath(path):
        return Path(path)
    raise OptionError(f"A file is named by a path, such as 'small.safetensors', not {path!r}.")


def refuse_special(path: Path) -> None:
    """Raise StorageError for what is there and isn't a file: reading a named pipe would never end."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise StorageError(f"{path} can't be read or written: it is {what}. Give the name of a file.")


def writable(path: object) -> Path:
    """A path that a user gave for a file to be written; raises OptionError, or StorageError where none can be."""
    found = as_path(path)
    refuse_special(found)
    if not found.resolve().parent.is_dir():
        raise StorageError(f"{found} can't be written: there is no folder {found.resolve().parent}. Make it first.")
    return found


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a new file and put it in the place of ``path`` at once.

    Whoever reads ``path``, also after a crash or a power cut, finds the old content or the new, never a part. Raises
    StorageError where that fails; ``path`` is then as it was.
    """
    path = writable(path).resolve()  # through a link, the file that it names
    name = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                os.chmod(name, path.stat().st_mode & 0o777)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except (OSError, RuntimeError, ValueError) as error:  # torch.save turns a full disk into a RuntimeError
        raise StorageError(f"{path} can't be written: {error}. What was there before is still there.") from error
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder can't be opened
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise StorageError(f"{folder}: the new file is there, but may not outlast a power cut: {error}.") from error
