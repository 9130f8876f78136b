"""The house: which room may ask which, how large a file may be, what a file may be called."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "affinequant_kernels": ROOT / "kernels/affinequant_kernels",
    "affinequant": ROOT / "affinequant",
    "affinequant_evals": ROOT / "evals/affinequant_evals",
    "affinequant_research": ROOT / "research/affinequant_research",
}
ORDER = list(PACKAGES)
# Inside affinequant, from used to user: a room asks those on earlier lines alone, inside functions too.
LAYERS = [
    {"errors", "progress", "version"},
    {"recipe", "run"},
    {"data", "numbers"},
    {"models"},
    {"transforms"},
    {"formats", "costs"},
    {"stages", "advice"},
    {"plan", "rounding", "runtime"},
    {"learning", "serve"},
    {"verify", "fit"},
    {"deliver"},
    {"pipeline", "export"},
    {"report"},
    {"cli"},
]
KERNEL_LAYERS = [
    {"checks", "cache"},
    {"layout"},
    {"weight"},
    {"reference"},
    {"cpu", "cuda"},
    {"ops"},
    {"bench"},
    {"tune", "aot"},
]
LEVELS = {
    package: {name: level for level, names in enumerate(layers) for name in names}
    for package, layers in (("affinequant", LAYERS), ("affinequant_kernels", KERNEL_LAYERS))
}
FILES = [path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))]
MODULES = {
    ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in PACKAGES.values()
    for path in folder.rglob("*.py")
}
BANNED = {"utils", "helpers", "common", "misc", "manager"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, at module level) of every import of a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module and node.level == 0, f"{path} imports by a relative name"
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(part if part in MODULES else node.module, id(node) in top) for part in parts]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_depend_one_way(path: Path) -> None:
    package = next(name for name, folder in PACKAGES.items() if path.is_relative_to(folder))
    for name, top in imports(path):
        other = name.split(".")[0]
        if other not in ORDER or ORDER.index(other) <= ORDER.index(package):
            continue
        beyond = other in ("affinequant_evals", "affinequant_research")
        lazy_cli = beyond and path.is_relative_to(ROOT / "affinequant/cli") and not top
        typing_only = beyond and path.is_relative_to(ROOT / "affinequant/cli")
        assert lazy_cli or typing_only, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_ask_downwards(path: Path) -> None:
    package = next(name for name, folder in PACKAGES.items() if path.is_relative_to(folder))
    room = path.relative_to(PACKAGES[package]).parts[0].removesuffix(".py")
    if package not in LEVELS or room in ("__init__", "__main__"):  # the public face and the command: above all rooms
        return
    level = LEVELS[package]
    assert room in level, f"{room} has no place in LAYERS"
    for name, _ in imports(path):
        parts = name.split(".")
        if (package, parts[0]) == ("affinequant", "affinequant_kernels"):
            assert room in ("runtime", "serve"), f"{room} may not use the kernels"
        if parts[0] != package or len(parts) == 1 or parts[1] == room:
            continue
        assert parts[1] in level, f"{parts[1]} has no place in LAYERS"
        assert level[parts[1]] < level[room], f"{room} asks {parts[1]}"


def test_imports_make_no_circle() -> None:
    asks = {name: {part for part, _ in imports(path)} for name, path in MODULES.items()}
    for module, names in asks.items():  # what is imported may be a module's name in a package, or a name in a module
        asks[module] = {name for name in names if name in MODULES} - {module}
    while asks:
        free = {module for module, names in asks.items() if not names & asks.keys()}
        assert free, f"these import one another: {sorted(asks)}"
        asks = {module: names for module, names in asks.items() if module not in free}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_small_and_well_named(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    assert path.stem not in BANNED and not path.stem.startswith("base_")


def test_the_top_level_is_the_house() -> None:
    shown = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and path.name != "__pycache__"}
    allowed = {"pyproject.toml", "README.md", "LICENSE", "affinequant", "kernels", "evals", "research", "tests"}
    assert shown - {"build", "dist"} <= allowed
    for name in ("kernels", "evals", "research"):
        assert not (ROOT / name / "__init__.py").exists()
        assert (ROOT / name / "README.md").exists()
