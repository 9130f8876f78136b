"""`--tp N`: what N ranks compute is what one computes, since o and down read slices that are handled apart."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_kernels import prepare_weight, reference
from torch import Tensor

import affinequant
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.recipe.scheme import Scheme
from affinequant.runtime.integer_linear import IntegerLinear

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """made(tier=..., **recipe): a checkpoint for two ranks, written once."""
    folder = tmp_path_factory.mktemp("made")
    text = folder / "text.txt"
    text.write_text(" ".join(f"{i} red foxes and {i % 7} hens" for i in range(2000)))

    def make(**recipe: Any) -> Path:
        out = folder / "-".join(str(value) for value in recipe.values()).replace("'", "")
        if not out.exists():
            settings = {"preset": "fast", "samples": 4, "seq_len": 32, "data": text, "tp": 2} | recipe
            affinequant.quantize(tiny(hidden=128, heads=4, kv_heads=2, mlp=256), scheme="w4a4", out=out, **settings)
        return out

    return make


RECIPES: list[dict[str, Any]] = [
    {"tier": "merged"},
    {"tier": "online"},
    {"tier": "online", "transforms": {"mlp_mid": "block"}},
    {"tier": "online", "transforms": {"mlp_mid": "hadamard"}, "finish": "kl"},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_checkpoint_in_slices_computes_what_its_run_did(recipe: dict[str, Any], made: Make) -> None:
    folder = made(**recipe)
    checked = json.loads((folder / "report.json").read_text())["verified"]
    assert checked["passed"] and checked["hidden"] < 1e-3
    ours = json.loads((folder / "config.json").read_text())["quantization_config"]["affinequant"]
    assert {name.rpartition(".")[2] for name in ours["slices"]} == {"o_proj", "down_proj"}
    assert set(ours["slices"].values()) == {2}


def test_a_slice_has_scales_of_its_own_and_needs_nothing_of_the_others() -> None:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (24, 96), dtype=torch.int8, generator=random)
    scale, zero = torch.rand(24, 1, generator=random), torch.randint(-8, 8, (24, 1), dtype=torch.int8, generator=random)
    # Small integers: sums are exact whatever their order, which the compiled transform is free to choose.
    left, right = (torch.randint(-4, 5, (size, size), generator=random).float() for size in (4, 12))
    settings: dict[str, Any] = {"bits": 4, "activation": Scheme.parse("w4a4").activation, "clip": 0.9}
    x = torch.randint(-9, 10, (5, 96), generator=random) * torch.tensor([1.0] * 48 + [30.0] * 48)
    whole = IntegerLinear(codes, scale, zero, None, **settings, matrices=[left, right], slices=2)(x)

    def rank(index: int) -> Tensor:
        columns = slice(48 * index, 48 * (index + 1))
        rows = reference.kron_quant(x[:, columns], left, right, bits=4, symmetric=False, clip=0.9)
        weight = prepare_weight(codes[:, columns].contiguous(), scale, zero)
        return reference.linear(rows.q, rows.scale, rows.zero, weight)

    assert torch.equal(whole, rank(0) + rank(1))


def test_every_rank_has_its_own_of_many_blocks() -> None:
    random = torch.Generator().manual_seed(0)
    codes, scale = torch.randint(-8, 8, (24, 96), dtype=torch.int8, generator=random), torch.rand(24, 1)
    blocks, x = torch.randn(6, 16, 16, generator=random), torch.randn(5, 96, generator=random)
    halves = IntegerLinear(codes, scale, None, None, bits=4, activation=None, clip=1.0, matrices=[blocks], slices=2)
    assert [len(part.matrices()[0]) for part in halves.parts] == [3, 3]  # pyright: ignore
    dense = (x @ torch.block_diag(*blocks)) @ (codes.float() * scale).T
    torch.testing.assert_close(halves(x), dense, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("tp", "fits"), [(3, "1, 2, 4"), (8, "1, 2, 4")])
def test_ranks_that_cannot_share_the_model_are_refused(tp: int, fits: str, tiny: Callable[..., Path]) -> None:
    with pytest.raises(AffineQuantError, match="do not divide among") as caught:
        affinequant.plan(str(tiny(hidden=128, heads=4, kv_heads=2, mlp=256)), tp=tp, data="demo", seq_len=32)
    assert fits in caught.value.fix and caught.value.exit_code == PREFLIGHT


def test_ranks_that_would_cut_a_group_of_activations_are_refused(tiny: Callable[..., Path]) -> None:
    model = str(tiny(hidden=128, heads=4, kv_heads=4, mlp=256))
    settings = {"scheme": "w4a4-ag64", "data": "demo", "seq_len": 32}
    assert affinequant.plan(model, tp=2, **settings).recipe.tp == 2
    with pytest.raises(AffineQuantError, match="do not divide among 4 ranks") as caught:
        affinequant.plan(model, tp=4, **settings)
    assert caught.value.fix == "use one of 1, 2" and caught.value.exit_code == PREFLIGHT


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
def test_an_engine_refuses_ranks_that_the_checkpoint_was_not_made_for() -> None:
    from affinequant.serve.vllm_linear import AffineQuantLinear
    from affinequant.serve.vllm_plugin import AffineQuantConfig

    scheme = Scheme.parse("w4a4")
    assert scheme.activation
    grids = {"weight": asdict(scheme.weight), "activation": asdict(scheme.activation)}
    ours = {"version": 1, "scheme": "w4a4", "input_clip": {}} | grids
    down = "model.layers.0.mlp.down_proj"
    for slices, ranks, left in ((1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2)):
        config = AffineQuantConfig({"affinequant": ours | {"slices": {down: slices}}, "quant_method": "x"})
        assert AffineQuantLinear(config, down).slices_of(ranks, {}) == left
    for slices, ranks in ((1, 2), (2, 4)):
        config = AffineQuantConfig({"affinequant": ours | {"slices": {down: slices}}, "quant_method": "x"})
        with pytest.raises(ValueError, match=f"quantise with --tp {ranks}"):
            AffineQuantLinear(config, down).slices_of(ranks, {})
    weight_only = AffineQuantConfig({"affinequant": ours | {"activation": None}, "quant_method": "x"})
    assert AffineQuantLinear(weight_only, down).slices_of(2, {}) == 1
    with pytest.raises(ValueError, match="quantise with --tp 2"):
        AffineQuantLinear(weight_only, down).slices_of(2, {"left": [2, 2], "right": [2, 2]})


RANKS = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, ids = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(model=folder, dtype="float32", max_model_len=64, enforce_eager=True, gpu_memory_utilization=0.3,
              disable_log_stats=True, tensor_parallel_size=2, load_format="safetensors")
    settings = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    done = llm.generate([{"prompt_token_ids": row} for row in ids], settings, use_tqdm=False)
    print("TOKENS", json.dumps([list(result.outputs[0].token_ids) for result in done]))
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_two_ranks_of_an_engine_say_what_one_process_says(made: Make, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    folder = made(tier="online")
    ids = torch.randint(3, 300, (16, 12), generator=torch.Generator().manual_seed(0))
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    command = [sys.executable, str(script), str(folder), json.dumps(ids.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    line = next((line for line in done.stdout.splitlines() if line.startswith("TOKENS ")), None)
    assert line is not None, done.stderr[-3000:]
    model: Any = affinequant.load(folder, device="cpu")
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    same = sum(a == b for a, b in zip(json.loads(line[7:]), alone[:, 12:].tolist(), strict=True))
    assert same >= len(ids) - 1, f"{same} of {len(ids)} continuations agree"
