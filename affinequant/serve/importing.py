"""Registration with transformers, put off until transformers is there.

transformers looks for quantisers nowhere but in two dicts of its own, so something must write our names into them.
Importing it for that would cost every `import affinequant` seconds. So, where it is imported already, the names are
written at once; else a finder waits in front of `sys.meta_path` for the one module that holds the dicts, leaves finding
it to Python, and writes the names when that module has run. It looks at no other module and replaces no function.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

WATCHED = "transformers.quantizers.auto"


class Finder(importlib.abc.MetaPathFinder):
    """Finds `WATCHED` where Python would, and registers our quantiser behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec, or None for any other module."""
        if fullname != WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register
        return spec


def register_with_transformers() -> None:
    """Make `from_pretrained` load our checkpoints: now, or as soon as transformers is imported. Repeating is harmless."""
    if WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


def _register() -> None:
    from affinequant.serve import transformers_quantizer

    # Where that module is what imports transformers, it is not ready yet, and registers itself when it is.
    if hasattr(transformers_quantizer, "register"):
        transformers_quantizer.register()
