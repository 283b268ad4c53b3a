"""Faults of csrc/cuda/tables.cpp."""

from __future__ import annotations

from ..fault import Fault

FAULTS = [
    Fault(
        "slots of two items overlap by a row",
        "csrc/cuda/tables.cpp",
        "slot_rows_ += int64_t(first ? 1 : end - begin) * count;",
        "slot_rows_ += int64_t(first ? 1 : end - begin) * count - 1;",
    ),
    Fault(
        "the last cut of a row group's passes is lost",
        "csrc/cuda/tables.cpp",
        "if (sum * runs >= total * int64_t(ends.size() + 1)) ends.push_back(i + 1);",
        "if (i + 1 < end && sum * runs >= total * int64_t(ends.size() + 1))\n"
        "      ends.push_back(i + 1);",
    ),
    Fault(
        "a pass's pages are its segment's first",
        "csrc/cuda/tables.cpp",
        "plan.first_tile[chunk.segment] + chunk.begin / TILE",
        "plan.first_tile[chunk.segment]",
    ),
    Fault(
        "a pass begins a tile late",
        "csrc/cuda/tables.cpp",
        "pass.first_tile = int32_t((first - chunk.begin) / TILE);",
        "pass.first_tile = int32_t(ceil_div(first - chunk.begin, TILE));",
    ),
    Fault(
        "the tile in which a window begins is not masked",
        "csrc/cuda/tables.cpp",
        "int32_t(ceil_div(inner_low - chunk.begin, TILE))",
        "int32_t((inner_low - chunk.begin) / TILE)",
    ),
    Fault(
        "the tile in which the keys seen end is not masked",
        "csrc/cuda/tables.cpp",
        "int32_t((inner_high + 1 - chunk.begin) / TILE)",
        "int32_t(ceil_div(inner_high + 1 - chunk.begin, TILE))",
    ),
    Fault(
        "rows 32 to 63 have seen what rows 0 to 31 have",
        "csrc/cuda/tables.cpp",
        "pass.seen_by[1] = uint32_t(seen_by >> 32);",
        "pass.seen_by[1] = uint32_t(seen_by);",
    ),
    Fault(
        "the last padding row is not written",
        "csrc/cuda/tables.cpp",
        "i < padded_queries; ++i)",
        "i + 1 < padded_queries; ++i)",
    ),
    Fault(
        "a worker's tokens are those of the row group's last worker",
        "csrc/cuda/tables.cpp",
        "tokens = std::max(tokens, plan.query_lengths[plan.parts[p].worker]);",
        "tokens = plan.query_lengths[plan.parts[p].worker];",
    ),
]
