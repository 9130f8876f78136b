"""What a stranger is told to install: dependencies within the ranges that were tested, and commands that work."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import affinequant

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
WANTED = [
    Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
]


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_every_dependency_has_both_ends_and_what_is_here_lies_between(wanted: Requirement) -> None:
    operators = {part.operator for part in wanted.specifier}
    assert operators == {">=", "<"}, f"{wanted}: give the range that was tested"
    try:
        here = version(wanted.name)
    except PackageNotFoundError:
        pytest.skip(f"{wanted.name} is not installed here")
    assert wanted.specifier.contains(here, prereleases=True), (
        f"{wanted.name} {here} runs the tests, but is outside {wanted}"
    )


def test_nobody_is_told_to_install_a_package_that_is_not_published() -> None:
    packages = Path(affinequant.__file__).parents[1]
    files = [ROOT / "README.md", *(ROOT / "tests").glob("*.sh")]
    for name in ("affinequant", "affinequant_kernels", "affinequant_evals"):
        for place in (packages, packages / "kernels", packages / "evals"):
            files += sorted((place / name).rglob("*.py"))
    assert len(files) > 50
    told = re.compile(r"pip install[^\n`&]*['\" ]affinequant(?![-\w])")
    found = [f"{file}: {hit[0]}" for file in files for hit in told.finditer(file.read_text()) if "clone" not in hit[0]]
    assert not found, "\n".join(found)
