"""The network's blocks as stages take them: what is fixed for each, its tensors from the source, and what is reported."""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from affinequant.data.tokens import Tokens
from affinequant.learning.training import FitReport
from affinequant.models import resolve_sites
from affinequant.models.decoder import Decoder
from affinequant.plan import Plan
from affinequant.rounding.job import BlockJob
from affinequant.transforms.fold import Tensors

SCORED_TOKENS = 4096
"""Calibration tokens, in whole samples, of which the report says what both streams make of them."""


def scored_samples(tokens: Tokens) -> int:
    """How many of the calibration samples the report gives the perplexity of."""
    return max(1, min(len(tokens.ids), SCORED_TOKENS // tokens.ids.shape[1]))


def store_dtype(made: Plan) -> torch.dtype:
    """What scales, norms and embeddings are kept in: float16 where the source is, else bfloat16."""
    entry = made.source.entries[f"{made.family.embedding}.weight"]
    return torch.float16 if entry.dtype == "F16" else torch.bfloat16


def block_job(
    made: Plan, decoder: Decoder, index: int, kwargs: Sequence[Mapping[str, Any]], scratch: Path | None = None
) -> BlockJob:
    """What is fixed while block `index` of this plan is worked on. `kwargs`: what each block is called with."""
    family = made.family.at(made.dims, index)
    first = {site: f"{family.blocks}.{index}.{members[0]}" for site, members in family.input_groups()}
    numbers = {site: made.schemes[name] for site, name in first.items()}
    return BlockJob(
        decoder=decoder,
        index=index,
        sites={site.name: site for site in resolve_sites(family, made.dims, made.recipe.tp)},
        recipe=made.recipe,
        scheme=made.recipe.parsed_scheme,
        others={site: one for site, one in numbers.items() if one is not None and one != made.recipe.parsed_scheme},
        kwargs=kwargs[index],
        store=store_dtype(made),
        scratch=scratch,
    )


def block_reader(made: Plan, decoder: Decoder) -> Callable[[int], Tensors]:
    """Index of a block -> its tensors as the source has them, named within it, on the device. What the model's own code
    has no place for is left out: the writer copies it."""
    unknown = set(decoder.unknown(made.source.entries))

    def read(index: int) -> Tensors:
        prefix = f"{made.family.blocks}.{index}."
        found = made.source.read(name for name in made.source.names_under(prefix[:-1]) if name not in unknown)
        return {name[len(prefix) :]: tensor.to(decoder.device) for name, tensor in found.items()}

    return read


def read_outer(made: Plan, decoder: Decoder) -> Tensors:
    """The source's tensors outside the blocks, without those that the model's own code has no place for."""
    unknown = set(decoder.unknown(made.source.entries))
    names = (name for name in made.source.entries if not name.startswith(made.family.blocks + "."))
    return made.source.read(name for name in names if name not in unknown)


def whole_report(
    fitted: FitReport, trace: Sequence[float | None], began: float, device: torch.device
) -> dict[str, Any]:
    """What is reported of a training of the whole network, judged by the divergence on held-out text: at the start and
    after each epoch. `curve` is the mean loss of each epoch, `trace` that of shorter parts of equal length."""
    return {
        "divergence_first": fitted.series["held-out"][0],
        "divergence_last": fitted.best,
        "divergence": fitted.series["held-out"],
        "curve": fitted.series["loss"],
        "trace": trace,
        "steps": fitted.steps,
        "non_finite": fitted.non_finite,
        "stopped": fitted.stopped,
        "events": fit_events(fitted),
        **costs(began, device),
    }


class Laps:
    """Consecutive parts of some work: how long each took, and the peak memory up to its end."""

    def __init__(self, device: torch.device, began: float) -> None:
        """Args:
        began: when, by `time.perf_counter`.
        """
        self.device, self.last = device, began
        self.phases: list[dict[str, Any]] = []

    def __call__(self, name: str) -> None:
        """All since the part before has been `name`."""
        now = time.perf_counter()
        self.phases.append({"name": name, "seconds": now - self.last, "peak_bytes": peak_bytes(self.device)})
        self.last = now


def costs(began: float, device: torch.device) -> dict[str, Any]:
    """What a stage has cost since `began`, and where."""
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak_bytes(device), "device": device.type}


def peak_bytes(device: torch.device) -> int:
    """Peak memory: of the GPU where blocks are there, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fit_events(fitted: FitReport) -> list[str]:
    """What went wrong in a training, in words."""
    if not fitted.non_finite:
        return []
    outcome = "gave up, last finite state kept" if fitted.stopped == "non-finite" else "went on at a lower rate"
    return [f"{fitted.non_finite} non-finite losses: {outcome}"]
