"""What blocks chose, counted and said."""

from affinequant.progress import choices_of, tally, tally_lines

BLOCKS = [
    {"transforms": {"vo": {"transform": "hadamard"}}, "roundings": {"vo": {"rounding": "gptq 0.01"}}},
    {"transforms": {"vo": {"transform": "diagonal+kronecker"}}, "roundings": {"vo": {"rounding": "nearest"}}},
    {"transforms": {"vo": {"transform": "diagonal+kronecker"}}, "roundings": {"vo": {"rounding": "nearest"}}},
]


def test_the_most_frequent_comes_first() -> None:
    assert tally(BLOCKS)["transform at vo"] == {"diagonal+kronecker": 2, "hadamard": 1}
    assert tally_lines(BLOCKS) == [
        "transform at vo: diagonal+kronecker x 2, hadamard x 1",
        "rounding at vo: nearest x 2, gptq 0.01 x 1",
    ]


def test_a_line_of_progress_is_short() -> None:
    assert choices_of(BLOCKS[1]) == "vo:diag+kron vo:nearest"
    assert choices_of(BLOCKS[0]) == "vo:hadamard vo:gptq"


def test_nothing_is_said_where_nothing_was_chosen() -> None:
    assert tally([{"sqnr": 1.0}]) == {} and tally_lines([]) == [] and choices_of({}) == ""
