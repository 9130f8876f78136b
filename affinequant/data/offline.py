"""Whether the user forbids downloads: one reading for all that fetch something, or say why they could not."""

import os
from collections.abc import Sequence

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
"""The settings that forbid downloads; the last is about data sets alone."""
MODELS_OFFLINE = OFFLINE[:2]


def offline_setting(names: Sequence[str] = OFFLINE) -> str:
    """The first of those settings that is switched on, by the words that huggingface_hub takes for that, or ""."""
    return next((name for name in names if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")), "")
