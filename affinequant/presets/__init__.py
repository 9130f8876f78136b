"""Named settings, a TOML file each: data that anyone can read, copy and change. Nothing but recipe fields."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """`settings`: recipe fields, which any flag overrides. `online`: what differs in the online tier. `demo`: what differs
    on the embedded model, sized for two CPU cores. `expect`: published figures with their source and protocol, where
    there are any."""

    about: str
    settings: Mapping[str, Any]
    online: Mapping[str, Any] = field(default_factory=dict)
    demo: Mapping[str, Any] = field(default_factory=dict)
    expect: Mapping[str, Any] = field(default_factory=dict)

    def fields(self, tier: str, *, demo: bool = False) -> dict[str, Any]:
        """The recipe fields of a tier."""
        chosen = dict(self.settings) | dict(self.online if tier == "online" else {})
        return chosen | ({"data": "demo", **self.demo} if demo else {})


ORDER = ("rtn", "smoothquant", "paper", "fast", "default")


def _read(name: str) -> Preset:
    return Preset(**tomllib.loads((Path(__file__).parent / f"{name}.toml").read_text(encoding="utf-8")))


PRESETS: dict[str, Preset] = {name: _read(name) for name in ORDER}
"""What `affinequant list presets` shows, from the plainest to the strongest."""
