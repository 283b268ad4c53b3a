"""`hogwild bench attention`: cells, the model beside kernels that run, peers, ceilings, targets,
output."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attention_libraries
from emulator import build
from hogwild_ext import _C, cli
from hogwild_ext.bench import (
    attention,
    attention_targets,
    ceilings,
    flex,
    grid,
    peers,
    plots,
    report,
    roofline,
    targets,
    timing,
    work,
    yardsticks,
)  # fmt: skip
from hogwild_ext.bench.grid import Cell, Heads

TESTS = Path(__file__).parent
CPU = torch.device("cpu")
SMALL = Cell(Heads("", 4, 2, 64), "bfloat16", "decode", "few", 700, 3)


def hogwild(*words: str) -> int:
    """Runs `hogwild bench attention`; argparse's own exit is an exit code too."""
    try:
        return cli.main(["bench", "attention", *words])
    except SystemExit as exit:
        return int(exit.code or 0)


def changed(cell: Cell, **values: Any) -> Cell:
    return dataclasses.replace(cell, **values)


# ---- cells --------------------------------------------------------------------------------------


@given(
    st.sampled_from(("decode", "ragged", "prefill")), st.sampled_from(grid.SEGMENTS),
    st.integers(40, 3000), st.integers(1, 8),
)  # fmt: skip
def test_views_have_the_context(step: str, segments: str, context: int, workers: int) -> None:
    layout = changed(SMALL, step=step, segments=segments, context=context, workers=workers).layout()
    assert len(layout.views) == len(layout.query_lengths) == workers
    assert len({view[-1] for view in layout.views}) == workers  # each writes its own
    for view, new in zip(layout.views, layout.query_lengths, strict=True):
        assert sorted(view) == list(range(len(layout.lengths)))
        assert sum(layout.lengths[s] for s in view) == context
        assert 1 <= new <= layout.lengths[view[-1]]
    assert min(layout.lengths) > 0
    shared = len(layout.lengths) - workers
    assert shared == 1 if segments == "few" else 1 < shared <= grid.MANY_SEGMENTS


def test_a_context_too_short_for_its_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="context: expected more than 16 tokens for 4 workers"):
        changed(SMALL, step="ragged", context=16, workers=4).layout()


def test_short_segments_and_numbers_of_segments() -> None:
    cell = changed(SMALL, segments="5", context=1000, workers=2, short_segments=8)
    layout = cell.layout()
    assert len(layout.lengths) == 5 + 8
    assert layout.lengths[5:] == [grid.SHORT_SEGMENT] * 8
    assert [view[-1] for view in layout.views] == [5, 6]
    assert all(sum(layout.lengths[s] for s in view) == 1000 for view in layout.views)


def test_a_prompt_is_all_new() -> None:
    layout = changed(SMALL, step="prompt", context=77, workers=1).layout()
    assert (layout.lengths, layout.query_lengths) == ([77], [77])
    with pytest.raises(ValueError, match="workers: expected 1 for a prompt, got 3"):
        changed(SMALL, step="prompt").layout()


@given(
    st.sampled_from(("decode", "ragged", "prefill")), st.sampled_from(("few", "many", "7")),
    st.integers(60, 300), st.integers(1, 4),
)  # fmt: skip
def test_visible_pairs(step: str, segments: str, context: int, workers: int) -> None:
    layout = changed(SMALL, step=step, segments=segments, context=context, workers=workers).layout()
    pairs = 0
    for view, new in zip(layout.views, layout.query_lengths, strict=True):
        places = range(sum(layout.lengths[s] for s in view))
        pairs += sum(key <= query for query in places[-new:] for key in places)
    assert layout.visible_pairs() == pairs
    assert layout.seen_tokens() == sum(layout.lengths)


def test_a_token_that_nobody_sees_is_not_read() -> None:
    layout = grid.Layout([[0, 2], [0, 3]], [10, 99, 4, 5], [1, 2])
    assert layout.seen_tokens() == 19
    assert layout.visible_pairs() == 14 + (14 + 15)


def test_heads_are_named_or_written() -> None:
    assert grid.heads_from("llama-3") == Heads("Llama-3-8B", 32, 8, 128)
    assert str(grid.heads_from("40/8x128")) == "40/8x128"


# ---- the model ----------------------------------------------------------------------------------


def emulated(*words: str) -> str:
    """What emulated_bench.py prints."""
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    result = subprocess.run(
        [sys.executable, "emulated_bench.py", *words],
        cwd=TESTS,
        env={**os.environ, "HOGWILD_EMULATE_ARCH": "90"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def test_the_work_counted_is_the_work_done() -> None:
    """Blocks and products exactly, stored sectors to 1%, loaded ones to 2% where keys and values
    are most of them, and to 10% in short steps, where small tables weigh in."""
    cases = [json.loads(line) for line in emulated("counts").splitlines()]
    assert {case["row_tiles"] for case in cases} == {1, 2, 4}
    for case in cases:
        modelled, counted = case["modelled"], case["counted"]
        assert modelled["mma"] == counted["mma"] > 0, case
        assert case["modelled_blocks"] == case["launched_blocks"], case
        assert modelled["blocks"] == counted["blocks"], case
        assert modelled["store_sectors"] == pytest.approx(counted["store_sectors"], rel=0.01), case
        assert modelled["load_sectors"] == pytest.approx(counted["load_sectors"], rel=0.1), case
        assert case["key_value_sectors"] < counted["load_sectors"], case
        assert case["modelled_shared"] == case["launched_shared"], case
        if case["context"] >= 1500:
            assert modelled["load_sectors"] == pytest.approx(counted["load_sectors"], rel=0.02)
    assert max(case["context"] for case in cases) >= 1500
    kinds = {(len(case["launched_blocks"]), case["passes_of_an_item"] > 1) for case in cases}
    assert kinds == {(2, True), (3, False), (3, True)}  # merged or not, folded or not


def test_bytes_are_those_of_the_tensors() -> None:
    cell = changed(SMALL, context=128, workers=1)
    moved = work.step_bytes(cell, work.step_tables(cell))
    assert moved.cache == 2 * 128 * 2 * 64 * 2
    assert moved.operands == 2 * (4 + 2) * 64 * 2  # queries and outputs, keys and values
    # Two results of (64 + 2) floats for each of 4 query heads: the long segment and the short one.
    items = work.count_layer(cell).items
    slots = sum(item.passes for item in items) if len(items) > 1 else 0
    assert moved.partial == slots * 4 * (64 + 2) * 4
    assert moved.total == moved.cache + moved.operands + 2 * moved.partial


def test_times_of_the_model() -> None:
    gpu = roofline.GPUS["h100"]
    cell = changed(SMALL, heads=grid.MODELS["llama-3"], context=65536, workers=1)
    layer = work.count_layer(cell)
    model = roofline.estimate(layer, gpu)
    read = layer.bytes.cache / gpu.bytes_per_second
    assert read < model.seconds < 1.25 * read
    assert model.limit == "memory"

    # Nothing but the memory's rate matters here: half of it takes twice as long, less the launches.
    slow = dataclasses.replace(gpu, bytes_per_second=gpu.bytes_per_second / 2)
    launches = len(layer.launches) * roofline.LAUNCH_SECONDS
    doubled = 2 * (model.seconds - launches) + launches
    assert roofline.estimate(layer, slow).seconds == pytest.approx(doubled, rel=0.02)

    # A short step is all launches, and no GPU makes those faster.
    short = roofline.estimate(work.count_layer(changed(cell, context=256)), gpu)
    assert short.limit == "launches" and short.seconds > 2 * roofline.LAUNCH_SECONDS

    # With slow issue or slow tensor cores, those are the limit.
    for slower, limit in (({"clock": 1e6}, "issue"), ({"tensor_flops": 1e10}, "tensor")):
        assert roofline.estimate(layer, dataclasses.replace(gpu, **slower)).limit == limit


def test_waves() -> None:
    layer = work.count_layer(changed(SMALL, heads=grid.MODELS["llama-3"], context=16384))
    at_once = layer.kernel.blocks_at_once(100 * 1024)
    blocks = layer.attention.blocks
    for processors in (1, 7, blocks):
        gpu = dataclasses.replace(roofline.GPUS["l40s"], multiprocessors=processors)
        assert roofline.estimate(layer, gpu).waves == -(-blocks // (at_once * processors))


def test_blocks_of_a_wave_share_what_they_read() -> None:
    """Two row groups: their blocks load everything twice, from memory it comes once."""
    cell = changed(SMALL, heads=grid.MODELS["llama-3"], context=2048, workers=32)
    layer = work.count_layer(cell)
    assert sum(item.kv_rows for item in layer.items) == 2 * 2048
    moved = layer.bytes.cache + layer.bytes.operands + layer.bytes.partial
    everything = dataclasses.replace(roofline.GPUS["h100"], multiprocessors=10**6)
    assert [wave[1] for wave in roofline._waves(layer, everything)] == [pytest.approx(moved)]
    one_block = dataclasses.replace(everything, multiprocessors=1, shared_bytes=100 * 1024)
    again = sum(wave[1] for wave in roofline._waves(layer, one_block))
    assert again == pytest.approx(moved + layer.bytes.cache)


def test_every_kernel_has_its_instructions() -> None:
    shapes = itertools.product((64, 96, 128, 256), (1, 17, 33))
    kernels = [work.AttentionKernel.of(dim, rows) for dim, rows in shapes]
    assert {(k.head_dim, k.row_tiles) for k in kernels} == set(roofline.INSTRUCTIONS)
    for gpu in roofline.GPUS.values():
        assert all(kernel.blocks_at_once(gpu.shared_bytes) >= 1 for kernel in kernels)


# ---- candidates and timing ----------------------------------------------------------------------


def measured(
    cells: list[Cell], those: Any = peers.GPU_PEERS, yardstick: Any = None, timer: Any = None
) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and JSON of a run on the CPU, beside a copy unless another yardstick is given."""
    out, timer = io.StringIO(), timer or timing.ClockTimer()
    yardstick = yardstick or yardsticks.CopyRate(CPU, timer, 1 << 16)
    bench = attention.Measured(CPU, "CPU", timer, yardstick, "warm", those, rounds=2)
    code = attention.run(cells, bench, report.JsonReport(out))
    return code, [json.loads(line) for line in out.getvalue().splitlines()]


class Numbered(timing.ClockTimer):
    """Says of the first function that it took 1, 2 and 3 s, of the second one 2, 4 and 6 s."""

    def __call__(self, functions: Any, rounds: int) -> dict[str, timing.Timing]:
        return {
            name: timing.Timing((i, 2.0 * i, 3.0 * i)) for i, name in enumerate(functions, start=1)
        }


OF_WORKERS = {"step.attend", "concurrent_attention", "SDPA, a cache a worker"}
LIBRARIES = {"FlashInfer, a request a worker", "flash-attention"}


def test_all_peers_compute_the_same() -> None:
    cells = [
        changed(SMALL, step=step, segments=segments, context=330)
        for step in ("decode", "ragged", "prefill")
        for segments in grid.SEGMENTS
    ]
    cells.append(changed(SMALL, step="ragged", context=600))  # shares pages of 256 tokens too
    with attention_libraries.installed():
        code, (about, *records) = measured(cells)
    assert code == 0
    assert about["missing"] == {} and about["measured"]
    assert [r for r in records if r["error"]] == []
    for cell in cells:
        names = {r["what"] for r in records if (r["step"], r["segments"], r["context"]) == (
            cell.step, cell.segments, cell.context
        )}  # fmt: skip
        packed = {"SDPA, rows packed"} if cell.step == "decode" else set()
        # A cascade needs something that all views begin with.
        shares = cell.segments == "few" and cell.layout().lengths[0] >= peers.PAGE
        assert names == OF_WORKERS | LIBRARIES | packed | (
            {"FlashInfer, cascade"} if shares else set()
        )


def test_figures_of_a_record() -> None:
    _, (about, *records) = measured([SMALL], timer=Numbered())
    assert about["missing"] == {
        p.name: "not installed" for p in peers.GPU_PEERS if p.library != "torch"
    }
    ours = next(r for r in records if r["what"] == "step.attend")
    moved = work.step_bytes(SMALL, work.step_tables(SMALL))
    assert ours["bytes"] == moved.total
    for r in records:
        assert r["bytes_per_second"] == pytest.approx(r["bytes"] / r["seconds"])
        assert r["part_of_copy"] == pytest.approx(
            r["bytes_per_second"] / about["copy_bytes_per_second"]
        )
        assert r["times_ours"] == pytest.approx(r["seconds"] / ours["seconds"])
        assert (r["spread"], r["ratio_spread"], r["calls"]) == (0.5, 0.0, 3)
    # Each worker's own cache is 700 tokens; packed into one it is there once.
    by_name = {r["what"]: r for r in records}
    token = 2 * 2 * 64 * 2
    assert by_name["SDPA, a cache a worker"]["bytes"] == 3 * 700 * token + moved.operands
    assert by_name["SDPA, rows packed"]["bytes"] == 700 * token + moved.operands


class Wrong(peers.SdpaPerWorker):
    """A fast way to compute something else: one key too few."""

    name = "wrong"

    def prepare(self, inputs: Any) -> Any:
        keys = [key.clone() for key in inputs.keys]
        keys[0][0] += 10
        inputs = dataclasses.replace(inputs, keys=keys)
        return super().prepare(inputs)


class Failing(peers.Peer):
    name, library = "failing", "torch"

    def prepare(self, inputs: Any) -> Any:
        raise RuntimeError("not for\n this head dimension")


def test_a_peer_that_is_wrong_or_fails_has_no_time() -> None:
    code, (_, *records) = measured([SMALL], (Wrong(), Failing(), peers.SdpaPacked()))
    assert code == 2
    by_name = {r["what"]: r for r in records}
    assert re.fullmatch(r"differs by [\d.]+", by_name["wrong"]["error"])
    assert by_name["failing"]["error"] == "RuntimeError: not for this head dimension"
    assert "seconds" not in by_name["wrong"] and "seconds" not in by_name["failing"]
    assert by_name["SDPA, rows packed"]["seconds"] > 0
    assert measured([SMALL], (Failing(),))[0] == 0


SLOW_PATH = "rotate, concat, SDPA"


def small_roofline() -> yardsticks.Roofline:
    return yardsticks.Roofline(ceilings.Ceilings(buffer_bytes=1 << 20, pass_bytes=1 << 18))


@pytest.mark.parametrize("dtype", grid.DTYPES)
def test_the_peers_of_the_cpu_compute_the_same(dtype: str) -> None:
    cells = [
        changed(SMALL, dtype=dtype, step=step, segments=segments, context=150)
        for step in ("decode", "ragged", "prefill")
        for segments in grid.SEGMENTS
    ]
    cells.append(changed(SMALL, dtype=dtype, step="prompt", context=80, workers=1))
    those = [peer for peer in peers.CPU_PEERS if not isinstance(peer, peers.Flex)]
    code, (about, *records) = measured(cells, those, small_roofline())
    assert code == 0 and about["missing"] == {}
    assert [r for r in records if r["error"]] == []
    for cell in cells:
        names = {r["what"] for r in records if (r["step"], r["segments"]) == (
            cell.step, cell.segments
        )}  # fmt: skip
        packed = {"SDPA, rows packed"} if cell.step == "decode" else set()
        assert names == OF_WORKERS | {SLOW_PATH} | packed


def test_flex_attention_computes_the_same() -> None:
    flexed = peers.Flex()
    if reason := flexed.why_not():
        pytest.skip(f"FlexAttention: {reason}")
    cells = [changed(SMALL, step=step, context=150) for step in ("decode", "ragged", "prefill")]
    code, (_, *records) = measured(cells, [flexed], small_roofline())
    assert code == 0 and [r for r in records if r["error"]] == []
    assert [r["step"] for r in records if r["what"] == flexed.name] == ["decode", "prefill"]


def test_the_slow_path_rotates() -> None:
    """Without its rotation it would be told apart."""
    inputs = attention.Inputs.make(SMALL, CPU)
    inputs.inv_freq = 0 * inputs.inv_freq
    wrong = peers.RotateAndConcatenate().prepare(inputs)
    expected = peers.StepAttend().prepare(attention.Inputs.make(SMALL, CPU)).run()
    assert attention._difference(wrong, expected, SMALL).startswith("differs by")


def test_what_cannot_be_compiled_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "why_not", lambda: "does not compile: no compiler")
    _, (about, *records) = measured([SMALL, SMALL], (peers.Flex(),), small_roofline())
    assert about["missing"] == {"FlexAttention": "does not compile: no compiler"}
    assert [n for n in about["notes"] if "Flex" in n] == [
        "not shown: FlexAttention (does not compile: no compiler)"
    ]
    assert {r["what"] for r in records} == {"step.attend", "concurrent_attention"}


def test_compiling_is_bounded_and_its_error_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flex.why_not(seconds=0.01) == "compiling took more than 0 s"
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    assert flex.why_not().startswith("does not compile: ")


def test_figures_beside_the_roofline() -> None:
    cell = changed(SMALL, step="ragged")
    _, (about, *records) = measured([cell], (peers.SdpaPerWorker(),), small_roofline())
    assert about["isa"] == _C.isa() and about["threads"] == torch.get_num_threads()
    lengths = cell.layout().lengths
    for r in records:
        assert r["fmas"] == 2 * 64 * 4 * cell.layout().visible_pairs()
        assert r["fmas_per_second"] == pytest.approx(r["fmas"] / r["seconds"])
        assert r["bytes_per_second"] == pytest.approx(r["bytes"] / r["seconds"])
        read = 2 * sum(lengths) * 2 * 64 * 2 / r["read_bytes_per_second"]
        multiplied = r["fmas"] / r["peak_fmas_per_second"]
        assert r["roofline_seconds"] == pytest.approx(max(read, multiplied))
        assert r["part_of_roofline"] == pytest.approx(r["roofline_seconds"] / r["seconds"])
        assert r["limit"] == ("memory" if read > multiplied else "arithmetic")


# ---- ceilings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 63, 129, 1_000_003])
def test_a_pass_reads_everything(count: int, threads: int) -> None:
    numbers = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int64)
    words = numbers.to(torch.int32)
    read = _C.read_bandwidth_pass(words.data_ptr(), 4 * count, threads)
    assert read == int(numbers.sum()) % 2**32


@pytest.mark.parametrize("dtype", [_C.FLOAT32, _C.FLOAT16, _C.BFLOAT16])
def test_multiply_adds_are_counted(dtype: int) -> None:
    done = _C.fma_pass(dtype, 1, 1)
    assert done > 0
    assert _C.fma_pass(dtype, 1001, 3) == 1001 * done
    assert _C.fma_pass(dtype, 0, 1) == 0


def test_rates_and_the_least_time() -> None:
    machine = ceilings.Ceilings(buffer_bytes=1 << 20, pass_bytes=1 << 18)
    functions = machine.functions("float32")
    assert set(functions) == {ceilings.READ, ceilings.MULTIPLY_ADD}
    done = functions[ceilings.MULTIPLY_ADD]()
    timings = {
        ceilings.READ: timing.Timing((1.0, 2.0, 4.0)),
        ceilings.MULTIPLY_ADD: timing.Timing((5.0,) * 3),
    }
    rates = machine.rates("float32", timings)
    assert rates == ceilings.Rates((1 << 18) / 2, done / 5, timings[ceilings.READ].spread, 0.0)
    rates = ceilings.Rates(100.0, 1000.0, 0.1, 0.2)
    memory, arithmetic = ceilings.Work(200, 1000), ceilings.Work(200, 5000)
    assert (rates.least_seconds(memory), rates.limit(memory)) == (2.0, "memory")
    assert (rates.least_seconds(arithmetic), rates.limit(arithmetic)) == (5.0, "arithmetic")
    assert (rates.spread(memory), rates.spread(arithmetic)) == (0.1, 0.2)


def test_functions_are_timed_in_turn() -> None:
    called: list[str] = []
    timer = timing.ClockTimer()
    timings = timer({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3)
    assert called == ["a", "b"] * 4
    assert list(timings) == ["a", "b"]


def test_medians_and_spread() -> None:
    timed = timing.Timing((1.0, 9.0, 2.0))
    assert (timed.median, timed.spread) == (2.0, 2.0)
    assert (timing.Timing((4.0,) * 5).spread, timing.Timing((4.0,)).spread) == (0.0, 0.0)
    assert timed.over(timing.Timing((2.0, 3.0, 1.0))).seconds == (0.5, 3.0, 2.0)


class Clock:
    """A function that takes so many seconds of a clock of its own."""

    def __init__(self, seconds: float) -> None:
        self.now, self._seconds = 0.0, seconds

    def __call__(self) -> float:
        return self.now

    def work(self) -> None:
        self.now += self._seconds


@pytest.mark.parametrize(("seconds", "calls"), [(0.01, 30), (0.25, 9), (7.0, 5)])
def test_rounds_follow_the_time_of_a_call(seconds: float, calls: int) -> None:
    clock = Clock(seconds)
    timings = timing.ClockTimer(budget=2.0, clock=clock)({"work": clock.work}, 30)
    assert timings["work"].seconds == pytest.approx((seconds,) * calls)
    assert len(timing.ClockTimer(clock=clock)({"work": clock.work}, 30)["work"].seconds) == 30


def test_the_whole_benchmark_on_the_emulated_gpu() -> None:
    about, *records = [json.loads(line) for line in emulated("measured").splitlines()]
    assert about["device"] == "emulated GPU"
    assert [r for r in records if r["error"]] == []
    assert {r["dtype"] for r in records} == {"bfloat16", "float16", "float32"}
    assert sum(r["what"] == "step.attend, CUDA graph" for r in records) == 5


@pytest.mark.gpu
def test_the_whole_benchmark_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--workers", "1", "3", "--context", "700", "--heads", "llama-3", "--json"]
    assert hogwild(*words) == 0
    about, *records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert about["measured"] and "cold" in about["caches"]
    ours = [r for r in records if r["what"].startswith("step.attend")]
    assert len(ours) == 2 * 2 * 3 * 2
    assert all(0 < r["part_of_copy"] < 2 for r in ours)


# ---- the command --------------------------------------------------------------------------------

GRID = ("--gpu", "a100", "--context", "512", "--workers", "1", "8", "--heads", "llama-3")


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    assert hogwild(*GRID) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    titles = [line.strip() for line in lines if "Llama-3-8B" in line]
    assert titles == [
        f"Model of A100 SXM 80 GB, not measured: {step}, Llama-3-8B 32/8x128, bfloat16"
        for step in grid.GPU.steps
    ]
    assert any(" mma" in line or "Mmma" in line for line in lines) == (width == 120)


def test_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert hogwild(*GRID, "--markdown", "--step", "decode") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("- no time here was measured (--gpu asks for a model)")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 2 * 2
    assert len({line.count("|") for line in table}) == 1
    assert sum(line.startswith("### Model of ") for line in lines) == 1


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert hogwild(*GRID, "--json", "--step", "decode", "--segments", "many") == 0
    about, *records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert about["kind"] == "about" and not about["measured"]
    assert [(r["kind"], r["workers"], r["segments"]) for r in records] == [
        ("cell", 1, "many"), ("cell", 8, "many"),
    ]  # fmt: skip
    layer = work.count_layer(Cell(grid.MODELS["llama-3"], "bfloat16", "decode", "many", 512, 8))
    assert records[1]["tiles"] == layer.tiles
    assert records[1]["mma"] == layer.attention.mma == layer.tiles * layer.kernel.row_tiles * 128


def test_grid_and_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Cell] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(attention, "on_cpu", lambda **_: None)
    monkeypatch.setattr(attention, "run", lambda cells, bench, shown: asked.extend(cells) or 0)
    assert hogwild("--json") == 0
    assert len(asked) == len(set(asked)) == 2 * 4 * 2 * 2 * 4 * 4
    assert {(c.workers, c.query_lengths[0]) for c in asked if c.step == "prefill"} == {
        (1, 256), (2, 128), (4, 64), (8, 32),
    }  # fmt: skip
    asked.clear()
    assert hogwild("--json", "--gpu", "a100") == 0
    assert len(asked) == len(set(asked)) == 4 * 3 * 2 * 5 * 4
    asked.clear()
    words = "--heads qwq 6/3x96 --dtype float16 bfloat16 --context 2k 300 --quick --step ragged"
    assert hogwild("--json", "--gpu", "a100", *words.split()) == 0
    assert {cell.context for cell in asked} == {2048, 300}
    assert {str(cell.heads) for cell in asked} == {"40/8x128", "6/3x96"}
    assert len(asked) == 2 * 2 * 2 * 2 * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--device gpu", "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("--heads 3/2x64", "--heads: expected a multiple of 2 query heads, got '3/2x64'"),
        ("--heads gpt", "--heads: expected smollm2, qwen2.5, llama-3, qwq or heads as in 32/8x128, "
         "got 'gpt'"),
        ("--gpu h100 --heads 4/4x72", "heads: expected a head dimension that GPUs have kernels "
         "for, got 72"),
        ("--gpu h100 --dtype float32", "dtype: expected bfloat16 or float16 for the model, got "
         "float32"),
        ("--gpu h100 --context 3", "context: expected more than 4 tokens for 4 workers (decode), "
         "got 3"),
        ("--device cpu --context 3", "context: expected more than 4 tokens for 4 workers (decode), "
         "got 3"),
        ("--device cpu --warm", "--warm: expected a GPU's benchmark, --device cuda"),
        ("--gpu h100 --threads 2", "--threads: expected the CPU's benchmark, --device cpu"),
        ("--gpu h100 --plot there", "--plot: expected the CPU's benchmark, --device cpu"),
        ("--gpu h100 --check", "--check: expected the CPU's benchmark, --device cpu"),
        ("--device cpu --check --plot x", "--plot: expected no --check, which draws nothing"),
    ],
)  # fmt: skip
def test_errors(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hogwild(*words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"hogwild: error: {message}\n"


def test_without_a_gpu_there_is_a_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hogwild("--quick", "--device", "cuda", "--json", "--context", "512") == 0
    about = json.loads(capsys.readouterr().out.splitlines()[0])
    assert not about["measured"] and about["gpu"]["title"] == "H100 SXM"
    assert hogwild("--device", "cuda:0", "--json") == 2
    assert "cuda:0 cannot be used" in capsys.readouterr().err


def test_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "rich" else find(name)
    )
    assert hogwild(*GRID) == 2
    error = 'hogwild: error: not installed: rich. Type: pip install "hogwild_ext[run]"\n'
    assert capsys.readouterr().err == error
    assert hogwild(*GRID, "--markdown") == 0


def test_without_a_gpu_the_cpu_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = dict(peers=(peers.SdpaPacked(),), ceilings=ceilings.Ceilings(1 << 20), seconds=0.0)
    bench = attention.on_cpu(**small)  # type: ignore[arg-type]
    monkeypatch.setattr(attention, "on_cpu", lambda **_: bench)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    words = "--heads 40/8x128 --dtype bfloat16 --step decode --context 512 --workers 1 8"
    assert hogwild(*words.split()) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("hogwild: measuring on the CPU: ")
    lines = captured.out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in captured.out
    assert sum("SDPA" in line for line in lines) == 4
    assert hogwild("--device", "cpu", "--json", *words.split()) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    about, *records = [json.loads(line) for line in captured.out.splitlines()]
    assert about["measured"] and len(records) == 2 * 2 * 3
    assert all(5 <= r["calls"] <= 30 for r in records)


# ---- pictures -----------------------------------------------------------------------------------


def record(what: str, ratio: float, **values: Any) -> dict[str, Any]:
    return {
        "heads": "4/2x64", "model": "", "dtype": "float32", "step": "decode", "segments": "few",
        "context": 512, "workers": 1, "error": "", "what": what, "times_ours": ratio,
        "is_ours": what == "step.attend", "part_of_roofline": 0.5, **values,
    }  # fmt: skip


def test_the_fastest_peer_counts() -> None:
    ours, slow, fast = record("step.attend", 1), record("slow", 3), record("fast", 2)
    broken = record("broken", 0.1, error="differs by 1")
    alone = record("step.attend", 1, workers=2)
    assert list(plots.speed_ups([ours, slow, fast, broken, alone]).values()) == [(ours, fast)]


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs hogwild_ext[bench]")
    records = [
        record(what, ratio, step=step, context=context, workers=workers)
        for step in ("decode", "prefill")
        for context in (512, 700)
        for workers in (1, 4)
        for what, ratio in (("step.attend", 1.0), ("SDPA", 2.0))
    ]
    paths = plots.draw(records, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [
        "attention_decode_float32.png", "attention_prefill_float32.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_pictures_need_matplotlib_and_a_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find, lacking = cli.importlib.util.find_spec, {"matplotlib"}
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name in lacking else find(name)
    )
    assert hogwild("--device", "cpu", "--plot", str(tmp_path)) == 2
    assert capsys.readouterr().err == (
        "hogwild: error: --plot: not installed: matplotlib. Type: "
        'pip install "hogwild_ext[bench]"\n'
    )
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: True)
    assert hogwild("--device", "cpu", "--plot", __file__) == 2
    assert "--plot: expected a folder, got the file" in capsys.readouterr().err


# ---- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "spread", "at_least", "verdict"),
    [
        (80.0, 0.05, True, "PASS"), (79.9, 0.05, True, "FAIL"), (79.9, 0.051, True, "NOISY"),
        (99.0, 0.051, True, "NOISY"), (80.0, 0.0, False, "PASS"), (80.1, 0.0, False, "FAIL"),
    ],
)  # fmt: skip
def test_verdicts(figure: float, spread: float, at_least: bool, verdict: str) -> None:
    assert targets.Line("line", figure, spread, 80.0, at_least=at_least).verdict == verdict


@pytest.mark.parametrize(
    ("figures", "code"), [((1.0, 2.0), 0), ((1.0, 0.9), 1), ((0.9, 1.0), 1), ((), 0)]
)
def test_a_check_fails_with_any_of_its_lines(figures: tuple[float, ...], code: int) -> None:
    out = io.StringIO()
    those = [
        targets.Target(f"t{i}", lambda f=f: [targets.Line("line", f, 0.0, 1.0)])
        for i, f in enumerate(figures)
    ]
    assert targets.check(those, report.JsonReport(out)) == code
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["verdict"] for line in lines] == ["FAIL" if f < 1 else "PASS" for f in figures]


def test_a_noisy_line_does_not_fail() -> None:
    target = targets.Target("t", lambda: [targets.Line("line", 0.5, 0.2, 1.0)])
    assert targets.check([target], report.JsonReport(io.StringIO())) == 0


def small_machine() -> attention_targets.Machine:
    cells = [changed(SMALL, context=100), changed(SMALL, context=100, segments="many")]
    return attention_targets.Machine(
        timing.ClockTimer(), ceilings.Ceilings(1 << 20, 1 << 18), cells,
        (peers.SdpaPerWorker(), peers.SdpaPacked()), rounds=3, long_segment=1024, prompt=64,
        seconds=0.0,
    )  # fmt: skip


def test_every_target_can_be_measured() -> None:
    pytest.importorskip("transformers", reason="needs hogwild_ext[run]")
    lines = {t.name: list(t.measure()) for t in attention_targets.targets(small_machine())}
    assert all(line.figure > 0 for those in lines.values() for line in those)
    counts = {name.split(",")[0]: len(those) for name, those in lines.items()}
    assert counts["Fastest torch peer beside step.attend"] == 2
    assert counts["Many segments instead of one"] == 4
    assert counts["Around the kernels"] == 6
    wide = next(those for name, those in lines.items() if "128, bfloat16" in name)
    narrow = next(those for name, those in lines.items() if "64, bfloat16" in name)
    assert [line.bound for line in wide] == [80, 85, 72, 85, 76, 85, 83, 85, 85, 85]
    assert [line.bound for line in narrow] == [76, 85, 68, 85, 72, 85, 79, 85, 81, 85]


@pytest.mark.parametrize("rows", [1, 5, 10, 20, 40, 24, 7])
def test_rows_of_a_decode_cell(rows: int) -> None:
    cell = attention_targets.decode_cell(small_machine(), "float32", 64, rows)
    assert cell.workers * cell.heads.num_heads == rows * cell.heads.kv_heads
    lengths = cell.layout().lengths
    assert lengths == [1024] + [attention_targets.SHORT] * 8


def test_the_ridge() -> None:
    """Where reading an element of float32 takes as long as multiplying it with each row."""
    rates = ceilings.Rates(10e9, 50e9)
    assert attention_targets.ridge_rows(rates) == 20
    cell = attention_targets.decode_cell(small_machine(), "float32", 128, 20)
    todo = ceilings.Work.of(cell)
    reading, multiplying = todo.bytes / 10e9, todo.fmas / 50e9
    assert multiplying == pytest.approx(reading, rel=0.01)


def test_targets_are_chosen_by_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs hogwild_ext[run]")
    pytest.importorskip("rich", reason="needs hogwild_ext[run]")
    machine = small_machine()
    monkeypatch.setattr(attention_targets, "Machine", lambda *_, **__: machine)
    assert hogwild("--device", "cpu", "--json", "--check", "prompt", "smollm2") in (0, 1)
    about, *lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert about["isa"] == _C.isa() and {line["kind"] for line in lines} == {"target"}
    assert {line["target"] for line in lines} == {"Prompt of 64 tokens, SmolLM2's heads"}
    assert [line["name"].split(":")[0] for line in lines] == ["bfloat16", "float32"]
    assert hogwild("--device", "cpu", "--check", "no such") == 2
    assert "--check: no target has 'no such' in its title: decode," in capsys.readouterr().err
