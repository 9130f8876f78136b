"""Files, folders and names that text is read from, and everything that can be wrong with them."""

import bz2
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from affinequant.data.text import check_source, read_text
from affinequant.errors import USAGE, AffineQuantError


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


ROWS = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize("name", ["rows.jsonl", "ROWS.JSONL", "rows.ndjson", "rows.NdJson"])
def test_rows_are_rows_whatever_the_case_of_their_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(ROWS)
    assert read_text(str(tmp_path / name), 1000, print)[1] == "one\n\ntwo"
    assert read_text(str(tmp_path), 1000, print)[1] == "one\n\ntwo"


@pytest.mark.parametrize("name", ["CORPUS.TXT", "README.md", "argparse.py", "wiki.test.raw", "corpus"])
def test_plain_text_by_other_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("import this\n{ and that }")
    assert read_text(str(tmp_path / name), 1000, print)[1] == "import this\n{ and that }"


def test_half_of_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "half \\ud83d, whole \\ud83d\\ude00, other half \\ude00"}\n')
    text = read_text(str(tmp_path / "x.jsonl"), 1000, print)[1]
    assert text == "half \ufffd, whole \U0001f600, other half \ufffd" and text.encode()


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
    "null.jsonl": (b'{"text": null}\n', "no string field 'text': it is null", "line 1"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", "not JSON", "line 1"),
    "value.json": (b'{"text": "a"}', "one JSON value", ".jsonl"),
    "VALUE.JSON": (b'{"text": "a"}', "one JSON value", ".jsonl"),
    "rows.txt": (ROWS, "an object a line", "name it .jsonl"),
    "table.csv": (b"text\nriver", "a table", ".jsonl"),
    "table.TSV": (b"text\nriver", "a table", ".jsonl"),
    "page.html": (b"<p>river</p>", "markup", "a .txt file"),
    "page.xml": (b"<p>river</p>", "markup", "a .txt file"),
    "settings.yaml": (b"river: 5", "settings", ".txt"),
    "text.xyz": (b"river", "no kind of text is known by the suffix '.xyz'", "ends in .txt"),
    "rows.jsonl.gz": (gzip.compress(ROWS), "gzip", "gunzip"),
    "packed.txt": (gzip.compress(ROWS), "gzip", "gunzip"),
    "packed.jsonl": (bz2.compress(ROWS), "bzip2", "bunzip2"),
    "rows.xz": (b"river", "compressed", "unpack it"),
    "archive.txt": (b"PK\x03\x04river", "zip", "unzip"),
    "table.parquet": (b"PAR1\x15\x04", "a table", ".jsonl"),
    "table.txt": (b"PAR1\x15\x04", "a table", ".jsonl"),
    "paper.pdf": (b"%PDF-1.7\n", "document", "export it"),
    "wide.txt": ("the river".encode("utf-16"), "UTF-16", "iconv -f utf-16 "),
    "wide.jsonl": ('{"text": "a"}'.encode("utf-16"), "UTF-16", "iconv -f utf-16 "),
    "unmarked.txt": ("the river \u017e".encode("utf-16le"), "UTF-16", "iconv -f utf-16le "),
    "unmarked-be.txt": ("the river \u017e".encode("utf-16be"), "UTF-16", "iconv -f utf-16be "),
    "wider.txt": ("the river".encode("utf-32"), "UTF-32", "iconv -f utf-32 "),
    "zeros.txt": (b"river\x00\x01\x02\x03\x04\x05\x06\x07", "binary", ".txt"),
    "pointer.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS", "git lfs pull"),
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
        assert "latin1" not in error.fix


def test_what_turns_out_to_be_no_text_further_on(tmp_path: Path) -> None:
    (tmp_path / "late.txt").write_bytes(b"river " * 20_000 + b"\x00")
    with pytest.raises(AffineQuantError, match="binary"):
        check_source(str(tmp_path / "late.txt"))


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    for source, what in {
        str(tmp_path / "fifo.txt"): "no regular file",
        str(tmp_path / "link.txt"): "a link to nowhere",
        "words " * 1000 + "/x": "no such file",
        "~nobody-of-that-name/x.txt": "no such file",
        "\x00.txt": "no such file",
    }.items():
        with pytest.raises(AffineQuantError) as caught:
            check_source(source)
        assert what in caught.value.what and caught.value.exit_code == USAGE


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
        "import sys; from affinequant.data.tokens import check_source; "
        f"print(check_source({str(corpus)!r})); assert not {{'torch', 'datasets', 'transformers'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "corpus.txt\n"
