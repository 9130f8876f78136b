"""One block at a time gives what the whole model gives; what linears read is seen once per site."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from affinequant.models import resolve
from affinequant.models.attention import register
from affinequant.models.decoder import Decoder, StopForward, like_on_disk, open_decoder, run_block, slices, spread
from affinequant.models.source import open_source

Tiny = Callable[..., Path]
IDS = torch.randint(2, 320, (3, 20), generator=torch.Generator().manual_seed(0))


def opened(folder: Path) -> tuple[Decoder, dict[str, Tensor]]:
    """The empty model of a folder, and all of its tensors in float32."""
    source = open_source(folder)
    family, dims = resolve(source.config, where="")
    state = {name: tensor.float() for name, tensor in source.read(source.entries).items()}
    return open_decoder(source, family, dims, torch.device("cpu"), torch.float32), state


def inside(state: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{index}."
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("shape", [{}, {"tied": True}, {"bias": True}, {"heads": 2, "kv_heads": 1}], ids=str)
def test_block_by_block_equals_the_model(tiny: Tiny, shape: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    decoder, state = opened(tiny(**shape))
    x, kwargs = decoder.embed(IDS, state)
    for index in range(decoder.dims.layers):
        x = run_block(decoder.block(index), decoder.family, inside(state, index), x, kwargs[index])
    whole: Any = AutoModelForCausalLM.from_pretrained(tiny(**shape), dtype=torch.float32)
    with torch.no_grad():
        expected = whole.model(IDS, output_hidden_states=True)
        normed = decoder.model.get_submodule(decoder.family.norm)
        found = torch.func.functional_call(normed, {"weight": state["model.norm.weight"]}, (x,))
    torch.testing.assert_close(found, expected.last_hidden_state)


def test_the_model_stays_empty(tiny: Tiny) -> None:
    decoder, state = opened(tiny())
    x, kwargs = decoder.embed(IDS, state)
    run_block(decoder.block(0), decoder.family, inside(state, 0), x, kwargs[0])
    assert all(parameter.is_meta for parameter in decoder.model.parameters())
    assert not any(parameter.requires_grad for parameter in decoder.model.parameters())
    assert not any(module._forward_pre_hooks for module in decoder.model.modules())


def test_a_batch_is_its_rows(tiny: Tiny) -> None:
    decoder, state = opened(tiny())
    x, kwargs = decoder.embed(IDS, state)
    together = run_block(decoder.block(1), decoder.family, inside(state, 1), x, kwargs[1])
    alone = [run_block(decoder.block(1), decoder.family, inside(state, 1), row[None], kwargs[1]) for row in x]
    torch.testing.assert_close(together, torch.cat(alone))


def test_each_site_is_asked_once_in_order_and_may_be_replaced(tiny: Tiny) -> None:
    decoder, state = opened(tiny())
    x, kwargs = decoder.embed(IDS, state)
    seen: list[tuple[str, int]] = []

    def on_input(site: str, value: Tensor) -> Tensor:
        seen.append((site, value.shape[-1]))
        return value * 0 if site == "mlp_mid" else value

    changed = run_block(decoder.block(0), decoder.family, inside(state, 0), x, kwargs[0], on_input)
    assert seen == [("attn_in", 64), ("vo", 64), ("mlp_in", 64), ("mlp_mid", 128)]
    attention_only = dict(inside(state, 0))
    attention_only["mlp.down_proj.weight"] = torch.zeros(64, 128)
    torch.testing.assert_close(changed, run_block(decoder.block(0), decoder.family, attention_only, x, kwargs[0]))


def test_a_forward_that_is_stopped_leaves_no_hooks(tiny: Tiny) -> None:
    decoder, state = opened(tiny())
    x, kwargs = decoder.embed(IDS, state)

    def stop(site: str, value: Tensor) -> Tensor:
        raise StopForward

    with pytest.raises(StopForward):
        run_block(decoder.block(0), decoder.family, inside(state, 0), x, kwargs[0], stop)
    run_block(decoder.block(0), decoder.family, inside(state, 0), x, kwargs[0])


def test_gradients_reach_lent_weights(tiny: Tiny) -> None:
    decoder, state = opened(tiny())
    x, kwargs = decoder.embed(IDS, state)
    lent = {name: tensor.clone().requires_grad_() for name, tensor in inside(state, 0).items()}
    run_block(decoder.block(0), decoder.family, lent, x, kwargs[0]).square().sum().backward()
    assert all(tensor.grad is not None and bool(tensor.grad.any()) for tensor in lent.values())


def test_activations_on_disk_are_like_those_in_memory(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 2)
    there = like_on_disk(x, tmp_path)
    there[:] = x
    assert torch.equal(there, x) and (there.shape, there.dtype) == (x.shape, x.dtype)
    assert list(tmp_path.iterdir()) == [], "a kill would leave the file behind"
    assert like_on_disk(x.bfloat16(), tmp_path).dtype == torch.bfloat16
    assert like_on_disk(x, None).shape == x.shape


def test_slices_cover_everything_once() -> None:
    rows = list(range(10))
    assert [rows[part] for part in slices(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(slices(0, 4)) == []


@pytest.mark.parametrize(("samples", "rows"), [(1, 64), (8, 64), (32, 64), (128, 64), (512, 64), (4, 24), (64, 5)])
def test_tokens_are_looked_at_as_often_as_they_occur(samples: int, rows: int) -> None:
    """Each of 16 positions alike, the first no more than others, however many samples there are; and every sample."""
    chosen = spread(samples, 16, rows, seed=3)
    counts = chosen.sum(0)
    assert chosen.shape == (samples, 16) and int(chosen.sum()) >= min(rows, samples * 16)
    assert counts.min() > 0 and counts.max() - counts.min() <= 1 and bool(chosen.any(1).all())
    assert torch.equal(chosen, spread(samples, 16, rows, seed=3))
    alike = [torch.equal(chosen, spread(samples, 16, rows, seed=seed)) for seed in range(4, 12)]
    assert all(alike) is bool(chosen.all())


def test_blocks_are_given_what_the_model_gives_each_of_them(tmp_path: Path) -> None:
    """Qwen2 as transformers has it, whose second block sees eight tokens back: block by block it is the model, and with
    the first block's mask everywhere it is not."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    window: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "num_hidden_layers": 3,
    }
    config = transformers.Qwen2Config(**sizes, **window, vocab_size=320)
    config._attn_implementation = register()
    model = transformers.Qwen2ForCausalLM(config).eval().requires_grad_(False)
    known, dims = resolve(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, where="")
    decoder = Decoder(model=model, family=known, dims=dims, device=torch.device("cpu"), dtype=torch.float32)
    state: dict[str, Tensor] = dict(model.named_parameters())
    embedded, kwargs = decoder.embed(IDS, state)
    assert len(kwargs) == 3 and not any("forward" in vars(decoder.block(index)) for index in range(3))
    expected = model.model(IDS).last_hidden_state
    for given, same in ((kwargs, True), (kwargs[:1] * 3, False)):
        x = embedded
        for index, block in enumerate(given):
            x = run_block(decoder.block(index), known, inside(state, index), x, block)
        assert torch.allclose(model.model.norm(x), expected, atol=1e-5) is same
