"""Every opcode of the emulated GPU against an oracle of one line, over random operands and the
edges of their types; and what it refuses."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emulator import ptx

Values = NDArray[Any]

INTEGERS = {
    "s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32,
    "s64": np.int64, "u64": np.uint64,
}  # fmt: skip
BITS = {"b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
DTYPES: dict[str, Any] = {
    **INTEGERS, **BITS, "u8": np.uint8, "s8": np.int8, "f32": np.float32, "f64": np.float64,
    "pred": np.bool_, "f16": np.uint16, "bf16": np.uint16, "f16x2": np.uint32,
    "bf16x2": np.uint32,
}  # fmt: skip
NAN = np.uint32(0x7FFFFFFF).view(np.float32)  # the one that float32 arithmetic returns


def bits(type_: str) -> int:
    return 8 * np.dtype(DTYPES[type_]).itemsize


# ---- oracles ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What an opcode computes, element by element."""

    results: tuple[str, ...]
    sources: tuple[str, ...]
    oracle: Callable[..., Any]
    tolerance: float = 0.0  # relative; 0: bit for bit
    any_nan: bool = False  # the ISA leaves its payload open
    defined: Callable[..., Values] | None = None  # where the ISA says what comes out
    text: str = ""  # with {0}, {1}, ... for the results and the sources; by default all in a row


def exact(values: Values) -> Values:
    """Integers without an end."""
    return values.astype(object)


def wrapped(values: Values, type_: str) -> Values:
    """The low bits of integers, as `type_`."""
    unsigned = np.array([int(v) & (1 << bits(type_)) - 1 for v in values], np.uint64)
    return unsigned.astype(f"uint{bits(type_)}").view(DTYPES[type_])


def truncated_quotient(a: Values, b: Values) -> Values:
    """Towards zero, as in C; where b is 0, nothing of interest."""
    signs = [-1 if (x < 0) != (y < 0) else 1 for x, y in zip(exact(a), exact(b), strict=True)]
    return abs(exact(a)) // abs(exact(np.where(b == 0, b.dtype.type(1), b))) * signs


def shifted_right(a: Values, count: Values) -> Values:
    return np.array([int(x) >> min(int(n), 64) for x, n in zip(a, count, strict=True)], object)


def shifted_left(a: Values, count: Values) -> Values:
    return np.array([int(x) << min(int(n), 64) for x, n in zip(a, count, strict=True)], object)


def inserted(a: Values, b: Values, position: Values, length: Values) -> Values:
    result = []
    for x, y, p, n in zip(exact(a), exact(b), exact(position), exact(length), strict=True):
        field = ((1 << (n & 255)) - 1) << (p & 255)
        result.append((y & ~field | x << (p & 255) & field) & 0xFFFFFFFF)
    return np.array(result, np.uint32)


def canonical(x: Values) -> Values:
    return np.where(np.isnan(x), NAN, x).astype(np.float32)


def fused(a: Values, b: Values, c: Values) -> Values:
    """a b + c, rounded once: to odd in float64, which has bits to spare, and then to float32."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = total.view(np.int64) % 2 == 0
    step = np.where((error > 0) == (total > 0), 1, -1)
    to_odd = even & (error != 0) & np.isfinite(total)
    odd = total.view(np.int64) + np.where(to_odd, step, 0)
    return canonical(odd.view(np.float64).astype(np.float32))


def fused_down(a: Values, b: Values, c: Values) -> Values:
    """a b + c, rounded towards minus infinity: the nearest number or the one below it."""
    down = []
    for near, *xyz in zip(fused(a, b, c), a, b, c, strict=True):
        if np.isfinite(xyz).all():
            x, y, z = (Fraction(float(operand)) for operand in xyz)
            exact = x * y + z
            if exact == 0:
                both_positive = np.signbit(xyz[0]) == np.signbit(xyz[1]) and not np.signbit(xyz[2])
                near = np.float32(0.0 if both_positive else -0.0)
            elif near == np.inf or (near > -np.inf and Fraction(float(near)) > exact):
                near = np.nextafter(near, np.float32(-np.inf))
        down.append(near)
    return canonical(np.array(down, np.float32))


def extreme(a: Values, b: Values, larger: bool) -> Values:
    """Of minimum and maximum: +0 is larger than -0, and a number wins against none."""
    below = (a < b) | ((a == b) & np.signbit(a))
    return canonical(np.where(np.isnan(a) | (~np.isnan(b) & (below == larger)), b, a))


def double(x: Values) -> Values:
    return x.astype(np.float64)


def flushed(x: Values) -> Values:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x)


def rounded(x: Values, mantissa: int, lowest: int, overflow: float) -> Values:
    """To `mantissa` bits after the point, the even one if two are as near."""
    x = x.astype(np.float64)
    exponent = np.maximum(np.frexp(np.where(np.isfinite(x), x, 1))[1] - 1, lowest)
    quantum = np.ldexp(1.0, exponent - mantissa)
    near = np.rint(x / quantum) * quantum
    return np.where(np.abs(x) >= overflow, np.copysign(np.inf, x), near)


def to_f16(x: Values) -> Values:
    half = rounded(x, 10, -14, 65520.0).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), half)


def to_bf16(x: Values) -> Values:
    near = rounded(x, 7, -126, 2.0**128 - 2.0**119).astype(np.float32).view(np.uint32) >> 16
    return np.where(np.isnan(x), np.uint16(0x7FFF), near.astype(np.uint16))


def from_bf16(x: Values) -> Values:
    return (x.astype(np.uint32) << 16).view(np.float32)


def joined(high: Values, low: Values) -> Values:
    return high.astype(np.uint32) << 16 | low.astype(np.uint32)


def saturated(x: Values, dtype: Any) -> Values:
    """To an integer, towards zero; the nearest one there is, and 0 for what is not a number."""
    limits = np.iinfo(dtype)
    whole = np.trunc(np.nan_to_num(x.astype(np.float64), nan=0.0))
    return np.clip(whole, limits.min, limits.max).astype(dtype)


def larger_bf16(a: Values, b: Values) -> Values:
    x, y = from_bf16(a), from_bf16(b)
    return np.where(np.isnan(x) & np.isnan(y), np.uint16(0x7FFF), to_bf16(extreme(x, y, True)))


RULES: dict[str, Rule] = {}


def high_half(a: Values, b: Values) -> Values:
    return exact(a) * exact(b) >> 8 * a.itemsize


def remainder(a: Values, b: Values) -> Values:
    return exact(a) - truncated_quotient(a, b) * exact(b)


def divisible(a: Values, b: Values) -> Values:
    return b != 0


for t in INTEGERS:
    RULES |= {
        f"add.{t}": Rule((t,), (t, t), lambda a, b: a + b),
        f"sub.{t}": Rule((t,), (t, t), lambda a, b: a - b),
        f"mul.lo.{t}": Rule((t,), (t, t), lambda a, b: a * b),
        f"mul.hi.{t}": Rule((t,), (t, t), high_half),
        f"mad.lo.{t}": Rule((t,), (t, t, t), lambda a, b, c: a * b + c),
        f"div.{t}": Rule((t,), (t, t), truncated_quotient, defined=divisible),
        f"rem.{t}": Rule((t,), (t, t), remainder, defined=divisible),
        f"min.{t}": Rule((t,), (t, t), np.minimum),
        f"max.{t}": Rule((t,), (t, t), np.maximum),
        f"shr.{t}": Rule((t,), (t, "u32"), shifted_right),
    }
for t in ("s16", "s32", "s64"):
    RULES |= {
        f"neg.{t}": Rule((t,), (t,), lambda a: -a),
        f"abs.{t}": Rule((t,), (t,), lambda a: np.where(a < 0, -a, a)),
    }
for t, wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")):
    RULES[f"mul.wide.{t}"] = Rule((wide,), (t, t), lambda a, b, d=DTYPES[wide]: a.astype(d) * b)
for t, wide in (("s32", "s64"), ("u32", "u64")):
    RULES[f"mad.wide.{t}"] = Rule(
        (wide,), (t, t, wide), lambda a, b, c, d=DTYPES[wide]: a.astype(d) * b + c
    )
RULES["bfi.b32"] = Rule(("b32",), ("b32", "b32", "u32", "u32"), inserted)

for t in ("b16", "b32", "b64"):
    RULES |= {
        f"and.{t}": Rule((t,), (t, t), np.bitwise_and),
        f"or.{t}": Rule((t,), (t, t), np.bitwise_or),
        f"xor.{t}": Rule((t,), (t, t), np.bitwise_xor),
        f"not.{t}": Rule((t,), (t,), np.invert),
        f"shl.{t}": Rule((t,), (t, "u32"), shifted_left),
    }
for t in (*INTEGERS, "b16", "b32", "b64", "f32", "f64"):
    same = f"b{bits(t)}"  # payloads too
    RULES[f"mov.{t}"] = Rule((same,), (same,), lambda a: a)
    RULES[f"selp.{t}"] = Rule((same,), (same, same, "pred"), lambda a, b, p: np.where(p, a, b))


def packed(low: Values, high: Values) -> Values:
    return exact(low) | exact(high) << 8 * low.itemsize


def unpacked(a: Values) -> tuple[Values, Values]:
    return exact(a), exact(a) >> 4 * a.itemsize


for half, whole in (("b16", "b32"), ("b32", "b64")):
    RULES |= {
        f"pack.{whole}": Rule(
            (whole,), (half, half), packed, text=f"mov.{whole} {{0}}, {{{{{{1}}, {{2}}}}}};"
        ),
        f"unpack.{whole}": Rule(
            (half, half), (whole,), unpacked, text=f"mov.{whole} {{{{{{0}}, {{1}}}}}}, {{2}};"
        ),
    }

RULES |= {
    "mov.pred": Rule(("pred",), ("pred",), lambda a: a),
    "not.pred": Rule(("pred",), ("pred",), np.logical_not),
    "and.pred": Rule(("pred",), ("pred", "pred"), np.logical_and),
    "or.pred": Rule(("pred",), ("pred", "pred"), np.logical_or),
    "xor.pred": Rule(("pred",), ("pred", "pred"), np.logical_xor),
}
COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
for t in (*INTEGERS, "b16", "b32", "b64", "f32"):
    for name, comparison in COMPARISONS.items():
        if t[0] != "b" or name in ("eq", "ne"):
            RULES[f"setp.{name}.{t}"] = Rule(("pred",), (t, t), comparison)
        if t == "f32":
            RULES[f"setp.{name}u.f32"] = Rule(
                ("pred",), (t, t), lambda a, b, f=comparison: f(a, b) | np.isnan(a) | np.isnan(b)
            )
RULES["setp.num.f32"] = Rule(("pred",), ("f32", "f32"), lambda a, b: ~(np.isnan(a) | np.isnan(b)))
RULES["setp.nan.f32"] = Rule(("pred",), ("f32", "f32"), lambda a, b: np.isnan(a) | np.isnan(b))

F = ("f32",)
for rounding in ("", ".rn"):
    RULES |= {
        f"add{rounding}.f32": Rule(F, F * 2, lambda a, b: canonical(a + b)),
        f"sub{rounding}.f32": Rule(F, F * 2, lambda a, b: canonical(a - b)),
        f"mul{rounding}.f32": Rule(F, F * 2, lambda a, b: canonical(a * b)),
    }
RULES |= {
    "fma.rn.f32": Rule(F, F * 3, fused),
    "fma.rm.f32": Rule(F, F * 3, fused_down),
    "add.rm.f32": Rule(F, F * 2, lambda a, b: fused_down(a, np.ones_like(a), b)),
    "div.rn.f32": Rule(F, F * 2, lambda a, b: canonical(a / b)),
    "min.f32": Rule(F, F * 2, lambda a, b: extreme(a, b, False)),
    "max.f32": Rule(F, F * 2, lambda a, b: extreme(a, b, True)),
    "neg.f32": Rule(F, F, np.negative, any_nan=True),
    "abs.f32": Rule(F, F, np.abs, any_nan=True),
    "copysign.f32": Rule(F, F * 2, lambda a, b: np.copysign(b, a), any_nan=True),
    "rcp.rn.f32": Rule(F, F, lambda a: canonical(np.float32(1) / a)),
    "sqrt.rn.f32": Rule(F, F, lambda a: canonical(np.sqrt(a))),
    "rcp.approx.ftz.f32": Rule(F, F, lambda a: flushed(1 / flushed(double(a))), 2.0**-23),
    "ex2.approx.ftz.f32": Rule(F, F, lambda a: flushed(np.exp2(flushed(double(a)))), 2.0**-22),
    "lg2.approx.f32": Rule(F, F, lambda a: np.log2(double(a)), 2.0**-22),
    "max.bf16x2": Rule(
        ("bf16x2",), ("bf16x2",) * 2,
        lambda a, b: joined(
            larger_bf16((a >> 16).astype(np.uint16), (b >> 16).astype(np.uint16)),
            larger_bf16(a.astype(np.uint16), b.astype(np.uint16)),
        ),
    ),
    "cvt.rn.f32.s32": Rule(F, ("s32",), lambda a: a.astype(np.float32)),
    "cvt.rn.f32.u32": Rule(F, ("u32",), lambda a: a.astype(np.float32)),
    "cvt.rzi.s32.f32": Rule(("s32",), F, lambda a: saturated(a, np.int32)),
    "cvt.rzi.u32.f32": Rule(("u32",), F, lambda a: saturated(a, np.uint32)),
    "cvt.rn.f16.f32": Rule(("f16",), F, to_f16),
    "cvt.rn.bf16.f32": Rule(("bf16",), F, to_bf16),
    "cvt.rn.f16x2.f32": Rule(("f16x2",), F * 2, lambda a, b: joined(to_f16(a), to_f16(b))),
    "cvt.rn.bf16x2.f32": Rule(("bf16x2",), F * 2, lambda a, b: joined(to_bf16(a), to_bf16(b))),
    "cvt.f32.f16": Rule(F, ("f16",), lambda a: a.view(np.float16).astype(np.float32), any_nan=True),
    "cvt.f32.bf16": Rule(F, ("bf16",), from_bf16, any_nan=True),
    "cvta.to.global.u64": Rule(("u64",), ("u64",), lambda a: a),
}  # fmt: skip
for to, source in (
    ("s64", "s32"), ("u64", "u32"), ("u32", "u64"), ("s32", "s64"), ("u32", "u16"), ("s32", "s16"),
    ("u16", "u32"), ("s16", "s32"), ("u64", "u16"), ("s64", "s16"), ("u16", "u64"),
):  # fmt: skip
    RULES[f"cvt.{to}.{source}"] = Rule((to,), (source,), lambda a, d=DTYPES[to]: a.astype(d))

# ---- operands -----------------------------------------------------------------------------------

RANDOM = 1024
FLOATS = [
    0.0, 1.0, 1.5, 2.0, 3.0, 0.1, np.inf, np.nan, 2.0**-149, 2.0**-127, 2.0**-126, 3.4028235e38,
    # on the way to float16 and bfloat16: ties, and where they overflow and vanish
    1 + 2.0**-11, 1 + 3 * 2.0**-11, 65504, 65519.996, 65520, 2.0**-24, 2.0**-25,
    1.0000001 * 2.0**-25, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**128 - 2.0**119, 3.3895e38,
    # on the way to integers, and of exponents
    0.99999994, 16777216, 2147483520, 2.0**31, 4294967040, 2.0**32, 126, 127, 128, 149, 150, 126.5,
]  # fmt: skip


def edges(type_: str) -> Values:
    dtype = DTYPES[type_]
    if type_ == "pred":
        return np.array([False, True])
    if type_ == "f32":
        return np.concatenate([np.array(FLOATS, np.float32), -np.array(FLOATS, np.float32)])
    if type_ in ("f16", "bf16"):
        return np.arange(1 << 16, dtype=np.uint16)
    if type_ in ("f16x2", "bf16x2"):
        halves = np.array([0, 0x8000, 1, 0x3F80, 0xBF80, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0080])
        return joined(np.repeat(halves, len(halves)), np.tile(halves, len(halves)))
    width, (low, high) = bits(type_), (np.iinfo(dtype).min, np.iinfo(dtype).max)
    numbers = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, low, low + 1, high,
               high - 1, high // 2, high // 3]  # fmt: skip
    return wrapped(np.array([*numbers, -1, -2, -7, 1 << width - 1], object), type_)


def random_values(rng: np.random.Generator, type_: str, count: int) -> Values:
    if type_ == "pred":
        return rng.integers(0, 2, count).astype(bool)
    values: Values = np.frombuffer(rng.bytes(count * bits(type_) // 8), DTYPES[type_])
    if type_ == "f32":  # half of them of ordinary size
        values = np.where(np.arange(count) % 2, values, rng.normal(size=count).astype(np.float32))
    return values


def operands(rng: np.random.Generator, types: Sequence[str]) -> list[Values]:
    """Every pair of edges (of more operands: random ones), and random values."""
    corners = [edges(t) for t in types]
    if len(types) <= 2:
        combined = [np.array(x) for x in zip(*itertools.product(*corners), strict=True)]
    else:
        combined = [rng.choice(c, 8 * RANDOM) for c in corners]
    columns = [
        np.concatenate([c.astype(DTYPES[t]), random_values(rng, t, RANDOM)])
        for c, t in zip(combined, types, strict=True)
    ]
    count = -(-len(columns[0]) // 32) * 32
    return [np.resize(c, count) for c in columns]


# ---- element by element -------------------------------------------------------------------------


def in_memory(values: Values) -> Values:
    """As a kernel loads it: predicates as integers of 32 bits."""
    return np.ascontiguousarray(values.astype(np.uint32) if values.dtype == bool else values)


def register_of(type_: str) -> str:
    return "pred" if type_ == "pred" else f"b{bits(type_)}"


def loading(register: str, type_: str, array: int) -> str:
    """%d`array` becomes the address of the thread's element; it is loaded from there."""
    size = 4 if type_ == "pred" else bits(type_) // 8
    text = f"mad.wide.u32 %d{array}, %thread, {size}, %array{array};\n"
    if type_ == "pred":
        return text + f"ld.global.b32 %r0, [%d{array}];\nsetp.ne.b32 {register}, %r0, 0;\n"
    return text + f"ld.global.b{8 * size} {register}, [%d{array}];\n"


def storing(register: str, type_: str, array: int) -> str:
    if type_ == "pred":
        return f"selp.b32 %r0, 1, 0, {register};\nst.global.b32 [%d{array}], %r0;\n"
    return f"st.global.b{bits(type_)} [%d{array}], {register};\n"


@pytest.mark.parametrize("opcode", RULES)
@np.errstate(all="ignore")
def test_element_by_element(opcode: str, seed: int) -> None:
    rule, rng = RULES[opcode], np.random.default_rng(seed)
    sources = operands(rng, rule.sources)
    expected = rule.oracle(*sources)
    expected = expected if isinstance(expected, tuple) else (expected,)
    runs = rng.integers(0, 4, len(sources[0])) > 0
    before = [random_values(rng, t, len(runs)) for t in rule.results]

    types = [*rule.results, *rule.sources]
    names = [f"%x{n}" for n in range(len(types))]
    text = rule.text or f"{opcode} {', '.join(f'{{{n}}}' for n in range(len(types)))};"
    body = "".join(f".reg .{register_of(t)} {x};\n" for x, t in zip(names, types, strict=True))
    body += "".join(loading(x, t, n) for n, (x, t) in enumerate(zip(names, types, strict=True)))
    body += loading("%p0", "pred", len(types)) + "@%p0 " + text.format(*names) + "\n"
    body += "".join(storing(names[n], t, n) for n, t in enumerate(rule.results))
    arrays = [in_memory(x).copy() for x in (*before, *sources, runs)]
    assert ptx.run(body, arrays, grid=len(runs) // 32) == []

    defined = rule.defined(*sources) if rule.defined else np.full(len(runs), True)
    for n, type_ in enumerate(rule.results):
        got = arrays[n].astype(bool) if type_ == "pred" else arrays[n]
        as_integers = expected[n].dtype == object
        wanted = wrapped(expected[n], type_) if as_integers else expected[n].astype(DTYPES[type_])
        same = got.view(f"u{got.itemsize}") == wanted.view(f"u{got.itemsize}")
        if rule.any_nan:
            same |= np.isnan(got) & np.isnan(wanted)
        if rule.tolerance:
            wanted = canonical(wanted)
            near = np.abs(got - expected[n]) <= rule.tolerance * np.maximum(
                np.abs(expected[n]), 2.0**-126
            )
            near &= np.isfinite(wanted) & (np.signbit(got) == np.signbit(wanted))
            same = (got.view(np.uint32) == wanted.view(np.uint32)) | near
        untouched = got.view(f"u{got.itemsize}") == before[n].view(f"u{got.itemsize}")
        wrong = np.flatnonzero(np.where(runs, ~same & defined, ~untouched))
        assert not len(wrong), (
            f"{[x[wrong[0]] for x in sources]} -> {got[wrong[0]]}, not {wanted[wrong[0]]} "
            f"(executed: {runs[wrong[0]]}); {len(wrong)} of {len(runs)} wrong"
        )


# ---- memory -------------------------------------------------------------------------------------

MEMORY = re.compile(
    r"(?P<op>ld|st)(?P<space>\.param|\.global\.nc|\.global|\.shared|)(?:\.v(?P<count>[24]))?"
    r"\.(?P<type>[busf]\d+)\.(?P<register>\d)(?:\.a(?P<address>[48]))?"
)
# In memory, and bytes of the registers that it goes to or comes from.
TYPES = {
    **dict.fromkeys(("u16", "b16", "s16"), (2, 4)), **dict.fromkeys(("u32", "b32", "s32"), (4, 8)),
    **dict.fromkeys(("u64", "b64", "s64", "f64"), (8,)), "f32": (4,),
}  # fmt: skip
SPACES = ["ld", "ld.global", "ld.global.nc", "st", "st.global"]
SPACES += [f"{op}.shared@.a{address}" for op in ("ld", "st") for address in (4, 8)]


def memory_opcodes() -> list[str]:
    """As the engine calls them: with the bytes of a register, and of a shared address."""
    names = []
    for vector, (type_, registers) in itertools.product(("", ".v2", ".v4"), TYPES.items()):
        for register in registers:
            tail = f"{vector}.{type_}.{register}"
            names.append("ld.param" + tail)
            if int(vector[2:] or 1) * bits(type_) <= 128:
                names += [
                    f"{space}{tail}{address}"
                    for space, _, address in (name.partition("@") for name in SPACES)
                ]
        for type_, register in itertools.product(("u8", "b8", "s8"), (2, 4)):
            if f"ld.param{vector}.{type_}.{register}" not in names:
                names.append(f"ld.param{vector}.{type_}.{register}")
    return names


@pytest.mark.parametrize("opcode", memory_opcodes())
def test_loads_and_stores(opcode: str, seed: int) -> None:
    """Each thread moves a vector between memory and registers, at an address with an offset."""
    match = MEMORY.fullmatch(opcode)
    assert match
    rng, count, threads = np.random.default_rng(seed), int(match["count"] or 1), 64
    type_, register = match["type"], f"b{8 * int(match['register'])}"
    size = bits(type_) // 8
    loads, space = match["op"] == "ld", match["space"]
    memory = random_values(rng, type_.replace("f", "b"), threads * count)
    registers = random_values(rng, register, threads * count)
    if loads:
        # As many bits as the register has, with the sign of a signed type.
        value_type = memory.view(DTYPES[type_]) if type_[0] == "s" else memory
        expected = value_type.astype(f"{'i' if type_[0] == 's' else 'u'}{match['register']}")
        result = registers
    else:
        expected, result = registers.astype(memory.dtype), memory
    memory, registers = memory.copy(), registers.copy()

    names = [f"%x{n}" for n in range(count)]
    vector = names[0] if count == 1 else "{" + ", ".join(names) + "}"
    text = opcode.rsplit(f".{match['register']}", 1)[0]
    add = count * size
    pointer = "%d3" if match["address"] != "4" else "%r3"
    outside = "b8" if size == 1 else f"b{8 * size}"
    body = f".reg .{register} {', '.join(names)};\n"
    body += f"mul.lo.u32 %r0, %thread, {add};\nmad.wide.u32 %d0, %thread, {add}, %array0;\n"
    body += f"mad.wide.u32 %d1, %thread, {count * bits(register) // 8}, %array1;\n"
    params = []
    if space == ".param":
        params = [(f".param .align 16 .b8 q[{len(memory) * size}]", memory.tobytes())]
        body += "mov.b64 %d2, q;\ncvt.u64.u32 %d3, %r0;\nadd.s64 %d3, %d2, %d3;\n"
    elif space == ".shared":
        body += f"add.u32 %r3, %r0, {add};\ncvt.u64.u32 %d3, %r3;\n"
    else:
        body += f"add.s64 %d3, %d0, {add};\n"
    address = f"[{pointer}]" if space == ".param" else f"[{pointer}+{-add}]"
    if space == ".shared" and loads:
        for n in range(count):
            body += f".reg .{outside} %m{n};\nld.global.{outside} %m{n}, [%d0+{n * size}];\n"
            body += f"st.shared.{outside} [%r0+{n * size}], %m{n};\n"
    if loads:
        body += f"{text} {vector}, {address};\n"
        for n, x in enumerate(names):
            body += f"st.global.{register} [%d1+{n * bits(register) // 8}], {x};\n"
    else:
        for n, x in enumerate(names):
            body += f"ld.global.{register} {x}, [%d1+{n * bits(register) // 8}];\n"
        body += f"{text} {address}, {vector};\n"
        if space == ".shared":
            for n in range(count):
                body += f".reg .{outside} %m{n};\nld.shared.{outside} %m{n}, [%r0+{n * size}];\n"
                body += f"st.global.{outside} [%d0+{n * size}], %m{n};\n"
    arrays = [memory, registers]
    shared = 2 * threads * add
    found = ptx.run(
        body, arrays, block=threads, shared=shared, more_params=params,
        declarations=ptx.dynamic_shared(),
    )  # fmt: skip
    assert found == []
    got = registers if loads else memory
    assert result.tobytes() != expected.tobytes()
    np.testing.assert_array_equal(got, expected.astype(expected.dtype).view(got.dtype))


# ---- warps --------------------------------------------------------------------------------------


def shuffled(how: str, lane: int, distance: int, control: int) -> tuple[int, bool]:
    """The lane that is read, and whether it lies in the segment: the ISA's own words."""
    clamp, segment = control & 31, control >> 8 & 31
    highest = (lane & segment) | (clamp & ~segment & 31)
    source = {
        "up": lane - distance,
        "down": lane + distance,
        "bfly": lane ^ distance,
        "idx": (lane & segment) | (distance & ~segment & 31),
    }[how]
    there = source >= highest if how == "up" else source <= highest
    return (source, True) if there else (lane, False)


@pytest.mark.parametrize("how", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32, None], ids=lambda w: f"width_{w or 'any'}")
def test_shuffles(how: str, width: int | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = random_values(rng, "b32", 32)
    distance = rng.integers(0, 64, 32).astype(np.uint32)  # the low five bits count
    control = np.full(32, 32 - (width or 0) << 8 | (0 if how == "up" else 31), np.uint32)
    if width is None:
        control = (rng.integers(0, 32, 32) << 8 | rng.integers(0, 32, 32)).astype(np.uint32)
    there = np.zeros(32, np.uint32)
    arrays = [values.copy(), distance, control, there]
    body = "".join(loading(f"%r{n + 1}", "b32", n) for n in range(3))
    body += "mad.wide.u32 %d3, %thread, 4, %array3;\n"
    body += f"shfl.sync.{how}.b32 %r1|%p1, %r1, %r2, %r3, -1;\n"
    body += storing("%r1", "b32", 0) + storing("%p1", "pred", 3)
    assert ptx.run(body, arrays) == []
    wanted = [shuffled(how, n, int(distance[n]) & 31, int(control[n])) for n in range(32)]
    np.testing.assert_array_equal(arrays[0], [values[source] for source, _ in wanted])
    np.testing.assert_array_equal(there, [inside for _, inside in wanted])


GUARD = loading("%p0", "pred", 0) + "vote.sync.ballot.b32 %r9, %p0, -1;\n@!%p0 bra OTHERS;\n"


def random_lanes(rng: np.random.Generator) -> Values:
    """At least one of them, and seldom all."""
    lanes = rng.integers(0, 2, 32).astype(np.uint32)
    lanes[rng.integers(32)] = 1
    return lanes


def test_shuffle_among_some_lanes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    some, values = random_lanes(rng), random_values(rng, "b32", 32)
    sources = rng.choice(np.flatnonzero(some), 32).astype(np.uint32)
    got = values.copy()
    body = GUARD + loading("%r1", "b32", 1) + loading("%r2", "b32", 2)
    body += "shfl.sync.idx.b32 %r1, %r1, %r2, 31, %r9;\n" + storing("%r1", "b32", 1) + "OTHERS:"
    assert ptx.run(body, [some, got, sources]) == []
    np.testing.assert_array_equal(got, np.where(some, values[sources], values))


VOTES: dict[str, Callable[[Values], Any]] = {
    "any.pred": np.any,
    "all.pred": np.all,
    "ballot.b32": lambda chosen: sum(1 << int(n) for n in np.flatnonzero(chosen)),
}


@pytest.mark.parametrize("how", VOTES)
def test_votes(how: str, seed: int) -> None:
    """Among the lanes that take part; what the others hold does not count."""
    rng, type_ = np.random.default_rng(seed), how.split(".")[1]
    one = np.eye(32)[rng.integers(32)]
    for chosen in (rng.integers(0, 2, 32), 0 * one, one, 1 - one, np.ones(32)):
        for some in (np.ones(32, np.uint32), random_lanes(rng)):
            inputs, got = chosen.astype(np.uint32), np.full(32, 77, np.uint32)
            wanted = int(VOTES[how](np.where(some, chosen, how == "all.pred") != 0))
            result = "%p2" if type_ == "pred" else "%r2"
            body = loading("%p1", "pred", 1) + GUARD + "mad.wide.u32 %d2, %thread, 4, %array2;\n"
            body += f"vote.sync.{how} {result}, %p1, %r9;\n" + storing(result, type_, 2) + "OTHERS:"
            assert ptx.run(body, [some, inputs, got]) == []
            np.testing.assert_array_equal(got, np.where(some, np.uint32(wanted), 77))


REDUCTIONS: dict[str, Callable[[Values], Any]] = {"min": np.min, "max": np.max, "add": np.sum}


@pytest.mark.parametrize("type_", ["s32", "u32"])
@pytest.mark.parametrize("how", REDUCTIONS)
def test_reductions(how: str, type_: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for some in (np.ones(32, np.uint32), random_lanes(rng)):
        values = random_values(rng, type_, 32)
        got = values.copy()
        body = GUARD + loading("%r1", type_, 1) + f"redux.sync.{how}.{type_} %r1, %r1, %r9;\n"
        assert ptx.run(body + storing("%r1", type_, 1) + "OTHERS:", [some, got]) == []
        chosen = exact(values[some != 0])
        wanted = wrapped(np.array([REDUCTIONS[how](chosen)], object), type_)
        np.testing.assert_array_equal(got, np.where(some, wanted, values))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, transposed: bool, seed: int) -> None:
    """Lane 8 m + r has the address of row r of matrix m, and lane l gets (row l / 4, columns
    2 (l % 4) and the next) of each: of the transposed matrix if it says so."""
    rng = np.random.default_rng(seed)
    memory = random_values(rng, "b16", 32 * 8).reshape(32, 8)
    places = rng.permutation(32).astype(np.uint32)
    got = np.zeros((32, count), np.uint32)
    body = loading("%r1", "b32", 1) + "shl.b32 %r1, %r1, 4;\n"
    body += "mad.wide.u32 %d0, %thread, 16, %array0;\nshl.b32 %r2, %thread, 4;\n"
    body += "ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%d0];\n"
    body += "st.shared.v4.b32 [%r2+16], {%r3, %r4, %r5, %r6};\nbar.warp.sync -1;\n"
    registers = [f"%r{10 + m}" for m in range(count)]
    trans = ".trans" if transposed else ""
    body += f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 "
    body += f"{{{', '.join(registers)}}}, [%r1+16];\n"
    body += f"mad.wide.u32 %d2, %thread, {4 * count}, %array2;\n"
    body += "".join(f"st.global.b32 [%d2+{4 * m}], {x};\n" for m, x in enumerate(registers))
    found = ptx.run(body, [memory, places, got], shared=528, declarations=ptx.dynamic_shared())
    assert found == []
    for m in range(count):
        matrix = memory[places[8 * m : 8 * m + 8]]
        matrix = matrix.T if transposed else matrix
        pairs = matrix.reshape(32, 2)  # row l / 4, columns 2 (l % 4) and the next
        np.testing.assert_array_equal(got[:, m], joined(pairs[:, 1], pairs[:, 0]))


# Fragments of m16n8k16: row and column of element i of a lane.
def place_in_a(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (0 if i in (0, 1, 4, 5) else 8), lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)


def place_in_b(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0), lane // 4


def place_in_c(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2


@pytest.mark.parametrize("numbers", ["integers", "normal"])
@pytest.mark.parametrize("type_", ["bf16", "f16"])
def test_mma(type_: str, numbers: str, seed: int) -> None:
    """Small integers come out exactly, whatever the order of the sums."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Values:
        if numbers == "integers":
            return rng.integers(-8, 9, shape).astype(np.float32)
        values = rng.normal(size=shape).astype(np.float32)
        half = to_bf16(values.ravel()) if type_ == "bf16" else to_f16(values.ravel())
        back = from_bf16(half) if type_ == "bf16" else half.view(np.float16).astype(np.float32)
        return back.reshape(shape)

    encode = to_bf16 if type_ == "bf16" else to_f16
    a, b, c = draw(16, 16), draw(16, 8), draw(16, 8)

    def fragment(matrix: Values, place: Callable[[int, int], tuple[int, int]], n: int) -> Values:
        return np.array([[matrix[place(lane, i)] for i in range(n)] for lane in range(32)])

    a_bits, b_bits = (
        encode(fragment(matrix, place, n).ravel()).astype(np.uint16).view(np.uint32)
        for matrix, place, n in ((a, place_in_a, 8), (b, place_in_b, 4))
    )
    accumulator = fragment(c, place_in_c, 4)
    body = "mad.wide.u32 %d0, %thread, 16, %array0;\nmad.wide.u32 %d1, %thread, 8, %array1;\n"
    body += "mad.wide.u32 %d2, %thread, 16, %array2;\n"
    body += "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0];\nld.global.v2.b32 {%r5, %r6}, [%d1];\n"
    body += "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%d2];\n"
    body += f"mma.sync.aligned.m16n8k16.row.col.f32.{type_}.{type_}.f32 {{%f5, %f6, %f7, %f8}}, "
    body += "{%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f1, %f2, %f3, %f4};\n"
    body += "st.global.v4.f32 [%d2], {%f5, %f6, %f7, %f8};\n"
    assert ptx.run(body, [a_bits.copy(), b_bits.copy(), accumulator]) == []
    assert ptx.engine().counters().mma == 1
    wanted = a.astype(np.float64) @ b + c
    got = np.zeros((16, 8))
    for lane, i in itertools.product(range(32), range(4)):
        got[place_in_c(lane, i)] = accumulator[lane, i]
    error = np.abs(got - wanted)
    assert error.max() <= (0 if numbers == "integers" else 2.0**-20 * (np.abs(a) @ np.abs(b)).max())


@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_all;"])
@pytest.mark.parametrize("address", ["%r1", "%d2"])
def test_copies(wait: str, address: str, seed: int) -> None:
    """Bytes past the source size are zero, and nothing past it is read."""
    rng = np.random.default_rng(seed)
    memory = ptx.aligned(random_values(rng, "u8", 512))
    sizes = ptx.aligned(rng.integers(0, 17, 32).astype(np.uint32))
    got = np.full(512, 0x55, np.uint8)
    commit = "" if wait == "cp.async.wait_all;" else "cp.async.commit_group;\n"
    body = "mad.wide.u32 %d0, %thread, 16, %array0;\nshl.b32 %r1, %thread, 4;\n"
    body += loading("%r2", "b32", 1) + "mad.wide.u32 %d3, %thread, 16, %array2;\n"
    body += "cvt.u64.u32 %d2, %r1;\n"
    body += f"cp.async.cg.shared.global [{address}], [%d0], 16, %r2;\n{commit}{wait}\n"
    body += "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r1];\n"
    body += "st.global.v4.b32 [%d3], {%r4, %r5, %r6, %r7};\n"
    found = ptx.run(body, [memory, sizes, got], shared=512, declarations=ptx.dynamic_shared())
    assert found == []
    kept = np.arange(16) < sizes[:, None]
    np.testing.assert_array_equal(got.reshape(32, 16), np.where(kept, memory.reshape(32, 16), 0))
    touched = np.unique(np.flatnonzero(sizes) // 2)
    assert ptx.engine().counters().load_sectors == 4 + len(touched)  # 4 of the sizes


def test_wait_group_leaves_the_newest_groups_alone(seed: int) -> None:
    """Of four groups, the older ones have arrived, and the others are not there yet."""
    memory = random_values(np.random.default_rng(seed), "u8", 64)
    for newest in range(4):
        got = np.zeros(64, np.uint8)
        body = "setp.ne.b32 %p0, %thread, 0;\n@%p0 bra DONE;\n"
        for n in range(4):
            body += f"mov.u32 %r{n}, {16 * n};\nadd.s64 %d{n}, %array0, {16 * n};\n"
            body += f"cp.async.cg.shared.global [%r{n}], [%d{n}], 16;\ncp.async.commit_group;\n"
        body += f"cp.async.wait_group {newest};\n"
        for n in range(4):
            body += f"ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r{n}];\n"
            body += f"st.global.v4.b32 [%array1+{16 * n}], {{%r4, %r5, %r6, %r7}};\n"
        body += "cp.async.wait_all;\nDONE:"
        found = ptx.run(body, [memory, got], shared=64, declarations=ptx.dynamic_shared())
        assert [f.kind for f in found] == ["reads data of an unfinished copy"] * newest
        arrived = 64 - 16 * newest
        np.testing.assert_array_equal(got[:arrived], memory[:arrived])
        assert np.all(got[arrived:] == 0xFF)


# ---- control ------------------------------------------------------------------------------------


def test_loops_end_lane_by_lane(seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 50, 64).astype(np.uint32)
    wanted = counts * (counts + 1) // 2
    body = (
        loading("%r1", "b32", 0)
        + """
        mov.u32 %r2, 0;
        setp.eq.u32 %p1, %r1, 0;
        @%p1 bra AFTER;
    LOOP:
        add.u32 %r2, %r2, %r1;
        sub.u32 %r1, %r1, 1;
        setp.ne.u32 %p1, %r1, 0;
        @%p1 bra LOOP;
    AFTER:
        vote.sync.ballot.b32 %r3, %p1, -1;
    """
        + storing("%r2", "b32", 0)
    )
    assert ptx.run(body, [counts], block=64) == []  # all lanes vote together
    np.testing.assert_array_equal(counts, wanted)


def test_branches_part_and_meet_again() -> None:
    """Three ways of different lengths, one within another; afterwards all go on as one."""
    body = """
        and.b32 %r1, %thread, 3;
        mad.wide.u32 %d0, %thread, 4, %array0;
        setp.gt.u32 %p1, %r1, 0;
        @%p1 bra ODD;
        mov.u32 %r2, 100;
        bra.uni MEET;
    ODD:
        setp.eq.u32 %p2, %r1, 3;
        @!%p2 bra SMALL;
        mov.u32 %r2, 300;
        add.u32 %r2, %r2, 1;
        bra MEET;
    SMALL:
        mov.u32 %r2, 200;
    MEET:
        bar.warp.sync -1;
        st.global.b32 [%d0], %r2;
    """
    got = np.zeros(32, np.uint32)
    assert ptx.run(body, [got]) == []
    np.testing.assert_array_equal(got, np.array([100, 200, 200, 301] * 8))
    # Each statement once: five before the body, four at its start, eight apart, three at the end.
    # Of lanes count those that do something: of a branch, those that take it.
    counters = ptx.engine().counters()
    assert counters.warp_instructions == 5 + 4 + 2 + 2 + 3 + 1 + 3
    start, apart, end = 32 * 8 + 24, 8 * 2 + (24 + 16) + 8 * 3 + 16, 32 * 3
    assert counters.lane_instructions == start + apart + end


@pytest.mark.parametrize("leave", ["ret", "exit"])
def test_lanes_may_end_before_others(leave: str) -> None:
    got = np.zeros(48, np.uint32)
    body = f"""
        mad.wide.u32 %d0, %thread, 4, %array0;
        setp.lt.u32 %p1, %thread, 5;
        @%p1 {leave};
        st.global.b32 [%d0], %thread;
    """
    assert ptx.run(body, [got], block=48) == []
    np.testing.assert_array_equal(got, np.where(np.arange(48) < 5, 0, np.arange(48)))


@pytest.mark.parametrize("barrier", ["bar.sync", "barrier.sync"])
def test_barriers_let_a_block_exchange_values(barrier: str) -> None:
    got = np.zeros(96, np.uint32)
    body = f"""
        shl.b32 %r1, %thread, 2;
        st.shared.b32 [%r1], %thread;
        {barrier} 0;
        xor.b32 %r1, %r1, 124;
        ld.shared.b32 %r2, [%r1];
        sub.u32 %r3, 380, %r1;
        ld.shared.b32 %r3, [%r3];
        mad.wide.u32 %d0, %thread, 4, %array0;
        add.u32 %r2, %r2, %r3;
        st.global.b32 [%d0], %r2;
    """
    assert ptx.run(body, [got], block=96, shared=384, declarations=ptx.dynamic_shared()) == []
    partner = np.arange(96) ^ 31
    np.testing.assert_array_equal(got, partner + 95 - partner)
    assert ptx.engine().counters().barriers == 1


def test_special_registers() -> None:
    """Threads of a block count along x first."""
    names = [f"{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
    grid, block = (2, 3, 2), (5, 2, 4)
    threads, blocks = int(np.prod(block)), int(np.prod(grid))
    got = np.zeros((blocks * threads, 13), np.uint32)
    place = "mad.lo.u32 {0}, %{1}.z, %{2}.y, %{1}.y;\nmad.lo.u32 {0}, {0}, %{2}.x, %{1}.x;\n"
    body = place.format("%r0", "ctaid", "nctaid") + place.format("%r1", "tid", "ntid")
    body += f"mad.lo.u32 %r0, %r0, {threads}, %r1;\nmad.wide.u32 %d0, %r0, 52, %array0;\n"
    for n, name in enumerate([*names, "laneid"]):
        body += f"mov.u32 %r2, %{name};\nst.global.b32 [%d0+{4 * n}], %r2;\n"
    ptx.load(ptx.kernel(body, 1))
    address = got.ctypes.data
    with ptx.engine().calling([(address, got.nbytes)], []):
        ptx.engine().launch("kernel", grid, block, [address.to_bytes(8, "little")])
    b, t = np.divmod(np.arange(blocks * threads), threads)
    of_thread, of_block = (t % 5, t // 5 % 2, t // 10), (b % 2, b // 2 % 3, b // 6)
    wanted = [*of_thread, *block, *of_block, *grid, t % 32]
    for n, values in enumerate(wanted):
        np.testing.assert_array_equal(got[:, n], values, err_msg=[*names, "laneid"][n])


# ---- all of them --------------------------------------------------------------------------------

TESTED_BY_NAME = {
    **{f"shfl.sync.{how}.b32": test_shuffles for how in ("up", "down", "bfly", "idx")},
    **{f"vote.sync.{how}": test_votes for how in VOTES},
    **{f"redux.sync.{how}.{t}": test_reductions for how in REDUCTIONS for t in ("s32", "u32")},
    **{
        f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16.a4": test_ldmatrix
        for count in (1, 2, 4)
        for trans in ("", ".trans")
    },
    **{f"mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32": test_mma for t in ("f16", "bf16")},
    **{f"cp.async.cg.shared.global.16.a{n}": test_copies for n in (4, 8)},
    "cp.async.commit_group": test_copies,
    "cp.async.wait_all": test_copies,
    "cp.async.wait_group": test_wait_group_leaves_the_newest_groups_alone,
    "bar.warp.sync": test_branches_part_and_meet_again,
    "bra": test_branches_part_and_meet_again,
    "bra.uni": test_branches_part_and_meet_again,
    "ret": test_lanes_may_end_before_others,
    "exit": test_lanes_may_end_before_others,
    "bar.sync": test_barriers_let_a_block_exchange_values,
    "barrier.sync": test_barriers_let_a_block_exchange_values,
}


def test_every_opcode_has_an_oracle() -> None:
    known = [*RULES, *memory_opcodes(), *TESTED_BY_NAME]
    assert len(set(known)) == len(known)
    assert sorted(known) == sorted(ptx.engine().opcodes())


# ---- refusals -----------------------------------------------------------------------------------

REFUSED = {
    # opcodes, types and modifiers
    "frobnicate.b32 %r1, %r2;": "unknown opcode",
    "trap;": "unknown opcode",
    "membar.gl;": "unknown opcode",
    "add.f64 %d1, %d2, %d3;": "unknown opcode add.f64",
    "add.u128 %d1, %d2, %d3;": "unknown opcode or type",
    "add.sat.s32 %r1, %r2, %r3;": "unknown opcode add.sat.s32",
    "add.ftz.f32 %f1, %f2, %f3;": "unknown opcode add.ftz.f32",
    "fma.rz.f32 %f1, %f2, %f3, %f4;": "unknown opcode fma.rz.f32",
    "ex2.approx.f32 %f1, %f2;": "unknown opcode ex2.approx.f32",
    "min.NaN.f32 %f1, %f2, %f3;": "unknown opcode min.NaN.f32",
    "cvt.rn.satfinite.bf16.f32 %h1, %f1;": "unknown opcode cvt.rn.satfinite.bf16.f32",
    "cvt.rn.tf32.f32 %r1, %f1;": "unknown type",
    "shr.b32 %r1, %r2, 1;": "unknown opcode shr.b32",
    "set.lt.u32.f32 %r1, %f1, %f2;": "unknown opcode set.lt.u32.f32",
    "ld.volatile.global.u32 %r1, [%d1];": "unknown opcode ld.volatile.global.u32.4",
    "ld.global.v3.u32 {%r1, %r2, %r3}, [%d1];": "unknown opcode ld.global.v3.u32.4",
    "ld.global.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%d1];": "unknown opcode",
    "ld.global.v4.b64 {%d1, %d2, %d3, %d4}, [%d1];": "unknown opcode ld.global.v4.b64.8",
    "ld.global.u8 %h1, [%d1];": "unknown opcode ld.global.u8.2",
    "st.shared.u8 [%r1], %h1;": "unknown opcode st.shared.u8.2.a4",
    "ld.local.u32 %r1, [%d1];": "unknown opcode ld.local.u32.4",
    "ld.global.q32 %r1, [%d1];": "unknown type",
    "atom.global.add.u32 %r1, [%d1], %r2;": "unknown operand",
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r3}, "
    "{%f1, %f2, %f3, %f4};": "unknown opcode mma.sync.aligned.m16n8k8",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b8 {%r1, %r2, %r3, %r4}, [%r5];": "unknown opcode",
    "cp.async.ca.shared.global [%r1], [%d1], 16;": "unknown opcode or type",
    "cp.async.cg.shared.global.L2::128B [%r1], [%d1], 16;": "unknown opcode or type",
    "mov.b128 %d1, {%d2, %d3};": "unknown type",
    # registers and other operands
    "add.s32 %r1, %r2, %d3;": "%d3 has 8 bytes, not 4",
    "add.s64 %d1, %r2, %d3;": "%r2 has 4 bytes, not 8",
    "add.s16 %r1, %h2, %h3;": "%r1 has 4 bytes, not 2",
    "cvt.u32.u16 %r1, %r2;": "%r2 has 4 bytes, not 2",
    "selp.b32 %r1, %r2, %r3, %r4;": "%r4 has 4 bytes, not 0",
    "setp.eq.s32 %r1, %r2, %r3;": "%r1 has 4 bytes, not 0",
    "@%r1 add.s32 %r1, %r2, %r3;": "%r1 has 4 bytes, not 0",
    "mov.u32 %r1, %r32;": "unknown register %r32",
    "mov.u32 %r1, %q1;": "unknown register %q1",
    "mov.u32 %r1, somewhere;": "unknown operand somewhere",
    "mov.u32 %r1, %warpid;": "unknown register %warpid",
    "mov.u64 %d1, %clock64;": "unknown register %clock64",
    "mov.u64 %d1, %tid.x;": "%tid.x has 4 bytes, not 8",
    "mov.u32 %r1, 017;": "unknown operand 017",
    "mov.u32 %r1, 4294967296;": "does not fit into 4 bytes",
    "mov.b64 %d1, 0f3F800000;": "does not have 8 bytes",
    "mov.b32 %r1, 0d3FF0000000000000;": "does not have 4 bytes",
    "ld.global.v2.u32 {%r1, %d2}, [%d1];": "%d2 has 8 bytes, not 4",
    "ld.global.u32 %r1, [%r2];": "an address of 4 bytes",
    "ld.global.u32 %r1, [param];": "unknown address [param]",
    "ld.param.u32 %r1, [param+4];": "reads past the parameter",
    "ld.param.u32 %r1, [nowhere];": "unknown address [nowhere]",
    "ld.shared.u32 %r1, [%r2+%r3];": "unknown form of address",
    # how many
    "add.s32 %r1, %r2;": "add.s32 with 1 sources",
    "neg.s32 %r1, %r2, %r3;": "neg.s32 with 2 sources",
    "ret %r1;": "1 operands",
    "bra;": "0 operands",
    "add.s32;": "0 operands",
    "mov.b64 %d1, {%h1, %h2, %h3, %h4};": "%h1 has 2 bytes, not 4",
    "mov.b32 %r1, {%h1};": "pack.b32 with 1 sources",
    "ld.global.v2.u32 %r1, [%d1];": "ld.global.v2.u32.4 with 1 destinations",
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1}, [%r5];": "with 1 destinations",
    # forms
    "bar.sync 1;": "another barrier than 0 of all threads",
    "bar.sync 0, 64;": "another barrier than 0 of all threads",
    "bar.sync %r1;": "another barrier than 0 of all threads",
    "bar.arrive 0, 64;": "unknown opcode",
    "@%p1 bra.uni HERE;": "a uniform branch with a predicate",
    "bra NOWHERE;": "unknown label NOWHERE",
    "cp.async.wait_group -1;": "unknown form",
    "cp.async.wait_group %r1;": "unknown form",
    "cp.async.cg.shared.global [%r1+16], [%d1], 16;": "unknown form",
    "cp.async.cg.shared.global [%r1], [%d1], 8;": "unknown form",
    "setp.lt.s32 %p1|%p2, %r1, %r2;": "unknown register %p1|%p2",
    "and.pred %p1, %p2, !%p3;": "unknown operand !%p3",
    "call.uni (%r1), function, (%r2);": "unknown opcode",
    # declarations
    ".local .align 4 .b8 stack[16];": "unknown directive",
    ".branchtargets HERE;": "unknown directive",
    ".reg .b8 %x1;": "unknown type of register",
    ".reg .b128 %x1;": "unknown type of register",
    ".shared .align 4 .f32 tile[16];": "unknown directive",
    ".extern .shared .align 4 .b8 tile[16];": "external with a size",
}


@pytest.mark.parametrize("statement", REFUSED)
def test_what_is_not_understood_is_refused(statement: str) -> None:
    text = ptx.kernel(f"HERE:\n{statement}", more_params=".param .u32 param")
    (line,) = (n for n, raw in enumerate(text.split("\n"), 1) if raw == statement)
    with pytest.raises(ValueError, match=re.escape(REFUSED[statement])) as error:
        ptx.load(text)
    assert f"PTX line {line}:" in str(error.value)


REFUSED_MODULES = {
    ".global .align 4 .b8 table[16];": "unknown directive",
    ".const .align 4 .b8 table[16];": "unknown directive",
    ".visible .func function()\n{\nret;\n}": "unknown directive",
    ".alias one, two;": "unknown directive",
    ".extern .shared .align 4 .f32 tile[];": "unknown directive",
    ".extern .shared .align 4 .b8 tile[16];": "external with a size",
    ".shared .align 4 .b8 tile[];": "not external without",
}


@pytest.mark.parametrize("declaration", REFUSED_MODULES)
def test_declarations_that_are_not_understood_are_refused(declaration: str) -> None:
    text = ptx.kernel("", declarations=declaration)
    with pytest.raises(ValueError, match=f"PTX line 5: .*{REFUSED_MODULES[declaration]}"):
        ptx.load(text)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (".entry kernel(.param .f16 p)\n{\nret;\n}", None),
        (".entry kernel(.param .u64 .ptr .align 1 p)\n{\nret;\n}", None),
        (".entry kernel(.param .u64 .ptr .shared .align 1 p)\n{\nret;\n}", "unknown kind of param"),
        (".entry kernel(.param .f16x2 p)\n{\nret;\n}", "unknown kind of parameter"),
        (".entry kernel(.param .texref p)\n{\nret;\n}", "unknown kind of parameter"),
        (".entry kernel()\n.maxntid 64, 2, 1\n.minnctapersm 2\n{\nret;\n}", None),
        (
            ".entry kernel()\n.reqntid 64\n{\nret;\n}",
            "unknown directive of a kernel: '.reqntid 64'",
        ),
        (".entry kernel()\n.explicitcluster\n{\nret;\n}", "unknown directive of a kernel"),
        (".entry kernel()\n{\nbar.sync 0;\n}", "the code does not end here"),
        (".entry kernel()\n{\n.reg .pred %p<2>;\n@%p1 ret;\n}", "the code does not end here"),
        (".entry kernel()\n{\nbra END;\nEND:\n}", "a branch to nowhere"),
        (".entry kernel()\n{\nret\n}", "statement without an end"),
        (".entry kernel()\n{\n}", "a kernel without code"),
        (".entry kernel()\n{\nA:\nA:\nret;\n}", "label seen twice"),
        ("", "no kernel in this PTX"),
    ],
)
def test_kernels_that_are_not_understood_are_refused(kernel: str, message: str | None) -> None:
    text = ptx.HEADER + kernel
    if message is None:
        ptx.load(text)
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            ptx.load(text)


def test_addresses_of_32_bits_are_refused() -> None:
    text = ptx.kernel("").replace(".address_size 64", ".address_size 32")
    with pytest.raises(ValueError, match="PTX line 3: unknown directive"):
        ptx.load(text)


def test_registers_of_an_inner_scope_end_with_it() -> None:
    """As in assembler that is written by hand, whose names may hide those around it."""
    got = np.zeros(2, np.uint32)
    body = """
        .reg .b32 x;
        mov.u32 x, 1;
        {
        .reg .b32 x, y;
        .reg .pred p;
        mov.u32 x, 2;
        setp.ne.u32 p, x, 0;
        @p mov.u32 y, 7;
        @p st.global.b32 [%array0], y;
        }
        st.global.b32 [%array0+4], x;
    """
    assert {f.kind for f in ptx.run(body, [got], block=1)} == set()
    assert list(got) == [7, 1]
    with pytest.raises(ValueError, match="unknown operand y"):
        ptx.load(ptx.kernel(body + "mov.u32 x, y;", 1))


def test_shared_variables_lie_behind_each_other() -> None:
    """Those that a kernel names, aligned, and what the launch asks for behind them."""
    declarations = (
        ".shared .align 4 .b8 other[999];\n.shared .align 4 .b8 first[20];\n"
        ".extern .shared .align 128 .b8 dynamic[];"
    )
    got = np.zeros(3, np.uint32)
    body = ".shared .align 16 .b8 second[4];\n"
    for n, name in enumerate(("first", "second", "dynamic")):
        body += f"mov.u32 %r1, {name};\nst.global.b32 [%array0+{4 * n}], %r1;\n"
    assert ptx.run(body, [got], block=1, declarations=declarations) == []
    assert list(got) == [0, 32, 128]
