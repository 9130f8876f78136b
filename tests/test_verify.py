"""Nothing that was written wrongly, or is computed wrongly, passes for what the run has."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import affinequant
from affinequant import deliver
from affinequant.runtime import load as runtime
from affinequant.runtime.integer_linear import IntegerLinear
from affinequant.verify import TOLERANCE, Committed, verify

TEXT = " ".join(f"{i} grey geese over field {i % 19}" for i in range(1500))
RECIPES: dict[str, dict[str, Any]] = {
    "affinequant": {"scheme": "w4a4kv4", "tier": "online", "shape": {"bias": True}},
    "compressed-tensors": {"scheme": "w4a4-g32", "preset": "rtn", "shape": {"tied": True}},
    "int8": {"scheme": "w8a8", "tier": "merged", "activation_clip": "none", "shape": {"shards": 2}},
    "dense": {"scheme": "w4a4", "tier": "merged", "format": "dense", "shape": {"bias": True}},
}
KINDS = {
    "affinequant": "bias embed input_layernorm lm_head norm online_blocks online_left online_right post_attention_layernorm "
    "weight_packed weight_scale weight_shape weight_zero_point",
    "compressed-tensors": "embed input_layernorm norm post_attention_layernorm weight_packed weight_scale weight_shape "
    "weight_zero_point",
    "int8": "embed input_layernorm lm_head norm post_attention_layernorm weight weight_scale",
    "dense": "bias embed input_layernorm lm_head norm post_attention_layernorm weight",
}


@dataclass
class Written:
    """A folder that a run has written, and what it was held against."""

    out: Path
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def check(self, out: Path) -> dict[str, Any]:
        return verify(out, *self.arguments, **self.options)


@pytest.fixture(scope="module")
def written(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """written(format): a finished folder, made once, with the run's tensors as they were when it was verified."""
    made: dict[str, Written] = {}

    def of(name: str) -> Written:
        if name in made:
            return made[name]
        folder = tmp_path_factory.mktemp(name)
        (folder / "text.txt").write_text(TEXT)

        def seen(out: Path, contents: Any, committed: Committed, jobs: Any, *rest: Any, **options: Any) -> Any:
            blocks = [committed.block(job.index) for job in jobs]
            kept = Committed(outer=committed.outer, block=blocks.__getitem__, copied=list(committed.copied))
            made[name] = Written(out, (contents, kept, jobs, *rest), options)
            return made[name].check(out)

        fields: dict[str, Any] = {
            "preset": "fast",
            "samples": 4,
            "seq_len": 32,
            "data": folder / "text.txt",
            "out": folder / "out",
        }
        fields |= {key: value for key, value in RECIPES[name].items() if key != "shape"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deliver, "verify", seen)
            affinequant.quantize(tiny(**RECIPES[name]["shape"]), **fields)
        return made[name]

    return of


def kind(name: str) -> str:
    """What sort of tensor a name in a file is of."""
    module, _, part = name.rpartition(".")
    owner = module.rpartition(".")[2]
    return {"embed_tokens": "embed"}.get(owner, owner if "norm" in owner or owner == "lm_head" else part)


def bit(tensor: Tensor) -> Tensor:
    """With the lowest bit of one number turned."""
    changed = tensor.clone().contiguous()
    whole = changed.reshape(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
    whole[len(whole) // 2] ^= 1
    return changed


def change(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Change (or, by None, leave out) one tensor of the folder's files."""
    file = next(path for path in sorted(folder.glob("*.safetensors")) if name in load_file(path))
    tensors = load_file(file)
    value = change(tensors.pop(name))
    save_file(tensors if value is None else tensors | {name: value}, file, metadata={"format": "pt"})


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_written_is_what_the_run_has(name: str, written: Callable[[str], Written]) -> None:
    checked = json.loads((written(name).out / "report.json").read_text())["verified"]
    assert checked["passed"] and checked["wrong"] == [] and checked["tensors"] > 20
    assert checked["hidden"] < TOLERANCE / 10 and checked["tokens"] == 4 * 31


@pytest.mark.parametrize("name", RECIPES)
def test_one_bit_of_any_kind_of_tensor(name: str, written: Callable[[str], Written], tmp_path: Path) -> None:
    made = written(name)
    names = [one for file in made.out.glob("*.safetensors") for one in load_file(file)]
    kinds = {kind(one): one for one in sorted(names)}  # the last of each: in the last block
    assert sorted(kinds) == sorted(KINDS[name].split())
    for number, one in enumerate(kinds.values()):
        out = Path(shutil.copytree(made.out, tmp_path / str(number)))
        change(out, one, bit)
        checked = made.check(out)
        assert not checked["passed"], one
        shutil.rmtree(out)


@pytest.mark.parametrize("factor", [1.01, 1.5])
def test_one_scale(factor: float, written: Callable[[str], Written], tmp_path: Path) -> None:
    made = written("affinequant")
    out = Path(shutil.copytree(made.out, tmp_path / "out"))
    change(out, "model.layers.0.mlp.up_proj.weight_scale", lambda scale: (scale.float() * factor).to(scale))
    checked = made.check(out)
    assert not checked["passed"] and "model.layers.0.mlp.up_proj.scale is not what the run has" in checked["wrong"]


@pytest.mark.parametrize("of", ["lm_head.weight", "model.layers.1.mlp.down_proj.bias", "model.norm.weight"])
def test_a_tensor_that_is_missing(of: str, written: Callable[[str], Written], tmp_path: Path) -> None:
    made = written("affinequant")
    out = Path(shutil.copytree(made.out, tmp_path / "out"))
    change(out, of, lambda tensor: None)
    checked = made.check(out)
    assert not checked["passed"] and any(of in line and "missing" in line for line in checked["wrong"])


def test_a_tensor_that_is_too_many(written: Callable[[str], Written], tmp_path: Path) -> None:
    made = written("compressed-tensors")
    out = Path(shutil.copytree(made.out, tmp_path / "out"))
    file = out / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    assert any("lm_head.weight" in line for line in made.check(out)["wrong"])


def ours(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["affinequant"]


CONFIGS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "a clip": ("affinequant", lambda config: ours(config)["input_clip"].update({"model.layers.1.mlp.up_proj": 0.5})),
    "the cache": ("affinequant", lambda config: ours(config).update(kv=None)),
    "the activations": ("affinequant", lambda config: ours(config)["activation"].update(bits=8)),
    "a tie": ("affinequant", lambda config: config.update(tie_word_embeddings=True)),
    "no tie": ("compressed-tensors", lambda config: config.update(tie_word_embeddings=False)),
    "the dtype": ("dense", lambda config: config.update(dtype="float32")),
    "a norm": ("dense", lambda config: config.update(rms_norm_eps=1.0)),
}


@pytest.mark.parametrize("which", CONFIGS)
def test_what_the_config_says(which: str, written: Callable[[str], Written], tmp_path: Path) -> None:
    name, wrong = CONFIGS[which]
    made = written(name)
    out = Path(shutil.copytree(made.out, tmp_path / "out"))
    change_config(out, wrong)
    assert not made.check(out)["passed"]


class _NoClip(IntegerLinear):
    """A run time that leaves clips aside."""

    def __init__(self, *parts: Any, **settings: Any) -> None:
        super().__init__(*parts, **(settings | {"clip": 1.0}))


class _NoTransform(IntegerLinear):
    """A run time that leaves transforms aside."""

    def __init__(self, *parts: Any, **settings: Any) -> None:
        super().__init__(*parts, **(settings | {"matrices": ()}))


@pytest.mark.parametrize("kind", [_NoClip, _NoTransform])
def test_a_run_time_that_computes_something_else(
    kind: type, written: Callable[[str], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = written("affinequant")
    monkeypatch.setattr(runtime, "IntegerLinear", kind)
    checked = made.check(made.out)
    assert checked["wrong"] and all("computes something else" in line for line in checked["wrong"])
    assert checked["hidden"] > 3 * TOLERANCE
