"""KL, agreement and flips beside a baseline: against float64, live against kept, in one budget of memory."""

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from affinequant_evals import checkpoint, logits, memory, reference
from affinequant_evals.checkpoint import eval_checkpoint
from affinequant_evals.part import Part
from affinequant_evals.perplexity import LanguageModel, on_text, read
from affinequant_evals.reference import Kept, Live, check_disk
from affinequant_evals.windows import Windows
from torch.utils._python_dispatch import TorchDispatchMode

import affinequant
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.recipe.recipe import Dtype
from tests import tiny as made

NAMES = ("kl", "agreement", "flips")


@pytest.fixture(scope="module")
def models(tiny: Callable[..., Path]) -> list[Any]:
    """A tiny Llama, and the same with noise on its weights, so that they agree often and not always."""
    loaded = [affinequant.load(tiny(), dtype="float32") for _ in range(2)]
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loaded[1].parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=draws))
    return loaded


def alone(model: Any, **beside: Any) -> LanguageModel:
    return LanguageModel(model=model, tokenizer=None, name="", **beside)


def windows_of(count: int = 5, length: int = 33, *, stride: int | None = None, vocabulary: int = 320) -> Windows:
    draws = torch.Generator().manual_seed(1)
    if stride:
        ids = torch.randint(vocabulary, (length + (count - 1) * stride,), generator=draws).unfold(0, length, stride)
    else:
        ids = torch.randint(vocabulary, (count, length), generator=draws)
    return Windows(ids=ids, text="text", bos="none", stride=stride)


@torch.no_grad()
def by_hand(student: Any, teacher: Any, windows: Windows) -> dict[str, torch.Tensor]:
    """Sums over each window's tokens, from whole logits in float64."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for index, ids in enumerate(windows.ids):
        places = list(windows.places(index))
        mine, theirs = (
            model(input_ids=ids[None]).logits[0, places].double().log_softmax(-1) for model in (student, teacher)
        )
        targets = ids[[place + 1 for place in places]]
        right = [logs.argmax(-1) == targets for logs in (mine, theirs)]
        found["kl"].append(float((theirs.exp() * (theirs - mine)).sum()))
        found["agreement"].append(float((mine.argmax(-1) == theirs.argmax(-1)).sum()))
        found["flips"].append(float((right[0] != right[1]).sum()))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


@pytest.mark.parametrize("stride", [None, 8])
@pytest.mark.parametrize("rows", [None, 7])
def test_live_is_what_float64_gives(
    models: list[Any], stride: int | None, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows:
        monkeypatch.setattr(logits, "BUDGET", logits.TABLES * 4 * 320 * rows)
    windows, (teacher, student) = windows_of(stride=stride), models
    live = Live(load=lambda: teacher)
    found = read(alone(student, reference=live), windows)
    expected = by_hand(student, teacher, windows)
    for name in NAMES:
        assert found[name].tolist() == pytest.approx(expected[name].tolist(), rel=1e-5, abs=1e-6), name
    assert 0 < expected["agreement"].sum() < sum(windows.counts)
    # Both models' losses are those of a pass by itself: nothing is read twice.
    assert torch.equal(found["loss"], read(alone(student), windows)["loss"])
    assert torch.equal(live.losses[windows.key], read(alone(teacher), windows)["loss"])


def test_rows_of_a_battery(models: list[Any]) -> None:
    windows, (teacher, student) = windows_of(), models
    rows = on_text(windows)(alone(student, reference=Live(load=lambda: teacher)))
    assert {name: better for name, (better, _) in rows.items()} == {
        "perplexity@text,seq33": "lower",
        "kl@text,seq33": "lower",
        "agreement@text,seq33": "higher",
        "flips@text,seq33": "lower",
    }
    expected = by_hand(student, teacher, windows)["kl"] / 32
    score = rows["kl@text,seq33"][1]
    assert score.value == pytest.approx(expected.mean().item(), rel=1e-5) and score.n == 5
    assert score.stderr == pytest.approx((expected.std() / math.sqrt(5)).item(), rel=1e-4)
    assert score.about["reference"] == "live" and score.about["tokens_scored"] == 160
    assert list(on_text(windows)(alone(student))) == ["perplexity@text,seq33"]


@pytest.mark.parametrize("stride", [None, 8])
@pytest.mark.parametrize("k", [16, 512])
def test_kept_against_live(models: list[Any], tmp_path: Path, k: int, stride: int | None) -> None:
    windows, (teacher, student) = windows_of(stride=stride), models
    kept = Kept(folder=tmp_path, k=k)
    assert not kept.holds(windows) and kept.losses(windows) is None
    with pytest.raises(AffineQuantError, match="did not get through"):
        kept.open(windows)
    needed = kept.bytes_for([windows])
    own = read(alone(teacher, record=kept), windows)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size == needed if k == 16 else size < needed  # there are no 512 logits
    assert kept.holds(windows) and kept.bytes_for([windows]) == 0
    losses = kept.losses(windows)
    assert losses is not None and torch.allclose(losses, own["loss"], rtol=1e-12)
    live, found = (read(alone(student, reference=one), windows) for one in (Live(load=lambda: teacher), kept))
    for name in ("loss", "agreement", "flips"):
        assert torch.equal(live[name], found[name])
    outside = by_hand_outside(teacher, windows, k)
    assert found["outside"].sum().item() == pytest.approx(outside, abs=1e-4)
    if k == 512:  # all of it is there
        assert found["kl"].tolist() == pytest.approx(live["kl"].tolist(), abs=1e-4)
    else:
        assert (found["at_least"] > 0).all() and (found["at_least"] < live["kl"]).all()
        assert found["kl"].sum().item() == pytest.approx(live["kl"].sum().item(), rel=0.4)  # few tokens, much drawn
        assert found["at_least"].sum() < 0.8 * live["kl"].sum()
    about = on_text(windows)(alone(student, reference=kept))[f"kl@{windows.label}"][1].about
    assert (about["reference"], about["top_k"], about["drawn"]) == ("kept", k, 32)
    assert about["outside"] == pytest.approx(outside / sum(windows.counts), abs=1e-5)


def test_what_is_drawn_has_no_bias(models: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw a token instead of 32, on many tokens: the mean is within its own error of the exact one."""
    monkeypatch.setattr(reference, "DRAWN", 1)
    windows, (teacher, student) = windows_of(40, 65), models
    kept = Kept(folder=tmp_path, k=4)
    read(alone(teacher, record=kept), windows)
    live, found = (read(alone(student, reference=one), windows)["kl"] for one in (Live(load=lambda: teacher), kept))
    error = (found - live).std() / math.sqrt(40)
    assert 0 < error < live.mean() and abs((found - live).mean()) < 4 * error


@torch.no_grad()
def by_hand_outside(teacher: Any, windows: Windows, k: int) -> float:
    total = 0.0
    for index, ids in enumerate(windows.ids):
        likely = teacher(input_ids=ids[None]).logits[0, list(windows.places(index))].double().softmax(-1)
        total += float(1 - likely.topk(min(k, 320)).values.sum(-1).mean()) * len(windows.places(index))
    return total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["live", "kept"])
def test_a_model_beside_itself_is_no_other(tiny: Callable[..., Path], tmp_path: Path, dtype: Any, way: str) -> None:
    one, same = (affinequant.load(tiny(), dtype=dtype) for _ in range(2))
    windows = windows_of()
    if way == "live":
        beside: Any = Live(load=lambda: same)
    else:
        beside = Kept(folder=tmp_path, k=16)
        read(alone(same, record=beside), windows)
    found = read(alone(one, reference=beside), windows)
    assert found["kl"].tolist() == [0.0] * 5 == found["flips"].tolist()
    assert way == "live" or found["at_least"].tolist() == [0.0] * 5
    assert found["agreement"].tolist() == list(map(float, windows.counts))


@pytest.mark.parametrize("fits", [True, False])
def test_every_delta_of_a_checkpoint_to_itself_is_0(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    monkeypatch.setattr(checkpoint, "fit_together", lambda folders, **options: fits)
    (tmp_path / "text.txt").write_text("the heron in the reed over the water " * 60)
    card = eval_checkpoint(tiny(), text=str(tmp_path / "text.txt"), seq_len=48, windows=4, baseline=tiny())
    value = card.to_json()["metrics"]
    assert [value[f"{name}@text.txt,seq48"]["value"] for name in NAMES] == [0.0, 1.0, 0.0]
    for name in NAMES:
        entry = value[f"{name}@text.txt,seq48"]
        assert entry["baseline"] is None and entry["delta"] is None and entry["stderr"] == 0
    entry = value["perplexity@text.txt,seq48"]
    assert entry["delta"]["value"] == entry["delta"]["stderr"] == 0 and entry["value"] == entry["baseline"]


@pytest.mark.parametrize("fits", [True, False])
def test_no_model_reads_a_text_twice(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    monkeypatch.setattr(checkpoint, "fit_together", lambda folders, **options: fits)
    load, read_windows = affinequant.load, {}

    def counted(folder: Path, **options: Any) -> Any:
        model: Any = load(folder, **options)
        seen = read_windows.setdefault(Path(folder).name, [])
        model.base_model.register_forward_pre_hook(
            lambda module, given, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True
        )
        return model

    monkeypatch.setattr(affinequant, "load", counted)
    (tmp_path / "text.txt").write_text("the heron in the reed over the water " * 60)
    eval_checkpoint(tiny(), text=str(tmp_path / "text.txt"), seq_len=48, windows=4, baseline=tiny(seed=1))
    assert {name: seen.count(48) for name, seen in read_windows.items()} == {tiny().name: 4, tiny(seed=1).name: 4}


def test_another_vocabulary_is_no_kl_but_a_note(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "VOCAB", 328)  # a padded head
    other = made.tiny_llama(tmp_path / "other")
    (tmp_path / "text.txt").write_text("the heron in the reed over the water " * 60)
    card = eval_checkpoint(tiny(), text=str(tmp_path / "text.txt"), seq_len=48, windows=2, baseline=other)
    assert [row.name for row in card.rows] == ["perplexity@text.txt,seq48"] and not card.failed
    assert card.baseline and not card.baseline.failed and card.compare(card.baseline)
    assert card.notes == ("no KL: the baseline has a vocabulary of 328, this model of 320",)


def test_without_kl(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the heron in the reed over the water " * 60)
    given: dict[str, Any] = {"text": str(tmp_path / "text.txt"), "seq_len": 48, "windows": 2}
    card = eval_checkpoint(tiny(), **given, baseline=tiny(seed=1), kl=False)
    assert [row.name for row in card.rows] == ["perplexity@text.txt,seq48"] and card.baseline
    card = eval_checkpoint(tiny(), **given, baseline="none")
    assert [row.name for row in card.rows] == ["perplexity@text.txt,seq48"] and len(card.notes) == 1


def test_a_pass_that_breaks_is_not_there(models: list[Any], tmp_path: Path) -> None:
    windows, (teacher, _) = windows_of(), models
    kept = Kept(folder=tmp_path, k=16)
    broken = replace(windows, ids=torch.cat([windows.ids[:3], torch.full((2, 33), 10**6)]))
    with pytest.raises(IndexError):
        read(alone(teacher, record=kept), broken)
    assert not kept.holds(broken)
    live = Live(load=lambda: teacher)
    with pytest.raises(IndexError):
        read(alone(teacher, reference=live), broken)
    assert broken.key not in live.losses


def test_what_was_read_is_not_read_again(models: list[Any]) -> None:
    """A pass that was interrupted goes on behind the last window that it noted."""
    windows, (teacher, student) = windows_of(), models
    first, whole = Part(), read(alone(student, reference=Live(load=lambda: teacher)), windows)
    read(alone(student, reference=Live(load=lambda: teacher)), replace(windows, ids=windows.ids[:3]), first)
    noted = first.waiting
    assert noted is not None and len(noted["loss"]) == 3

    class Went(Part):
        def there(self) -> dict[str, Any]:
            return dict(noted)

    seen: list[int] = []
    hook = student.base_model.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    live = Live(load=lambda: teacher)
    again = read(alone(student, reference=live), windows, Went())
    hook.remove()
    assert seen.count(33) == 2 and again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert len(live.losses[windows.key]) == 5


class Tables(TorchDispatchMode):
    """The largest tensor that is made, and the most bytes that large tensors hold at one time."""

    def __init__(self, large: int, *models: Any) -> None:
        super().__init__()
        self.large, self.largest, self.most = large, 0, 0
        self.weights = {one.untyped_storage().data_ptr() for model in models for one in model.parameters()}
        self.alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple) else (made,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage and storage.nbytes() >= self.large and storage.data_ptr() not in self.weights:
                self.largest = max(self.largest, storage.nbytes())
                self.alive[storage.data_ptr()] = (weakref.ref(tensor), storage.nbytes())
        self.alive = {place: one for place, one in self.alive.items() if one[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


def test_a_vocabulary_of_256k_stays_in_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2, which caps its logits behind the head: with no budget one table of 64 tokens would be 64 MB."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=262144,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=4,
        max_position_embeddings=128,
    )
    teacher, student = (Gemma2ForCausalLM(config).eval() for _ in range(2))
    monkeypatch.setattr(logits, "BUDGET", 48 * 2**20)
    windows = windows_of(2, 65, vocabulary=262144)
    kept = Kept(folder=tmp_path)
    for subject in (
        alone(student, reference=Live(load=lambda: teacher)),
        alone(teacher, record=kept),
        alone(student, reference=kept),
    ):
        with Tables(2**20, teacher, student) as tables:
            read(subject, windows)
        assert 12 * 2**20 == tables.largest <= logits.BUDGET / logits.TABLES
        assert tables.most <= logits.BUDGET


def test_memory_does_not_grow_with_the_text(models: list[Any], tmp_path: Path) -> None:
    teacher, student = models
    found = []
    for count in (2, 8):
        kept = Kept(folder=tmp_path / str(count))
        windows = windows_of(count, 129)
        with Tables(2**10, teacher, student) as tables:
            read(alone(student, reference=Live(load=lambda: teacher)), windows)
            read(alone(teacher, record=kept), windows)
            read(alone(student, reference=kept), windows)
        found.append(tables.most)
    assert found[0] == pytest.approx(found[1], rel=0.05)


def test_rows_at_once() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for vocabulary in (320, 32000, 49152, 151936, 262144, 10**9):
        for device in (cpu, gpu):
            rows = logits.rows_at_once(vocabulary, device)
            assert rows >= 1 and (rows == 1 or rows * 4 * vocabulary * logits.TABLES <= logits.BUDGET)
    assert logits.rows_at_once(49152, cpu) * 4 * 49152 < 2**25  # below what glibc maps anew each time
    assert logits.rows_at_once(262144, cpu) == logits.ROWS


def test_models_that_fit_together(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    numbers = sum(tensor.numel() for tensor in load_file(tiny() / "model.safetensors").values())
    assert memory.weight_bytes(tiny(), 4) == 4 * numbers and memory.weight_bytes(tiny(), 2) == 2 * numbers
    pair = (tiny(), tiny(seed=1))
    widths: tuple[tuple[Dtype, int], ...] = (("float32", 4), ("bfloat16", 2))
    for dtype, width in widths:
        needed = 2 * width * numbers + memory.ROOM
        for free, expected in ((needed, True), (needed - 1, False)):
            monkeypatch.setattr(memory, "available_bytes", lambda device, free=free: free)
            assert memory.fit_together(pair, device="cpu", dtype=dtype) is expected


def test_packed_weights_count_as_if_unpacked(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from affinequant.formats import find_format
    from tests.tiny import rounded

    find_format("auto").write(rounded(tiny(), "w4a4"), tmp_path / "w4a4")
    assert memory.weight_bytes(tmp_path / "w4a4", 4) >= memory.weight_bytes(tiny(), 4)


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    free = memory.available_bytes(torch.device("cpu"))
    assert free > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 5000\n")
    assert memory._left_in_container() == math.inf
    (tmp_path / "memory.max").write_text("3000\n")
    assert memory.available_bytes(torch.device("cpu")) == 2000


def test_a_full_disk_is_refused_before_anything_is_read(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_disk(tmp_path, 0)
    monkeypatch.setattr(reference.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr(checkpoint, "fit_together", lambda folders, **options: False)
    monkeypatch.setattr(affinequant, "load", lambda *given, **options: pytest.fail("a model was loaded"))
    (tmp_path / "text.txt").write_text("the heron in the reed over the water " * 60)
    with pytest.raises(AffineQuantError, match="are free") as caught:
        eval_checkpoint(tiny(), text=str(tmp_path / "text.txt"), seq_len=48, windows=2, baseline=tiny(seed=1))
    assert caught.value.exit_code == PREFLIGHT and "--no-kl" in caught.value.fix
