"""Which families vLLM runs with our plugin, as far as it has been tried: what `affinequant list models` says, and the tests
try."""

from affinequant.formats import mixed
from affinequant.models import Family

PROVEN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt")
"""Those of which a test holds what vLLM gives, on its build for CPUs, against `affinequant.load`."""


def in_vllm(family: Family) -> tuple[str, str]:
    """`proven`, `unproven` or `refused`, and what that means in words."""
    if mixed(family):
        return "refused", "the plugin runs no layers of experts; stock vLLM has kernels for their exports"
    if family.name in PROVEN:
        return "proven", "on CPU the plugin gives what `affinequant.load` does"
    return "unproven", "nothing is known to stand in the way, but no test has run it there"
