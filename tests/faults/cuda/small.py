"""Faults of csrc/cuda/small.cuh."""

from __future__ import annotations

from ..fault import Fault
from .tests import PAGES

FAULTS = [
    # Partial results
    Fault(
        "a block of the merge takes one row only",
        "csrc/cuda/small.cuh",
        "r += gridDim.y",
        "r += merge.row_count",
    ),
    Fault(
        "the merge folds from right to left",
        "csrc/cuda/small.cuh",
        "merge.slot_row + int64_t(s) * merge.row_count + r",
        "merge.slot_row + int64_t(merge.num_slots - 1 - s) * merge.row_count + r",
    ),
    Fault(
        "the merge leaves out the last partial result",
        "csrc/cuda/small.cuh",
        "s < merge.num_slots",
        "s + 1 < merge.num_slots",
    ),
    Fault(
        "merged outputs are not divided by the sum",
        "csrc/cuda/small.cuh",
        "const float inverse = sum == 0.f ? 0.f : 1.f / sum;",
        "const float inverse = 1.f;",
    ),
    # Append and move
    Fault(
        "append: a row too far",
        "csrc/cuda/small.cuh",
        "* TILE + slot % TILE) * D",
        "* TILE + (slot + 1) % TILE) * D",
        PAGES,
    ),
    Fault(
        "append: keys are rotated by the token before's angles",
        "csrc/cuda/small.cuh",
        "header.array<float>(header.key_angles) + int64_t(t) * 2 * half",
        "header.array<float>(header.key_angles) + int64_t(max(t - 1, 0)) * 2 * half",
        PAGES,
    ),
    Fault(
        "append: values of the first head",
        "csrc/cuda/small.cuh",
        "t * params.values.token_stride + head * params.values.head_stride",
        "t * params.values.token_stride",
        PAGES,
    ),
    Fault(
        "append: no rope_scale",
        "csrc/cuda/small.cuh",
        "params.interleaved, params.rope_scale));",
        "params.interleaved, 1.f));",
        PAGES,
    ),
    Fault(
        "append and move: keys turn the other way",
        "csrc/cuda/small.cuh",
        "low ? -sine : sine",
        "low ? sine : -sine",
        PAGES,
    ),
    Fault(
        "append and move: interleaved pairs are taken for halves",
        "csrc/cuda/small.cuh",
        "const int step = interleaved ? 1 : half;",
        "const int step = half;",
        PAGES,
    ),
    Fault(
        "move: into the page of the source's row",
        "csrc/cuda/small.cuh",
        "target_pages[goal / TILE]",
        "target_pages[l / TILE]",
        PAGES,
    ),
    Fault(
        "move: into the row of the source",
        "csrc/cuda/small.cuh",
        "* TILE + goal % TILE) * D",
        "* TILE + l % TILE) * D",
        PAGES,
    ),
    Fault(
        "move: keys keep their angle",
        "csrc/cuda/small.cuh",
        "keys[to + d] = T::narrow(\n"
        "          rotated_key<T>(keys + from, angles, header.half_rotary, d, "
        "params.interleaved, 1.f));",
        "keys[to + d] = keys[from + d];",
        PAGES,
    ),
    Fault(
        "move: the first layer's values only",
        "csrc/cuda/small.cuh",
        "(params.tables + header.value_layers)[layer]",
        "(params.tables + header.value_layers)[0]",
        PAGES,
    ),
]
