"""Run by test_bench in a process of its own, because hogwild_ext is then the one whose GPU is
emulated.

    python emulated_bench.py counts     what the kernels did beside what was counted, a JSON line
    python emulated_bench.py measured   the whole benchmark on small cells, as JSON lines
    python emulated_bench.py model ...  `hogwild bench attention ...`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from emulator import session

SESSION = session.start()

import torch  # noqa: E402

from hogwild_ext import cli  # noqa: E402
from hogwild_ext.bench import attention, report, timing, yardsticks  # noqa: E402
from hogwild_ext.bench.grid import Cell, Heads  # noqa: E402
from hogwild_ext.bench.inputs import Inputs  # noqa: E402
from hogwild_ext.bench.peers import GPU_PEERS, StepAttend  # noqa: E402
from hogwild_ext.bench.work import count_layer  # noqa: E402


def cell(
    heads: tuple[int, int, int], step: str, segments: str, context: int, workers: int,
    dtype: str = "bfloat16",
) -> Cell:  # fmt: skip
    return Cell(Heads("", *heads), dtype, step, segments, context, workers)


# All shapes of kernel: row tiles 1, 2 and 4; one token and several a worker; items that write the
# output, that fold several passes first, and that leave it to the merge.
COUNTED = [
    cell((4, 2, 64), "decode", "few", 700, 2),
    cell((6, 2, 64), "decode", "many", 700, 4),
    cell((5, 1, 128), "decode", "few", 1500, 4),
    cell((5, 1, 128), "ragged", "few", 700, 4),
    cell((5, 1, 128), "ragged", "many", 1000, 3, "float16"),
    cell((3, 1, 96), "decode", "few", 900, 3),
    cell((2, 1, 256), "ragged", "few", 500, 3),
    cell((4, 1, 64), "prefill", "few", 300, 1),
    cell((4, 2, 128), "decode", "few", 60, 1),
    cell((176, 88, 64), "prefill", "few", 390, 1),
    cell((528, 132, 64), "prefill", "few", 260, 1),
]


def counts() -> None:
    for case in COUNTED:
        inputs = Inputs.make(case, torch.device("cpu"))
        ours = StepAttend().prepare(inputs)
        SESSION.engine.clear_counters()
        SESSION.runtime.clear_calls()
        ours.run()
        launched = [call for call in SESSION.runtime.calls() if call.is_launch]
        work = count_layer(case)
        names = ("blocks", "load_sectors", "store_sectors", "mma")
        print(json.dumps({
            "cell": str(case),
            "context": case.context,
            "row_tiles": work.kernel.row_tiles,
            "passes_of_an_item": max(item.passes for item in work.items),
            "modelled": {n: sum(getattr(launch, n) for launch in work.launches) for n in names},
            "counted": {n: SESSION.engine.counters().as_dict()[n] for n in names},
            "modelled_blocks": [launch.blocks for launch in work.launches],
            "launched_blocks": [call.grid[0] * call.grid[1] for call in launched],
            "modelled_shared": work.kernel.shared_bytes(228 * 1024),
            "launched_shared": launched[1].shared,
            "key_value_sectors": work.kv_heads * sum(
                2 * item.kv_rows * case.heads.head_dim * 2 // 32 for item in work.items
            ),
        }))  # fmt: skip


class EmulatedTimer(timing.ClockTimer):
    """With graphs as the emulated runtime captures them."""

    def captured(self, function: Callable[[], Any]) -> Callable[[], Any]:
        backend, memory = SESSION.backend, []
        make_known = backend._calling

        def calling(*tensors: Any) -> Any:
            memory.append(tensors)
            return make_known(*tensors)

        with mock.patch.object(backend, "_calling", calling), SESSION.runtime.capture() as calls:
            function()

        def replay() -> None:
            with make_known(*memory[0]):
                SESSION.runtime.replay(calls)

        return replay


def measured() -> int:
    device, timer = torch.device("cpu"), EmulatedTimer()
    bench = attention.Measured(
        device, "emulated GPU", timer, yardsticks.CopyRate(device, timer, 1 << 20), "warm",
        GPU_PEERS, rounds=2,
    )  # fmt: skip
    cells = [
        cell((4, 2, 64), "decode", "few", 200, 2),
        cell((4, 2, 64), "decode", "many", 90, 3, "float16"),
        cell((2, 1, 64), "ragged", "few", 150, 3),
        cell((2, 1, 128), "prefill", "few", 100, 2),
        cell((2, 2, 64), "decode", "few", 100, 1, "float32"),
    ]
    return attention.run(cells, bench, report.JsonReport(sys.stdout))


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "model":
        sys.exit(cli.main(["bench", "attention", *words]))
    sys.exit({"counts": counts, "measured": measured}[what]())
