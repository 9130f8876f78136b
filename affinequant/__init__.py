"""4-bit LLMs that still work: learned affine transforms, int4 activations, ready for vLLM."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from affinequant.errors import AffineQuantError as AffineQuantError
from affinequant.recipe import Recipe as Recipe
from affinequant.recipe import Scheme as Scheme
from affinequant.serve.importing import register_with_transformers
from affinequant.version import __version__ as __version__

if TYPE_CHECKING:
    from affinequant.deliver import Result as Result
    from affinequant.export import export as export
    from affinequant.fit import fit as fit
    from affinequant.pipeline import quantize as quantize
    from affinequant.plan import plan as plan
    from affinequant.run.run import Run as Run
    from affinequant.runtime.load import load as load

__all__ = ["AffineQuantError", "Recipe", "Result", "Run", "Scheme", "export", "fit", "load", "plan", "quantize"]

_LAZY = {
    "export": "affinequant.export",
    "fit": "affinequant.fit",
    "Result": "affinequant.deliver",
    "quantize": "affinequant.pipeline",
    "plan": "affinequant.plan",
    "Run": "affinequant.run.run",
    "load": "affinequant.runtime.load",
}


def __getattr__(name: str) -> Any:
    # torch takes over a second to import: it waits until something that needs it is asked for.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """`affinequant.fit` and others are the functions, although submodules of these names exist."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _LAZY:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

register_with_transformers()
