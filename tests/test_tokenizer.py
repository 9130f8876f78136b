"""A tokenizer that is missing, broken or another model's is refused by a plan, and by whatever opens it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from affinequant.data.tokenizer import check_tokenizer, load_tokenizer
from affinequant.errors import PREFLIGHT, AffineQuantError
from affinequant.plan import plan
from tests.tiny import VOCAB

Tiny = Callable[..., Path]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def change(file: str, **values: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return act


def write(file: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def only_model(content: bytes) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        remove(folder)
        (folder / "tokenizer.model").write_bytes(content)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')

    return act


def cut(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:400])


def with_more_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text())
    table["model"]["vocab"]["one too many"] = VOCAB
    path.write_text(json.dumps(table))


def without_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text())
    table["model"] |= {"vocab": {"<s>": 0, "</s>": 1}, "merges": []}
    path.write_text(json.dumps(table))


WRONG: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "none": (remove, "no tokenizer is there", "tokenizer.json"),
    "cut": (cut, "tokenizer.json is not JSON", "download that file again"),
    "pointer": (write("tokenizer.json", POINTER), "Git LFS pointer", "git lfs pull"),
    "pointer beside": (write("tokenizer_config.json", POINTER), "Git LFS pointer", "git lfs pull"),
    "list": (write("tokenizer.json", "[]"), "not a table", "download that file again"),
    "something else": (write("tokenizer.json", '{"model": 5}'), "cannot be loaded", "download"),
    "bytes": (write("tokenizer.json", b"\xff\xfe\x00"), "not JSON", "download that file again"),
    "config": (write("tokenizer_config.json", "{"), "tokenizer_config.json is not JSON", "download that file again"),
    "too many": (with_more_tokens, f"token {VOCAB}, the model knows {VOCAB}", "the model's own tokenizer"),
    "no tokens": (without_tokens, "no tokens for a line", "the model's own tokenizer"),
    "code": (
        change("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}),
        "brings code of its own",
        "--trust-remote-code",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_by_the_plan(tiny_copy: Tiny, tmp_path: Path, case: str) -> None:
    act, what, fix = WRONG[case]
    folder = tiny_copy()
    act(folder)
    (tmp_path / "text.txt").write_text("the heron")
    with pytest.raises(AffineQuantError) as caught:
        plan(folder, data=str(tmp_path / "text.txt"), seq_len=32, device="cpu")
    assert caught.value.exit_code == PREFLIGHT
    assert what in caught.value.what and fix in caught.value.fix


@pytest.mark.parametrize("case", [name for name in WRONG if name != "code"])
def test_and_by_whatever_opens_it(tiny_copy: Tiny, case: str) -> None:
    folder = tiny_copy()
    WRONG[case][0](folder)
    with pytest.raises(AffineQuantError) as caught:
        load_tokenizer(folder, VOCAB)
    assert caught.value.exit_code == PREFLIGHT


@pytest.mark.parametrize(
    ("content", "package"),
    [(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "sentencepiece"), (b"IQ== 0\n", "tiktoken")],
)
def test_a_tokenizer_model_alone_names_the_package(
    tiny_copy: Tiny, content: bytes, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_copy()
    only_model(content)(folder)
    monkeypatch.setattr("affinequant.data.tokenizer._installed", lambda name: False)
    with pytest.raises(AffineQuantError) as caught:
        check_tokenizer(folder, VOCAB, required=True)
    assert caught.value.exit_code == PREFLIGHT and f"pip install {package}" in caught.value.fix


def test_code_of_a_tokenizer_is_not_run_by_looking(tiny_copy: Tiny, tmp_path: Path) -> None:
    folder = tiny_copy()
    WRONG["code"][0](folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n")
    for trusted in (False, True):
        try:
            check_tokenizer(folder, VOCAB, required=True, trust_remote_code=trusted)
        except AffineQuantError:
            assert not trusted
    assert not (tmp_path / "sprung").exists()


def test_a_config_alone_can_be_planned(tiny_copy: Tiny) -> None:
    folder = tiny_copy()
    remove(folder)
    check_tokenizer(folder, VOCAB, required=False)


def test_looking_at_it_takes_no_torch(tiny: Tiny) -> None:
    script = (
        "import sys; from pathlib import Path; from affinequant.data.tokenizer import check_tokenizer; "
        f"check_tokenizer(Path({str(tiny())!r}), {VOCAB}, required=True); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
