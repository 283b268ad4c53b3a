"""`hogwild bench attention`: cells, the model beside kernels that run, peers, output."""

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
from hogwild_ext import cli
from hogwild_ext.bench import attention, grid, peers, report, roofline, timing, work
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
    st.sampled_from(grid.STEPS), st.sampled_from(grid.SEGMENTS), st.integers(40, 3000),
    st.integers(1, 8),
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


def measured(cells: list[Cell], those: Any = peers.PEERS) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and JSON of a run on the CPU."""
    out = io.StringIO()
    bench = attention.Measured(
        CPU, "CPU", timing.ClockTimer(), cold=False, peers=those, rounds=2, copy_bytes=1 << 16
    )
    code = attention.run(cells, bench, report.JsonReport(out))
    return code, [json.loads(line) for line in out.getvalue().splitlines()]


OF_WORKERS = {"step.attend", "concurrent_attention", "SDPA, a cache a worker"}
LIBRARIES = {"FlashInfer, a request a worker", "flash-attention"}


def test_all_peers_compute_the_same() -> None:
    cells = [
        changed(SMALL, step=step, segments=segments, context=330)
        for step in grid.STEPS
        for segments in grid.SEGMENTS
    ]
    cells.append(changed(SMALL, step="ragged", context=600))  # shares pages of 256 tokens too
    with attention_libraries.installed():
        code, (about, *records) = measured(cells)
    assert code == 0
    assert about["missing"] == [] and about["measured"]
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
    _, (about, *records) = measured([SMALL])
    assert about["missing"] == [p.name for p in peers.PEERS if p.library not in ("torch",)]
    ours = next(r for r in records if r["what"] == "step.attend")
    moved = work.step_bytes(SMALL, work.step_tables(SMALL))
    assert ours["bytes"] == moved.total
    for r in records:
        assert r["bytes_per_second"] == pytest.approx(r["bytes"] / r["seconds"])
        assert r["part_of_copy"] == pytest.approx(
            r["bytes_per_second"] / about["copy_bytes_per_second"]
        )
        assert r["times_ours"] == pytest.approx(r["seconds"] / ours["seconds"])
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
        inputs = dataclasses.replace(inputs, keys=keys, _rotated={})
        return super().prepare(inputs)


class Failing:
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


def test_functions_are_timed_in_turn() -> None:
    called: list[str] = []
    timer = timing.ClockTimer()
    timings = timer({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3)
    assert called == ["a", "b"] * 4
    assert list(timings) == ["a", "b"]


def test_medians_and_spread() -> None:
    assert timing.Timing.of([1.0, 9.0, 2.0]) == timing.Timing(2.0, 2.0)
    assert timing.Timing.of([4.0] * 5) == timing.Timing(4.0, 0.0)


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
    assert about["measured"] and about["cold"]
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
        for step in grid.STEPS
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
    monkeypatch.setattr(attention, "run", lambda cells, bench, shown: asked.extend(cells) or 0)
    assert hogwild("--json") == 0
    assert len(asked) == len(set(asked)) == 4 * 3 * 2 * 5 * 4
    asked.clear()
    words = "--heads qwq 6/3x96 --dtype float16 bfloat16 --context 2k 300 --quick --step ragged"
    assert hogwild("--json", *words.split()) == 0
    assert {cell.context for cell in asked} == {2048, 300}
    assert {str(cell.heads) for cell in asked} == {"40/8x128", "6/3x96"}
    assert len(asked) == 2 * 2 * 2 * 2 * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--device cpu", "--device: expected auto, cuda or cuda:N, got cpu: the CPU's benchmark is "
         "bench/decode_attention.py"),
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
