"""What `import affinequant` offers, and what it must not cost."""

import inspect
import subprocess
import sys

import affinequant


def test_the_public_names_are_these() -> None:
    assert affinequant.__all__ == [
        "AffineQuantError",
        "Recipe",
        "Result",
        "Run",
        "Scheme",
        "export",
        "fit",
        "load",
        "plan",
        "quantize",
    ]
    assert all(getattr(affinequant, name) is not None for name in affinequant.__all__)


def test_functions_are_functions_although_modules_share_their_names() -> None:
    import affinequant.export
    import affinequant.fit
    import affinequant.plan

    assert inspect.isfunction(affinequant.export)
    assert inspect.isfunction(affinequant.fit)
    assert inspect.isfunction(affinequant.plan)
    assert list(inspect.signature(affinequant.plan).parameters) == ["model", "fields"]


def test_importing_loads_nothing_heavy() -> None:
    heavy = "torch transformers triton vllm lm_eval datasets numpy rich"
    code = f"import sys, affinequant; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(affinequant, "quantise")
