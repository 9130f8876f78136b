"""A GGUF file in llama.cpp itself: the same tokens as transformers', and the same next ones, for every kind of source."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import affinequant
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.export import read_back
from affinequant.formats import find_format
from affinequant.formats.gguf_tokenizer import read_vocabulary
from affinequant.formats.reread import read_finished
from tests.llamacpp import ask
from tests.tiny import SLIDING, VOCAB, dense_model, rounded

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")

Tiny = Callable[..., Path]
Change = Callable[[Path], None]
SHAPE = {"hidden": 128, "mlp": 256}
TEXT = "The rain in  there, not on it:\n 1987 geese flew na\u00efve"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE = {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 5e5}
NEAR = 0.004
"""Nats by which llama.cpp's next token may diverge: it rounds activations to 8 bits (0.0002 here; RoPE left as it was
without its scaling gives 0.05)."""


def config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    table = json.loads((folder / "config.json").read_text())
    change(table)
    (folder / "config.json").write_text(json.dumps(table))


def tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    table = json.loads((folder / "tokenizer.json").read_text())
    change(table)
    (folder / "tokenizer.json").write_text(json.dumps(table))


def roped(**rope: Any) -> Change:
    return lambda folder: config(folder, lambda table: table.update(rope_parameters=rope))


def quiet(folder: Path) -> None:
    """Embeddings that leave the word to the blocks: loud ones that are the head too make one token certain, whatever the
    blocks do. With another window, base of RoPE or cap the divergence is then at least 0.006."""
    tensors(folder, lambda stored: stored["model.embed_tokens.weight"].mul_(0.1))


def two_ropes(folder: Path) -> None:
    """Of blocks that see a window, and, stretched, of those that see everything."""
    sliding = {"rope_type": "default", "rope_theta": 500.0}
    roped(sliding_attention=sliding, full_attention={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5})(folder)


def at_defaults(folder: Path) -> None:
    def shorten(table: dict[str, Any]) -> None:
        for key in ("max_position_embeddings", "rms_norm_eps", "hidden_act", "rope_parameters", "model_type"):
            table.pop(key, None)
        table["model_type"] = "llama"  # transformers itself needs it

    config(folder, shorten)


def with_frequencies(folder: Path) -> None:
    """As libraries before 2023 saved them."""
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    tensors(folder, lambda stored: stored.update({name.format(layer): torch.rand(16) for layer in range(2)}))


def with_zeros(folder: Path) -> None:
    def clear(stored: dict[str, Tensor]) -> None:
        stored["model.layers.0.mlp.up_proj.weight"][5:9] = 0
        stored["model.layers.1.self_attn.v_proj.weight"][:, :64] = 0
        stored["model.embed_tokens.weight"][7] = 0

    tensors(folder, clear)


def with_added(folder: Path) -> None:
    """Tokens beyond the vocabulary, special and not, in the rows that the embedding has left."""

    def add(table: dict[str, Any]) -> None:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for content, special in (("<|user|>", True), ("geese", False)):
            number = 1 + max(*table["model"]["vocab"].values(), *(token["id"] for token in table["added_tokens"]))
            table["added_tokens"].append({"id": number, "content": content, "special": special, **flags})

    tokenizer(folder, add)


def with_first(folder: Path) -> None:
    """A tokenizer that puts <s> before every text."""
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text, other = ({"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB"))

    def add(table: dict[str, Any]) -> None:
        known = {"<s>": {"id": "<s>", "ids": [table["model"]["vocab"]["<s>"]], "tokens": ["<s>"]}}
        processor = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, other]}
        table["post_processor"] = processor | {"special_tokens": known}

    tokenizer(folder, add)


def pieces(prefix: str = "Prepend") -> Change:
    """A tokenizer as SentencePiece makes them: `prefix` puts a space in front, in the older way or in the newer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyzTR,.:0123456789"]
    merges = [
        ("\u2581", "t"),
        ("h", "e"),
        ("t", "he"),
        ("\u2581", "the"),
        ("\u2581t", "he"),
        ("i", "n"),
        ("\u2581", "in"),
    ]
    merges.append(("\u2581", "\u2581"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *letters]
    tokens += [token for token in dict.fromkeys(map("".join, merges)) if token not in tokens]
    vocab = {token: place for place, token in enumerate(tokens)}
    made: Any = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prefix == "Prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    elif prefix == "Split":  # as Gemma has it
        made.normalizer = normalizers.Replace(" ", "\u2581")
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=prefix, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])

    def change(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


CASES: dict[str, tuple[str, dict[str, Any], Change]] = {
    "asymmetric": ("w4a4", {}, lambda folder: None),
    "symmetric in groups, own head": ("w4a16-g32-sym", {"tied": False}, lambda folder: None),
    "eight bits, a shared head": ("w8a8", {"tied": True}, lambda folder: None),
    "biases": ("w4a16", {"bias": True}, lambda folder: None),
    "llama3": ("w4a16", {}, roped(**LLAMA3_ROPE)),
    "linear": ("w4a16", {}, roped(rope_type="linear", factor=4.0, rope_theta=1e4)),
    "qwen2": ("w4a16", {"family": "qwen2"}, roped(rope_type="linear", factor=2.0, rope_theta=1e6)),
    "qwen2, own head": ("w4a16-g32-sym", {"family": "qwen2", "tied": False, "kv_heads": 4}, lambda folder: None),
    "mistral": ("w4a16", {"family": "mistral", "sliding_window": None}, quiet),
    "qwen3": ("w4a16-g32-sym", {"family": "qwen3"}, quiet),
    "phi3": ("w4a16-g32", {"family": "phi3"}, lambda folder: None),
    "smollm3": ("w4a16", {"family": "smollm3", "no_rope_layers": None, "layers": 4}, quiet),
    "gemma2": (
        "w4a16",
        {"family": "gemma2", "tied": True, "attn_logit_softcapping": 0.5},
        both(quiet, pieces("Split")),
    ),
    "gemma3": ("w4a16-g32-sym", {"family": "gemma3", "tied": True}, both(quiet, two_ropes)),
    "defaults": ("w4a16", {}, at_defaults),
    "old frequencies": ("w4a16", {}, with_frequencies),
    "zeros": ("w4a16-g32", {}, with_zeros),
    "zeros, symmetric": ("w4a16-sym", {}, with_zeros),
    "added tokens, a first one": ("w4a16", {}, both(with_added, with_first)),
    "pieces": ("w4a16", {}, both(pieces(), with_first)),
    "pieces, no first token": ("w4a16", {}, pieces()),
    "pieces, no space in front": ("w4a16", {}, pieces("never")),
    "pieces, added tokens": ("w4a16", {"tied": True}, both(pieces(), with_added)),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_the_folder_means(case: str, tiny_copy: Tiny, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    scheme, shape, change = CASES[case]
    source, out = tiny_copy(**SHAPE, **shape), tmp_path / "out"
    change(source)
    find_format("auto").write(rounded(source, scheme), tmp_path / "made")
    report = affinequant.export(tmp_path / "made", format="gguf", out=out).report
    assert report["verified"]["passed"] and report["events"][1:] == []
    if case == "old frequencies":
        tensors(source, lambda stored: [stored.pop(name) for name in list(stored) if "inv_freq" in name])
    talk: Any = [{"role": "user", "content": "there"}]
    text = TEXT + ("<|user|>" if "added" in case else "")
    told = ask(out / "model.gguf", text, talk)
    own: Any = AutoTokenizer.from_pretrained(source)
    assert told["ids"] == own(text)["input_ids"]
    if own.chat_template:
        assert told["chat"] == own.apply_chat_template(talk, tokenize=False)
    with torch.no_grad():
        wanted = dense_model(rounded(source, scheme))(torch.tensor([told["ids"]])).logits[0, -1].log_softmax(-1)
    assert len(told["logprobs"]) == VOCAB
    got = torch.tensor([told["logprobs"][str(token)] for token in range(VOCAB)])
    assert float((wanted.exp() * (wanted - got)).sum()) < NEAR


def spoiled(change: Callable[[dict[str, Any]], None]) -> Change:
    return lambda folder: tokenizer(folder, change)


def unordered(table: dict[str, Any]) -> None:
    merges = table["model"]["merges"]
    merges.append(merges.pop(3))


REFUSED: dict[str, tuple[Change, str]] = {
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
    "splitting": (spoiled(lambda table: table.update(pre_tokenizer={"type": "Whitespace"})), "way of splitting text"),
    "unigram": (spoiled(lambda table: table.update(model={"type": "Unigram"})), "no BPE"),
    "too many tokens": (spoiled(lambda table: table["model"]["vocab"].update(x=VOCAB)), f"tokens up to {VOCAB}"),
    "merges out of order": (both(pieces(), spoiled(unordered)), "in an order that no scores"),
    "a merge left out": (both(pieces(), spoiled(lambda table: table["model"]["merges"].pop(0))), "never joins"),
    "a byte left out": (
        both(pieces(), spoiled(lambda table: table["model"]["vocab"].update(x=table["model"]["vocab"].pop("<0x41>")))),
        "no token <0x41>",
    ),
    "changed text": (both(pieces(), spoiled(lambda table: table.update(normalizer={"type": "NFKC"}))), "changes text"),
    "yarn": (roped(rope_type="yarn", factor=4.0, rope_theta=1e4), "RoPE of type 'yarn'"),
    "dynamic": (roped(rope_type="dynamic", factor=4.0, rope_theta=1e4), "RoPE of type 'dynamic'"),
    "a foreign tensor": (
        lambda folder: tensors(folder, lambda stored: stored.update({"model.extra": torch.ones(3)})),
        "no tensor for model.extra",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused_before_anything_is_written(
    case: str, tiny_copy: Tiny, tmp_path: Path
) -> None:
    change, words = REFUSED[case]
    source, out = tiny_copy(**SHAPE), tmp_path / "out"
    change(source)
    find_format("auto").write(rounded(source, "w4a16"), tmp_path / "made")
    with pytest.raises(AffineQuantError, match=words) as raised:
        affinequant.export(tmp_path / "made", format="gguf", out=out)
    assert raised.value.exit_code == PREFLIGHT and not out.exists()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (SLIDING, "Qwen2 has no sliding windows"),
        ({"head_dim": 16}, "heads of 64 features together"),
        ({}, "RoPE of type 'llama3'"),
    ],
    ids=["windows", "heads", "rope"],
)
def test_what_llama_cpp_s_qwen2_is_not_is_refused(
    shape: dict[str, Any], words: str, tiny_copy: Tiny, tmp_path: Path
) -> None:
    source = tiny_copy(**SHAPE, **shape | {"family": "qwen2"})
    if not shape:
        roped(**LLAMA3_ROPE)(source)
    find_format("auto").write(rounded(source, "w4a16"), tmp_path / "made")
    with pytest.raises(AffineQuantError, match=words) as raised:
        affinequant.export(tmp_path / "made", format="gguf", out=tmp_path / "out")
    assert raised.value.exit_code == PREFLIGHT and not (tmp_path / "out").exists()


OTHER = ["full_attention", "sliding_attention"]
UNLIKE: dict[str, tuple[str, dict[str, Any], str]] = {
    "windows": ("mistral", {}, "Llama has no sliding windows"),
    "windows, fused": ("phi3", {"sliding_window": 12}, "Phi-3 has no sliding windows"),
    "windows elsewhere": ("gemma2", {"layer_types": OTHER}, "no sliding windows in this order: .* each second has one"),
    "a bias": ("qwen3", {"attention_bias": True}, r"Qwen3 has no tensor for model\.layers\.0\.self_attn\.q_proj\.bias"),
    "RoPE everywhere": (
        "smollm3",
        {"no_rope_layers": [1, 0]},
        "leaves RoPE out of each 4th block, this model of others",
    ),
    "one cap": ("gemma2", {"final_logit_softcapping": None}, "has both caps"),
    "a cap": ("gemma3", {"final_logit_softcapping": 3.0}, "has no caps"),
    "a scale": ("gemma2", {"query_pre_attn_scalar": 32}, "divides scores by the root of 16, this model of 32"),
    "long RoPE": (
        "smollm3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        "type 'yarn'",
    ),
    "no family": ("opt", {}, "llama.cpp has no OPT"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_what_llama_cpp_computes_otherwise_in_a_family_is_refused(case: str, tiny: Tiny) -> None:
    family, shape, words = UNLIKE[case]
    source = tiny(**SHAPE, family=family, tied=family.startswith("gemma"))
    contents = rounded(source, "w4a16")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(source / "model.safetensors").items()}
    if "attention_bias" in shape:
        shapes["model.layers.0.self_attn.q_proj.bias"] = (64,)
    changed = replace(contents, config=contents.config | shape)
    assert re.search(words, str(find_format("gguf").refuses(changed, shapes)))


def test_where_llama_cpp_puts_more_spaces_is_said(tiny_copy: Tiny, tmp_path: Path) -> None:
    source = tiny_copy(**SHAPE)
    pieces("first")(source)
    find_format("auto").write(rounded(source, "w4a16"), tmp_path / "made")
    report = affinequant.export(tmp_path / "made", format="gguf", out=tmp_path / "out").report
    assert any("space before every text" in event for event in report["events"])
    vocabulary = read_vocabulary(source, VOCAB)
    assert not isinstance(vocabulary, str) and vocabulary.space_prefix


MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rotated neighbours": ("mixtral", "w4a16-g32-sym", {}),
    "a shared expert": ("qwen2_moe", "w4a4", {"shared_expert_intermediate_size": 64}),
    "norms on heads": ("qwen3_moe", "w4a16", {"mlp_only_layers": None}),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_llama_cpp_computes_a_mixture(case: str, mixture: Tiny, tmp_path: Path) -> None:
    family, scheme, shape = MIXTURES[case]
    folder = mixture(family, scheme, **shape)
    report = affinequant.export(folder, format="gguf", out=tmp_path).report
    assert report["verified"]["divergence"] < 1e-3 and report["verified"]["read_by"].endswith("the gguf package")
    told = ask(tmp_path / "model.gguf", TEXT)
    with torch.no_grad():
        weights, _ = read_back(find_format("gguf"), tmp_path, "float32")
        wanted = weights(torch.tensor([told["ids"]])).logits[0, -1].log_softmax(-1)
    got = torch.tensor([told["logprobs"][str(token)] for token in range(VOCAB)])
    assert float((wanted.exp() * (wanted - got)).sum()) < NEAR


OTHERWISE = {
    "dense blocks": ({}, "has experts in every block"),
    "weights that add up": ({"mlp_only_layers": [], "norm_topk_prob": False}, "makes the weights .* add up to one"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_llama_cpp_computes_otherwise_with_experts_is_refused(case: str, mixture: Tiny) -> None:
    shape, words = OTHERWISE[case]
    found = read_finished(mixture("qwen3_moe", "w4a16"))
    contents = replace(found.contents, config=found.contents.config | shape)
    assert re.search(f"Qwen3-MoE {words}", str(find_format("gguf").refuses(contents, found.shapes)))
