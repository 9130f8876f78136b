"""Codes in words: what the library packs where a word holds whole codes, and codes that run on at 3 bits."""

import pytest
import torch

from affinequant.formats import packing


def codes(bits: int, rows: int, columns: int) -> torch.Tensor:
    seeded = torch.Generator().manual_seed(bits)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=seeded, dtype=torch.int8)


@pytest.mark.parametrize("columns", [1, 10, 11, 31, 32, 33, 64, 97])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_come_back(bits: int, columns: int) -> None:
    given = codes(bits, 5, columns)
    packed = packing.pack(given, bits)
    assert packed.dtype == torch.int32 and packed.shape == (5, packing.words(columns, bits))
    assert torch.equal(packing.unpack(packed, bits, columns), given)


def test_three_bits_run_on_from_word_to_word() -> None:
    given = codes(3, 4, 32)
    whole = [sum((int(code) + 4) << (3 * place) for place, code in enumerate(row)) for row in given]
    packed = packing.pack(given, 3).to(torch.int64) & 0xFFFFFFFF
    for row, number in zip(packed, whole, strict=True):
        assert [int(word) for word in row] == [(number >> (32 * place)) & 0xFFFFFFFF for place in range(3)]


def test_the_library_agrees_where_it_packs_without_gaps() -> None:
    from compressed_tensors.compressors import pack_to_int32, unpack_from_int32

    given = codes(3, 6, 64)
    packed = pack_to_int32(given, 3)
    if packed.shape[1] != packing.words(64, 3):
        pytest.skip("this release leaves two bits of each word empty")
    assert torch.equal(packed, packing.pack(given, 3))
    assert torch.equal(unpack_from_int32(packing.pack(given, 3), 3, given.shape), given)


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
def test_vllm_expects_as_many_words() -> None:
    from fractions import Fraction

    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16

    for bits in (2, 3, 4, 8):
        scheme = CompressedTensorsWNA16("group", bits, 64, True)
        assert 96 // Fraction(scheme.pack_factor) == packing.words(96, bits)
