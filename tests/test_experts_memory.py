"""One expert at a time: what lives at once while a block of experts is quantised, counted in bytes of tensors."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import affinequant
from affinequant import costs
from affinequant.learning import block as stage
from affinequant.models import on_demand
from affinequant.numbers.weights import codes_of
from affinequant.rounding import ways

Tiny = Callable[..., Path]
HIDDEN, WIDTH = 64, 128
WEIGHTS = 3 * HIDDEN * WIDTH
"""Of an expert."""


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, whoever holds them, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; look at what it was given and what it gives."""
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, result)):
            if isinstance(one, torch.Tensor) and not one.is_meta:
                self._see(one.untyped_storage())
        self.most = max(self.most, self.now)
        return result

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"{i} black crows in tree {i % 17}" for i in range(1500)))
    return path


def most(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> int:
    """Bytes that lived at once while the block was made."""
    whole, counts = stage.block_stage, list[int]()

    def counted(*given: Any) -> None:
        with Held() as held:
            whole(*given)
        counts.append(held.most)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "block_stage", counted)
    # Thousands of small steps, whose memory is that of one linear: not looked at.
    monkeypatch.setattr(ways, "gptq", lambda weight, hessian, *grid, damping: codes_of(weight, *grid))
    with pytest.raises(KeyboardInterrupt):
        affinequant.quantize(folder, out=out, **fields)
    monkeypatch.setattr(stage, "block_stage", whole)
    return counts[0]


CASES = {
    "rounded": ({"preset": "fast", "tier": "online"}, 3.0),
    "rotated and learned": ({"preset": "flatquant", "epochs": 1, "transforms": {"residual": "hadamard"}}, 10.0),
}
"""Recipes, and the bytes that they hold of each weight of an expert that is not in work: two as the source has it, and its
code; or in float32 what learning rounds it to, and what it is rotated."""


@pytest.mark.parametrize("case", CASES)
def test_of_all_experts_but_one_nothing_waits_but_sixteen_bits_and_the_result(
    case: str, tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many experts take that much more, whatever one of them takes while it is in work; the plan says no less."""
    fields, each = CASES[case]
    fields = fields | {"scheme": "w4a4", "samples": 8, "seq_len": 64, "batch_size": 4, "data": text}
    for module in (on_demand, costs):  # in one, the matrices of all these would be no larger than those of one in work
        monkeypatch.setattr(module, "TOGETHER", 2 * HIDDEN * WIDTH)
    held, planned = list[int](), list[int]()
    for count in (8, 16):
        folder = tiny(family="mixtral", layers=1, hidden=HIDDEN, mlp=WIDTH, num_local_experts=count)
        planned.append(affinequant.plan(folder, **fields).cpu_bytes)
        held.append(most(folder, tmp_path / f"{count}", monkeypatch, **fields))
    grown, more = ((after - before) / (8 * WEIGHTS) for before, after in (held, planned))
    assert grown <= each * 1.1  # with scales, learned ranges and matrices that act at run time
    assert grown <= more <= each + 2
