"""Bad input: one row for each argument of each public function and each way to get it wrong.

Every row calls a function with good arguments but one. The error must begin with the name of that
argument, and afterwards every tensor that went in, every segment's length, token and byte must be
as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import hogwild_ext as hx
from models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

D, KV, HEADS, LAYERS, VOCAB = 16, 2, 4, 2, 97
INV_FREQ = [1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003]
BEYOND_INT32 = 2**31


@dataclass
class World:
    """Good arguments of every function, made anew for each row."""

    model: Any
    cache: hx.SegmentCache
    prompt: hx.Segment
    own: hx.Segment
    arguments: dict[str, dict[str, Any]]
    functions: dict[str, Callable[..., Any]]
    snapshot: Callable[[], list[Any]]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return tiny_model("llama", head_dim=D, num_heads=HEADS, num_kv_heads=KV, num_layers=LAYERS,
                      vocab_size=VOCAB)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"?": VOCAB - 1}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast)


@pytest.fixture
def world(model: Any, tokenizer: Any) -> World:
    torch.manual_seed(1)
    cache = hx.SegmentCache.for_model(model, max_tokens=512)
    prompt, own = cache.segment("prompt"), cache.segment("own")
    hx.forward(model, cache, [[prompt]], [[1, 2, 3, 4, 5]])
    hx.forward(model, cache, [[prompt, own]], [[6, 7]])
    query = torch.randn(2, 3, HEADS, D)
    keys = [torch.randn(n, KV, D) for n in (5, 4)]
    values = [torch.randn(n, KV, D) for n in (5, 4)]
    out = torch.randn(2, 3, HEADS, D)
    rows = {
        "query": torch.randn(2, HEADS, D),
        "key": torch.randn(2, KV, D),
        "value": torch.randn(2, KV, D),
    }
    step_out = torch.randn(2, HEADS, D)
    team = hx.Hogwild(model, tokenizer)

    def attend(**arguments: Any) -> None:
        with cache.step([[prompt, own]], [2]) as step:
            step.attend(**arguments)

    arguments: dict[str, dict[str, Any]] = {
        "concurrent_attention": {
            "query": query, "keys": keys, "values": values, "offsets": [[9, 3], [4, 8]],
            "inv_freq": INV_FREQ, "query_lengths": [3, 2], "scale": 0.25, "rope_scale": 1.0,
            "interleaved": False, "softcap": 0.0, "window": None, "return_lse": False, "out": out,
        },
        "rotate": {
            "keys": keys[0], "inv_freq": INV_FREQ, "start": 0, "rope_scale": 1.0,
            "interleaved": False,
        },
        "view_offsets": {"views": [[0, 1], [1, 0]], "lengths": [5, 4], "query_lengths": [3, 2]},
        "SegmentCache": {
            "num_layers": 2, "num_kv_heads": KV, "head_dim": D, "inv_freq": INV_FREQ,
            "max_tokens": 128, "dtype": torch.float32, "device": "cpu", "value_dim": D,
            "rope_scale": 1.0, "interleaved": False, "scale": 0.25, "softcap": 0.0, "window": None,
            "max_position": 100, "spare_pages": 1,
        },
        "SegmentCache.for_model": {"model": model, "max_tokens": 128, "spare_pages": 1},
        "SegmentCache.segment": {"name": "another"},
        "SegmentCache.fork": {"segment": prompt, "name": "copy"},
        "SegmentCache.commit": {"source": own, "target": prompt},
        "SegmentCache.free": {"segment": own},
        "SegmentCache.step": {
            "views": [[prompt, own]], "query_lengths": [2], "tokens": [[1, 2]],
            "allow_beyond": False,
        },
        "Segment.truncate": {"length": 3},
        "Segment.keys": {"layer": 0},
        "Segment.values": {"layer": 0},
        "Step.attend": {"layer": 0, **rows, "out": step_out},
        "patch": {"model": model, "linear": None},
        "unpatch": {"model": model},
        "forward": {
            "model": model, "cache": cache, "views": [[prompt, own]], "tokens": [[1, 2]],
            "logits": "last", "allow_beyond": False, "linear": None,
        },
        "Hogwild": {
            "model": model, "tokenizer": tokenizer, "workers": 2, "layout": "combined",
            "max_tokens": 256, "seed": 1, "generation_config": None, "logits_processors": [],
            "prompts": None, "question_every": 9, "final_answer": None, "answer_tokens": 5,
            "paragraph_ends": None, "linear": None,
        },
        **{
            f"Hogwild.{method}": {
                "problem": "w1 w2", "max_steps": 2, "snapshots": [], "trace": None,
            }
            for method in ("run", "stream")
        },
    }  # fmt: skip
    functions: dict[str, Callable[..., Any]] = {
        "concurrent_attention": hx.concurrent_attention,
        "rotate": hx.rotate,
        "view_offsets": hx.view_offsets,
        "SegmentCache": hx.SegmentCache,
        "SegmentCache.for_model": hx.SegmentCache.for_model,
        "SegmentCache.segment": cache.segment,
        "SegmentCache.fork": cache.fork,
        "SegmentCache.commit": cache.commit,
        "SegmentCache.free": cache.free,
        "SegmentCache.step": lambda **a: cache.step(**a).__enter__(),
        "Segment.truncate": prompt.truncate,
        "Segment.keys": prompt.keys,
        "Segment.values": prompt.values,
        "Step.attend": attend,
        "patch": hx.patch,
        "unpatch": hx.unpatch,
        "forward": hx.forward,
        "Hogwild": hx.Hogwild,
        "Hogwild.run": team.run,
        "Hogwild.stream": team.stream,
    }

    def snapshot() -> list[Any]:
        state: list[Any] = [cache.used_tokens, cache.free_tokens, cache.segments]
        for segment in (prompt, own):
            state += [len(segment), segment.tokens]
            state += [kv(layer) for layer in range(LAYERS) for kv in (segment.keys, segment.values)]
        tensors = [query, *keys, *values, out, *rows.values(), step_out]
        return [x.clone() if isinstance(x, torch.Tensor) else x for x in [*state, *tensors]]

    return World(model, cache, prompt, own, arguments, functions, snapshot)


def other_segment(_: World) -> hx.Segment:
    return hx.SegmentCache(1, 1, 8, inv_freq=[]).segment("stranger")


def freed_segment(world: World) -> hx.Segment:
    segment = world.cache.segment("gone")
    world.cache.free(segment)
    return segment


def other_cache(_: World) -> hx.SegmentCache:
    return hx.SegmentCache(LAYERS + 1, KV, D, inv_freq=INV_FREQ)


meta = torch.device("meta")
wide = torch.randn(2, 3, HEADS, 2 * D)[..., ::2]  # its last dimension is not dense
SECOND_SEGMENT = [
    ("type", np.zeros((4, KV, D), np.float32)), ("rank", torch.zeros(4, KV, D, 1)),
    ("dtype", torch.zeros(4, KV, D).half()), ("dtype", torch.zeros(4, KV, D, dtype=torch.int32)),
    ("device", torch.zeros(4, KV, D, device=meta)),
    ("range", torch.zeros(4, KV, 2 * D)[..., ::2]),
    ("grad", torch.zeros(4, KV, D, requires_grad=True)),
]  # fmt: skip
NUMBER = [("type", "a lot"), ("type", None), ("type", True), ("range", float("nan")),
          ("range", float("inf"))]  # fmt: skip
FLAG = [("type", 1), ("type", None), ("type", "yes")]
LINEAR = [("type", 3), ("type", True), ("range", "torch")]
FREQUENCIES = [
    ("type", None), ("type", 0.5), ("type", "x"), ("rank", [[1.0]]), ("dtype", [1, 2]),
    ("dtype", ["a"]), ("device", torch.empty(4, device=meta)), ("range", [1.0] * (D // 2 + 1)),
    ("range", [float("nan")]),
]  # fmt: skip


def integer(low: int, *, none: bool = True) -> list[tuple[str, Any]]:
    kinds: list[tuple[str, Any]] = [("type", "3"), ("type", 2.0), ("type", True)]
    kinds += [("range", low - 1), ("range", BEYOND_INT32)]
    return kinds + ([("type", None)] if none else [])


# Function -> argument -> [(what is wrong, bad value or a function from the world to it)].
WRONG: dict[str, dict[str, list[tuple[str, Any]]]] = {
    "concurrent_attention": {
        "query": [
            ("type", None), ("type", [[1.0]]), ("type", np.zeros((2, 3, HEADS, D), np.float32)),
            ("rank", torch.zeros(3, HEADS, D)), ("dtype", torch.zeros(2, 3, HEADS, D).double()),
            ("dtype", torch.zeros(2, 3, HEADS, D).long()),
            ("device", torch.zeros(2, 3, HEADS, D, device=meta)),
            ("range", torch.zeros(2, 3, 3, D)), ("range", torch.zeros(2, 3, HEADS, 12)),
            ("range", torch.zeros(2, 3, HEADS, 264)), ("range", wide),
            ("grad", torch.zeros(2, 3, HEADS, D, requires_grad=True)),
        ],
        "keys": [
            ("type", None), ("type", torch.zeros(2, 5, KV, D)), ("type", [None, None]),
            ("rank", [torch.zeros(5, D)] * 2), ("dtype", [torch.zeros(5, KV, D).half()] * 2),
            ("device", [torch.zeros(5, KV, D, device=meta)] * 2),
            ("range", [torch.zeros(5, KV, D), torch.zeros(4, KV, 2 * D)]),
            ("range", [torch.zeros(5, KV, D), torch.zeros(4, 1, D)]),
            *[(kind, [torch.zeros(5, KV, D), bad]) for kind, bad in SECOND_SEGMENT],
            ("grad", [torch.zeros(n, KV, D, requires_grad=True) for n in (5, 4)]),
        ],
        "values": [
            ("type", None), ("type", torch.zeros(2, 5, KV, D)), ("type", [None, None]),
            ("rank", [torch.zeros(5, D)] * 2), ("dtype", [torch.zeros(5, KV, D).half()] * 2),
            ("device", [torch.zeros(5, KV, D, device=meta)] * 2),
            ("range", [torch.zeros(5, KV, D)]),
            ("range", [torch.zeros(5, KV, D), torch.zeros(5, KV, D)]),
            ("range", [torch.zeros(5, KV, 9), torch.zeros(4, KV, 9)]),
            ("range", [torch.zeros(5, KV, D), torch.zeros(4, KV, 2 * D)]),
            ("range", [torch.zeros(5, KV, D), torch.zeros(4, 1, D)]),
            *[(kind, [torch.zeros(5, KV, D), bad]) for kind, bad in SECOND_SEGMENT],
            ("grad", [torch.zeros(n, KV, D, requires_grad=True) for n in (5, 4)]),
        ],
        "offsets": [
            ("type", None), ("type", 3), ("type", "abcd"), ("rank", [9, 3, 4, 8]),
            ("rank", [[9, 3]]), ("rank", [[9], [4, 8]]), ("dtype", [[9.0, 3.0], [4.0, 8.0]]),
            ("dtype", torch.ones(2, 2)), ("dtype", torch.ones(2, 2, dtype=torch.bool)),
            ("device", torch.ones(2, 2, dtype=torch.int32, device=meta)),
            ("range", [[BEYOND_INT32, 3], [4, 8]]), ("range", [[-BEYOND_INT32 - 1, 3], [4, 8]]),
        ],
        "inv_freq": FREQUENCIES,
        "query_lengths": [
            ("type", 3), ("rank", [[3, 2]]), ("rank", [3]), ("dtype", [3.0, 2.0]),
            ("device", torch.ones(2, dtype=torch.int32, device=meta)), ("range", [3, -1]),
            ("range", [3, 4]),
        ],
        "scale": [w for w in NUMBER if w[1] is not None],
        "rope_scale": NUMBER,
        "interleaved": FLAG,
        "softcap": [*NUMBER, ("range", -1.0)],
        "window": integer(1, none=False),
        "return_lse": FLAG,
        "out": [
            ("type", [1.0]), ("rank", torch.zeros(3, HEADS, D)),
            ("dtype", torch.zeros(2, 3, HEADS, D).half()),
            ("device", torch.zeros(2, 3, HEADS, D, device=meta)),
            ("range", torch.zeros(2, 3, HEADS, 2 * D)), ("range", wide),
            ("range", torch.zeros(1, 3, HEADS, D).expand(2, 3, HEADS, D)),
            ("range", torch.zeros(999).as_strided((2, 3, HEADS, D), (400, D, D, 1))),
            ("memory", lambda w: w.arguments["concurrent_attention"]["query"]),
            ("grad", torch.zeros(2, 3, HEADS, D, requires_grad=True)),
        ],
    },
    "rotate": {
        "keys": [
            ("type", None), ("rank", torch.zeros(5, D)), ("dtype", torch.zeros(5, KV, D).double()),
            ("range", wide[0]), ("grad", torch.zeros(5, KV, D, requires_grad=True)),
        ],
        "inv_freq": FREQUENCIES,
        "start": [
            ("type", None), ("type", 1.0), ("range", BEYOND_INT32 - 3), ("range", -BEYOND_INT32),
        ],
        "rope_scale": NUMBER,
        "interleaved": FLAG,
    },
    "view_offsets": {
        "views": [
            ("type", None), ("type", 3), ("type", [0, 1]), ("type", [[0.0], [1]]),
            ("range", [[0, 2], [1]]), ("range", [[0, -1], [1]]), ("range", [[0, 0], [1]]),
        ],
        "lengths": [
            ("type", None), ("rank", [[5, 4]]), ("dtype", [5.0, 4.0]), ("range", [5, -1]),
            ("device", torch.ones(2, dtype=torch.int32, device=meta)),
        ],
        "query_lengths": [
            ("type", None), ("rank", [3]), ("dtype", [3.0, 2.0]), ("range", [3, -1]),
            ("range", [5, 2]),
            ("device", torch.ones(2, dtype=torch.int32, device=meta)),
        ],
    },
    "SegmentCache": {
        "num_layers": integer(1),
        "num_kv_heads": integer(1),
        "head_dim": [*integer(1), ("range", 12), ("range", 264)],
        "inv_freq": FREQUENCIES,
        "max_tokens": integer(1),
        "dtype": [("type", "float32"), ("type", None), ("dtype", torch.float64)],
        "device": [("type", 3), ("type", None), ("device", "meta"), ("device", "abacus"),
                   ("device", "cuda")],
        "value_dim": [*integer(1, none=False), ("range", 12), ("range", 264)],
        "rope_scale": NUMBER,
        "interleaved": FLAG,
        "scale": [w for w in NUMBER if w[1] is not None],
        "softcap": [*NUMBER, ("range", -1.0)],
        "window": integer(1, none=False),
        "max_position": integer(1, none=False),
        "spare_pages": integer(0),
    },
    "SegmentCache.for_model": {
        "model": [("type", None), ("type", torch.nn.Linear(2, 2))],
        "max_tokens": integer(1),
        "spare_pages": integer(0),
    },
    "SegmentCache.segment": {
        "name": [("type", None), ("type", 3), ("range", ""), ("range", "prompt")],
    },
    "SegmentCache.fork": {
        "segment": [("type", None), ("type", "prompt"), ("range", other_segment),
                    ("range", freed_segment)],
        "name": [("type", 3), ("range", ""), ("range", "own")],
    },
    "SegmentCache.commit": {
        "source": [("type", None), ("type", "own"), ("range", other_segment),
                   ("range", freed_segment), ("range", lambda w: w.prompt)],
        "target": [("type", None), ("type", "own"), ("range", other_segment),
                   ("range", freed_segment)],
    },
    "SegmentCache.free": {
        "segment": [("type", None), ("type", "own"), ("range", other_segment),
                    ("range", freed_segment)],
    },
    "SegmentCache.step": {
        "views": [
            ("type", None), ("type", lambda w: w.prompt), ("type", lambda w: [w.prompt]),
            ("type", [["prompt"]]), ("range", []), ("range", [[]]),
            ("range", lambda w: [[other_segment(w)]]), ("range", lambda w: [[freed_segment(w)]]),
            ("range", lambda w: [[w.prompt, w.own, w.prompt]]),
        ],
        "query_lengths": [
            ("type", None), ("rank", [[2]]), ("rank", [2, 2]), ("dtype", [2.0]), ("range", [0]),
            ("range", [-1]), ("device", torch.ones(1, dtype=torch.int32, device=meta)),
        ],
        "tokens": [
            ("type", 3), ("type", [["a", "b"]]), ("rank", [[1]]), ("rank", [[1, 2], [3, 4]]),
            ("rank", torch.ones(2, dtype=torch.int64)), ("dtype", torch.ones(1, 2)),
            ("range", [[1, -2]]), ("range", [[1, BEYOND_INT32]]),
        ],
        "allow_beyond": FLAG,
    },
    "Segment.truncate": {"length": [*integer(0), ("range", 6)]},
    "Segment.keys": {"layer": [*integer(0), ("range", LAYERS)]},
    "Segment.values": {"layer": [*integer(0), ("range", LAYERS)]},
    "Step.attend": {
        "layer": [*integer(0), ("range", LAYERS)],
        "query": [
            ("type", None), ("rank", torch.zeros(HEADS, D)),
            ("dtype", torch.zeros(2, HEADS, D).half()),
            ("device", torch.zeros(2, HEADS, D, device=meta)), ("range", torch.zeros(3, HEADS, D)),
            ("range", torch.zeros(2, 3, D)), ("range", torch.zeros(2, HEADS, 2 * D)),
            ("grad", torch.zeros(2, HEADS, D, requires_grad=True)),
        ],
        "key": [
            ("type", None), ("rank", torch.zeros(KV, D)), ("dtype", torch.zeros(2, KV, D).half()),
            ("device", torch.zeros(2, KV, D, device=meta)), ("range", torch.zeros(3, KV, D)),
            ("range", torch.zeros(2, KV + 1, D)), ("range", wide[0, :2, :KV]),
            ("grad", torch.zeros(2, KV, D, requires_grad=True)),
        ],
        "value": [
            ("type", None), ("rank", torch.zeros(KV, D)), ("dtype", torch.zeros(2, KV, D).half()),
            ("device", torch.zeros(2, KV, D, device=meta)), ("range", torch.zeros(3, KV, D)),
            ("range", torch.zeros(2, KV, 2 * D)),
            ("grad", torch.zeros(2, KV, D, requires_grad=True)),
        ],
        "out": [
            ("type", 3), ("rank", torch.zeros(HEADS, D)),
            ("dtype", torch.zeros(2, HEADS, D).half()),
            ("device", torch.zeros(2, HEADS, D, device=meta)), ("range", torch.zeros(3, HEADS, D)),
            ("range", torch.zeros(1, HEADS, D).expand(2, HEADS, D)),
            ("memory", lambda w: w.arguments["Step.attend"]["query"]),
        ],
    },
    "patch": {"model": [("type", None), ("type", torch.nn.Linear(2, 2))], "linear": LINEAR},
    "unpatch": {"model": [("type", None), ("type", torch.nn.Linear(2, 2))]},
    "forward": {
        "model": [("type", None), ("type", torch.nn.Linear(2, 2))],
        "cache": [("type", None), ("type", "cache"), ("range", other_cache)],
        "views": [
            ("type", None), ("type", lambda w: [w.prompt]), ("range", []), ("range", [[]]),
            ("range", lambda w: [[other_segment(w)]]), ("range", lambda w: [[freed_segment(w)]]),
        ],
        "tokens": [
            ("type", None), ("type", 3), ("type", [["a"]]), ("type", [[1.0]]), ("rank", [1, 2]),
            ("rank", torch.ones(2, dtype=torch.int64)), ("dtype", torch.ones(1, 2)),
            ("dtype", torch.ones(1, 2, dtype=torch.int32)),
            ("device", torch.ones(1, 2, dtype=torch.int64, device=meta)), ("range", []),
            ("range", [[]]), ("range", [[VOCAB]]), ("range", [[-1]]),
            ("range", torch.full((1, 2), VOCAB)), ("range", [[1], [2]]),
        ],
        "logits": [("type", None), ("type", 3), ("range", "first")],
        "allow_beyond": FLAG,
        "linear": LINEAR,
    },
    "Hogwild": {
        "model": [("type", None), ("type", torch.nn.Linear(2, 2))],
        "tokenizer": [("type", None), ("type", "gpt2")],
        "workers": [
            *integer(1), ("range", 1025), ("type", [1, 2]), ("range", []), ("range", [""]),
            ("range", ["Al", "Al"]), ("range", ["A\nl"]),
        ],
        "layout": [("type", None), ("type", 3), ("range", "circular")],
        "max_tokens": integer(1, none=False),
        "seed": [("type", 1.5), ("type", "1"), ("type", True), ("range", -1), ("range", 2**63)],
        "generation_config": [
            ("type", 3), ("type", {}), ("range", transformers.GenerationConfig(num_beams=4)),
        ],
        "logits_processors": [("type", 3), ("type", None), ("type", [3])],
        "prompts": [("type", "You are"), ("type", 3)],
        "question_every": integer(1, none=False),
        "final_answer": [("type", "yes"), ("type", 3)],
        "answer_tokens": integer(0, none=False),
        "paragraph_ends": [("type", "yes"), ("type", 3)],
        "linear": LINEAR,
    },
    **{
        f"Hogwild.{method}": {
            "problem": [("type", None), ("type", 3), ("range", ""), ("range", "  ")],
            "max_steps": integer(1),
            "snapshots": [
                ("type", 3), ("type", None), ("type", [1.5]), ("type", ["1"]), ("range", [0]),
                ("range", [3]), ("range", [1]),
            ],
            "trace": [("type", 3), ("type", True), ("type", b"run")],
        }
        for method in ("run", "stream")
    },
}  # fmt: skip

ROWS = [
    pytest.param(function, argument, kind, bad, id=f"{function}-{argument}-{kind}-{i}")
    for function, arguments in WRONG.items()
    for argument, wrongs in arguments.items()
    for i, (kind, bad) in enumerate(wrongs)
]
# Where a bad argument shows as a mismatch with another one, either name will do.
ALSO = {
    ("forward", "tokens"): ("tokens", "views", "query_lengths"),
    ("forward", "views"): ("views", "tokens"),
    ("SegmentCache.step", "query_lengths"): ("query_lengths", "views"),
    ("SegmentCache.step", "views"): ("views", "query_lengths"),
    ("view_offsets", "views"): ("views", "query_lengths"),
    ("concurrent_attention", "keys"): ("keys", "values", "query"),
}


@pytest.mark.parametrize(("function", "argument", "kind", "bad"), ROWS)
def test_a_bad_argument_is_named_and_changes_nothing(
    world: World, function: str, argument: str, kind: str, bad: Any
) -> None:
    if inspect.isfunction(bad):
        bad = bad(world)
    before = world.snapshot()
    expected = RuntimeError if kind == "grad" else (TypeError, ValueError)
    with torch.enable_grad(), pytest.raises(expected) as caught:
        world.functions[function](**{**world.arguments[function], argument: bad})
    message = str(caught.value)
    assert message.startswith(ALSO.get((function, argument), argument)), message
    assert "expected" in message and "got" in message, message
    for was, now in zip(before, world.snapshot(), strict=True):
        if isinstance(was, torch.Tensor):
            assert torch.equal(was, now)
        else:
            assert was == now


@pytest.mark.parametrize("function", WRONG)
def test_the_good_arguments_are_good(world: World, function: str) -> None:
    if function == "Step.attend":
        arguments = world.arguments[function]
        with world.cache.step([[world.prompt, world.own]], [2]) as step:
            step.attend(**arguments)
            step.attend(**{**arguments, "layer": 1})
    else:
        world.functions[function](**world.arguments[function])


def test_every_argument_of_every_function_has_rows(world: World) -> None:
    for function, arguments in WRONG.items():
        assert set(arguments) == set(world.arguments[function]), function
        target: Any = hx
        for part in function.split("."):
            target = hx.cache.Step if part == "Step" else getattr(target, part)
        parameters = set(inspect.signature(target).parameters) - {"self"}
        assert parameters == set(arguments), function
    listed = {name for name in hx.__all__ if callable(getattr(hx, name))}
    known = {"HIDDEN", "info", "Segment", "OutOfPages"}  # no arguments, or tested apart
    assert listed - known == {function for function in WRONG if "." not in function}
