"""How tests compare tensors: inf and nan masks, then the relative norm, then the worst element.

A norm alone hides one bad row among thousands, a worst element alone says nothing about the rest,
and neither means anything while a nan is about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Limits:
    """What the op promises for standard-normal data."""

    out: float  # ||out - ref|| / ||ref||
    lse: float  # |lse - ref|; float32: of max(1, |ref|)
    lse_is_relative: bool


LIMITS = {
    torch.float32: Limits(out=1e-5, lse=2e-5, lse_is_relative=True),
    torch.float16: Limits(out=5e-4, lse=2e-2, lse_is_relative=False),
    torch.bfloat16: Limits(out=4e-3, lse=2e-2, lse_is_relative=False),
}

# The worst element may miss by this many times the norm's limit, measured against the larger of
# the element itself and the root mean square of its row: rounding to the storage type alone
# reaches 1, and in a row of two or three keys an error of a probability goes into every element,
# times the difference of the values.
WORST = 10.0

# Fewer rows than this have no average to speak of: rounding the query, the probabilities and the
# output may go the same way in all of them, and go well in the eager reference.
A_FEW_ROWS = 8

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_out_matches(out: torch.Tensor, expected: torch.Tensor) -> None:
    """`out` against a float64 reference, with the limits of its storage type."""
    assert_close(out, expected, relative=LIMITS[out.dtype].out, name="out")


def assert_out_near(
    out: torch.Tensor, expected: torch.Tensor, eager: Callable[[], torch.Tensor]
) -> float:
    """As `assert_out_matches`, or with at most twice the error of `eager`: one row is a lottery.

    A softmax over two keys has two probabilities, and the error of rounding them is that of the
    row. Returns the error as a share of the fixed limit.
    """
    limit = LIMITS[out.dtype].out
    error = relative_error(out, expected)
    if error > limit:
        few = out.numel() < A_FEW_ROWS * out.shape[-1]
        limit = max(2 * limit if few else limit, 2 * relative_error(eager(), expected))
    assert_close(out, expected, relative=limit, name="out")
    return error / LIMITS[out.dtype].out


def assert_lse_matches(
    lse: torch.Tensor, expected: torch.Tensor, storage: torch.dtype, name: str = "lse"
) -> None:
    """`lse` (float32, of inputs in the type `storage`) against a float64 reference."""
    assert lse.dtype == torch.float32, f"{name}: expected float32, got {lse.dtype}"
    assert_same_shape(lse, expected, name)
    assert_same_masks(lse, expected, name)
    limits = LIMITS[storage]
    finite = torch.isfinite(expected)
    error = torch.where(finite, lse.to(torch.float64) - expected, 0.0).abs()
    if limits.lse_is_relative:
        error = error / torch.where(finite, expected, 1.0).abs().clamp(min=1.0)
    if error.numel() and error.max() >= limits.lse:
        where = worst_index(error)
        raise AssertionError(
            f"{name}{where}: expected {expected[where].item():.9g}, got {lse[where].item():.9g}, "
            f"which is {error[where].item():.3g} away; the limit for {storage} is {limits.lse:g}"
        )


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    relative: float,
    worst: float | None = None,
    name: str = "result",
) -> None:
    """`actual` within `relative` of the float64 `expected` by norm, and no element far off.

    `worst`: limit of one element's error, relative to the larger of the element and its row's
    root mean square (a row: the last dim). `WORST * relative` if left out.
    """
    assert_same_shape(actual, expected, name)
    assert_same_masks(actual, expected, name)
    finite = torch.isfinite(expected)
    reference = torch.where(finite, expected.to(torch.float64), 0.0)
    difference = torch.where(finite, actual.to(torch.float64), 0.0) - reference
    if difference.numel() == 0:
        return

    norm = reference.norm().item()
    distance = difference.norm().item()
    if distance > relative * norm:
        where = worst_index(difference.abs())
        raise AssertionError(
            f"{name}: relative error {distance / norm if norm else float('inf'):.3g}, "
            f"limit {relative:g} ({actual.dtype}, shape {tuple(actual.shape)}); "
            f"worst is {name}{where}: expected {expected[where].item():.9g}, "
            f"got {actual[where].item():.9g}; {_rows_off(difference, reference, relative)}"
        )

    worst = WORST * relative if worst is None else worst
    row = reference.square().mean(dim=-1, keepdim=True).sqrt()
    share = difference.abs() / torch.maximum(reference.abs(), row).clamp(min=1e-300)
    if share.max() > worst:
        where = worst_index(share)
        raise AssertionError(
            f"{name}{where}: expected {expected[where].item():.9g}, got "
            f"{actual[where].item():.9g}, off by {share[where].item():.3g} of its row, limit "
            f"{worst:g}, though the whole is near ({distance / norm:.3g} of {relative:g}); "
            f"{_rows_off(difference, reference, worst)}"
        )


def assert_same_masks(actual: torch.Tensor, expected: torch.Tensor, name: str = "result") -> None:
    """nan, +inf and -inf stand in the same places."""
    for word, mask in (
        ("nan", torch.isnan),
        ("inf", torch.isposinf),
        ("-inf", torch.isneginf),
    ):
        wrong = mask(actual) != mask(expected)
        if wrong.any():
            where = worst_index(wrong)
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ in being {word}, "
                f"first {name}{where}: expected {expected[where].item():g}, "
                f"got {actual[where].item():g}"
            )


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, name: str = "result") -> None:
    """Equal bit for bit: nan payloads and the sign of zero count."""
    assert actual.dtype == expected.dtype, f"{name}: expected {expected.dtype}, got {actual.dtype}"
    assert_same_shape(actual, expected, name)
    kind = BITS[actual.element_size()]
    wrong = actual.contiguous().view(kind) != expected.contiguous().view(kind)
    if wrong.any():
        where = worst_index(wrong)
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ in their bits, first "
            f"{name}{where}: expected {expected[where].item()!r}, got {actual[where].item()!r}"
        )


def assert_same_shape(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert actual.shape == expected.shape, (
        f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; 0 for two zeros."""
    expected = expected.to(torch.float64)
    distance = (actual.to(torch.float64) - expected).norm().item()
    return distance / expected.norm().item() if distance else 0.0


def worst_index(x: torch.Tensor) -> tuple[int, ...]:
    """Index of the largest element, of the first one among equals."""
    flat = int(x.to(torch.float64).flatten().argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), x.shape))


def _rows_off(difference: torch.Tensor, reference: torch.Tensor, limit: float) -> str:
    """How much of it is wrong: one row, or all of them?"""
    off = difference.norm(dim=-1) > limit * reference.norm(dim=-1)
    return f"{int(off.sum())} of {off.numel()} rows are off by more than {limit:g}"
