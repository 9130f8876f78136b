"""Reports and scores made up in code, each number its own, so that one in the wrong place is found; and a reader of pages."""

import json
import math
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from typing import Any

LINEARS = {
    "self_attn.q_proj": "attn_in",
    "self_attn.k_proj": "attn_in",
    "self_attn.v_proj": "attn_in",
    "self_attn.o_proj": "vo",
    "mlp.gate_proj": "mlp_in",
    "mlp.up_proj": "mlp_in",
    "mlp.down_proj": "mlp_mid",
}
SITES = tuple(dict.fromkeys(LINEARS.values()))


def numbers(start: float) -> Iterator[float]:
    """Numbers that occur once each."""
    return (start + 0.013 * step + 1e-5 * step * step for step in range(1, 10_000))


def histogram(fresh: Iterator[float]) -> dict[str, Any]:
    width = next(fresh)
    return {"low": -width, "high": width, "counts": [3, 50, 1000, 60, 0], "crest": next(fresh)}


def picture(fresh: Iterator[float]) -> dict[str, Any]:
    return {"rows": 3, "columns": 3, "cells": [[-next(fresh) for _ in range(3)] for _ in range(3)]}


def block(fresh: Iterator[float]) -> dict[str, Any]:
    """One block as a run of `paper` reports it."""
    epochs = [{"epoch": 1 + n, "band": n, **picture(fresh)} for n in range(3)]
    return {
        "loss_first": next(fresh),
        "loss_last": next(fresh),
        "steps": 8,
        "curve": [next(fresh) for _ in range(3)],
        "sqnr": next(fresh),
        "condition": next(fresh),
        "conditions": {site: next(fresh) for site in SITES} | {"vo online": next(fresh)},
        "linears": {name: {"sqnr": next(fresh), "clip": 0.95} for name in LINEARS},
        "inputs": {s: {"sqnr": next(fresh), "before": histogram(fresh), "after": histogram(fresh)} for s in SITES},
        "weights": {name: {"before": histogram(fresh), "after": histogram(fresh)} for name in LINEARS},
        "pictures": {
            "attn_in": {"rows": 1, "columns": 3, "cells": [[next(fresh), None, next(fresh)]]},
            "vo": picture(fresh) | {"epochs": epochs},
            **{f"mlp_in online {part}": picture(fresh) for part in ("left", "right")},
        },
        "events": [],
        "seconds": next(fresh),
        "peak_bytes": 598_802_432,
        "device": "cpu",
    }


def made_report(**more: Any) -> dict[str, Any]:
    """report.json of a run of two blocks."""
    fresh = numbers(2.0)
    kinds = {"attn_in": "diagonal", "vo": "kronecker", "mlp_in": "diagonal", "mlp_mid": "diagonal"}
    sites = [
        {
            "site": site,
            "transform": kind,
            "placement": "online" if kind == "kronecker" else "folded",
            "reason": f"why {site}",
            "flops_per_token": 2560 if kind == "kronecker" else 0,
        }
        for site, kind in kinds.items()
    ]
    dims = {
        "layers": 2,
        "hidden": 64,
        "mlp": 128,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "vocab": 320,
        "tied": False,
    }
    return {
        "schema": 1,
        "model": "/home/someone/models/tiny-llama",
        "scheme": "w4a4",
        "tier": "online",
        "preset": "paper",
        "plan": {
            "family": "llama",
            "dims": dims | {"experts": 0, "kinds": []},
            "format": "auto",
            "sites": sites,
            "source_bytes": 304_000,
            "untied_bytes": 0,
            "notes": ["transforms stay online"],
        },
        "calibration": {"source": "text.txt", "samples": 4, "seq_len": 32, "bos": "none", "sha256": "abc123"},
        "bits_per_weight": 4.277777,
        "weight_bytes": 152_088,
        "bytes": 165_227,
        "blocks": [block(fresh) for _ in range(2)],
        "finish": {
            "divergence_first": next(fresh),
            "divergence_last": next(fresh),
            "steps": 6,
            "stopped": "done",
            "curve": [next(fresh) for _ in range(3)],
            "trace": [next(fresh) for _ in range(6)],
            "divergence": [next(fresh) for _ in range(4)],
        },
        "events": ["block 1: a loss that was not finite"],
        "env": {"affinequant": "0.1.0", "torch": "2.13.0", "device": "cpu", "threads": 2},
        "calibration_perplexity": {"full": 572.0863, "quantized": 581.1234, "tokens": 124},
        "verified": {"passed": True, "wrong": [], "tensors": 93},
        "seconds": 5.470463,
        "peak_bytes": 651_313_152,
        "phases": [
            {"name": "load", "seconds": 1.1234, "peak_bytes": 401_313_152},
            {"name": "blocks", "seconds": 4.347063, "peak_bytes": 651_313_152},
        ],
    } | more


def metric(value: float, baseline: float | None, better: str = "lower", **more: Any) -> dict[str, Any]:
    delta = None
    if baseline is not None:
        delta = {"value": value - baseline, "stderr": 0.231, "paired": True, "dof": 5, "interval": [1.101, 2.202]}
    return {
        "value": value,
        "stderr": 1.2355,
        "dof": 5,
        "n": 6,
        "better": better,
        "baseline": baseline,
        "baseline_stderr": None if baseline is None else 1.0755,
        "delta": delta,
        "interval": [value - 3.003, value + 3.007],
        "baseline_interval": None if baseline is None else [baseline - 2.005, baseline + 2.009],
        "about": {},
    } | more


def scores(checkpoint: str = "out", **more: Any) -> dict[str, Any]:
    """What `affinequant eval --json` prints."""
    about = {"text": "demo", "windows": 6, "seq_len": 2048, "bos": "none"}
    return {
        "schema": 1,
        "checkpoint": checkpoint,
        "baseline": {"checkpoint": "demo", "seconds": 54.4},
        "metrics": {
            "perplexity@demo,seq2048": metric(21.75367, 18.36488, about=about),
            "kl@demo,seq2048": metric(0.20317, None),
            "agreement@demo,seq2048": metric(0.81234, None, "higher"),
            "piqa,acc": metric(0.6012, 0.6634, "higher"),
            "boolq,acc": metric(0.5523, 0.5745, "higher"),
            "piqa,flips": metric(0.0712, None),
        },
        "samples": [{"prompt": "Once", "baseline": "upon a time", "text": "upon a mat", "suspicious": ""}],
        "gates": [{"metric": "kl@demo,seq2048", "kind": "kl", "value": 0.20317, "limit": 0.3001, "passed": True}],
        "published": [{"method": "FlatQuant", "value": 5.79, "ours": 21.75367, "verdict": "not comparable"}],
        "env": {"affinequant": "0.1.0", "cpus": 2},
        "notes": [],
        "seconds": 51.4,
    } | more


def comparison(**more: Any) -> dict[str, Any]:
    """compare.json."""
    preset = {
        "preset": "fast",
        "tier": "online",
        "perplexity": 23.5123,
        "stderr": 1.3111,
        "dof": 5,
        "ratio": 1.2803,
        "kl": 0.25123,
        "minutes": 2.7654,
        "peak_bytes": 1_651_313_152,
        "percent_of_block": 6.2231,
        "bytes": 110_165_227,
        "error": None,
    }
    other = preset | {"preset": "default", "perplexity": 21.7537, "ratio": 1.1845, "stderr": 1.2355, "kl": 0.20317}
    return {
        "schema": 1,
        "model": "/home/someone/demo",
        "scheme": "w4a4",
        "full_precision": {"perplexity": 18.3649, "stderr": 1.0755, "dof": 5, "n": 6},
        "presets": [preset, other],
        "text": {"text": "demo", "windows": 6, "seq_len": 2048, "bos": "none"},
        "env": {"affinequant": "0.1.0"},
    } | more


def with_seeds() -> dict[str, Any]:
    """compare.json of presets that were made with two seeds each."""
    found = comparison()
    ratios = {"fast": (1.2755, 1.2851), "default": (1.1811, 1.1879)}
    for one in found["presets"]:
        one["seeds"] = [{"seed": n, "perplexity": 18.3 * v, "ratio": v} for n, v in enumerate(ratios[one["preset"]])]
    spreads = {
        "fast": {"mean": 1.2803, "deviation": 0.0067, "n": 2},
        "default": {"mean": 1.1845, "deviation": 0.0048, "n": 2},
    }
    verdicts = {"default": {"difference": -0.0958, "floor": 0.0412, "dof": 1.7, "said": "better"}}
    ratio = {
        "reference": "fast",
        "deviation": 0.0059,
        "dof": 2,
        "spreads": spreads,
        "verdicts": verdicts,
        "level": 0.95,
    }
    return found | {"noise": {"seeds": [0, 1], "ratio": ratio}}


class Seen(HTMLParser):
    """What a program finds in a page: every number with its text, figures as data, links, roles, tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.numbers: list[tuple[float, str]] = []
        self.figures: dict[str, dict[str, Any]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._value: float | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "data":
            self._value = float(found["value"] or "nan")
        if tag == "figure":
            self.figures[found["data-key"] or ""] = json.loads(found["data-figure"] or "{}")

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._value is not None:
            self.numbers.append((self._value, data))
            self._value = None


def leaves(value: Any) -> Iterator[float]:
    """Every number of a JSON value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from leaves(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


UNITS = {"MB": 2**20, "GB": 2**30, "s": 1, "min": 60, "%": 0.01}


def reads_as(text: str, value: float) -> bool:
    """Whether a text says a number, as far as its digits go."""
    words = text.replace(",", "").split(" ")
    if len(words) == 4:  # 6 h 20 min
        return abs(3600 * float(words[0]) + 60 * float(words[2]) - value) <= 31
    unit = UNITS[words[1]] if len(words) > 1 else 1
    digits, _, power = words[0].lstrip("+-").partition("e")
    step = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    value = max(value, 1.0) if words[1:] == ["s"] and step == 1 else value  # no time is said as nothing
    said = float(words[0]) * unit
    return abs(value - said) <= 0.5000001 * step * unit or math.isclose(value, said)
