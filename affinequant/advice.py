"""What a device gains from each scheme, and which scheme it gains most from. Arithmetic and tables: nothing here is timed.

How many times as fast as 16 bits one token is follows from the bytes of the weights, which a GPU reads at the rate of its
memory whatever it multiplies; many tokens at once follow from the rate of its products. Both are bounds, of a linear alone.
Of CPUs there are measurements (`kernels/README.md`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from affinequant.errors import unknown_name
from affinequant.recipe.scheme import Scheme

WIDTH = 4096
"""Inputs of the linear that figures are of."""

NOISE = 0.05
"""Of a measured time: less says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A kind of device. `int8` is the rate of products of 8-bit integers in units of that of 16-bit floats (of 32-bit
    floats where the device has no 16-bit products), as the maker gives them; None where it is not known here. `float4`: that
    of 4-bit floats, 1 where they are multiplied as 16-bit ones.

    `measured` has by scheme how many times as fast as `unit` a linear of 4096 x 4096 was with one token, and with 512.
    """

    about: str
    int8: float | None = None
    float4: float = 1.0
    measured: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    unit: str = "bf16"
    note: str = ""


_INT8 = "its int4 products are not used: these kernels unpack and multiply as int8"
HARDWARE: dict[str, Hardware] = {
    "sm_80": Hardware(about="A100", int8=2.0, note=_INT8),
    "sm_86": Hardware(about="A10, A40, RTX 30", int8=2.0, note=_INT8),
    "sm_89": Hardware(about="L4, L40S, RTX 40", int8=2.0, note=_INT8),
    "sm_90": Hardware(about="H100, H200", int8=2.0, note="it has no int4 products"),
    "sm_100": Hardware(
        about="B200",
        int8=2.0,
        float4=4.0,
        note="it has products of 4-bit floats at four times the rate of 16 bits; integers do not reach them",
    ),
    "cpu-amx": Hardware(
        about="Xeon with AMX",
        measured={"w4a4": (2.92, 1.63), "w4a8": (2.84, 1.65), "w8a8": (2.10, 1.17), "w4a4-g128": (2.82, 0.54)},
    ),
    "cpu-vnni": Hardware(
        about="AVX512-VNNI without AMX",
        unit="fp32",
        measured={"w4a4": (4.69, 3.27), "w4a8": (4.79, 3.20), "w8a8": (1.90, 3.73), "w4a4-g128": (4.45, 2.96)},
        note="timed on a Xeon whose AMX was kept from oneDNN",
    ),
    "cpu-avx2": Hardware(
        about="AVX2 alone",
        unit="fp32",
        measured={"w4a4": (3.80, 1.98), "w4a8": (3.82, 1.98), "w8a8": (2.64, 1.07), "w4a4-g128": (2.68, 1.19)},
    ),
}
"""By the name that `--for` takes."""
ASKED = ("w4a4", "w4a8", "w4a16-g64", "w8a8")
"""Schemes that are laid beside the one that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """How many times as fast a linear is with one token and with many, None where nothing is known; and how that is."""

    scheme: str
    one: float | None
    many: float | None
    basis: str


def gains(device: str, asked: str) -> list[Gain]:
    """What each scheme of `ASKED`, and `asked`, gain on a device of `HARDWARE`.

    Raises:
        AffineQuantError: no such device; the nearest is named.
    """
    if device not in HARDWARE:
        raise unknown_name("device", device, HARDWARE, where="--for")
    return [_gain(HARDWARE[device], Scheme.parse(name)) for name in dict.fromkeys((asked, *ASKED))]


def advice(device: str, asked: str) -> str:
    """In a sentence, what the gains say of the scheme that was asked for; "" where they say nothing."""
    scheme, found = Scheme.parse(asked), {gain.scheme: gain for gain in gains(device, asked)}
    wider = asked.replace("a4", "a8", 1)
    four = scheme.activation is not None and (scheme.activation.bits, scheme.activation.kind) == (4, "int")
    if four and scheme.kv is None:
        mine, other = found[scheme.name], _gain(HARDWARE[device], Scheme.parse(wider))
        pairs = [(mine.one, other.one), (mine.many, other.many)]
        if all(one is not None and two is not None and two >= one * (1 - NOISE) for one, two in pairs):
            return f"{wider} costs there what {asked} costs, and rounds activations to 8 bits in place of 4"
    return ""


def this_cpu() -> str:
    """The name in `HARDWARE` of the CPU at hand; "" where it is none of them."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.exists() else set[str]()
    kinds = {"amx_int8": "cpu-amx", "avx512_vnni": "cpu-vnni", "avx2": "cpu-avx2"}
    return next((name for flag, name in kinds.items() if flag in flags), "")


def _gain(hardware: Hardware, scheme: Scheme) -> Gain:
    if hardware.int8 is None:
        one, many = hardware.measured.get(scheme.name, (None, None))
        basis = f"measured, times {hardware.unit}" if one else "not measured"
        return Gain(scheme=scheme.name, one=one, many=many, basis=basis)
    one = 16 / scheme.bits_per_weight(WIDTH)
    floats = scheme.weight.kind != "int"
    many = 1.0 if scheme.activation is None else hardware.float4 if floats else hardware.int8
    kind = "bf16" if many == 1.0 else "4-bit float" if floats else "int8"
    basis = f"at most, times bf16: bytes of the weights; rate of {kind} products"
    return Gain(scheme=scheme.name, one=round(one, 2), many=many, basis=basis)
