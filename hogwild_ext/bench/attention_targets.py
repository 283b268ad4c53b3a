"""What the CPU's attention has to reach, as `targets`: speed beside the roofline and beside torch,
the price of many segments, and what is spent around the kernels."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import _C
from ..cache import SegmentCache
from ..ops import concurrent_attention
from .attention import cpu_name, on_cpu
from .ceilings import Ceilings, Rates, Work
from .grid import MODELS, Cell, Heads
from .inputs import Inputs
from .peers import CPU_PEERS, OURS, Peer, SdpaPerWorker, open_step
from .plots import speed_ups
from .report import Record
from .targets import NOISE, Line, Target
from .timing import Function, Timer, Timing

CPU = torch.device("cpu")
ROUNDS = 30
LONG, SHORT = 16384, 32  # tokens of a segment
SHORTS = 8  # short segments
KV_HEADS = 8
MICRO = 1e6


@dataclass(frozen=True)
class Machine:
    """How targets are measured."""

    timer: Timer
    ceilings: Ceilings
    cells: Sequence[Cell]  # in which ours is compared with its peers
    peers: Sequence[Peer] = CPU_PEERS
    rounds: int = ROUNDS
    long_segment: int = LONG
    prompt: int = 2048
    seconds: float = 3.0  # of a cell

    def about(self) -> tuple[list[str], Record]:
        """What `Report.about` gets."""
        cpu, threads, isa = cpu_name(), self.ceilings.threads, _C.isa()
        lines = [
            f"{cpu}; {threads} threads ({_C.thread_pool()}), {isa} kernels; hogwild_ext "
            f"{_C.__version__}, torch {torch.__version__}",
            "figures are medians of calls in turn, ±: half the distance between the quartiles; "
            f"NOISY: it is above {NOISE:.0%}",
        ]
        facts = {
            "device": cpu, "threads": threads, "isa": isa, "rounds": self.rounds,
            "versions": {"hogwild_ext": _C.__version__, "torch": torch.__version__},
        }  # fmt: skip
        return lines, facts


def targets(machine: Machine) -> list[Target]:
    """All of this module's."""
    percent = {1: 80.0, 5: 72.0, 10: 76.0, 20: 83.0, 40: 85.0}
    lower = {rows: bound - 4 for rows, bound in percent.items()}

    def target(name: str, measure: Callable[..., Iterable[Line]], *values: Any) -> Target:
        measured = functools.partial(measure, machine, *values)
        return Target(name, functools.partial(_alone, measured))

    setting = f"decode, {machine.long_segment:,} tokens and {SHORTS} short segments, 8 KV heads"
    return [
        target(f"{setting}, head_dim 128, bfloat16", _near_roofline, "bfloat16", 128, percent),
        target(f"{setting}, head_dim 64, bfloat16", _near_roofline, "bfloat16", 64, lower),
        target(f"{setting}, head_dim 128, float32", _near_ridge),
        target("Fastest torch peer beside step.attend, decode and prefill", _beside_peers),
        target("Many segments instead of one, 40/8x128, bfloat16", _many_segments),
        target(f"Prompt of {machine.prompt:,} tokens, SmolLM2's heads", _prompt),
        target("Around the kernels", _around_the_kernels),
    ]


@torch.inference_mode()
def _alone(measure: Callable[[], Iterable[Line]]) -> list[Line]:
    gc.collect()  # what an earlier target left: a step and its cache know each other
    return list(measure())


# ---- beside the roofline ------------------------------------------------------------------------


def decode_cell(machine: Machine, dtype: str, dim: int, rows: int) -> Cell:
    """One long segment and the short ones, with so many query rows for each KV head."""
    group = next(g for g in (5, 4, 3, 2, 1) if rows % g == 0 and rows // g <= SHORTS)
    heads = Heads("", group * KV_HEADS, KV_HEADS, dim)
    context = machine.long_segment + SHORTS * SHORT
    return Cell(heads, dtype, "decode", "few", context, rows // group, short_segments=SHORTS)


def _near_roofline(
    machine: Machine, dtype: str, dim: int, percent: dict[int, float]
) -> Iterator[Line]:
    for rows, bound in percent.items():
        cell = decode_cell(machine, dtype, dim, rows)
        yield from _roofline_lines(machine, cell, f"{rows} row{'s' * (rows > 1)}", bound)


def _near_ridge(machine: Machine) -> Iterator[Line]:
    """Where reading is the limit, and where multiplying takes as long."""
    dtype = "float32"
    passes = machine.timer(machine.ceilings.functions(dtype), machine.rounds)
    ridge = ridge_rows(machine.ceilings.rates(dtype, passes))
    for rows, bound in {1: 80.0, 5: 80.0, ridge: 72.0}.items():
        if rows == ridge or 2 * rows <= ridge:
            name = f"{rows} row{'s' * (rows > 1)}{', the ridge' * (rows == ridge)}"
            yield from _roofline_lines(machine, decode_cell(machine, dtype, 128, rows), name, bound)


def ridge_rows(rates: Rates) -> int:
    """Rows for which float32 keys and values take as long to read as to multiply: a product for
    each row and element of 4 bytes. Rounded to a number that a cell can have."""
    rows = 4 * rates.fmas_per_second / rates.bytes_per_second
    possible = {group * workers for group in (1, 2, 3, 4, 5) for workers in range(1, SHORTS + 1)}
    return min(possible, key=lambda n: abs(n - rows))


def _roofline_lines(machine: Machine, cell: Cell, name: str, bound: float) -> Iterator[Line]:
    inputs = Inputs.make(cell, CPU)
    step, op = (_run(peer, inputs) for peer in OURS)
    timings = machine.timer(
        {**machine.ceilings.functions(cell.dtype), "step": step, "op": op}, machine.rounds
    )
    rates, work = machine.ceilings.rates(cell.dtype, timings), Work.of(cell)
    ours = timings["step"]
    part = 100 * rates.least_seconds(work) / ours.median
    limit = f"(limit: {rates.limit(work)})"
    yield Line(
        f"{name}: part of the roofline",
        part,
        max(ours.spread, rates.spread(work)),
        bound,
        "%",
        note=limit,
    )
    speed = ours.over(timings["op"])
    yield Line(
        f"{name}: speed of concurrent_attention, of step.attend's", 100 * speed.median,
        speed.spread, 85, "%",
    )  # fmt: skip


def _run(peer: Peer, inputs: Inputs) -> Function:
    candidate = peer.prepare(inputs)
    assert candidate is not None
    return candidate.run


# ---- beside torch -------------------------------------------------------------------------------


def _beside_peers(machine: Machine) -> Iterator[Line]:
    bench = on_cpu(machine.peers, machine.ceilings, machine.seconds)
    records = [record for cell in machine.cells for record in bench.records(cell)]
    if wrong := [r for r in records if r["error"].startswith("differs")]:
        raise RuntimeError(f"{wrong[0]['what']} {wrong[0]['error']} in {wrong[0]}")
    ratios = sorted(
        (best["times_ours"], *_of_cell(best)) for _, best in speed_ups(records).values()
    )
    if not ratios:
        return
    spread = statistics.median(spread for _, spread, _ in ratios)
    median = statistics.median(ratio for ratio, *_ in ratios)
    yield Line("median cell", median, spread, 1.5, "x", note=f"of {len(ratios)}")
    worst, spread, words = ratios[0]
    yield Line("worst cell", worst, spread, 1.0, "x", note=f"({words})")


def _of_cell(record: Any) -> tuple[float, str]:
    words = (
        f"{record['heads']} {record['dtype']} {record['step']}, {record['segments']}, context "
        f"{record['context']}, {record['workers']} workers, {record['what']}"
    )
    return record["ratio_spread"], words


def _prompt(machine: Machine) -> Iterator[Line]:
    for dtype in ("bfloat16", "float32"):
        cell = Cell(MODELS["smollm2"], dtype, "prompt", "few", machine.prompt, 1)
        inputs = Inputs.make(cell, CPU)
        step, sdpa = _run(OURS[0], inputs), _run(SdpaPerWorker(), inputs)
        timings = machine.timer({"step": step, "sdpa": sdpa}, machine.rounds)
        ratio = timings["sdpa"].over(timings["step"])
        yield Line(f"{dtype}: SDPA's causal path beside ours", ratio.median, ratio.spread, 1.0, "x")


# ---- segments -----------------------------------------------------------------------------------


def _many_segments(machine: Machine) -> Iterator[Line]:
    for workers in (1, 4):
        for count, length, bound in ((64, 256, 1.15), (1000, 16, 2.0)):
            length = max(1, length * machine.long_segment // LONG)
            context = count * length + workers * SHORT
            runs = {}
            for segments in ("1", str(count)):
                cell = Cell(MODELS["qwq"], "bfloat16", "decode", segments, context, workers)
                runs[segments] = _run(OURS[0], Inputs.make(cell, CPU))
            timings = machine.timer(runs, machine.rounds)
            ratio = timings[str(count)].over(timings["1"])
            yield Line(
                f"{count:,} segments of {length}, {workers} worker{'s' * (workers > 1)}: time of "
                "one segment's", ratio.median, ratio.spread, bound, "x", at_least=False,
            )  # fmt: skip


# ---- around the kernels -------------------------------------------------------------------------


def _around_the_kernels(machine: Machine) -> Iterator[Line]:
    cell = Cell(MODELS["llama-3"], "bfloat16", "decode", "64", 64 * 256 + 8 * SHORT, 8)
    step, *_ = open_step(Inputs.make(cell, CPU))
    plan = _each(machine, lambda: step._plan_for(cell.heads.num_heads))
    yield Line.at_most("planning a step of 8 workers x 64 segments", plan, 150, MICRO, "µs")

    tiny = Heads("", 1, 1, 64)
    attend = _run(OURS[0], Inputs.make(Cell(tiny, "float32", "decode", "few", 8, 1), CPU))
    yield Line.at_most(
        "step.attend, 1 head and 8 keys, kernel included", _each(machine, attend), 15, MICRO, "µs"
    )
    for count in (1, 16, 64):
        op = _tiny_op(count)
        yield Line.at_most(
            f"concurrent_attention, {count} segment{'s' * (count > 1)} of 2 keys, kernel included",
            _each(machine, op), 15 + 0.8 * count, MICRO, "µs",
        )  # fmt: skip
    yield Line.at_most(
        "hx.forward of 4 workers without the model's own call, and planning the step",
        _step_outside_the_model(machine.rounds), 300, MICRO, "µs",
    )  # fmt: skip


def _each(machine: Machine, function: Function, calls: int = 100) -> Timing:
    """Of one call; so many are timed together."""

    def run() -> None:
        for _ in range(calls):
            function()

    timing = machine.timer({"calls": run}, machine.rounds)["calls"]
    return Timing(tuple(seconds / calls for seconds in timing.seconds))


def _tiny_op(count: int) -> Function:
    keys, values = (list(torch.randn(count, 2, 1, 64)) for _ in range(2))
    query = torch.randn(1, 1, 1, 64)
    offsets = 2 * torch.arange(count, 0, -1, dtype=torch.int32)[None] - 1
    inv_freq = 1e4 ** (-torch.arange(0, 64, 2) / 64)
    return lambda: concurrent_attention(query, keys, values, offsets, inv_freq=inv_freq)


def _step_outside_the_model(rounds: int) -> Timing:
    """A step's time around the call of a model: checking and reading tokens and views, taking pages
    and giving tokens to their segments. Planning happens within the model's first layer and is
    added. Needs transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..patching import forward

    workers = 4
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1 << 15,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    cache = SegmentCache.for_model(model, max_tokens=1 << 14)
    prompt, *own = (cache.segment(str(i)) for i in range(1 + workers))
    forward(model, cache, [[prompt]], [[1] * 100])
    views = [[prompt, *(s for s in own if s is not mine), mine] for mine in own]
    tokens = [[i] for i in range(workers)]
    moments: list[float] = []
    hooks = [
        model.register_forward_pre_hook(lambda *_: moments.append(time.perf_counter())),
        model.register_forward_hook(lambda *_: moments.append(time.perf_counter())),
    ]
    seconds = []
    for i in range(10 * rounds + 3):
        begin = time.perf_counter()
        forward(model, cache, views, tokens)
        outside = time.perf_counter() - begin - (moments[1] - moments[0])
        moments.clear()
        step = cache.step(views, [1] * workers).__enter__()
        begin = time.perf_counter()
        step._plan_for(config.num_attention_heads)
        planning = time.perf_counter() - begin
        step.abandon()
        if i >= 3:  # the first ones patch and fill caches
            seconds.append(outside + planning)
    for hook in hooks:
        hook.remove()
    return Timing(tuple(seconds))
