"""Named settings, a TOML file each: data that anyone can read, copy and change. Nothing but recipe options."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from affinequant.errors import unknown_name
from affinequant.recipe.scheme import Scheme
from affinequant.recipe.tables import flat


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """`settings`: recipe options by their flat names, which any flag overrides. `online`: what differs in the online
    tier. `weights`: by tier, what differs further where weights alone are quantised, in groups; `floats`: the same where
    numbers are 4-bit floats, whose blocks have scales of their own. `kv`: which transforms the online tier adds where the
    scheme quantises the KV cache. `shifted`: which transforms stand in the place of its own where biases take a shift up.
    `demo`: what differs on the embedded model, sized for two CPU cores."""

    about: str
    settings: Mapping[str, Any]
    online: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    floats: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kv: Mapping[str, str] = field(default_factory=dict)
    shifted: Mapping[str, str] = field(default_factory=dict)
    demo: Mapping[str, Any] = field(default_factory=dict)

    def fields(self, tier: str, scheme: Scheme, *, demo: bool = False) -> dict[str, Any]:
        """The recipe fields of a tier at these numbers."""
        chosen = dict(self.settings) | ({"data": "demo", **self.demo} if demo else {})
        chosen |= self.online if tier == "online" else {}
        if scheme.weight.kind != "int":
            chosen |= self.floats.get(tier, {})
        elif scheme.activation is None and scheme.weight.granularity == "group":
            chosen |= self.weights.get(tier, {})
        if tier == "online" and scheme.kv is not None:
            chosen["transforms"] = dict(chosen.get("transforms", {})) | dict(self.kv)
        return chosen

    @property
    def names(self) -> set[str]:
        """The recipe fields that it sets, whatever the tier and the numbers."""
        return set().union(self.settings, self.online, self.demo, *self.weights.values(), *self.floats.values())


ORDER = ("rtn", "smoothquant", "omniquant", "paper", "quarot", "spinquant", "flatquant", "fast", "default", "best")
ALIASES = {"affinequant-paper": "paper"}
"""Second names; a recipe always holds the first."""


def _read(name: str) -> Preset:
    read = tomllib.loads((Path(__file__).parent / f"{name}.toml").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {
        part: flat(read[part], where=f"preset {name}") for part in ("settings", "online", "demo") if part in read
    }
    for part in ("weights", "floats"):
        parts[part] = {tier: flat(one, where=f"preset {name}") for tier, one in read.get(part, {}).items()}
    return Preset(**{**read, **parts})


PRESETS: dict[str, Preset] = {name: _read(name) for name in ORDER}
"""What `affinequant list presets` shows, from the plainest to the strongest."""


def find_preset(name: Any) -> Preset:
    """The preset of that name.

    Raises:
        AffineQuantError: unknown name.
    """
    known = ALIASES.get(name, name) if isinstance(name, str) else None
    if known not in PRESETS:
        raise unknown_name("preset", str(name), (*PRESETS, *ALIASES), where="--preset", listing="presets")
    return PRESETS[known]
