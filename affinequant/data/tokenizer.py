"""A model folder's tokenizer: looked at in seconds by a plan, opened for a run; whatever is wrong with it is said in time."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from affinequant.data.files import check_pointer, first_line, read_table
from affinequant.errors import PREFLIGHT, AffineQuantError

LINE = "The quick brown fox, 12 jumps over 3.5 lazy dogs."
"""What a tokenizer is tried on."""

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TABLES = ("tokenizer.json", "vocab.json")
_OTHERS = ("tokenizer.model", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
_GIVE = "copy tokenizer.json and tokenizer_config.json of the model there"


def check_tokenizer(folder: Path, vocab: int, *, required: bool, trust_remote_code: bool = False) -> None:
    """Open what is there of a tokenizer and encode a line, without running code that comes with it.

    A tokenizer.json alone decides where there is one: then nothing slow is imported. `vocab`: tokens that the model knows.

    Raises:
        AffineQuantError: with exit code 3: no tokenizer though `required`, one that brings code of its own which is not
            trusted, a file that is a Git LFS pointer or cannot be read, more tokens than the model knows, or none.
    """
    there = check_tables(folder)
    config = read_table(folder / "tokenizer_config.json") if "tokenizer_config.json" in there else {}
    check_code(config, "tokenizer", folder, trusted=trust_remote_code)
    if config.get("auto_map"):
        return  # its own code reads it, when the run begins
    if not any(folder.glob("*.tiktoken")) and there <= {*_SETTINGS}:
        if required:
            raise _refused("no tokenizer is there", folder, _GIVE)
    elif "tokenizer.json" in there:
        _try_fast(folder / "tokenizer.json", vocab)
    else:
        load_tokenizer(folder, vocab)


def check_tables(folder: Path) -> set[str]:
    """Names of the tokenizer's files that are there; each is itself and no pointer, and what should be JSON is.

    Raises:
        AffineQuantError: one that is not (exit 3).
    """
    there = {name for name in (*_SETTINGS, *_TABLES, *_OTHERS) if (folder / name).is_file()}
    for name in sorted(there):
        (check_pointer if name in _OTHERS else read_table)(folder / name)
    return there


def load_tokenizer(
    folder: Path, vocab: int | None = None, *, bos: bool = False, trust_remote_code: bool = False
) -> Any:
    """The transformers tokenizer of a folder, which has encoded a line.

    Args:
        bos: let it start texts with its BOS, if it has one, where it does not by itself.

    Raises:
        AffineQuantError: it cannot be loaded, gives no tokens, or gives some that a model of `vocab` does not know (exit 3).
    """
    from transformers import AutoTokenizer

    try:
        made: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        if bos and made.bos_token_id is not None and not adds_bos(made):
            made.add_bos_token = True
        ids = made(LINE, add_special_tokens=False)["input_ids"]
        largest = max(made.get_vocab().values(), default=0)
    except Exception as problem:  # whatever the files are, it is not this package's mistake
        if check_tables(folder) <= {*_SETTINGS} and not any(folder.glob("*.tiktoken")):
            raise _refused("no tokenizer is there", folder, _GIVE) from problem
        if not trust_remote_code and (folder / "tokenizer_config.json").is_file():
            check_code(read_table(folder / "tokenizer_config.json"), "tokenizer", folder, trusted=False)
        raise _unloadable(folder, problem) from problem
    _check_ids(ids, largest, vocab, folder)
    return made


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself starts a text with its BOS token."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def without_bos(folder: Path) -> tuple[str, ...]:
    """What to say of a tokenizer.json that starts no text with its BOS, where the model cannot do without; else nothing."""
    config = read_table(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if not (folder / "tokenizer.json").is_file() or config.get("auto_map") or config.get("add_bos_token") is True:
        return ()
    from tokenizers import Tokenizer

    declared = config.get("bos_token")
    name = declared.get("content") if isinstance(declared, Mapping) else declared
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = made.token_to_id(name) if isinstance(name, str) else None
    if start is None or made.encode("a").ids[:1] == [start]:
        return ()
    return (
        f"tokenizer.json starts no text with {name}, and without it this model makes nonsense: calibration and `eval` put it "
        "there, engines do not (set add_bos_token = True on the tokenizer and save it: that goes into the file)",
    )


def check_code(config: Mapping[str, Any], whose: str, folder: Path, *, trusted: bool) -> None:
    """Refuse what would run code out of the folder, unless that is trusted.

    Raises:
        AffineQuantError: it would (exit 3).
    """
    if config.get("auto_map") and not trusted:
        fix = "read that code, then add --trust-remote-code"
        raise _refused(f"this {whose} brings code of its own", folder, fix)


def _try_fast(path: Path, vocab: int) -> None:
    from tokenizers import Tokenizer

    try:
        made = Tokenizer.from_file(str(path))
        ids = made.encode(LINE, add_special_tokens=False).ids
        largest = max(made.get_vocab(with_added_tokens=True).values(), default=0)
    except Exception as problem:
        raise _unloadable(path.parent, problem) from problem
    _check_ids(ids, largest, vocab, path)


def _check_ids(ids: list[int], largest: int, vocab: int | None, where: Path) -> None:
    if not ids:
        raise _refused("the tokenizer gives no tokens for a line of text", where, "give the model's own tokenizer")
    if vocab is not None and largest >= vocab:
        fix = "give the model's own tokenizer, take the added tokens out, or resize the model's embedding and save it"
        raise _refused(f"the tokenizer gives token {largest}, the model knows {vocab}", where, fix)


def _unloadable(folder: Path, problem: Exception) -> AffineQuantError:
    """Why a tokenizer does not load, as far as its files show it."""
    model = folder / "tokenizer.model"
    if model.is_file() and not (folder / "tokenizer.json").is_file():
        # SentencePiece's files are protobuf, whose first field is a list; tiktoken's are lines of base64.
        wanted = ("sentencepiece", "protobuf") if model.read_bytes()[:1] == b"\n" else ("tiktoken",)
        missing = [name for name in wanted if not _installed(name)]
        if missing:
            what = f"only tokenizer.model is there, and reading it takes {' and '.join(missing)}"
            return _refused(what, folder, f"pip install {' '.join(missing)}, or add the model's tokenizer.json")
    fix = f"download its files again, or {_GIVE}"
    return _refused(f"the tokenizer cannot be loaded: {first_line(problem)}", folder, fix)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec("google.protobuf" if name == "protobuf" else name) is not None
    except ModuleNotFoundError:
        return False


def _refused(what: str, where: Path, fix: str) -> AffineQuantError:
    return AffineQuantError(what, str(where), fix, exit_code=PREFLIGHT)
