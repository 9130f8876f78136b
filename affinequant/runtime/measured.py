"""The integer kernels on this machine: whether they are right, and how fast they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from affinequant_kernels import linear, prepare_weight

from affinequant.errors import AffineQuantError
from affinequant.recipe.recipe import Device


def self_test() -> dict[str, dict[str, Any]]:
    """Whether the integer kernels give on this CPU what their reference gives, bit for bit, on random layers.

    By the name of the case: `passed`, and `text` in words.
    """
    from affinequant_kernels import reference
    from affinequant_kernels.cpu import engines, native

    few, random, results = native.available() or "compiled", torch.Generator().manual_seed(0), {}
    cases = (("w4a4", 4, 4, 1), ("w4a8", 4, 8, 1), ("w4a4 in groups", 4, 4, 3), ("w8a8", 8, 8, 1))
    for name, bits, act_bits, groups in cases:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        codes = torch.randint(low, high, (96, 192), generator=random, dtype=torch.int8)
        scale = torch.rand(96, groups, generator=random) + 0.01
        zero = None if bits == 8 else torch.randint(low, high, (96, groups), generator=random, dtype=torch.int8)
        symmetric, passed, worst = zero is None, True, 0.0
        for tokens, act_group in ((3, 0), (33, 0), (3, 64), (33, 64)):  # few and many go different ways
            weight = prepare_weight(codes, scale, zero, bits=bits, act_group=act_group)
            x = torch.randn(tokens, 192, generator=random)
            fast = linear(x, weight, act_bits=act_bits, act_symmetric=symmetric, clip=0.9)
            slow = reference.linear_dyn(x, weight, act_bits=act_bits, act_symmetric=symmetric, clip=0.9)
            passed &= torch.equal(fast, slow)
            worst = max(worst, float((fast - slow).abs().max()))
        text = "equals its reference" if passed else f"DIFFERS by {worst:.3g}"
        results[name] = {"passed": passed, "text": f"{text} ({engines.summary(bits)}; few tokens: {few})"}
    return results


def benchmark(
    *,
    device: Device,
    shapes: str | None,
    rows: str | None,
    rounds: int,
    minutes: float,
    out: Path | None,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], str]:
    """Time the integer kernels next to torch's linears on this machine: the figures, and the same as a table.

    Raises:
        AffineQuantError: a size, number, device or folder that cannot be.
    """
    from affinequant_kernels.bench import benchmark as timing
    from affinequant_kernels.bench import report

    try:
        settings = timing.Settings.read(device, shapes, rows, rounds, minutes)
        timing.make_folder(out)
    except ValueError as problem:
        option, _, what = str(problem).partition(": ")
        raise AffineQuantError(what, f"--{option}", "`affinequant bench --help` shows what can be given") from None
    result = timing.run(settings, say)
    if out is not None:
        say(timing.write(result, out))
    return result, report.table(result)
