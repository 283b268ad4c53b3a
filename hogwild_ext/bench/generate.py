"""`hogwild bench generate`: tokens a second of several workers, on a CPU.

Every cell is a step in which each worker gets one token: ours with packed linear layers and with
torch's, beside transformers with a batch of streams that share nothing and with the slow path. The
ideal speed-up is what reading all weights and visible keys and values once a step, and multiplying,
would allow at the ceilings that the same run measures.
"""

from __future__ import annotations

import functools
import gc
import itertools
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .. import _C
from ..model_support import read_model
from ..pages import PAGE_SIZE
from . import ceilings, step_time
from .ceilings import Rates, Work
from .report import Column, Record, Report, Table, number
from .streams import PEERS, UNSHARED, Context, Streams, Workers, advance, twin
from .targets import Line, Target
from .timing import Timing

PACKED, PLAIN = "ours, packed", "ours"  # linear layers
DTYPES = ("bfloat16", "float32")  # by default
DTYPE_NAMES = ("bfloat16", "float16", "float32")
# ||logits - ours|| / ||ours|| that a peer may be off in float32. In half precision nothing is
# compared: behind keys and values that are random numbers, logits are a matter of rounding.
TOLERANCE = 1e-3
TARGET_CONTEXT, TARGET_WORKERS = 8192, 4
TARGET_PART = 0.85  # of the speed-up that the roofline allows


# ---- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchModel:
    """A model to measure: its key on the command line, its name, and how it is made in a dtype."""

    key: str
    title: str
    load: Callable[[torch.dtype], Any]


def _smollm2(dtype: torch.dtype) -> Any:
    from .. import default_model

    return _from_folder(str(default_model.ensure()), dtype)


def _from_folder(folder: str, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False
    ).eval()


def _qwen_shape(dtype: torch.dtype) -> Any:
    config = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


MODELS = {
    model.key: model
    for model in (
        BenchModel("smollm2", "SmolLM2-135M", _smollm2),
        BenchModel("qwen2.5", "Qwen2.5-0.5B's shape, random weights", _qwen_shape),
    )
}


def model_from(text: str) -> BenchModel:
    """A key of `MODELS`, or a model's folder. Raises ValueError for anything else."""
    if text in MODELS:
        return MODELS[text]
    if (Path(text).expanduser() / "config.json").is_file():
        folder = str(Path(text).expanduser())
        return BenchModel(text, Path(folder).name, lambda dtype: _from_folder(folder, dtype))
    raise ValueError(f"expected {', '.join(MODELS)} or a model's folder, got {text!r}")


# ---- what a step must do -------------------------------------------------------------------------


def step_work(model: Any, context: int, workers: int) -> Work:
    """What a step of so many workers has to do at least: the weights of linear layers, and the
    context's keys and values, read once each."""
    shape = read_model(model)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    elements = sum(weight.numel() for weight in weights)
    stored = 2 * shape.num_layers * context * shape.head_dim * shape.num_kv_heads
    attended = 2 * shape.num_layers * context * shape.head_dim * shape.num_heads
    return Work((elements + stored) * shape.dtype.itemsize, workers * (elements + attended))


def ideal_speedup(model: Any, context: int, workers: int, rates: Rates) -> float:
    """Tokens a second of so many workers against those of one, at the machine's ceilings."""
    one, all_of_them = (
        rates.least_seconds(step_work(model, context, count)) for count in (1, workers)
    )
    return workers * one / all_of_them


# ---- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is measured: every combination of the first four."""

    models: Sequence[BenchModel]
    dtypes: Sequence[str]
    contexts: Sequence[int]
    workers: Sequence[int]
    rounds: int = 10
    peers: Sequence[str] = tuple(PEERS)
    parts: bool = True  # whether to say where the time goes

    def check(self) -> None:
        """Raises ValueError for settings that cannot be."""
        if self.rounds < 2:
            raise ValueError(f"rounds: expected at least 2, got {self.rounds}")
        for dtype in self.dtypes:
            if dtype not in DTYPE_NAMES:
                raise ValueError(f"dtype: expected one of {', '.join(DTYPE_NAMES)}, got {dtype!r}")


FULL = Settings(tuple(MODELS.values()), DTYPES, (512, 2048, 8192), (1, 2, 4, 8))
QUICK = Settings((MODELS["smollm2"],), DTYPES, (2048,), (1, 4), rounds=5)


def run(settings: Settings, report: Report) -> tuple[int, list[Record]]:
    """Reports on all cells, and returns the exit code (2 if a peer computes something else than
    ours) and the records. Raises ValueError for settings that cannot be."""
    settings.check()
    limits = {dtype: ceilings.measure(dtype) for dtype in settings.dtypes}
    report.about(*_about(settings, limits))
    everything: list[Record] = []
    for model, dtype in itertools.product(settings.models, settings.dtypes):
        records, parts = measure(model, dtype, settings, limits[dtype])
        title = f"{model.title}, {dtype}"
        report.table(Table(title, COLUMNS, records))
        if parts:
            report.table(Table(f"{title}: where the time of a step goes, ms", PART_COLUMNS, parts))
        everything += records
    differing = any(record["error"].startswith("differs") for record in everything)
    return (2 if differing else 0), everything


def measure(
    bench_model: BenchModel, dtype: str, settings: Settings, rates: Rates
) -> tuple[list[Record], list[Record]]:
    """Records of all contexts and workers of a model in a dtype, and where the time goes."""
    plain = bench_model.load(getattr(torch, dtype))
    models = {PACKED: twin(plain, "packed"), PLAIN: twin(plain)}
    common = {"model": bench_model.title, "dtype": dtype}
    records: list[Record] = []
    parts: list[Record] = []
    for length in settings.contexts:
        context = Context.random(plain, length)
        counts = sorted({1, *settings.workers})
        # Own segments of a cell: those of all workers and of the one, with both kinds of layers.
        pages = -(-(3 * settings.rounds + 3) // PAGE_SIZE)
        cache, segment = context.segment_cache(plain, 2 * (counts[-1] + 1) * pages * PAGE_SIZE)
        for workers in settings.workers:
            ours = {
                (name, count): Workers(model, cache, segment, count)
                for name, model in models.items()
                for count in sorted({1, workers})
            }
            cell = {**common, "context": length, "workers": workers}
            ideal = ideal_speedup(plain, length, workers, rates)
            records += [
                {**cell, "ideal": ideal, **record}
                for record in _cell(plain, context, workers, ours, settings)
            ]
            if settings.parts:
                for name in models:
                    seconds = step_time.measure_parts(ours[name, workers], settings.rounds)
                    parts.append({**cell, "what": name, "parts": seconds})
            for streams in ours.values():
                streams.free()
    return records, parts


def _cell(
    model: Any,
    context: Context,
    workers: int,
    ours: dict[tuple[str, int], Workers],
    settings: Settings,
) -> list[Record]:
    """Ours and the peers, with so many streams each, in turn."""
    candidates: dict[tuple[str, int], Streams] = dict(ours)
    errors: dict[str, str] = {}
    first = {key: streams.logits().clone() for key, streams in ours.items()}
    for name in settings.peers:
        needed = _peer_bytes(name, context, workers, settings.rounds)
        if (free := _free_bytes()) is not None and needed > 0.8 * free:
            errors[name] = f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            continue
        peer = PEERS[name](model, context, workers, settings.rounds + 1)
        difference = ""
        if workers == 1 or name not in UNSHARED:  # those do what ours do
            difference = _difference(peer.logits(), first[PLAIN, workers])
        else:
            peer.logits()
        if difference:
            errors[name] = difference
        else:
            candidates[name, workers] = peer
    packed = _difference(first[PACKED, workers], first[PLAIN, workers])
    if packed:
        raise RuntimeError(f"{PACKED} {packed} from {PLAIN}, {workers} workers")

    timings = interleaved({key: _advance(s) for key, s in candidates.items()}, settings.rounds)
    records: list[Record] = []
    for (name, count), timing in timings.items():
        if count != workers:
            continue
        record: dict[str, Any] = {
            "what": name, "error": "", "seconds": timing.median, "spread": timing.spread,
            "tokens_per_second": workers / timing.median,
            "times_packed": timing.over(timings[PACKED, workers]).median,
        }  # fmt: skip
        if (name, 1) in timings:
            speedup = timings[name, 1].over(timing)
            record["speedup"] = workers * speedup.median
            record["speedup_spread"] = speedup.spread
        records.append(record)
    del candidates
    gc.collect()
    return records + [{"what": name, "error": error} for name, error in errors.items()]


def interleaved(functions: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, Timing]:
    """The functions taking turns. No call is for warming up: each brings a token."""
    seconds: dict[Any, list[float]] = {key: [] for key in functions}
    for _ in range(rounds):
        for key, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[key].append(time.perf_counter() - start)
    return {key: Timing(tuple(taken)) for key, taken in seconds.items()}


def _advance(streams: Streams) -> Callable[[], None]:
    return lambda: advance(streams)


def _difference(out: Tensor, expected: Tensor) -> str:
    """ "differs by ..." if float32 logits are not those that they should be."""
    if out.dtype is not torch.float32:
        return ""
    error = float((out - expected).norm() / expected.norm())
    return "" if error <= TOLERANCE else f"differs by {error:.2g}"


def _peer_bytes(name: str, context: Context, workers: int, rounds: int) -> int:
    """Memory that a peer takes at the most: a cache a stream, and one layer's twice."""
    cache = (len(context) + rounds + 1) * context.token_bytes
    views = workers * cache
    return views + 2 * views // context.shape.num_layers if name in UNSHARED else 2 * cache


def _free_bytes() -> int | None:
    """Memory that can be had, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


# ---- what is shown -------------------------------------------------------------------------------


def _about(settings: Settings, limits: dict[str, Rates]) -> tuple[list[str], dict[str, Any]]:
    versions = {
        "hogwild_ext": _C.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    threads = torch.get_num_threads()
    measured = "; ".join(
        f"{dtype} {limit.bytes_per_second / 1e9:.1f} GB/s read, "
        f"{limit.fmas_per_second / 1e9:.0f} GFMA/s"
        for dtype, limit in limits.items()
    )
    lines = [
        f"{platform.machine()}, {_C.isa()} kernels, {threads} threads; {named}",
        f"ceilings of this machine, now: {measured}",
        f"ms: median of {settings.rounds} steps, everybody in turn; ±: half the distance between "
        "the quartiles. A step brings each worker a token, its choice (the likeliest) included",
        "speed-up: tokens a second against one worker's, in the same turns; ideal: the same at "
        "the ceilings, reading weights, keys and values once a step",
        "packed: with packed linear layers; batch: streams that share nothing; slow path: "
        "segments turned and concatenated anew in every layer of a step",
    ]
    facts = {
        "threads": threads, "isa": _C.isa(), "python": platform.python_version(),
        "versions": versions, "rounds": settings.rounds,
        "ceilings": {dtype: asdict(limit) for dtype, limit in limits.items()},
    }  # fmt: skip
    return lines, facts


def reached(record: Record) -> float | None:
    """Part of the ideal speed-up, of records that have one."""
    return record["speedup"] / record["ideal"] if "speedup" in record else None


def _reached_text(record: Record) -> str:
    part = reached(record)
    return "" if part is None else f"{part:.0%}"


_CELL_COLUMNS = (
    Column("context", number("context", form=",d")),
    Column("W", number("workers", form="d")),
)
COLUMNS = (
    *_CELL_COLUMNS,
    Column("what", lambda r: ": ".join(filter(None, (r["what"], r.get("error")))), is_text=True),
    Column("ms", number("seconds", 1e3)),
    Column("±", number("spread", form=".0%")),
    Column("tokens/s", number("tokens_per_second")),
    Column("speed-up", number("speedup", form=".2f")),
    Column("ideal", lambda r: format(r["ideal"], ".2f") if "speedup" in r else ""),
    Column("reached", _reached_text),
    Column("times packed", number("times_packed", form=".2f"), wide=True),
)


def _part(name: str) -> Callable[[Record], str]:
    return lambda record: format(record["parts"][name] * 1e3, ".2f")


PART_COLUMNS = (
    *_CELL_COLUMNS,
    Column("what", lambda r: str(r["what"]), is_text=True),
    *(Column(name, _part(name)) for name in step_time.PARTS),
)


# ---- targets -------------------------------------------------------------------------------------


def targets(
    models: Sequence[BenchModel] = tuple(MODELS.values()),
    dtypes: Sequence[str] = DTYPES,
    context: int = TARGET_CONTEXT,
    rounds: int = 10,
) -> list[Target]:
    """What must hold end to end: the speed-up of 4 workers, and that workers are never slower than
    as many streams that share nothing. A target for each model and dtype."""
    settings = Settings(
        models, dtypes, (context,), (1, 2, TARGET_WORKERS, 8), rounds, UNSHARED, parts=False
    )
    settings.check()

    def measured(model: BenchModel, dtype: str) -> list[Line]:
        return target_lines(measure(model, dtype, settings, ceilings.measure(dtype))[0])

    return [
        Target(
            f"End to end, {model.title}, {dtype}, {context} tokens",
            functools.partial(measured, model, dtype),
        )
        for model, dtype in itertools.product(models, dtypes)
    ]


def target_lines(records: Sequence[Record]) -> list[Line]:
    """The targets' lines of one model, dtype and context; see `targets`."""
    packed, plain = (
        next(r for r in records if r["what"] == what and r["workers"] == TARGET_WORKERS)
        for what in (PACKED, PLAIN)
    )
    parts = {r["what"]: reached(r) or 0.0 for r in (packed, plain)}
    lines = [
        Line(
            f"speed-up of {TARGET_WORKERS} workers, of the ideal {packed['ideal']:.2f}",
            100 * parts[PACKED],
            packed["speedup_spread"],
            100 * TARGET_PART,
            "%",
            note=f"({packed['speedup']:.2f}; with torch's linear layers {parts[PLAIN]:.0%}, "
            f"{plain['speedup']:.2f})",
        )
    ]
    unshared = [r for r in records if r["what"] in UNSHARED and "times_packed" in r]
    if unshared:
        worst = min(unshared, key=lambda r: r["times_packed"])
        lines.append(
            Line(
                "speed of workers against that of as many streams that share nothing",
                worst["times_packed"],
                worst["spread"],
                1.0,
                "x",
                note=f"(at worst: {worst['workers']}, {worst['what']})",
            )
        )
    return lines
