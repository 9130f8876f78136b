"""Models of several parts, one of which is a decoder that is known: that one is quantised, the others are copied.

config.json describes the decoder in a table of its own, `text_config`. transformers 5 has it at `model.language_model`, its
head at `lm_head`, and the other parts beside them. Files call their tensors after these modules, or as older versions did,
which is how most are published: `language_model.model.layers.0` for `model.language_model.layers.0`. Here all go by the
modules, and what is written is called as the source's files call it. vLLM and transformers read both.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.models.family import Family

Named = TypeVar("Named")

WRAPPERS: Mapping[str, tuple[str, ...]] = {
    "Gemma3ForConditionalGeneration": ("gemma3",),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5",),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5_moe",),
    "LlavaForConditionalGeneration": ("llama", "mistral", "qwen2"),
    "Mistral3ForConditionalGeneration": ("mistral",),
}
"""By architecture the families of decoders that have been tried in it; a decoder's `model_type` is the family's name."""
_TIED = ("Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration")
"""Those in which transformers takes head and embedding to be tied where nothing is said."""
LEFT_OUT: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    | {"num_attention_heads": 8},
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
"""By the decoder's `model_type`, sizes that published configs leave to transformers' defaults, and these."""
PREDICTOR = "mtp"
"""The part that guesses several tokens at once, from what the decoder gives. transformers has no code for it and passes it
over; vLLM drafts with it where it is asked to, in 16 bits as long as it is named among what is not quantised."""
_WHOLE = ("architectures", "quantization_config", "auto_map", "dtype", "torch_dtype", "tie_word_embeddings")
"""What the whole model's config says of the decoder too, and rather than it."""
_DECODER = "model.language_model"
_RENAMED = (
    ("language_model.model.", f"{_DECODER}."),
    ("language_model.lm_head.", "lm_head."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
"""Beginnings of names in files, and of the modules that transformers 5 has them in; the first that fits."""


def wraps(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model of several parts that is known here."""
    names = config.get("architectures")
    return isinstance(names, list) and names[:1] in [[name] for name in WRAPPERS]


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of the decoder: all of it, or in a model of several parts the table `text_config`, with what is
    said of the whole."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping) or not wraps(config):
        return config
    given = {key: value for key, value in inner.items() if value is not None}
    whole = {key: config[key] for key in _WHOLE if config.get(key) is not None}
    tied = {"tie_word_embeddings": config["architectures"][0] in _TIED}
    return {**tied, **LEFT_OUT.get(str(inner.get("model_type")), {}), **given, **whole}


def with_text(config: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """A config.json with these settings, said of the decoder as well where it has a table that says them, or leaves the tie
    to what stands for the whole."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping) or not wraps(config):
        return {**config, **settings}
    shared = {key: value for key, value in settings.items() if key in inner or key == "tie_word_embeddings"}
    return {**config, **settings, "text_config": {**inner, **shared}}


def decoder_type(config: Mapping[str, Any]) -> str:
    """What the decoder of a config.json is, by its `model_type`, as families are called."""
    return str(text_config(config).get("model_type")).removesuffix("_text")


def inside(family: Family) -> Family:
    """A family as it is found in a model of several parts, what is seen in an image being put in the place of tokens'
    embeddings. Caps are refused: the code around the decoder has none."""
    paths = {part: getattr(family, part) for part in ("blocks", "embedding", "norm", "positions")}
    moved = {part: f"{_DECODER}.{path.removeprefix('model.')}" for part, path in paths.items() if path}
    uncapped = {"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)}
    return replace(family, **moved, inside=True, settings={**family.settings, **uncapped})


def by_module(
    config: Mapping[str, Any], named: Mapping[str, Named], where: str
) -> tuple[dict[str, Named], dict[str, str]]:
    """What the files' names stand for by the names of modules, and how those that begin otherwise in the files are called
    there: beginning here to beginning there.

    Raises:
        AffineQuantError: the files follow several versions at once, so that what is written could not follow them (exit 3).
    """
    if not wraps(config):
        return dict(named), {}
    found, renamed = dict[str, Named](), dict[str, str]()
    for name, value in named.items():
        there, here = next((pair for pair in _RENAMED if name.startswith(pair[0])), ("", ""))
        found[here + name.removeprefix(there)] = value
        if here:
            renamed[here] = there
    if {in_file(name, renamed) for name in found} != {*named}:
        what = "its tensors are called as several versions of transformers call them"
        fix = "save the model anew: from_pretrained, then save_pretrained"
        raise AffineQuantError(what, where, fix, exit_code=PREFLIGHT)
    return found, renamed


def in_file(name: str, renamed: Mapping[str, str]) -> str:
    """The name in a file of what is called `name` here."""
    here = next((here for here in renamed if name.startswith(here)), "")
    return renamed.get(here, "") + name.removeprefix(here)


def beside(family: Family, names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's tensors that belong to other parts than the decoder."""
    modules = (family.blocks, *family.entries, family.norm, family.head)
    own = tuple(f"{module}." for module in modules)
    return [name for name in names if not name.startswith(own)]


def part_of(name: str) -> str:
    """The part that a tensor beside the decoder belongs to: `vision_tower`, whatever stands before and behind it."""
    return name.removeprefix("model.").partition(".")[0]


def said_of_copies(parts: Mapping[str, int]) -> str:
    """The parts that are copied, with their bytes, in words."""
    return ", ".join(f"{name} ({count / 2**20:,.1f} MB)" for name, count in parts.items()) + ", as they are"


def patterns(parts: Collection[str], linears: Iterable[str] = ()) -> list[str]:
    """Regular expressions that fit, from the beginning, the names that vLLM and transformers give the modules of these
    parts, the head, and these linears of the decoder: they differ in what stands before, which is less where transformers
    is asked for the decoder alone, and within a part. None where there are no parts."""
    within = [name.removeprefix(f"{_DECODER}.") for name in linears if name.startswith(f"{_DECODER}.")]
    found = [*(rf"{re.escape(part)}\..*" for part in parts), "lm_head", *map(re.escape, within)]
    return [rf"(.*\.)?{one}" for one in found] if parts else []


def is_ignored(name: str, ignored: Collection[str]) -> bool:
    """Whether a module is in a list of what is not quantised, by its name or by a pattern behind `re:`."""
    return name in ignored or any(one.startswith("re:") and re.match(one[3:], name) for one in ignored)


def auto_class(config: Mapping[str, Any]) -> Any:
    """transformers' class for what a config.json describes: the one that has all parts of the model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if wraps(config) else AutoModelForCausalLM
