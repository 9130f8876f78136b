"""`affinequant env`: what this machine is, for a bug report."""

import argparse
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from affinequant.cli.arguments import Parser
from affinequant.cli.output import Screen, size

USAGE = "[--json]"
EPILOG = """
Versions, devices and threads, how fast each way to multiply integers on this CPU is and which one is used, and whether
the integer kernels of this machine give what their reference gives. Paste it into a bug report. Exit code 1: the
self-test failed. The environment variable AFFQ_ENGINE makes one way be used whatever the times (unless it is not exact).
"""
PACKAGES = (
    *("affinequant", "torch", "transformers", "accelerate", "datasets", "safetensors", "compressed-tensors"),
    *("triton", "lm_eval", "vllm"),
)
_UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")


def add_arguments(parser: Parser) -> None:
    """None of its own."""


def run(args: argparse.Namespace, screen: Screen) -> int:
    """Print it all; 1 if the self-test failed."""
    values = _machine()
    values |= _torch()
    for name, value in values.items():
        screen.print(f"{name:<22} {value}")
    versions = {name: version(name) for name in PACKAGES}
    for name, found in versions.items():
        screen.print(f"{name:<22} {found or 'not installed'}")
    engines = _engines()
    for name, found in engines.items():
        screen.print(f"{'engine ' + name:<22} {found['chosen']}")
        for candidate, outcome in found["candidates"].items():
            screen.print(f"{'':<22}   {candidate:<15} {outcome['text']}")
    tests = _self_test()
    for name, outcome in tests.items():
        screen.print(f"{'kernel ' + name:<22} {outcome['text']}")
    passed = all(outcome["passed"] for outcome in tests.values())
    screen.result(
        {"schema": 1, "machine": values, "versions": versions}
        | {"engines": engines, "kernels": tests, "passed": passed}
    )
    return 0 if passed else 1


def version(package: str) -> str | None:
    """The installed version, if any."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "affinequant":
            from affinequant.version import __version__

            return __version__
        return None


def _machine() -> dict[str, Any]:
    from affinequant.data.offline import offline_setting
    from affinequant.data.wheels import cache_folder

    facts = _cpu_facts()
    flags = facts.get("flags", "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "cpu": facts.get("model name", platform.processor() or platform.machine()),
        "cores": f"{_cores()} of {os.cpu_count()}",
        "integer units": " ".join(unit for unit in _UNITS if unit in flags) or "none known",
        "memory": size(memory),
        "cache": str(cache_folder()),
        "offline": "yes" if offline_setting() else "no",
    }


def _torch() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "threads": torch.get_num_threads(),
        "gpus": ", ".join(devices) or "none",
        "cuda": torch.version.cuda or "none",
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_facts() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _engines() -> dict[str, dict[str, Any]]:
    from affinequant.runtime.integer_linear import engines_report

    return engines_report()


def _self_test() -> dict[str, dict[str, Any]]:
    from affinequant.runtime.measured import self_test

    return self_test()
