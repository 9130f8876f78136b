"""Between RoPE and attention: what acts there acts in the quantised stream only, and a rotation makes keys easier."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from affinequant.learning.objective import BlockObjective
from affinequant.models.attention import NAME, register
from affinequant.models.sites import Edge, Site
from affinequant.numbers import grid_of
from affinequant.numbers.activations import fake_quantize_activation
from affinequant.recipe.scheme import NumberFormat, Scheme
from affinequant.rounding.block import round_block
from affinequant.transforms import build
from affinequant.transforms.cached_heads import CachedHeads
from tests.test_objective import make_job, objective_of
from tests.tiny import VOCAB

Tiny = Callable[..., Path]
KV4 = NumberFormat(bits=4, symmetric=False, granularity="head", dynamic=True)
ALL = ("residual", "attn_in", "vo", "mlp_in", "mlp_mid")
ROTATED: dict[str, Any] = {"scheme": "w4a4kv4", "tier": "online", "preset": "fast"}


def rotation(width: int) -> dict[str, Tensor]:
    edge = Edge(module="m", side="rows")
    site = Site(name="qk", kind="rope", width=2 * width, heads=2, sources=(edge,), sinks=(edge,))
    made: Any = build("hadamard", site, seed=3, alpha=1.0)
    return made.online()


def heads(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [6, 24, 64, 80, 96, 128])
def test_scores_are_kept_and_outlier_channels_spread(width: int) -> None:
    """Keys have a few channels far larger than the rest; rotated, all are alike, and 4 bits lose much less."""
    rotate = CachedHeads(None, rotation(width))
    q, k, v = heads(2, 4, 9, width), heads(2, 2, 9, width, seed=1), heads(2, 2, 9, width, seed=2)
    k = k * torch.where(torch.arange(width) % 37 == 5, 30.0, 1.0)
    turned_q, turned_k, same, mask = rotate(q, k, v)
    assert same is v and mask is None and (turned_k - k).abs().max() > 0.1
    scores = [a @ b.repeat_interleave(2, 1).mT for a, b in ((q, k), (turned_q, turned_k))]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-3)
    if width < 24:
        return
    plain, turned = ((fake_quantize_activation(x, grid_of(KV4)) - x).square().mean() for x in (k, turned_k))
    assert turned < 0.6 * plain


def test_all_heads_are_rounded_and_only_keys_and_values() -> None:
    q, k, v = heads(1, 4, 5, 8), heads(1, 2, 5, 8, seed=1), heads(1, 2, 5, 8, seed=2)
    found = CachedHeads(KV4, {})(q, k, v)
    assert found[0] is q and found[3] is None
    for x, y in zip((k, v), found[1:3], strict=True):
        assert torch.equal(y, fake_quantize_activation(x, grid_of(KV4))) and not torch.equal(x, y)
        assert all(len(row.unique()) <= 16 for row in y.flatten(0, 2))


@pytest.mark.parametrize("padded", [False, True])
def test_with_nothing_to_do_it_is_transformers_own(tiny: Tiny, padded: bool) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    ids = torch.randint(2, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation(register())
        assert model.config._attn_implementation == NAME
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)


def test_a_query_that_sees_nothing_gives_numbers_where_scores_are_capped() -> None:
    """As padding on the left does: what is no number there would reach every token of the next block."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    query, key, value = (heads(1, 2, 5, 8, seed=seed) for seed in range(3))
    seen = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    padded = seen.clone()
    padded[..., :2] = False

    def attended(mask: Tensor) -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS[register()]
        return attend(torch.nn.Module(), query, key, value, mask, softcap=3.0, scaling=0.3)[0]

    given = attended(padded)
    assert given.isfinite().all() and not torch.allclose(given[:, 2:], attended(seen)[:, 2:])
    alone = ALL_ATTENTION_FUNCTIONS[register()](
        torch.nn.Module(), *(x[:, :, 2:] for x in (query, key, value)), None, softcap=3.0, scaling=0.3
    )[0]
    torch.testing.assert_close(given[:, 2:], alone)


def test_the_full_precision_stream_does_not_know_the_scheme(tiny: Tiny) -> None:
    (plain, tensors, x), (job, _, _) = make_job(tiny()), make_job(tiny(), **ROTATED)
    full = plain.run_all(tensors, x)
    assert torch.equal(job.run_all(tensors, x), full)
    cached = job.cached_heads({})
    assert plain.cached_heads({}) is None and cached is not None
    assert not torch.equal(job.run_all(tensors, x, None, cached), full)


def test_training_sees_the_cache_and_gradients_pass_it(tiny: Tiny) -> None:
    losses = []
    for scheme in ("w4a4", "w4a4kv8", "w4a4kv4"):
        fields: dict[str, Any] = ROTATED | {"scheme": scheme, "activation_clip": "none", "weight_clip": "learn"}
        job, tensors, x = make_job(tiny(), **fields)
        objective = objective_of(job, tensors, x)
        loss = objective.loss((x, job.run_all(tensors, x)))["block"]
        loss.backward()
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            grad = objective.ranges[name].low_logit.grad
            assert grad is not None and bool(grad.isfinite().all()) and float(grad.abs().max()) > 0
        losses.append(float(loss.detach()))
    assert losses[0] < losses[2] and abs(losses[1] - losses[0]) < 0.3 * (losses[2] - losses[0])


def test_a_rotation_changes_no_tensor_and_is_kept_beside_the_attention(tiny: Tiny) -> None:
    job, tensors, x = make_job(tiny(heads=4, kv_heads=1), **ROTATED, transforms=dict.fromkeys(ALL, "none"))
    objective = BlockObjective(job, tensors, {}, {"qk": build("hadamard", job.sites["qk"], seed=1, alpha=1.0)})  # pyright: ignore[reportArgumentType]
    folded = objective.folded()
    assert folded.keys() == tensors.keys() and all(torch.equal(folded[name], tensors[name]) for name in tensors)
    stored = round_block(job, tensors, x, objective).stored
    assert {name for name in stored if "online" in name} == {"self_attn.online_blocks"}
    matrix = stored["self_attn.online_blocks"]
    assert matrix.shape == (1, 16, 16) and matrix.dtype == torch.float32
    torch.testing.assert_close(matrix[0] @ matrix[0].mT, torch.eye(16))


def test_what_o_reads_is_what_the_quantised_cache_gives(tiny: Tiny) -> None:
    """GPTQ's Hessian at o sees the cache's rounding, so other codes come out there and nowhere before it."""
    codes = {}
    for scheme in ("w4a16", "w4a16kv4"):
        job, tensors, x = make_job(tiny(), scheme=scheme, preset="fast", transforms=dict.fromkeys(ALL, "none"))
        codes[scheme] = round_block(job, tensors, x, BlockObjective(job, tensors, {})).stored
    differs = {name for name in codes["w4a16"] if not torch.equal(codes["w4a16"][name], codes["w4a16kv4"][name])}
    assert "self_attn.o_proj.codes" in differs
    assert not any(name.startswith(("self_attn.q", "self_attn.k", "self_attn.v")) for name in differs)


def test_attention_that_does_not_come_by_is_no_silent_16_bit_cache(tiny: Tiny) -> None:
    job, tensors, x = make_job(tiny(), **ROTATED)
    model: Any = job.decoder.model
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="did not come by"):
        job.run_all(tensors, x, None, job.cached_heads({}))


def test_presets_rotate_keys_where_the_cache_is_quantised_and_the_tier_lets_them() -> None:
    from affinequant.recipe.recipe import resolve

    def at_qk(**fields: Any) -> str | None:
        return resolve({"model": "m", "preset": "fast"} | fields).transforms.get("qk")

    assert at_qk(scheme="w4a4kv4", tier="online") == "hadamard"
    assert at_qk(scheme="w4a4", tier="online") is None and at_qk(scheme="w4a4kv4", tier="merged") is None
    assert at_qk(scheme="w4a4kv4") == "hadamard" and at_qk(scheme="w4a16kv4") is None
    assert at_qk(scheme="w4a4kv4", tier="online", transforms={"qk": "none"}) is None
    assert at_qk(scheme="w4a4kv4", tier="online", preset="rtn") is None


@pytest.mark.parametrize("transforms", [{}, {"qk": "none"}, {"qk": "rope-pair+hadamard"}], ids=str)
def test_such_a_recipe_survives_its_file(tmp_path: Path, transforms: dict[str, str]) -> None:
    from affinequant.recipe.recipe import Recipe, resolve

    given = {"model": "m", "scheme": "w4a4kv4", "tier": "online", "transforms": transforms}
    recipe = resolve(given)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.from_toml(tmp_path / "recipe.toml") == recipe
    if not transforms:
        assert Recipe.from_toml(tmp_path / "recipe.toml", scheme="w4a4") == resolve(given | {"scheme": "w4a4"})


def test_a_plan_counts_the_cache_and_the_matrix(tiny: Tiny, tmp_path: Path) -> None:
    from affinequant.plan import plan

    (tmp_path / "text.txt").write_text("crows")
    fields = {"preset": "fast", "tier": "online", "data": str(tmp_path / "text.txt"), "seq_len": 32}
    fields |= {"transforms": {"qk": "hadamard"}}
    made = plan(str(tiny()), scheme="w4a4kv4", **fields)
    # Two layers, keys and values, two heads of 16: codes, and four bytes for scale and offset.
    assert made.cache_bytes == 2 * 2 * 2 * (16 // 2 + 4)
    assert made.to_json()["cache_bits"] == Scheme.parse("w4a4kv4").bits_per_cached(16) == 6.0
    without = plan(str(tiny()), scheme="w4a4kv4", **fields | {"transforms": {"qk": "none"}})
    assert made.output_bytes - without.output_bytes == 2 * 4 * 16 * 16
    merged = plan(str(tiny()), scheme="w4a16kv4", preset="fast", data=fields["data"], seq_len=32)
    assert any("16-bit KV cache" in note for note in merged.notes)
