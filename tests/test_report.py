"""The page of a run, of scores, of presets, of research: that it says what the JSON says, and nothing else gets in."""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student

import affinequant
from affinequant import AffineQuantError
from affinequant.cli import main
from affinequant.report.building import build_page
from affinequant.report.figure import Axis, Figure, Series
from affinequant.report.html import to_html
from affinequant.report.markdown import to_markdown
from affinequant.report.reading import Made, Sources, read_sources
from affinequant.report.words import plain
from tests.reports import LINEARS, SITES, Seen, comparison, leaves, made_report, metric, reads_as, scores, with_seeds

Capture = pytest.CaptureFixture[str]
RECIPE = 'model = "tiny"\nscheme = "w4a4"\n'


def sources(report: Mapping[str, Any] | None = None, *cards: Mapping[str, Any]) -> Sources:
    made = Made(folder=Path("out"), report=report, recipe=RECIPE) if report is not None else None
    return Sources(place=Path(), made=made, scores=cards)


def html_of(report: Mapping[str, Any] | None = None, *cards: Mapping[str, Any]) -> str:
    return to_html(build_page(sources(report, *cards)))


@pytest.fixture(scope="module")
def page() -> str:
    """Of a run with everything, and its scores."""
    return html_of(made_report(), scores())


# Every number is one of the JSON's.


def column(report: Mapping[str, Any], key: str) -> list[Any]:
    return [block[key] for block in report["blocks"]]


def histograms(block: Mapping[str, Any], part: str) -> list[Any]:
    series = []
    for name, one in block[part].items():
        panel = name.split(".")[-1].removesuffix("_proj")
        for when in ("before", "after"):
            low, high, count = one[when]["low"], one[when]["high"], len(one[when]["counts"])
            edges = [low + (high - low) * n / count for n in range(count + 1)]
            series.append({"name": when, "panel": panel, "x": edges, "y": one[when]["counts"]})
    return series


def expected_figures(report: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> the series of each figure, read straight out of the JSON."""
    blocks, metrics = report["blocks"], card["metrics"]
    perplexity, tasks = metrics["perplexity@demo,seq2048"], [metrics["piqa,acc"], metrics["boolq,acc"]]
    rows = [0, 1]

    def before(ones: list[Any]) -> dict[str, Any]:
        ends = [one["baseline_interval"] for one in ones]
        low, high = ([pair[n] for pair in ends] for n in (0, 1))
        return {"name": "full precision", "y": [one["baseline"] for one in ones], "low": low, "high": high}

    def after(ones: list[Any]) -> dict[str, Any]:
        ends = [[one["interval"][n] for one in ones] for n in (0, 1)]
        return {"name": "quantised", "y": [one["value"] for one in ones], "low": ends[0], "high": ends[1]}

    differences = {
        "y": [one["delta"]["value"] for one in tasks],
        "low": [one["delta"]["interval"][0] for one in tasks],
        "high": [one["delta"]["interval"][1] for one in tasks],
    }
    found: dict[str, Any] = {
        "scores-perplexity": [before([perplexity]), after([perplexity])],
        "scores-tasks": [before(tasks), after(tasks)],
        "scores-differences": [differences],
        "sqnr-blocks": [{"x": rows, "y": column(report, "sqnr")}],
        "sqnr-linears": [{"cells": [[block["linears"][name]["sqnr"] for name in LINEARS] for block in blocks]}],
        "sqnr-inputs": [{"cells": [[block["inputs"][site]["sqnr"] for site in SITES] for block in blocks]}],
        "curves": [{"name": f"block {n}", "x": [1, 2, 3], "y": block["curve"]} for n, block in enumerate(blocks)],
        "losses": [
            {"name": "before", "x": rows, "y": column(report, "loss_first")},
            {"name": "after", "x": rows, "y": column(report, "loss_last")},
        ],
        "curve-finish": [
            {"name": "training", "x": [0.5 * n for n in range(1, 7)], "y": report["finish"]["trace"]},
            {"name": "held-out", "x": [0, 1, 2, 3], "y": report["finish"]["divergence"]},
        ],
        "scaling-attn_in": [
            {"name": f"block {n}", "x": [0, 1, 2], "y": block["pictures"]["attn_in"]["cells"][0]}
            for n, block in enumerate(blocks)
        ],
        "conditions": [{"cells": [list(block["conditions"].values()) for block in blocks]}],
        "picture-mlp_in-online": [
            {"name": f"block {n}, {part}", "cells": block["pictures"][f"mlp_in online {part}"]["cells"]}
            for n, block in enumerate(blocks)
            for part in ("left", "right")
        ],
        "picture-vo": [
            {"name": f"block {n}, epoch {one['epoch']}, band {one['band']}", "cells": one["cells"]}
            for n, block in enumerate(blocks)
            for one in block["pictures"]["vo"]["epochs"]
        ],
        "phases-seconds": [{"y": [one["seconds"] for one in report["phases"]]}],
        "phases-peak-bytes": [{"y": [one["peak_bytes"] / 2**30 for one in report["phases"]]}],
        "bytes": [{"y": [size / 2**20 for size in byte_sizes(report).values()]}],
    }
    for n, block in enumerate(blocks):
        for part in ("inputs", "weights"):
            found[f"histogram-{part}-{n}"] = histograms(block, part)
    return found


SHAPES = {
    "q": (64, 64),
    "k": (32, 64),
    "v": (32, 64),
    "o": (64, 64),
    "gate": (128, 64),
    "up": (128, 64),
    "down": (64, 128),
}


def byte_sizes(report: Mapping[str, Any]) -> dict[str, float]:
    """Of two blocks at w4a4: four bits, and 16 + 4 of scale and zero for each row; tables in 16 bits."""
    sizes = {name: 2 * rows * (4 * columns + 20) / 8 for name, (rows, columns) in SHAPES.items()}
    sizes |= {"embeddings": 2 * 320 * 64, "head": 2 * 320 * 64}
    return sizes | {"rest": report["weight_bytes"] - sum(sizes.values())}


def expected_numbers(report: Mapping[str, Any], card: Mapping[str, Any]) -> list[float]:
    """Whatever number may stand on the page: of the JSON, or what follows from it."""
    metrics = card["metrics"].values()
    found = [*leaves(report), *leaves(card), *range(1, 4)]
    found += [one["value"] / one["baseline"] for one in metrics if one["baseline"]]
    for one in expected_figures(report, card).values():
        found += leaves(one)
    sizes, weights = byte_sizes(report), {name: 2 * rows * columns for name, (rows, columns) in SHAPES.items()}
    inside, table = sum(weights.values()), 320 * 64
    total = report["weight_bytes"]
    found += [*sizes.values(), *(100 * size / total for size in sizes.values()), 100.0, *weights.values(), table, 16]
    found += [inside + 2 * table, 8 * total / (inside + 2 * table)]
    found += [8 * sizes[name] / count for name, count in weights.items()]
    online = sum(site["flops_per_token"] for site in report["plan"]["sites"])
    return [*found, online, inside, 100 * online / inside]  # two blocks, two operations for each weight of one


def close(shown: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return (
            isinstance(shown, dict)
            and shown.keys() == wanted.keys()
            and all(close(shown[k], wanted[k]) for k in wanted)
        )
    if isinstance(wanted, list):
        return isinstance(shown, list) and len(shown) == len(wanted) and all(map(close, shown, wanted))
    return math.isclose(shown, wanted, rel_tol=1e-9) if isinstance(wanted, int | float) else shown == wanted


def mismatches(html: str, report: Mapping[str, Any], card: Mapping[str, Any]) -> list[str]:
    """Where a page and the JSON differ."""
    seen, wanted, known = Seen(html), expected_figures(report, card), expected_numbers(report, card)
    found = [f"figures: {seen.figures.keys() ^ wanted.keys()}"] if seen.figures.keys() != wanted.keys() else []
    found += [key for key, series in wanted.items() if not close(seen.figures.get(key, {}).get("series"), series)]
    for value, text in seen.numbers:
        if not any(math.isclose(value, one, rel_tol=1e-9) for one in known):
            found.append(f"{value} is nowhere in the JSON")
        if not reads_as(text, value):
            found.append(f"{text} does not say {value}")
    return found


def test_every_number_is_the_json_s(page: str) -> None:
    assert mismatches(page, made_report(), scores()) == []
    assert len(Seen(page).numbers) > 200


CHANGES: dict[str, tuple[str, str]] = {
    "a number's value": (r'<data value="(21\.75367)">', "21.76"),
    "a number's text": (r'<data value="21\.75367">(21\.75)<', "21.76"),
    "a size": (r'<data value="165227">(0\.16) MB<', "0.17"),
    "a point of a curve": (r'data-key="curves" data-figure="[^"]*?y&#34;:\[([\d.]+),', "2.5"),
    "a cell": (r'data-key="sqnr-linears" data-figure="[^"]*?\[\[([\d.]+),', "2.5"),
    "a count": (r'data-key="histogram-weights-1" data-figure="[^"]*?y&#34;:\[(3),', "4"),
    "a figure's name": (r'data-key="(curves)"', "curve"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_wrong_number_is_found(page: str, case: str) -> None:
    pattern, other = CHANGES[case]
    hit = re.search(pattern, page)
    assert hit, "the page has no such place"
    changed = page[: hit.start(1)] + other + page[hit.end(1) :]
    assert mismatches(changed, made_report(), scores())


# One file, for everyone.


def test_it_fetches_and_runs_nothing(page: str) -> None:
    seen = Seen(page)
    tags = {tag for tag, _ in seen.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "img", "form", "base"}
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|javascript:", page)
    for tag, attributes in seen.tags:
        assert not any(name.startswith("on") or name == "src" for name in attributes), tag
        links = [value for name, value in attributes.items() if name in ("href", "xlink:href")]
        assert all(value and value.startswith(("#", "data:image/png;base64,")) for value in links)
    assert "default-src 'none'" in page and len(page.encode()) < 3 * 2**20
    assert page.startswith("<!doctype html>") and 'name="viewport"' in page


def test_light_dark_and_narrow(page: str) -> None:
    assert "prefers-color-scheme: dark" in page and "max-width: 520px" in page
    used, defined = set(re.findall(r"var\((--[\w-]+)\)", page)), set(re.findall(r"(--[\w-]+):", page))
    assert used <= defined and {"--ink", "--c1", "--c2"} <= used
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", drawn), "a colour that no theme decides"


def test_what_is_drawn_is_said_in_words(page: str) -> None:
    seen = Seen(page)
    figures = [attributes for tag, attributes in seen.tags if tag == "figure"]
    images = [attributes for _, attributes in seen.tags if attributes.get("role") == "img"]
    assert len(images) >= len(figures) > 12 and all(len(one["aria-label"] or "") > 20 for one in images)
    assert page.count("<svg") == len(images)
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> ${{7*7}} $x$ & --> ]]> \u202e|`**_[a](b)"


def test_hostile_names_are_text() -> None:
    report = made_report(model=f"/models/{HOSTILE}".replace("</", "<"), preset=HOSTILE, events=[HOSTILE])
    for block in report["blocks"]:
        del block["inputs"], block["weights"], block["pictures"]
    report["blocks"][0]["linears"][HOSTILE] = {"sqnr": 3.3}
    report["plan"]["sites"][0]["reason"] = HOSTILE
    report["phases"][0]["name"] = HOSTILE
    card = scores(samples=[{"prompt": HOSTILE, "baseline": None, "text": HOSTILE, "suspicious": "one token"}])
    card["metrics"][HOSTILE] = metric(1.0, 2.0)
    built = build_page(sources(report, card))
    html, markdown = to_html(built), to_markdown(built)
    seen = Seen(html)
    assert not {"script", "img"} & {tag for tag, _ in seen.tags} and not any("onerror" in a for _, a in seen.tags)
    assert HOSTILE in "".join(seen.text) and "{{7*7}}" in html and "49" not in "".join(seen.text).split("$")
    assert "<script" not in markdown and "<img" not in markdown and "](b)" not in markdown.replace("\\](b)", "")


# Other kinds of sources.


def test_what_is_not_there_has_no_section() -> None:
    full = build_page(sources(made_report(), scores()))
    titles = [section.title for section in full.sections]
    assert "Learning" in titles and "Gates" in titles
    for key in ("plan", "blocks", "finish", "phases", "calibration", "env", "verified", "events", "bytes", "preset"):
        old = made_report()
        del old[key]
        assert len(build_page(sources(old)).sections) > 2, key
    bare = build_page(sources({"schema": 1, "blocks": []}))
    assert "Nothing was measured" in plain(bare.verdict) and not list(bare.figures)
    for key in ("curve", "inputs", "weights", "pictures", "conditions", "loss_first", "seconds"):
        old = made_report()
        for block in old["blocks"]:
            del block[key]
        assert list(build_page(sources(old)).figures), key


@pytest.mark.parametrize("broken", [{"blocks": 3}, {"scheme": "w9a9"}, {"phases": 7}, {"blocks": [{"linears": [1]}]}])
def test_values_that_no_report_has_are_refused_or_left_out(broken: dict[str, Any]) -> None:
    try:
        built = build_page(sources(made_report(**broken)))
    except AffineQuantError as problem:
        assert "not what a report has" in problem.what and problem.exit_code == 3
    else:
        assert "bytes" not in [figure.key for figure in built.figures]


def test_an_untrained_run_has_no_losses() -> None:
    report = made_report()
    for block in report["blocks"]:
        block |= {"loss_first": None, "loss_last": None}
        del block["curve"]
    keys = [figure.key for figure in build_page(sources(report)).figures]
    assert "losses" not in keys and "curves" not in keys and "sqnr-blocks" in keys


def test_without_scores_it_is_said_that_the_text_was_seen() -> None:
    built = build_page(sources(made_report()))
    assert "fitted to" in plain(built.verdict) and "in sample" in built.sections[0].about


def test_an_export_is_told_by_its_own_words() -> None:
    checked = {"passed": True, "divergence": 9.34e-06, "reference": "the source's weights"}
    report = {
        "exported_from": "/home/someone/out",
        "model": "x/y",
        "format": "gguf",
        "scheme": "w4a16",
        "verified": checked,
    }
    built = build_page(sources(report | {"activations": "16 bits", "bytes": 317_092, "files": ["model.gguf"]}))
    assert (
        plain(built.verdict) == "Exported as gguf, nothing retrained: 9.3e-06 nats per token from the source's weights."
    )
    text = to_markdown(built)
    assert "vllm serve" not in text and "| exported from | out |" in text and "| activations | 16 bits |" in text


def test_scores_alone() -> None:
    built = build_page(sources(None, scores()))
    assert built.title == "Scores of out" and "rises 1.18 times" in plain(built.verdict)


def test_of_several_scores_the_last_count() -> None:
    older = scores(metrics={"perplexity@c4,seq2048": metric(30.5, 25.5), "kl@demo,seq2048": metric(0.9, None)})
    built = build_page(sources(None, older, scores()))
    values = [value for value, _ in Seen(to_html(built)).numbers]
    assert plain(built.verdict).startswith("Perplexity on demo rises") and 30.5 in values and 0.9 not in values


def test_scores_of_before_there_were_intervals() -> None:
    card = scores()
    for one in card["metrics"].values():
        one["delta"] = one["delta"] and {name: one["delta"][name] for name in ("value", "stderr", "paired", "dof")}
        del one["interval"], one["baseline_interval"]
    figures = {figure.key: figure.series for figure in build_page(sources(None, card)).figures}
    t = student.ppf(0.975, 5)
    before, after = figures["scores-perplexity"]  # an exponential of a mean loss
    assert close(
        [before.low[0], after.high[0]],
        [18.36488 * math.exp(-t * 1.0755 / 18.36488), 21.75367 * math.exp(t * 1.2355 / 21.75367)],
    )
    assert close(figures["scores-tasks"][1].high[0], 0.6012 + t * 1.2355)
    assert close(figures["scores-differences"][0].low[0], 0.6012 - 0.6634 - t * 0.231)


def test_the_verdict_says_what_may_be_chance() -> None:
    card = scores()
    card["metrics"]["perplexity@demo,seq2048"]["delta"]["interval"] = [-0.5, 4.0]
    assert "may be chance" in plain(build_page(sources(None, card)).verdict)
    card["metrics"]["perplexity@demo,seq2048"]["baseline"] = 21.75367
    assert "is the same" in plain(build_page(sources(None, card)).verdict)


def test_what_failed_or_looks_broken_comes_first() -> None:
    gate = {
        "metric": "kl@demo,seq2048",
        "kind": "kl",
        "value": 0.4,
        "limit": 0.3,
        "passed": False,
        "said": "kl over by 0.1",
    }
    built = build_page(sources(None, scores(gates=[gate])))
    assert built.bad and plain(built.verdict).startswith("FAILED: kl over by 0.1;")
    unknown = gate | {"value": None, "said": "kl cannot be judged"}
    assert "not measured" in to_markdown(build_page(sources(None, scores(gates=[unknown]))))
    sample = {"prompt": "Once", "baseline": "a", "text": "!!!!", "suspicious": "one token", "baseline_suspicious": ""}
    built = build_page(sources(None, scores(samples=[sample, sample | {"prompt": "Twice", "suspicious": ""}])))
    assert built.bad and plain(built.verdict).startswith("1 of 2 greedy texts looks broken;")
    assert "Looks broken after: Once (one token)." in to_markdown(built)
    as_the_baseline = build_page(sources(None, scores(samples=[sample | {"baseline_suspicious": "one token"}])))
    assert not as_the_baseline.bad


def test_a_metric_that_failed_is_told() -> None:
    card = scores()
    card["metrics"]["perplexity@demo,seq2048"] |= {"value": None, "delta": None, "error": "no memory"}
    built = build_page(sources(None, card))
    assert built.bad and "failed: no memory" in "".join(Seen(to_html(built)).text)


ERRORS = {18.3649: 1.0755, 23.5123: 1.3111, 21.7537: 1.2355}


def test_presets_side_by_side() -> None:
    found = comparison()
    found["presets"].append({"preset": "rtn", "error": {"what": "died", "where": "there", "fix": "again"}})
    built = build_page(Sources(place=Path(), comparison=found))
    seen = Seen(to_html(built))
    half = {value: student.ppf(0.975, 5) * stderr / value for value, stderr in ERRORS.items()}
    [series] = seen.figures["presets"]["series"]
    assert series["y"] == [18.3649, 23.5123, 21.7537]
    assert close(series["low"], [value * math.exp(-share) for value, share in half.items()])
    assert close(series["high"], [value * math.exp(share) for value, share in half.items()])
    known = [*leaves(found), 60 * 2.7654, *leaves(series)]
    assert all(any(math.isclose(value, one) for one in known) and reads_as(text, value) for value, text in seen.numbers)
    assert built.bad and "rtn: died; there; again" in "".join(seen.text)


def test_presets_over_seeds_have_their_noise() -> None:
    found = with_seeds()
    built = build_page(Sources(place=Path(), comparison=found))
    seen = Seen(to_html(built))
    series = seen.figures["seeds"]["series"]
    assert series == [{"name": "seed 0", "y": [1.2755, 1.1811]}, {"name": "seed 1", "y": [1.2851, 1.1879]}]
    values = [value for value, _ in seen.numbers]
    assert {-0.0958, 0.0412, 0.0067, 0.0048, 1.2803} <= set(values) and "better" in seen.text
    assert all(reads_as(text, value) for value, text in seen.numbers)


def test_research_draws_its_own_figures() -> None:
    figure = Figure(
        kind="line", title="reward", series=(Series(name="a", y=(1.5, 2.5)),), x=Axis(label="step"), key="mine"
    )
    table = {"title": "claims", "columns": ["claim", "measured"], "rows": [["it learns", 0.125]]}
    report = {"title": "grokalign", "verdict": "1 of 1 claims hold.", "facts": {"seed": 3}, "tables": [table]}
    built = build_page(Sources(place=Path(), research=report | {"figures": [figure.to_json()]}))
    seen = Seen(to_html(built))
    assert Figure.from_json(seen.figures["mine"]) == figure
    assert (0.125, "0.1250") in seen.numbers and (3.0, "3") in seen.numbers and built.title == "grokalign"
    for broken in ({"figures": 3}, {"figures": [{"kind": "pie"}]}, {"tables": [{"rows": [[1]]}]}, {"tables": [3]}):
        with pytest.raises(AffineQuantError):
            build_page(Sources(place=Path(), research=report | broken))


def test_a_graph_is_told_edge_by_edge() -> None:
    one = Series(name="seed 0", names=("01", "1_1"), cells=((0.5, 0.125), (0.0, 0.375)))
    figure = Figure(kind="graph", title="ways", series=(one,), value=Axis(label="share"), key="ways")
    built = build_page(Sources(place=Path(), research={"title": "t", "figures": [figure.to_json()]}))
    seen, lines = Seen(to_html(built)), to_markdown(built).splitlines()
    assert seen.figures["ways"]["series"][0]["names"] == ["01", "1_1"]
    assert {value for value, _ in seen.numbers} >= {0.5, 0.125, 0.375}
    start = lines.index("| from | to | share |")
    assert lines[start + 2 : start + 5] == ["| 01 | 01 | 0.5000 |", "| 1_1 | 1_1 | 0.3750 |", "| 01 | 1_1 | 0.1250 |"]
    many = [f"n{index}" for index in range(30)]
    crowd = figure.to_json() | {"series": [{"names": many, "cells": [[1.0] * 30] * 30}]}
    assert "n7" not in to_markdown(build_page(Sources(place=Path(), research={"title": "t", "figures": [crowd]})))


def test_markdown_holds_the_tables(page: str) -> None:
    text = to_markdown(build_page(sources(made_report(), scores())))
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("| perplexity@demo,seq2048 |"))
    assert row.split("|")[2].strip() == "18.36 (16.4 to 20.4)" and row.split("|")[3].strip().startswith("21.75 (")
    assert next(line for line in lines if line.startswith("**")).startswith("**Perplexity on demo rises 1.18 times")
    assert "/home/someone" not in text and RECIPE not in text and "vllm serve ./out" in text
    tables = [line for line in lines if line.startswith("|")]
    for before, line in itertools.pairwise(lines):
        if before.startswith("|") and line.startswith("|"):
            assert len(re.split(r"(?<!\\)\|", before)) == len(re.split(r"(?<!\\)\|", line))
    assert len(tables) > 20


# A real run, and the command.


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `paper` on a tiny model; tests copy it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(" ".join(f"{n} green bottles hang on wall {n % 7}." for n in range(1200)))
    wanted = {"scheme": "w4a4", "tier": "merged", "preset": "paper", "epochs": 2, "samples": 4, "seq_len": 32}
    affinequant.quantize(str(tiny()), data=str(folder / "text.txt"), out=str(folder / "tiny w4a4"), **wanted)
    return folder / "tiny w4a4"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of what of it a page is made from, with few pictures."""
    folder = tmp_path / "tiny w4a4"
    folder.mkdir()
    for name in ("config.json", "recipe.toml"):
        (folder / name).write_bytes((made / name).read_bytes())
    report = json.loads((made / "report.json").read_text())
    for block in report["blocks"]:
        del block["weights"], block["pictures"]
    _written(folder / "report.json", report)
    return folder


def test_a_run_as_it_is(made: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    seen = Seen(to_html(build_page(read_sources([made]))))
    assert seen.figures["sqnr-blocks"]["series"][0]["y"] == [block["sqnr"] for block in report["blocks"]]
    shown = {"sqnr-linears", "sqnr-inputs", "curves", "conditions", "bytes", "phases-seconds", "histogram-weights-1"}
    assert shown | {"losses", "scaling-mlp_in", "picture-vo", "histogram-inputs-0"} <= seen.figures.keys()
    first, last = seen.figures["picture-vo"]["series"][:2]
    assert (first["name"], last["name"]) == ("block 0, epoch 1, band 1", "block 0, epoch 2, band 16")
    assert last["cells"] == report["blocks"][0]["pictures"]["vo"]["epochs"][1]["cells"]
    assert all(reads_as(text, value) for value, text in seen.numbers)
    assert 'scheme = "w4a4"' in "".join(seen.text) and "vllm serve './tiny w4a4'" in "".join(seen.text)


def test_the_same_files_give_the_same_bytes(run: Path) -> None:
    assert to_html(build_page(read_sources([run]))) == to_html(build_page(read_sources([run])))


def test_the_command(run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["report", str(run), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["html"] == str(run / "report.html") and value["bytes"] == (run / "report.html").stat().st_size
    assert "sqnr-linears" in value["figures"] and value["failed"] is False
    (tmp_path / "scores.json").write_text(json.dumps(scores(str(run))))
    assert main(["report", str(tmp_path / "scores.json"), str(run)]) == 0  # over the page of before
    assert "rises 1.18 times" in capsys.readouterr().out
    assert "rises 1.18 times" in (run / "report.md").read_text()
    assert main(["report", str(run / "report.json"), "-o", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.md").exists()


def test_what_quantize_and_demo_print_is_read(run: Path, tmp_path: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    said = tmp_path / "demo.json"
    said.write_text(json.dumps({"schema": 1, "path": str(run), "report": report, "scores": scores(str(run))}))
    assert read_sources([said]).scores and read_sources([said]).made.recipe  # type: ignore[union-attr]
    said.write_text(json.dumps({"schema": 1, "path": "x", "report": {"title": "t", "verdict": "v"}}))
    assert read_sources([said]).research
    moved = read_sources([run, _written(tmp_path / "s.json", scores(f"/elsewhere/{run.name}"))])
    assert moved.made and moved.scores and moved.place == run


def _written(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


REFUSED: dict[str, tuple[Any, int, str]] = {
    "half of it": (json.dumps(scores())[:200], 3, "cut short"),
    "no object": ([1, 2], 3, "holds no JSON object"),
    "something else": ({"name": "x", "version": 2}, 3, "no report and no scores"),
    "an error": ({"schema": 1, "error": {"what": "no such model"}}, 2, "the error of a command: no such model"),
    "scores of another": (scores("another-folder"), 2, "the scores are of another-folder"),
    "another run": (made_report(), 2, "about one run and its scores"),
    "a comparison": (comparison(), 2, "about one run and its scores"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_page(case: str, run: Path, tmp_path: Path, capsys: Capture) -> None:
    value, code, says = REFUSED[case]
    assert main(["report", str(run), str(_written(tmp_path / "given.json", value))]) == code
    shown = capsys.readouterr().err
    assert says in shown and "where:" in shown and "fix:" in shown
    assert not (run / "report.html").exists()


def test_folders_that_make_no_page(tmp_path: Path, capsys: Capture) -> None:
    assert main(["report"]) == 2 and "nothing is named" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2 and "no such file" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2 and "no report.json" in capsys.readouterr().err
    (tmp_path / ".run").mkdir()
    assert main(["report", str(tmp_path)]) == 2 and "has not finished" in capsys.readouterr().err


def test_a_run_that_failed_its_verification(tmp_path: Path) -> None:
    report = made_report(verified={"passed": False, "wrong": ["a tensor"]})
    _written(tmp_path / "report.failed.json", report)
    built = build_page(read_sources([tmp_path]))
    assert built.bad and "did not pass its verification" in plain(built.verdict)


def test_nothing_of_a_person_s_is_written_over(run: Path, tmp_path: Path, capsys: Capture) -> None:
    _written(run / "report.md", "# My notes\n")
    assert main(["report", str(run)]) == 3 and "no page of ours" in capsys.readouterr().err
    assert (run / "report.md").read_text() == "# My notes\n" and not (run / "report.html").exists()
    assert main(["report", str(run), "-o", str(tmp_path / "page.pdf")]) == 2
    assert main(["report", str(run), "-o", str(tmp_path / "none" / "page.html")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_page_goes_with_its_run_and_is_no_obstacle(
    tiny: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"{n} green bottles hang on wall {n % 7}." for n in range(1200)))
    argv = ["quantize", str(tiny()), "--preset", "rtn", "--tier", "merged", "--data", str(tmp_path / "text.txt")]
    argv += ["--samples", "4", "--seq-len", "32", "-o", str(tmp_path / "out")]
    assert main([*argv, "--report"]) == 0
    assert f"report: {tmp_path / 'out/report.html'}" in capsys.readouterr().out
    assert main(argv) == 0 and "finished already" in capsys.readouterr().err
    (tmp_path / "out/report.html.tmp").touch()  # of a page that was being written when the power went
    assert main([*argv, "--overwrite"]) == 0  # takes the old page along
    assert not list((tmp_path / "out").glob("report.html*")) and not (tmp_path / "out/report.md").exists()
    assert main([*argv, "--report"]) == 0 and (tmp_path / "out/report.md").exists()
    _written(tmp_path / "out/report.md", "# My notes\n")
    assert main([*argv, "--overwrite"]) == 2 and "report.md" in capsys.readouterr().err
    assert main([*argv, "--report"]) == 0 and "no report was written" in capsys.readouterr().err
