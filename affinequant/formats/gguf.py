"""gguf: one file for llama.cpp and what is built on it, written with the gguf package.

A 4-bit grid is held as it is: symmetric by Q4_0, value = (q - 8) d, asymmetric by Q4_1, value = q d + m, with one and the
same d (and m) in every block of 32 under a scale; 8-bit symmetric by Q8_0. The package's own quantisers would fit each
block anew, and lose the integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affinequant.data.files import read_table
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.formats import (
    SHARD_BYTES,
    Contents,
    Shapes,
    floats_reason,
    network_of,
    online_reason,
    split_stage,
    without_zeros,
)
from affinequant.formats.compressed_tensors import checkpoint_config
from affinequant.formats.gguf_settings import (
    ARCHITECTURES,
    UNKNOWN,
    described,
    rope_factors,
    write_settings,
    write_tokenizer,
)
from affinequant.formats.gguf_tensors import for_rope, found, mapped, names_of, number_of, unpacked
from affinequant.formats.gguf_tokenizer import Vocabulary, read_vocabulary
from affinequant.formats.reading import Dtype, in_transformers
from affinequant.formats.shards import copy_source, install, write_json
from affinequant.models import Dims, Family, resolve
from affinequant.models.sites import Placement
from affinequant.recipe.scheme import NumberFormat, Scheme

if TYPE_CHECKING:  # a plan asks `supports`, and must not wait for torch
    import numpy as np
    from torch import Tensor

ABOUT = "one file for llama.cpp: the same integers as Q4_0, Q4_1 or Q8_0, weights only"
ROUNDS = "scales to float16 (without loss from 2^-14 on), and what asymmetric weights add to each block"
TOLERANCE = 0.001
WEIGHT_ONLY = True
FILE = "model.gguf"
BLOCK = 32
"""Weights of a row that share the two or four bytes of scale in Q4_0, Q4_1 and Q8_0."""
_READ = (
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
)
"""What transformers reads from the file's settings, beside the base of RoPE."""


def supports(scheme: Scheme, placements: Mapping[str, Placement], *, clipped: bool = False) -> str | None:
    """None, or why this cannot be written: transforms at run time, or 8-bit weights with zero points."""
    if reason := floats_reason(scheme) or online_reason(placements, "llama.cpp cannot do"):
        return reason
    if scheme.weight.bits not in (4, 8):
        return f"{scheme.weight.bits}-bit weights; the types written here have 4 or 8"
    if scheme.weight.bits == 8 and not scheme.weight.symmetric:
        return "GGUF has no 8-bit type with zero points"
    group = scheme.weight.group_size
    return f"groups of {group} weights; blocks are of {BLOCK}" if group and group % BLOCK else None


def mixes(schemes: Sequence[Scheme]) -> str | None:
    """None: each linear's numbers are its own."""
    return None


def lacks(family: Family, schemes: Sequence[Scheme] = ()) -> str | None:
    """None, or that llama.cpp does not have the family, or how it does is not known here."""
    if family.name in ARCHITECTURES:
        return None
    return UNKNOWN.get(family.name, f"llama.cpp's form of {family.name} is not known here")


def refuses(contents: Contents, shapes: Shapes) -> str | None:
    """None, or which size, tensor, activation function, RoPE, attention or tokenizer llama.cpp does not have."""
    family, dims = network_of(contents)
    if reason := lacks(family):
        return reason
    if contents.beside:
        return (
            f"a GGUF file holds the decoder alone; {', '.join(contents.beside)} would have to lie in another (mmproj)"
        )
    architecture = ARCHITECTURES[family.name]
    for name in contents.linears:
        if shapes[f"{name}.weight"][1] % BLOCK:
            return f"{name} has {shapes[f'{name}.weight'][1]} inputs, which blocks of {BLOCK} do not divide"
    names, parts, there = names_of(architecture, dims), set(contents.linears), f"llama.cpp's {architecture.title}"
    for name in shapes:
        bias = name.endswith(".bias") and not architecture.biases
        if bias or not (name.rpartition(".")[0] in parts or _is_buffer(name) or found(names, name)):
            return f"{there} has no tensor for {name}"
    config = described(contents.config)
    if reason := architecture.refuses(config, dims):
        return f"{there} {reason}"
    vocabulary = read_vocabulary(contents.source, dims.vocab)
    return None if isinstance(vocabulary, Vocabulary) else vocabulary


def reload(out: Path, dtype: Dtype) -> tuple[Any, str]:
    """The file in transformers, dequantised; the words say what became of the tokenizer.

    transformers reads most settings from the file; biases and a scaled RoPE it knows by config.json alone.
    """
    from transformers import AutoConfig, AutoTokenizer, GgufConfig

    if not ARCHITECTURES[resolve(read_table(out / "config.json"), where=str(out))[0].name].stock:
        return unpacked(out / FILE, dtype)
    config: Any = AutoConfig.from_pretrained(out, local_files_only=True)
    read: Any = AutoConfig.from_pretrained(out, gguf_file=FILE, local_files_only=True)
    for key in _READ:
        if hasattr(read, key):
            setattr(config, key, getattr(read, key))
    config.rope_parameters = config.rope_parameters | {"rope_theta": read.rope_parameters["rope_theta"]}
    model, words = in_transformers(
        out, dtype, gguf_file=FILE, config=config, quantization_config=GgufConfig(dequantize=True)
    )
    vocabulary = read_vocabulary(out, model.config.vocab_size)
    assert isinstance(vocabulary, Vocabulary), vocabulary
    own, read = (AutoTokenizer.from_pretrained(out, **options) for options in ({}, {"gguf_file": FILE}))
    text = "It's 3 o'clock; 1,024 geese (or so) flew by.\n\n  \tThen: silence\u2026 na\u00efve \u6f22\u5b57"
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (own, read)]
    agree = (
        "splits a test text as tokenizer.json does"
        if ids[0] == ids[1]
        else ("is split otherwise by transformers, which does not know every `pre`")
    )
    note = f"; note: {vocabulary.note}" if vocabulary.note else ""
    return model, f"{words}; its tokenizer ({vocabulary.split}) {agree}{note}"


def write(contents: Contents, out: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the folder and return its files; `config.json` is the last of them. The file is one whatever its size.

    Raises:
        AffineQuantError: a scale that float16 does not hold, or a tokenizer that the file does not.
        OSError: the folder cannot be written.
    """
    from gguf import GGUFWriter

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)
    temporary = out / f"{FILE}.tmp"
    family, dims = network_of(contents)
    writer = GGUFWriter(temporary, ARCHITECTURES[family.name].called, use_temp_file=True)
    try:
        write_settings(writer, contents, ARCHITECTURES[family.name], dims)
        write_tokenizer(writer, contents, dims)
        if (factors := rope_factors(described(contents.config))) is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        for stage in contents.stages():
            _write_stage(writer, stage, contents, family, dims)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
        if writer.temp_file is not None:
            writer.temp_file.close()
    files = [install(temporary, out / FILE), *copy_source(contents.source, out)]
    return [*files, write_json(out / "config.json", checkpoint_config(contents))]


def blocks(codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: NumberFormat, where: str) -> tuple[np.ndarray, str]:
    """The rows of a linear as bytes of Q4_0, Q4_1 or Q8_0, and which of them.

    Raises:
        AffineQuantError: see `write`; `where` names the linear.
    """
    import numpy as np
    import torch

    rows, columns = codes.shape
    scale = without_zeros(codes, scale, zero)
    each = scale.repeat_interleave(columns // scale.shape[1] // BLOCK, 1).reshape(-1, 1)
    halves = each.half()
    if not bool(halves.isfinite().all()) or bool((halves == 0).any()):
        what = f"scales from {float(scale.min()):.3g} to {float(scale.max()):.3g} do not fit float16"
        raise AffineQuantError(what, where, "export compressed-tensors, which holds them", exit_code=PREFLIGHT)
    parts = [halves.numpy().view(np.uint8)]
    if zero is not None:
        offset = -(zero.float() + 2 ** (fmt.bits - 1)) * scale
        offset = offset.repeat_interleave(columns // scale.shape[1] // BLOCK, 1).reshape(-1, 1)
        parts.append(offset.half().numpy().view(np.uint8))
    if fmt.bits == 8:
        parts.append(codes.reshape(-1, BLOCK).numpy().view(np.uint8))
    else:
        low, high = (codes.int() + 8).reshape(-1, 2, BLOCK // 2).unbind(1)
        parts.append((low | high << 4).to(torch.uint8).numpy())
    kind = "Q8_0" if fmt.bits == 8 else "Q4_0" if zero is None else "Q4_1"
    return np.concatenate(parts, axis=1).reshape(rows, -1), kind


def _write_stage(writer: Any, stage: Mapping[str, Tensor], contents: Contents, family: Family, dims: Dims) -> None:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType

    architecture = ARCHITECTURES[family.name]
    names = names_of(architecture, dims)
    rest, integers = split_stage(stage, contents)
    experts: dict[tuple[str, str], dict[int, np.ndarray]] = {}

    def add(name: str, packed: np.ndarray, kind: str) -> None:
        there, number = mapped(names, name), number_of(name)
        if number is None:
            writer.add_tensor(there, packed, raw_dtype=GGMLQuantizationType[kind])
        else:
            experts.setdefault((there, kind), {})[number] = packed

    for name, (codes, scale, zero) in integers.items():
        parts = [part if part is None else for_rope(part, name, architecture, dims) for part in (codes, scale, zero)]
        assert parts[0] is not None and parts[1] is not None
        add(f"{name}.weight", *blocks(parts[0], parts[1], parts[2], contents.numbers(name).weight, name))
    for name, tensor in rest.items():
        if _is_buffer(name):
            continue
        owner = name.rpartition(".")[0]
        if tensor.ndim == 1:  # llama.cpp computes norms in float32, and adds biases in it
            vector = tensor.float() + family.norm_offset  # a gain, as it multiplies
            if name.endswith(".bias"):
                vector = for_rope(tensor, owner, architecture, dims).float()
            writer.add_tensor(mapped(names, name), vector.numpy())
        elif tensor.dtype == torch.bfloat16:
            there = for_rope(tensor, owner, architecture, dims).contiguous()
            add(name, there.view(torch.int16).numpy().view(np.uint8), "BF16")
        else:
            there = for_rope(tensor, owner, architecture, dims).numpy()
            add(name, there, {"float16": "F16", "float32": "F32"}[str(there.dtype)])
    for (there, kind), each in experts.items():
        whole = np.stack([each[number] for number in sorted(each)])
        writer.add_tensor(there, whole, raw_dtype=GGMLQuantizationType[kind])


def _is_buffer(name: str) -> bool:
    """Whether the tensor is none of the network's, but RoPE's frequencies as old libraries saved them."""
    return name.endswith("rotary_emb.inv_freq")
