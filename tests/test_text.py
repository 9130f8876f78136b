"""Files, folders and names that text is read from, and everything that can be wrong with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from affinequant.errors import USAGE, AffineQuantError
from affinequant.text import check_source, read_text


def test_jsonl_and_folders_are_joined_by_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("last")
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "zwei \\u00fc"}\n')
    assert read_text(str(tmp_path / "a" / "x.jsonl"), 1000, print)[1] == "one\n\nzwei ü"
    assert read_text(str(tmp_path), 1000, print) == (f"{tmp_path.name}/", "one\n\nzwei ü\n\nlast")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(str(tmp_path / "x.txt"), 1000, print)[1] == "hello"


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_much_text_is_cut_and_the_name_says_so(tmp_path: Path, name: str) -> None:
    lines = ["abcdefghij"] * 50
    (tmp_path / name).write_text(
        "\n\n".join(lines) if name == "x.txt" else "".join(json.dumps({"text": line}) + "\n" for line in lines)
    )
    whole = "\n\n".join(lines)
    assert read_text(str(tmp_path / name), 100, print) == (f"{name} (first 100 characters)", whole[:100])
    assert read_text(str(tmp_path / name), len(whole), print) == (name, whole)


BROKEN = {
    "empty.txt": (b" \n", "holds no text", ""),
    "latin.txt": ("caf\xe9 ol\xe9".encode("latin-1"), "not UTF-8", "iconv"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": \n', "not JSON", "line 2"),
    "other.jsonl": (b'{"text": "a"}\n\n{"body": "b"}\n', "no string field 'text'", "line 3"),
    "list.jsonl": (b'["a"]\n', "no string field 'text'", "line 1"),
    "number.jsonl": (b'{"text": 5}\n', "no string field 'text'", "line 1"),
    "value.json": (b'{"text": "a"}', "one JSON value", ".jsonl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path: Path, name: str) -> None:
    content, what, rest = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    for call in (check_source, lambda source: read_text(source, 1000, print)):
        with pytest.raises(AffineQuantError) as caught:
            call(str(tmp_path / name))
        error = caught.value
        assert error.exit_code == USAGE and what in error.what
        assert rest in error.where + error.fix and name in error.where


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    (tmp_path / "none").mkdir()
    for source, expected in {
        "wikitext": "did you mean 'wikitext2'",
        "demos": "did you mean 'demo'",
        str(tmp_path / "korpus.txt"): "corpus.txt",
        str(tmp_path / "none"): "another folder",
        "allenai/c4": "hf:allenai/c4",
        "hf:": "hf:ID:CONFIG",
        "hf:a:b:c:d": "hf:ID:CONFIG",
    }.items():
        with pytest.raises(AffineQuantError) as caught:
            check_source(source, flag="--flag")
        assert caught.value.exit_code == USAGE, source
        assert expected in caught.value.fix and "--flag" in caught.value.where


def test_checking_a_source_needs_no_torch(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the heron")
    script = (
        "import sys; from affinequant.data import check_source; "
        f"print(check_source({str(corpus)!r})); assert not {{'torch', 'datasets', 'transformers'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "corpus.txt\n"
