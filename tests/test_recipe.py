"""What is asked for: presets, precedence, files that are read back, refusals that name the nearest, fingerprints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from affinequant.errors import AffineQuantError
from affinequant.models import LLAMA
from affinequant.recipe.presets import PRESETS
from affinequant.recipe.recipe import Recipe, options, parse_bytes, resolve
from affinequant.recipe.tables import FLAT, Distill, Rotation
from affinequant.transforms import structures_of

MACHINE = {"device": "cpu", "gpu_memory": "22GB", "cpu_memory": "16GB", "offload": "disk", "out": "elsewhere"}


def other(name: str, value: Any) -> Any:
    """A value of a recipe field that is allowed and differs from `value`."""
    choices = {
        "model": "other", "scheme": "w8a8", "tier": "online", "preset": "fast", "format": "dense",
        "transforms": {"vo": "diagonal"}, "rounding": "nearest", "weight_clip": "none", "activation_clip": "none",
        "schedule": "constant", "start": "hadamard", "finish": "kl", "loss": "mse", "propagate": "quantized", "data": "c4",
        "dtype": "bfloat16", "judge": "kl", "keep": ("*.down_proj",), "set": {"*.down_proj": "w8a8"}, "avg_bits": 5.0,
        "balance_by": "rms",
    }  # fmt: skip
    if isinstance(value, bool):
        return not value
    return choices[name] if name in choices else (value + 1 if isinstance(value, int) else value / 2)


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "recipe.toml").write_text(text)
    return tmp_path / "recipe.toml"


@pytest.mark.parametrize("model", ["some/model", "demo"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_recipe_survives_its_file(tmp_path: Path, preset: str, model: str) -> None:
    for scheme in ("w4a4", "w4a16-g64", "w8a8", "w4a8-sym"):
        recipe = resolve({"model": model, "preset": preset, "scheme": scheme, "lr": 1e-5, "seed": 3} | MACHINE)
        assert Recipe.from_toml(written(tmp_path, recipe.to_toml())) == recipe


@pytest.mark.parametrize("transforms", [{}, {"vo": "none"}, {"vo": "hadamard+banded", "qk": "none"}])
def test_so_does_one_that_takes_transforms_away(tmp_path: Path, transforms: dict[str, str]) -> None:
    recipe = resolve({"model": "m", "transforms": transforms})
    assert Recipe.from_toml(written(tmp_path, recipe.to_toml())) == recipe
    bare = Recipe(model="m", transforms=transforms)
    read = Recipe.from_toml(written(tmp_path, bare.to_toml()))
    assert read.transforms == {site: name for site, name in transforms.items() if name != "none"}


@pytest.mark.parametrize("text", ['a "quoted" name', "back\\slash", "tab\there", "new\nline", "ümläut/模型"])
def test_odd_names_survive_the_file(tmp_path: Path, text: str) -> None:
    recipe = resolve({"model": text, "out": text})
    assert Recipe.from_toml(written(tmp_path, recipe.to_toml())) == recipe


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_sound(preset: str) -> None:
    assert set(PRESETS[preset].settings) | set(PRESETS[preset].demo) <= options().keys()
    assert PRESETS[preset].about
    for site, name in resolve({"model": "m", "preset": preset}).transforms.items():
        assert site in {spec.name for spec in LLAMA.sites}
        structures_of(name, where="test")


@pytest.mark.parametrize("preset", ["fast", "default", "best"])
@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4a16"])
def test_what_4_bit_floats_get_is_aligned_with_their_blocks(tmp_path: Path, preset: str, scheme: str) -> None:
    """No rotation of the stream; at run time one matrix for all blocks, which stock engines have a place for."""
    asked = {"model": "m", "preset": preset, "scheme": scheme}
    merged, online = (resolve(asked | {"tier": tier}) for tier in ("merged", "online"))
    assert merged.transforms == {"attn_in": "diagonal", "vo": "block", "mlp_in": "diagonal", "mlp_mid": "diagonal"}
    shared = dict.fromkeys(("attn_in", "mlp_in", "mlp_mid"), "diagonal+shared-32")
    assert online.transforms == merged.transforms | shared and merged.epochs == 0
    for recipe in (merged, online):
        path = written(tmp_path, recipe.to_toml())
        assert Recipe.from_toml(path) == recipe
        integers = Recipe.from_toml(path, scheme="w4a4", tier=recipe.tier)
        assert integers == resolve({"model": "m", "preset": preset, "scheme": "w4a4", "tier": recipe.tier})


@pytest.mark.parametrize("preset", ["fast", "default", "best"])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g64", "w4a16kv4-g64"])
def test_where_weights_alone_are_rounded_in_groups_the_stream_is_not_rotated(
    tmp_path: Path, preset: str, scheme: str
) -> None:
    asked = {"model": "m", "preset": preset, "scheme": scheme}
    merged = resolve(asked)
    assert merged.transforms == dict.fromkeys(("attn_in", "vo", "mlp_in", "mlp_mid"), "diagonal")
    assert (merged.balance, merged.balance_by, merged.rounding) == (0.15, "rms", "gptaq")
    path = written(tmp_path, merged.to_toml())
    assert Recipe.from_toml(path) == merged
    for other in (
        {"scheme": "w4a4-g64", "tier": "merged"},
        {"scheme": "w4a16"},
        {"scheme": "w4a8-g64", "tier": "merged"},
    ):
        rotated = resolve(asked | other)
        assert Recipe.from_toml(path, **other) == rotated and rotated.transforms["residual"] == "hadamard"


def test_a_preset_of_two_names_is_one_recipe(tmp_path: Path) -> None:
    first, second = (resolve({"model": "m", "preset": name}) for name in ("paper", "affinequant-paper"))
    assert first == second and first.preset == "paper" == Recipe(model="m", preset="affinequant-paper").preset
    assert Recipe.from_toml(written(tmp_path, 'model = "m"\npreset = "paper"\n')) == first


def test_a_preset_may_choose_the_tier_and_gives_way_to_who_asks(tmp_path: Path) -> None:
    assert resolve({"model": "m", "preset": "quarot"}).tier == "online"
    assert resolve({"model": "m", "preset": "quarot", "tier": "merged"}).tier == "merged"
    path = written(tmp_path, resolve({"model": "m", "preset": "quarot"}).to_toml())
    assert Recipe.from_toml(path).tier == "online"
    assert Recipe.from_toml(path, preset="rtn").tier == "merged"
    assert Recipe.from_toml(path, preset="fast").tier == "online"
    assert Recipe.from_toml(path, preset="fast", scheme="w4a16") == resolve(
        {"model": "m", "preset": "fast", "scheme": "w4a16"}
    )
    assert Recipe.from_toml(path, tier="merged").tier == "merged"
    for scheme, tier in (("w4a4", "merged"), ("w4a16", "online")):
        asked = {"model": "m", "scheme": scheme, "tier": tier}
        path = written(tmp_path, resolve(asked | {"preset": "fast"}).to_toml())
        assert Recipe.from_toml(path, preset="default") == resolve(asked)
        assert Recipe.from_toml(path, preset="quarot") == resolve(asked | {"preset": "quarot"})


TIERS = [
    ({}, "online"),
    ({"preset": "fast"}, "online"),
    ({"preset": "best", "scheme": "w4a4-g32"}, "online"),
    ({"scheme": "w4a4kv4"}, "online"),
    ({"scheme": "w4a4-sym"}, "online"),
    ({"model": "demo"}, "online"),
    ({"format": "affinequant"}, "online"),
    ({"format": "compressed-tensors"}, "merged"),
    ({"format": "dense"}, "merged"),
    ({"scheme": "w4a8"}, "online"),
    ({"scheme": "w4a8-g64-sym", "preset": "fast"}, "online"),
    ({"scheme": "w4a8", "format": "compressed-tensors"}, "merged"),
    ({"scheme": "w8a8"}, "merged"),
    ({"scheme": "w4a16-g64"}, "merged"),
    ({"scheme": "w4a16kv4"}, "merged"),
    ({"scheme": "nvfp4"}, "merged"),
    ({"scheme": "mxfp4", "preset": "fast"}, "merged"),
    ({"preset": "rtn"}, "merged"),
    ({"preset": "paper"}, "merged"),
    ({"preset": "quarot", "scheme": "w4a16"}, "online"),
    ({"preset": "flatquant", "format": "dense"}, "online"),
]


@pytest.mark.parametrize(("values", "tier"), TIERS, ids=lambda value: str(value)[:60])
def test_the_tier_where_none_is_asked_for(tmp_path: Path, values: dict[str, Any], tier: str) -> None:
    """Online where engines would not run 4 bits as they are, if preset and format have room; a file keeps it."""
    values = {"model": "m"} | values
    recipe = resolve(values)
    assert recipe.tier == tier and recipe == resolve(values | {"tier": tier})
    preset = PRESETS[recipe.preset].fields(tier, recipe.parsed_scheme)
    assert recipe.transforms == preset.get("transforms", {})
    assert Recipe.from_toml(written(tmp_path, recipe.to_toml())) == recipe
    for asked in ("merged", "online"):
        there = resolve(values | {"tier": asked})
        assert there.tier == asked and Recipe.from_toml(written(tmp_path, there.to_toml())) == there


def test_another_scheme_or_format_than_the_file_s_brings_its_own_tier(tmp_path: Path) -> None:
    def read(recipe: Recipe, **changes: Any) -> Recipe:
        return Recipe.from_toml(written(tmp_path, recipe.to_toml()), **changes)

    for change in ({"scheme": "w4a16"}, {"format": "dense"}, {"preset": "rtn"}):
        there = read(resolve({"model": "m"}), **change)
        assert there == resolve({"model": "m"} | change) and there.tier == "merged"
        assert read(there, scheme="w4a4", format="auto", preset="default") == resolve({"model": "m"})
    asked = {"model": "m", "tier": "merged"}
    assert read(resolve(asked), format="affinequant") == resolve(asked | {"format": "affinequant"})


def test_what_is_given_wins_over_the_preset_and_the_preset_over_defaults() -> None:
    merged = resolve({"model": "m", "tier": "merged"})
    assert merged.epochs == PRESETS["default"].settings["epochs"] != Recipe(model="m").epochs
    assert resolve({"model": "m"}).epochs == PRESETS["default"].online["epochs"] != merged.epochs
    assert resolve({"model": "m", "epochs": 1}).epochs == 1
    paper = resolve({"model": "m", "preset": "paper", "batch_size": 2})
    assert (paper.loss, paper.rounding, paper.batch_size) == ("mse", "nearest", 2)
    assert resolve({"model": "demo", "preset": "fast"}).samples == PRESETS["fast"].demo["samples"]
    assert resolve({"model": "demo", "preset": "fast", "samples": 5}).samples == 5
    assert resolve({"model": "demo"}).data == "demo"
    assert resolve({"model": "demo", "data": "c4"}).data == "c4"


def test_transforms_are_joined_site_by_site() -> None:
    recipe = resolve({"model": "m", "preset": "paper", "transforms": {"vo": "hadamard", "qk": "none"}})
    expected = dict(PRESETS["paper"].settings["transforms"]) | {"vo": "hadamard"}
    del expected["qk"]
    assert recipe.transforms == expected


def test_a_file_gives_way_to_arguments(tmp_path: Path) -> None:
    path = written(tmp_path, resolve({"model": "m", "preset": "paper", "samples": 7}).to_toml())
    assert Recipe.from_toml(path, samples=9).samples == 9
    assert Recipe.from_toml(path, transforms={"vo": "diagonal"}).transforms["vo"] == "diagonal"
    fast = Recipe.from_toml(path, preset="fast")
    assert (fast.samples, fast.transforms, fast.rounding) == (7, PRESETS["fast"].online["transforms"], "gptq")
    merged = Recipe.from_toml(path, preset="fast", tier="merged")
    assert (merged.samples, merged.transforms, merged.rounding) == (7, PRESETS["fast"].settings["transforms"], "gptq")


def test_a_file_of_a_person_needs_no_more_than_a_person_writes(tmp_path: Path) -> None:
    path = written(tmp_path, 'model = "m"\nscheme = "W4A16-G64"\n[transforms]\nqk = "none"\n')
    recipe = Recipe.from_toml(path)
    assert (recipe.scheme, recipe.preset) == ("w4a16-g64", "default") and "qk" not in recipe.transforms


def test_weight_only_has_no_activation_clip_unless_asked() -> None:
    assert resolve({"model": "m", "scheme": "w4a16"}).activation_clip == "none"
    assert resolve({"model": "m", "scheme": "w4a16", "activation_clip": "search"}).activation_clip == "search"
    assert resolve({"model": "m", "scheme": "w8a8"}).activation_clip == "none"
    assert resolve({"model": "m", "scheme": "w4a8"}).activation_clip != "none"


UNKNOWN = [
    ({"model": "m", "preset": "fsat"}, "unknown preset 'fsat'", "did you mean 'fast'"),
    ({"model": "m", "sample": 3}, "unknown recipe field 'sample'", "did you mean 'samples'"),
    ({"model": "m", "scheme": "w4a44"}, "unknown scheme", "did you mean 'w4a4'"),
    ({"model": "m", "rounding": "gpqt"}, "unknown rounding 'gpqt'", "did you mean 'gptq'"),
    ({"model": "m", "weight_clip": "serch"}, "unknown weight clip 'serch'", "did you mean 'search'"),
    ({"model": "m", "start": "hadamrd"}, "unknown start 'hadamrd'", "did you mean 'hadamard'"),
    ({"model": "m", "tier": "merge"}, "unknown tier 'merge'", "did you mean 'merged'"),
    ({"scheme": "w4a4"}, "no model was named", "give a folder"),
    ({"model": "m", "samples": 0}, "samples = 0", "use 1 or more"),
    ({"model": "m", "seq_len": 4}, "seq_len = 4", "use 8 or more"),
    ({"model": "m", "epochs": 1.5}, "epochs = 1.5", "type int"),
    ({"model": "m", "epochs": True}, "epochs = True", "type int"),
    ({"model": "m", "aux_loss": 1}, "aux_loss = 1", "type bool"),
    ({"model": "m", "seed": "7"}, "seed = '7'", "type int"),
    ({"model": "m", "alpha": 1.5}, "alpha = 1.5", "use 0.0 to 1.0"),
    ({"model": "m", "alpha": float("nan")}, "alpha = nan", "use 0.0 to 1.0"),
    ({"model": "m", "lr": float("inf")}, "lr = inf", "finite"),
    ({"model": "m", "clip_lr": -1.0}, "clip_lr = -1.0", "finite"),
    ({"model": "m", "gpu_memory": "lots"}, "'lots' is not a size", "22GB"),
    ({"model": "m", "transforms": {"vo": 3}}, "transforms = ", "SITE=TRANSFORM"),
    ({"model": "m", "transforms": "hadamard"}, "transforms = ", "SITE=TRANSFORM"),
    ({"model": 3}, "model = 3", "type str"),
    ({"model": "m", "distill": {"epoch": 3}}, "unknown recipe field 'distill.epoch'", "did you mean 'distill.epochs'"),
    ({"model": "m", "distill": 3}, "distill = 3", "a table of loss, epochs, lr"),
    ({"model": "m", "distill": {"lr": 1.0}, "finish_lr": 2.0}, "distill.lr and finish_lr are one option", "once"),
    ({"model": "m", "distill": {"epochs": 0}}, "finish_epochs = 0", "use 1 or more"),
    ({"model": "m", "rotation": {"lr": "x"}}, "rotation_lr = 'x'", "type float"),
]


@pytest.mark.parametrize(("values", "what", "fix"), UNKNOWN, ids=lambda value: str(value)[:40])
def test_refusals(values: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(AffineQuantError) as caught:
        resolve(values)
    assert what in caught.value.what and fix in caught.value.fix and caught.value.exit_code == 2
    assert caught.value.where


@pytest.mark.parametrize(
    ("text", "what"),
    [("model =", "is not TOML"), ("\xff", "is not TOML"), ('model = "m"\nsed = 1', "unknown recipe field 'sed'")],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "recipe.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(AffineQuantError, match=what):
        Recipe.from_toml(tmp_path / "recipe.toml")
    with pytest.raises(AffineQuantError, match="cannot read"):
        Recipe.from_toml(tmp_path / "absent.toml")


@pytest.mark.parametrize("name", options())
def test_the_fingerprint_holds_what_decides_the_bytes_and_only_that(name: str) -> None:
    recipe = Recipe(model="m", scheme="w4a4kv4")
    now = MACHINE[name] if name in MACHINE else other(name, getattr(recipe, name))
    changed = replace(recipe, **{name: now})
    assert getattr(changed, name) == now
    before, after = recipe.fingerprint(), changed.fingerprint()
    assert {key for key in {**before, **after} if before.get(key) != after.get(key)} == {name} - MACHINE.keys()


def test_every_option_explains_itself() -> None:
    for entry, _ in options().values():
        assert entry.metadata["help"] and entry.metadata["group"] in ("what", "method", "data", "machine", "output")


ASKED: dict[str, Any] = {"finish": "kl", "finish_epochs": 3, "rotation_steps": 7}
TABLED: dict[str, Any] = {"distill": {"loss": "kl", "epochs": 3}, "rotation": {"steps": 7}}


@pytest.mark.parametrize("given", [TABLED, {"distill": Distill(loss="kl", epochs=3), "rotation": Rotation(steps=7)}])
def test_a_method_s_options_have_a_table_and_flat_names(given: dict[str, Any]) -> None:
    """Whichever way they come, they are one recipe with one fingerprint, whose names are those from before the tables."""
    bare = Recipe(model="m")
    recipe = replace(bare, **given)
    assert recipe == Recipe(**{"model": "m"} | ASKED) == replace(bare, **ASKED) != bare
    assert (recipe.distill.loss, recipe.distill.epochs, recipe.rotation.steps) == ("kl", 3, 7)
    assert all(recipe.fingerprint()[name] == getattr(recipe, name) == value for name, value in ASKED.items())
    assert FLAT.keys() < recipe.fingerprint().keys() and not TABLED.keys() & recipe.fingerprint().keys()
    assert replace(recipe, finish_lr=0.5).distill == replace(recipe.distill, lr=0.5)


@pytest.mark.parametrize("preset", ["fast", "default", "spinquant"])
def test_a_table_in_a_file_means_what_its_flat_names_do(tmp_path: Path, preset: str) -> None:
    for model in ("m", "demo"):
        flat = f'model = "{model}"\npreset = "{preset}"\nfinish = "kl"\nfinish_epochs = 3\nrotation_steps = 7\n'
        table = flat.split("finish")[0] + '[distill]\nloss = "kl"\nepochs = 3\n[rotation]\nsteps = 7\n'
        expected = resolve({"model": model, "preset": preset} | ASKED)
        assert expected == resolve({"model": model, "preset": preset} | TABLED)
        for text in (flat, table, expected.to_toml()):
            assert Recipe.from_toml(written(tmp_path, text)) == expected
            assert Recipe.from_toml(tmp_path / "recipe.toml", finish_epochs=4).distill.epochs == 4
            assert Recipe.from_toml(tmp_path / "recipe.toml", distill={"epochs": 4}).distill.loss == "kl"
        # What a table's preset had filled in, another preset fills anew.
        assert Recipe.from_toml(tmp_path / "recipe.toml", preset="best").distill.lr == 2e-3
    text = resolve({"model": "m"}).to_toml()
    assert '[distill]\nloss = "kl"\nepochs = 2\nlr = 0.002\n' in text and "finish" not in text


def test_the_output_folder_is_named_after_model_and_scheme() -> None:
    assert resolve({"model": "org/Llama-7b"}).output_folder() == Path("Llama-7b-w4a4")
    assert resolve({"model": "/models/x/", "scheme": "w4a16-g64"}).output_folder() == Path("x-w4a16-g64")
    assert resolve({"model": "m", "out": "there"}).output_folder() == Path("there")
    assert resolve({"model": "."}).output_folder().name == f"{Path.cwd().name}-w4a4"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", None),
        ("22GB", 22 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("512mb", 2**29),
        ("7k", 7 * 2**10),
        ("1TB", 2**40),
        ("99", 99),
    ],
)
def test_sizes(text: str, size: int | None) -> None:
    assert parse_bytes(text, flag="--x") == size


@pytest.mark.parametrize("text", ["0", "-1GB", "GB", "1XB", "nan", "inf", "1e999"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(AffineQuantError, match="not a size"):
        parse_bytes(text, flag="--x")
