"""What a page says of where a result comes from, and how to run it."""

import shlex
from pathlib import Path

from affinequant.errors import AffineQuantError
from affinequant.report.page import Code, Section, Table, Text, section
from affinequant.report.reading import Made, Object
from affinequant.report.words import Words, joined, number, numeric

_NAMED = ("scheme", "tier", "preset", "format", "activations", "rounded")
MACHINE = ("device", "threads", "cpus", "platform", "dtype")
"""Of an environment: what is no version."""


def run_section(made: Made) -> tuple[Section, ...]:
    """How to run it, as the model card says it. An export runs elsewhere, and its own command has said where."""
    if "exported_from" in made.report:
        return ()
    folder = made.folder.name or str(made.folder)
    spoken = shlex.quote(folder if folder.startswith(("/", ".")) else f"./{folder}")
    lines = [
        "pip install .                    # in a clone of affinequant",
        f"vllm serve {spoken}",
        f'python -c "import affinequant; print(affinequant.load({folder!r}))"',
        f"affinequant eval {spoken}",
    ]
    said = None
    if made.config and made.report.get("scheme"):
        from affinequant.formats.card import engines
        from affinequant.recipe.scheme import Scheme

        try:
            said = Text(words=engines(Scheme.parse(str(made.report["scheme"])), made.config).replace("`", ""))
        except (AffineQuantError, KeyError, TypeError):  # a scheme or a config of another version
            said = None
    return section("Run it", Code(text="\n".join(lines)), said)


def origin_section(made: Made) -> tuple[Section, ...]:
    """Data, versions, verification, events, the recipe."""
    report = made.report
    events = [str(event) for event in report.get("events") or ()]
    notes = [str(note) for note in (report.get("plan") or {}).get("notes") or ()]
    recipe = Code(title="recipe.toml, resolved: quantize --config repeats the run", text=made.recipe, brief=False)
    return section(
        "Where it comes from",
        *(Text(words=event, warns=True) for event in events),
        *(Text(words=f"{note[0].upper()}{note[1:]}.") for note in notes if note),
        facts(report),
        recipe if made.recipe else None,
    )


def facts(report: Object) -> Table | None:
    """What a report says of its data, its checks and its machine, a row each."""
    data, env, checked = (report.get(name) or {} for name in ("calibration", "env", "verified"))
    rows: list[tuple[Words, ...]] = [
        (name, str(report[name])) for name in _NAMED if isinstance(report.get(name), str) and report[name]
    ]
    if exported := report.get("exported_from"):
        rows.append(("exported from", Path(str(exported)).name))
    if numeric(data.get("samples")) and numeric(data.get("seq_len")):
        size: Words = (number(data["samples"]), " x ", number(data["seq_len"]), " tokens")
        rows.append(
            ("calibration text", joined((f"{data.get('source', '?')}, ", size, f", BOS: {data.get('bos', '?')}"), ""))
        )
    if data.get("sha256"):
        rows.append(("its SHA-256", str(data["sha256"])))
    if checked:
        said = "passed" if checked.get("passed", True) else f"FAILED: {'; '.join(map(str, checked.get('wrong') or ()))}"
        tensors: Words = (
            (", ", number(checked["tensors"]), " tensors bit for bit") if numeric(checked.get("tensors")) else ""
        )
        rows.append(("read back and compared", joined((said, tensors), "")))
    if env:
        rows.append(("versions", ", ".join(f"{name} {value}" for name, value in env.items() if name not in MACHINE)))
        rows.append(("machine", ", ".join(f"{name}: {env[name]}" for name in MACHINE if name in env)))
    return Table(columns=("", ""), rows=tuple(rows)) if rows else None
