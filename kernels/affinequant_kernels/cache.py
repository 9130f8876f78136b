"""Where this machine's own files are kept: tables and timings, and in a folder for this user alone compiled code."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import stat
import tempfile
from pathlib import Path

SHARED = 0o022  # writable by others than the owner


def cache_folder() -> Path:
    """$AFFQ_CACHE, or ~/.cache/affinequant/kernels; for a user without a home a temporary folder of this process."""
    try:
        return Path(os.environ.get("AFFQ_CACHE") or "~/.cache/affinequant/kernels").expanduser()
    except RuntimeError:  # no HOME, and no entry in passwd
        return _temporary()


def private_folder() -> Path:
    """A folder that this user alone can read or write: what is kept in it may be loaded as code.

    Raises PermissionError, with the reason, where the cache is not such a place; OSError where there can be no folder.
    """
    cache = cache_folder()
    if not cache.is_absolute():
        raise PermissionError(
            f"AFFQ_CACHE is not an absolute path ({cache}), and code is not kept in whatever is there"
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = cache.resolve() / "private"
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        raise PermissionError(f"{cache} or `private` in it is not a folder") from None
    except OSError:  # a home that is not there or cannot be written
        folder = _temporary() / "private"
        folder.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)
    for above in folder.parents:
        _check_owner(above)
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(f"everybody can write to {above}")
    return folder


def check_private(path: Path) -> None:
    """Raise PermissionError unless a file or folder is this user's and nobody else's; a link is neither."""
    mode = path.lstat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise PermissionError(f"{path} is neither a file nor a folder")
    if mode & (SHARED if stat.S_ISREG(mode) else 0o077):
        raise PermissionError(f"{path} is not private: its mode is {stat.S_IMODE(mode):o}; remove it")
    _check_owner(path, others=())


def _check_owner(path: Path, others: tuple[int, ...] = (0,)) -> None:
    owner = path.lstat().st_uid
    if hasattr(os, "geteuid") and owner not in (os.geteuid(), *others):
        raise PermissionError(f"{path} belongs to another user ({owner})")


def write_whole(path: Path, text: str) -> None:
    """Write a file at once: several processes may, and a reader sees all of one or another's."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}", delete=False) as new:
        try:
            new.write(text)
            new.close()
            os.replace(new.name, path)
        except BaseException:
            os.unlink(new.name)
            raise


@functools.cache
def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="affinequant-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
