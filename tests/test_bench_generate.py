"""`hogwild bench generate` on tiny models: what its streams compute, and what it reports."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hogwild_ext as hx
from hogwild_ext import cli
from hogwild_ext.bench import generate, speedup_plot, step_time, streams
from hogwild_ext.bench.ceilings import Rates
from hogwild_ext.bench.generate import PACKED, PLAIN, BenchModel, Settings
from hogwild_ext.bench.report import Record, Table
from hogwild_ext.bench.streams import Context
from models import tiny_model

SMALL = 1e-4
pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    return tiny_model("llama")


def steps(made: streams.Streams, count: int = 4) -> list[torch.Tensor]:
    """The logits of some steps; the tokens follow from them."""
    logits = []
    for _ in range(count):
        logits.append(made.logits().clone())
        streams.choose(made, logits[-1])
    return logits


def ours(model: Any, context: Context, workers: int, linear: str | None = None) -> streams.Workers:
    twin = streams.twin(model, linear)
    cache, segment = context.segment_cache(twin, room=64 * workers)
    assert len(segment) == len(context)
    return streams.Workers(twin, cache, segment, workers)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("length", [1, 64, 130])
def test_the_slow_path_computes_what_ours_does(family: str, length: int) -> None:
    model = tiny_model(family)
    context = Context.random(model, length, scale=1)
    for workers in (1, 3):
        expected = steps(ours(model, context, workers))
        slow = steps(streams.SlowPath(model, context, workers, 4))
        packed = steps(ours(model, context, workers, "packed"))
        for right, *others in zip(expected, slow, packed, strict=True):
            for other in others:
                assert (other - right).norm() / right.norm() < SMALL


@pytest.mark.parametrize("peer", streams.UNSHARED)
def test_a_batch_computes_single_streams(model: Any, peer: str) -> None:
    context = Context.random(model, 70, scale=1)
    batch = steps(streams.PEERS[peer](model, context, 3, 4))
    twin = streams.twin(model)
    cache, segment = context.segment_cache(twin, room=1024)
    alone = [streams.Workers(twin, cache, segment, 1) for _ in range(3)]
    for w, stream in enumerate(alone):
        stream.tokens = [streams.first_tokens(3)[w]]
    rows = zip(*(steps(stream) for stream in alone), strict=True)
    for right, out in zip(rows, batch, strict=True):
        expected = torch.cat(right)
        assert (out - expected).norm() / expected.norm() < SMALL


def test_a_context_matters_and_is_the_same_again(model: Any) -> None:
    context = Context.random(model, 70, scale=1)
    again = Context.random(model, 70, scale=1)
    other = Context.random(model, 70, seed=1, scale=1)
    assert torch.equal(context.keys[1], again.keys[1])
    first, second = (steps(ours(model, c, 2), 1)[0] for c in (context, other))
    assert (first - second).norm() / first.norm() > 0.01


def test_twins_share_weights(model: Any) -> None:
    packed = streams.twin(model, "packed")
    assert packed.lm_head.weight is model.lm_head.weight
    assert packed.model.layers[0].self_attn is not model.model.layers[0].self_attn
    assert type(model.lm_head) is torch.nn.Linear
    hx.unpatch(packed)


# ---- the benchmark -------------------------------------------------------------------------------


class Kept:
    """A report that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.facts: dict[str, Any] = {}
        self.tables: list[Table] = []

    def about(self, lines: Sequence[str], facts: Record) -> None:
        self.lines, self.facts = list(lines), dict(facts)

    def table(self, table: Table) -> None:
        self.tables.append(table)


TINY = BenchModel("tiny", "Tiny", lambda dtype: tiny_model("llama").to(dtype))
SETTINGS = Settings((TINY,), ("float32", "bfloat16"), (40, 70), (1, 3), rounds=2)


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate.ceilings, "measure", lambda dtype: Rates(1e10, 1e11))


def test_every_cell_has_its_records() -> None:
    report = Kept()
    code, records = generate.run(SETTINGS, report)
    assert code == 0
    names = {PACKED, PLAIN, *streams.PEERS}
    cells = {(r["dtype"], r["context"], r["workers"], r["what"]) for r in records}
    assert cells == {
        (dtype, context, workers, name)
        for dtype in SETTINGS.dtypes
        for context in SETTINGS.contexts
        for workers in SETTINGS.workers
        for name in names
    }
    assert len(records) == len(cells)
    for record in records:
        assert record["error"] == ""
        assert record["tokens_per_second"] == record["workers"] / record["seconds"] > 0
        own = record["what"] in (PACKED, PLAIN)
        assert ("speedup" in record) == (own or record["workers"] == 1)
        if record["workers"] == 1:
            assert record["speedup"] == record["ideal"] == 1
        if record["what"] == PACKED:
            assert record["times_packed"] == 1
    assert [table.title.count("where the time") for table in report.tables] == [0, 1, 0, 1]
    for table in report.tables:
        for record in table.records:
            json.dumps(record)
            assert all(isinstance(column.text(record), str) for column in table.columns)
    assert report.facts["ceilings"]["float32"]["bytes_per_second"] == 1e10


def test_a_peer_that_computes_something_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(streams.SlowPath):
        def positions(self) -> torch.Tensor:
            return super().positions() - 30

    monkeypatch.setitem(streams.PEERS, "slow path", Wrong)
    code, records = generate.run(Settings((TINY,), ("float32",), (40,), (2,), 2), Kept())
    assert code == 2
    (record,) = (r for r in records if r["what"] == "slow path")
    assert record["error"].startswith("differs by") and "seconds" not in record


def test_a_peer_without_room_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_free_bytes", lambda: 1000)
    code, records = generate.run(Settings((TINY,), ("float32",), (40,), (2,), 2), Kept())
    assert code == 0
    assert {r["what"] for r in records if "GB are free" in r["error"]} == set(streams.PEERS)
    assert {r["what"] for r in records if not r["error"]} == {PACKED, PLAIN}


def test_the_work_of_a_step() -> None:
    model = tiny_model("llama", num_layers=3)
    weights = sum(
        module.weight.numel() for module in model.modules() if type(module) is torch.nn.Linear
    )
    work = generate.step_work(model, context=100, workers=5)
    cache = 3 * 2 * 100 * 2 * 32  # layers, keys and values, tokens, KV heads, dimensions
    assert work.bytes == 4 * (weights + cache)
    assert work.fmas == 5 * (weights + 2 * cache)  # 4 query heads for 2 KV heads


def test_the_ideal_speedup_is_between_its_limits() -> None:
    model = tiny_model("llama")
    assert generate.ideal_speedup(model, 100, 4, Rates(1, 1e15)) == 4  # memory is the limit
    assert generate.ideal_speedup(model, 100, 4, Rates(1e15, 1)) == 1  # arithmetic is
    between = generate.ideal_speedup(model, 100, 4, Rates(1e9, 0.5e9))
    assert 1 < between < 4


def test_the_parts_of_a_step_are_seen_and_the_watches_taken_off() -> None:
    model = tiny_model("llama")
    for linear in (None, "packed"):
        workers = ours(model, Context.random(model, 70), 2, linear)
        parts = step_time.measure_parts(workers, 3)
        assert list(parts) == list(step_time.PARTS)
        assert all(seconds > 0 for seconds in parts.values())
        assert not any("forward" in vars(module) for module in workers.model.modules())
    from hogwild_ext import _C, cpu_backend

    assert cpu_backend._C is _C
    assert not vars(cpu_backend.CPU)


# ---- targets -------------------------------------------------------------------------------------


def target_records(packed: float, plain: float, times: float) -> list[Record]:
    cell = {"model": "Tiny", "dtype": "float32", "context": 8192, "workers": 4, "ideal": 4.0}
    ours = [
        {**cell, "what": what, "speedup": speedup, "speedup_spread": 0.01, "times_packed": 1.0}
        for what, speedup in ((PACKED, packed), (PLAIN, plain))
    ]
    peers = [
        {**cell, "what": what, "spread": 0.02, "times_packed": ratio}
        for what, ratio in zip(streams.UNSHARED, (2.0, times), strict=True)
    ]
    return [*ours, *peers]


@pytest.mark.parametrize(
    "packed, times, passed",
    [(3.5, 1.2, [True, True]), (3.3, 1.2, [False, True]), (3.5, 0.9, [True, False])],
)
def test_target_lines(packed: float, times: float, passed: list[bool]) -> None:
    lines = generate.target_lines(target_records(packed, 2.0, times))
    assert [line.verdict == "PASS" for line in lines] == passed
    assert lines[0].figure == pytest.approx(100 * packed / 4)
    assert f"({packed:.2f}; with torch's linear layers 50%, 2.00)" in lines[0].note
    assert lines[1].figure == times and streams.UNSHARED[1] in lines[1].note
    assert (lines[0].spread, lines[1].spread) == (0.01, 0.02)


def test_targets_are_measured() -> None:
    targets = generate.targets((TINY,), ("float32",), context=40, rounds=2)
    assert [target.name for target in targets] == ["End to end, Tiny, float32, 40 tokens"]
    lines = list(targets[0].measure())
    assert len(lines) == 2
    for line in lines:
        assert math.isfinite(line.figure) and math.isfinite(line.spread)


# ---- the plot and the command line ---------------------------------------------------------------


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'hogwild_ext[bench]'")
    records = [
        {
            "model": "Tiny", "dtype": dtype, "context": context, "workers": workers,
            "what": what, "speedup": 0.9 * workers, "ideal": float(workers),
        }
        for dtype in ("float32", "bfloat16")
        for context in (512, 2048)
        for workers in (1, 2, 4)
        for what in (PACKED, PLAIN)
    ]  # fmt: skip
    file = speedup_plot.draw(records, tmp_path / "new" / "folder")
    drawn = file.read_bytes()
    assert file.parent == tmp_path / "new" / "folder" and b"<svg" in drawn
    assert speedup_plot.draw(records, tmp_path).read_bytes() == drawn
    assert speedup_plot.draw(records[:1], tmp_path).read_bytes() != drawn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(path)
    return str(path)


def test_the_command(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["bench", "generate", "--model", folder, "--dtype", "float32", "--threads", "1"]
    small = [*common, "--context", "33", "--workers", "2", "--rounds", "2"]
    assert cli.main([*small, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["about", *["cell"] * (5 + 2)]
    assert lines[0]["threads"] == 1 and lines[1]["context"] == 33
    assert cli.main([*small, "--markdown"]) == 0
    assert "| ours, packed |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "nowhere"], "--model: expected smollm2, qwen2.5 or a model's folder"),
        (["--rounds", "1"], "rounds: expected at least 2, got 1"),
    ],
)
def test_bad_options(
    folder: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["bench", "generate", "--json", "--model", folder, "--threads", "1", *words]
    assert cli.main(options) == 2
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert cli.main(["bench", "generate", "--model", folder, "--plot", "x"]) == 2
    assert 'pip install "hogwild_ext[bench]"' in capsys.readouterr().err
