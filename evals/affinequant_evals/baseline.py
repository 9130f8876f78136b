"""The model that a checkpoint was made from: found by the name in its report, fetched where it may be, never another."""

import json
from pathlib import Path

from affinequant.data.demo import demo_model
from affinequant.data.offline import offline_setting
from affinequant.data.wheels import Say
from affinequant.errors import AffineQuantError
from affinequant.models.multimodal import text_config
from affinequant.models.source import is_local, locate, open_source

NO_BASELINE = "none"


def locate_said(model: str, say: Say) -> Path:
    """As `locate`, but a demo that has to be fetched first is said, and a folder that holds no model is refused now and
    not after another model has been scored."""
    folder = demo_model(say) if model == "demo" else locate(model)
    open_source(folder)
    return folder


def find_baseline(folder: Path, baseline: str | Path | None, say: Say) -> tuple[tuple[str, Path] | None, str]:
    """Name and folder of the baseline, or None and why there is none. One that was named must exist.

    Whoever wrote the folder chose the name in its report: what would be fetched for it is said first, and with offline
    settings nothing is fetched.
    """
    if baseline is not None:
        if str(baseline) == NO_BASELINE:
            return None, "no baseline: --baseline none"
        return (str(baseline), locate_said(str(baseline), say)), ""
    report = folder / "report.json"
    try:
        model = json.loads(report.read_text()).get("model")
    except (OSError, ValueError, AttributeError):
        model = None
    if not isinstance(model, str):
        return None, f"no baseline: {report} names no model; give --baseline MODEL to compare"
    try:
        if not is_local(model) and not _in_cache(model):
            _announce(model, report, say)
        place = locate_said(model, say)
        _check_same_shape(folder, place, model)
        return (model, place), ""
    except AffineQuantError as problem:
        return None, f"no baseline: {problem.what}; give --baseline MODEL to compare"


def _in_cache(model: str) -> bool:
    """Whether a model of the hub needs no fetching: all that its index, or the lack of one, asks for is here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        open_source(Path(snapshot_download(model, local_files_only=True)))
    except (AffineQuantError, HFValidationError, LocalEntryNotFoundError):
        return False
    return True


def _announce(model: str, report: Path, say: Say) -> None:
    """Say what will be fetched, and why.

    Raises:
        AffineQuantError: it is no name of the hub's, or nothing may be fetched.
    """
    parts = model.split("/")
    if len(parts) != 2 or not all(parts) or model.startswith((".", "~", "/")):
        raise AffineQuantError(f"{report} names {model}, which is not here", str(report), "give --baseline MODEL")
    if setting := offline_setting():
        raise AffineQuantError(
            f"{report} names {model}, which is neither a folder here nor in the cache, and {setting} is set",
            str(report),
            "give --baseline MODEL",
        )
    say(
        f"the baseline {model} is fetched from the hub{_hub_size(model)}, because {report} names it as the model that this "
        "checkpoint was made from (--baseline MODEL compares with another, --baseline none with none)"
    )


def _hub_size(model: str) -> str:
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(model, files_metadata=True, timeout=5).siblings or []
    except Exception:  # whatever it is, fetching says it
        return ""
    size = sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))
    return f" ({size / 1e9:.1f} GB of weights)" if size else ""


def _check_same_shape(folder: Path, other: Path, name: str) -> None:
    """A relative path names another model in another place.

    Raises:
        AffineQuantError: the two cannot be one model before and after.
    """
    mine, theirs = (text_config(open_source(place, weights=False).config) for place in (folder, other))
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    differ = [f"{key} {theirs.get(key)} for {mine.get(key)}" for key in keys if mine.get(key) != theirs.get(key)]
    if differ:
        raise AffineQuantError(
            f"{name} here is not the model that this checkpoint was made from ({', '.join(differ)})",
            str(other),
            "give --baseline MODEL",
        )
