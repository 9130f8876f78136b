"""A pass that is stopped at each site: what it shows is what a whole pass meets there, and it computes nothing twice."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from affinequant.models.decoder import StopForward
from affinequant.rounding.replay import Replay
from tests.test_objective import make_job, started
from tests.tiny import quantized_input

Tiny = Callable[..., Path]
SHAPES = [{}, {"bias": True}, {"kv_heads": 1}, {"hidden": 72, "heads": 3, "kv_heads": 1}]


def reached(job: Any, tensors: dict[str, Tensor], x: Tensor, site: str, clips: Any, online: Any, heads: Any) -> Tensor:
    """What reaches a site in a pass of its own from the block's beginning."""
    seen, quantized = list[Tensor](), quantized_input(job, clips, online)

    def on_input(name: str, value: Tensor) -> Tensor:
        value = quantized(name, value)
        if name == site:
            seen.append(value)
            raise StopForward
        return value

    for part in (slice(0, 2), slice(2, 4)):
        with torch.no_grad(), pytest.raises(StopForward):
            job.run(tensors, x[part], on_input, heads)
    return torch.cat(seen)


@pytest.mark.parametrize("room", [0, 2**20], ids=["again", "kept"])
@pytest.mark.parametrize(
    ("tier", "count", "kv"), [("merged", 1, ""), ("merged", 2, ""), ("online", 1, ""), ("online", 1, "kv4")]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_meets_what_a_whole_pass_meets(
    tiny: Tiny, shape: dict[str, Any], tier: str, count: int, kv: str, room: int
) -> None:
    """Bit for bit, though the weights behind each site change before the next is reached; also where each of two slices
    of a token is rounded by itself."""
    job, tensors, x = make_job(tiny(**shape), preset="fast", tier=tier, scheme=f"w4a4{kv}")
    heads = job.cached_heads({})
    assert (heads is not None) is bool(kv)
    job = replace(job, sites={name: replace(site, slices=count) for name, site in job.sites.items()})
    _, modules = started(job, tensors, x)
    online = {site: {name: part.float() for name, part in module.online().items()} for site, module in modules.items()}
    assert bool(online) is (tier == "online")
    passing, clips, work = Replay(job, x, online, heads, room=room), dict[str, float](), dict(tensors)
    assert passing.keeps is bool(room)
    for number, (site, members) in enumerate(job.decoder.family.input_groups()):
        passing.reach(site, work, clips)
        expected = reached(job, work, x, site, clips, online, heads)
        assert torch.equal(torch.cat([value for _, value in passing.values()]), expected)
        clips[site] = 1.0 - 0.05 * number
        work |= {f"{name}.weight": work[f"{name}.weight"] * 1.1 for name in members}
    expected = job.run_all(work, x, quantized_input(job, clips, online), heads)
    assert torch.equal(passing.after(work, clips), expected)


@pytest.mark.parametrize("room", [0, 2**20], ids=["again", "kept"])
def test_no_linear_is_computed_twice(tiny: Tiny, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job, tensors, x = make_job(tiny(), preset="fast")
    passing, plain = Replay(job, x, {}, room=room), torch.nn.functional.linear
    rows: list[int] = []
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, bias=None: rows.append(w.shape[0]) or plain(x, w, bias)
    )
    for site, _ in job.decoder.family.input_groups():
        passing.reach(site, tensors, {})
        list(passing.values())
    passing.after(tensors, {})
    computed = sum(count > 0 for count in rows)
    batches = 2
    assert computed == (7 if room else 3 + 4 + 6 + 7) * batches


def test_without_a_site_it_is_the_whole_block(tiny: Tiny) -> None:
    job, tensors, x = make_job(tiny(), preset="rtn")
    assert torch.equal(Replay(job, x, {}).after(tensors, {}), job.run_all(tensors, x))
