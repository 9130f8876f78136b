"""The card of a checkpoint: README.md with the metadata that model hubs read, and what a person needs to run it."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.formats import rounds_inputs
from affinequant.formats.shards import CARD, write_text
from affinequant.models.multimodal import wraps
from affinequant.models.source_files import is_inside
from affinequant.recipe.assigned import counted
from affinequant.recipe.scheme import NumberFormat, Scheme

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
KNOWN_TEXTS = {
    "apache-2.0": r"\s*Apache License\s+Version 2\.0, January 2004",
    "mit": r"\s*(The )?MIT License\b",
}
"""How the texts of licences begin whose identifiers on a hub are beyond doubt; any other is `other`, with a link."""

ENGINES = {
    "online": "`affinequant` must be installed: `affinequant.load`, transformers (after `import affinequant`) and vLLM "
    "(through the plugin that the package brings) compute with {activations} and the transforms that act at run time. "
    "Without the package vLLM and transformers refuse this folder: they would compute another function.",
    "activations": "With `affinequant` installed, `affinequant.load`, transformers (after `import affinequant`) and vLLM "
    "(through the plugin that the package brings) compute with {activations}. Without it, stock transformers and vLLM load "
    "the same folder as a compressed-tensors checkpoint and compute with {weights} and 16-bit activations.",
    "declared": "Any engine that reads compressed-tensors, vLLM and transformers among them, loads it and quantises "
    "activations by itself, within rounding of what `affinequant.load` computes.",
    "floats": "Stock vLLM reads it as a compressed-tensors checkpoint: it multiplies 4-bit floats on GPUs that have such "
    "products (Blackwell), which this run has not tried, and elsewhere leaves activations in 16 bits. `affinequant.load` and "
    "transformers round weights and activations to the same floats and multiply those in 16 or 32 bits, anywhere.",
    "online floats": "`affinequant` must be installed: `affinequant.load` and transformers (after `import affinequant`) round "
    "weights and activations to 4-bit floats, multiply those in 16 or 32 bits, and compute the transforms that act at run "
    "time. No kernel multiplies them as 4-bit floats, and vLLM refuses this folder. Where all that acts at run time is one "
    "matrix per input (`shared-32` and the like), `affinequant export --format transform-config` or `fp_quant` makes of it what "
    "stock vLLM runs on Blackwell.",
    "weights": "Any engine that reads compressed-tensors, vLLM and transformers among them, loads it as it is.",
    "dense": "Any engine loads it: these are plain 16-bit weights with the values of the quantised ones, for inspection; "
    "activations are not quantised, and nothing is smaller.",
}

EXPERTS = {
    "online": "`affinequant` must be installed: `affinequant.load` and transformers (after `import affinequant`) compute with "
    "{activations} and the transforms that act at run time. vLLM refuses this folder, with the plugin that the package brings "
    "too: it does not run layers of experts.",
    "activations": "With `affinequant` installed, `affinequant.load` and transformers (after `import affinequant`) compute with "
    "{activations}. vLLM has no such experts: what `affinequant export --format compressed-tensors --scheme {weight_only}` makes "
    "of this folder it runs on GPUs, with {weights} and 16-bit activations.",
    "declared": "vLLM has kernels for it on GPUs and on CPUs with AMX, and quantises activations by itself, within rounding of "
    "what `affinequant.load` computes. transformers reads it after `import affinequant`.",
    "weights": "vLLM has kernels for it on GPUs. transformers reads it after `import affinequant`, and without the "
    "package where weights are symmetric.",
}
"""The same of mixtures of experts."""

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ base }} with {{ numbers }}, made by affinequant {{ version }}\
 (preset `{{ preset }}`, tier `{{ tier }}`).

| | |
|---|---|
| bits per weight of the blocks' linears | {{ "%.2f" | format(bits) }} |
| files of weights | {{ "{:,.0f}".format(size / 2**20) }} MiB |
| calibration text | {{ data.source }}: {{ data.samples }} x {{ data.seq_len }} tokens |
| perplexity on {{ tokens }} of these tokens, full precision | {{ "%.2f" | format(full) }} |
| the same, quantised | {{ "%.2f" | format(quantized) }} |

The two perplexities are of text that the checkpoint was fitted to; `affinequant eval` measures on text that it was not.

## Run it

    pip install .                                  # in a clone of affinequant
    python -c "import affinequant; print(affinequant.load('{{ name }}'))"
{{ serve }}    affinequant eval {{ name }}

{{ engines }}

## Where it comes from

`recipe.toml` repeats the run, `report.json` has its figures and lists every file{{ with_unknown }}.
{{ source_card }}{{ license_note }}
"""


def write_card(out: Path, source: Path, report: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
    """Write `README.md` from what the run's report and the checkpoint's config say.

    Metadata is carried over from the source's own card where it has any: licence and languages. The licence may also be
    recognised from the text of a LICENSE file. What cannot be known is left out.

    Raises:
        OSError: the folder cannot be read or written.
    """
    from huggingface_hub import ModelCard

    carried = source_metadata(source)
    scheme = Scheme.parse(report["scheme"])
    data, copied = report["calibration"], report["unknown_tensors"]
    others = counted((report.get("plan") or {}).get("linears", {}))
    name = (
        f"{base_name(report['model'], short=True)}-{scheme.name}"  # not the folder's: the same run gives the same bytes
    )
    values = {
        "name": name,
        "base": base_name(report["model"], short=False),
        "numbers": numbers(scheme) + (f" ({others})" if others else ""),
        "version": report["env"]["affinequant"],
        "preset": report["preset"],
        "tier": report["tier"],
        "bits": report["bits_per_weight"],
        "size": report["weight_bytes"],
        "data": data,
        "tokens": report["calibration_perplexity"]["tokens"],
        "full": report["calibration_perplexity"]["full"],
        "quantized": report["calibration_perplexity"]["quantized"],
        "engines": engines(scheme, config),
        "serve": f"    vllm serve {name}\n" if _served(scheme, config) else "",
        "with_unknown": f" and the {len(copied)} tensors that were copied unchanged" if copied else "",
        "source_card": "`SOURCE_README.md` is the card of the original model.\n" if (source / CARD).is_file() else "",
        "license_note": _license_note(carried),
    }
    card = ModelCard.from_template(_metadata(report, config, carried, name), template_str=TEMPLATE, **values)
    return write_text(out / CARD, str(card).rstrip() + "\n")


def source_metadata(source: Path) -> dict[str, Any]:
    """`license`, `license_name`, `license_link` and `language` of a model folder, as far as its files tell."""
    carried = {}
    file = source / CARD
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() and is_inside(file, source) else ""
    if text.startswith("---"):
        found = _front_matter(text)
        carried = {key: found[key] for key in ("license", "license_name", "license_link", "language") if found.get(key)}
    if "license" not in carried:
        for name in LICENSES:
            if (source / name).is_file() and is_inside(source / name, source):
                head = (source / name).read_text(encoding="utf-8", errors="replace")[:400]
                known = next((key for key, start in KNOWN_TEXTS.items() if re.match(start, head, re.I)), None)
                return carried | ({"license": known} if known else {"license": "other", "license_link": name})
    return carried


def hub_id(model: str) -> str | None:
    """The id of a model on the hub: as it was given, or of the hub's cache in which a folder lies; None for another."""
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", model + "/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else None


def _front_matter(text: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    log = logging.getLogger("huggingface_hub.repocard")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of a card without metadata, which is nobody's fault here
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, YAMLError):
        return {}
    finally:
        log.setLevel(level)


def _metadata(
    report: Mapping[str, Any], config: Mapping[str, Any], carried: Mapping[str, Any], name: str
) -> "ModelCardData":
    from huggingface_hub import ModelCardData

    method = (config.get("quantization_config") or {}).get("quant_method")
    base = hub_id(report["model"])
    fields: dict[str, Any] = {
        **carried,
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if wraps(config) else "text-generation",
        "tags": [
            "affinequant",
            *([method] if method and method != "affinequant" else []),
            report["scheme"],
            "quantized",
        ],
        "model_name": name,
        "eval_results": _results(report),
    }
    return ModelCardData(**fields)


def _results(report: Mapping[str, Any]) -> "list[EvalResult]":
    """The one thing that the run itself has measured: perplexity on the first calibration samples, named as that."""
    from huggingface_hub import EvalResult

    data, tokens = report["calibration"], report["calibration_perplexity"]["tokens"]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="calibration",
            dataset_name=f"calibration text of this checkpoint ({data['source']})",
            dataset_args={"tokens": tokens, "seq_len": data["seq_len"], "sha256": data["sha256"], "in_sample": True},
            metric_type="perplexity",
            metric_name="perplexity, in sample",
            metric_value=round(report["calibration_perplexity"]["quantized"], 4),
        )
    ]


def engines(scheme: Scheme, config: Mapping[str, Any]) -> str:
    """Which engines compute what with a checkpoint, by its config."""
    activations = _grid(scheme.activation, "activations") if scheme.activation else "16-bit activations"
    words = (ENGINES | EXPERTS if _has_experts(config) else ENGINES)[_kind(scheme, config)]
    weight_only = f"w{scheme.weight.bits}a16"
    return words.format(activations=activations, weights=_grid(scheme.weight, "weights"), weight_only=weight_only)


def _kind(scheme: Scheme, config: Mapping[str, Any]) -> str:
    declared = config.get("quantization_config")
    if declared is None:
        return "dense"
    floats = scheme.weight.kind != "int"
    if declared["quant_method"] == "affinequant":
        return "online floats" if floats else "online"
    if not rounds_inputs(declared.get("affinequant", {}) | {"activation": scheme.activation}):
        return "weights"
    stock = [group["input_activations"] for group in declared["config_groups"].values()]
    return ("floats" if floats else "declared") if any(stock) else "activations"


def _has_experts(config: Mapping[str, Any]) -> bool:
    return bool((config.get("quantization_config") or {}).get("affinequant", {}).get("experts"))


def _served(scheme: Scheme, config: Mapping[str, Any]) -> bool:
    """Whether vLLM, with the package's plugin, takes the folder."""
    kind = _kind(scheme, config)
    return kind != "online floats" and not (_has_experts(config) and kind in ("online", "activations"))


def numbers(scheme: Scheme) -> str:
    """The scheme in words."""
    activations = _grid(scheme.activation, "activations") if scheme.activation else "16-bit activations"
    return f"{_grid(scheme.weight, 'weights')} and {activations} (`{scheme.name}`)"


def _grid(grid: NumberFormat, what: str) -> str:
    if grid.kind != "int":
        return f"{grid.bits}-bit float {what} ({grid.kind.upper()})"
    return f"{grid.bits}-bit {'' if grid.symmetric else 'asymmetric '}integer {what}"


def base_name(model: str, *, short: bool) -> str:
    """The original model in words; of a local folder only its name, not where on someone's disk it lies."""
    from affinequant.data.demo import MODEL_FOLDER, MODEL_NOTE

    if model == "demo":
        return MODEL_FOLDER if short else MODEL_NOTE
    name = hub_id(model) or Path(model).name
    return name.rpartition("/")[2] if short else name


def _license_note(carried: Mapping[str, Any]) -> str:
    if "license" in carried:
        return "The licence of the original model applies."
    return "The files of the original model do not tell its licence; it applies here too."
