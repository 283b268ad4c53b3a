"""Tensors that are not what they seem: read right, or refused by the argument's name.

Kernels read addresses. A tensor may have none of its own (subclasses, what torch.func wraps), less
memory than its shape says, or numbers that torch would still negate. And what looks on while
something is computed (modes, traces) would not see the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import hogwild_ext as hx
from hogwild_ext import checks, ops
from models import tiny_model

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # torch's own, about kinds that it means to give up
]

D = 64
INV_FREQ = 1e4 ** (-torch.arange(0, D, 2) / D)
REFUSALS = (TypeError, ValueError, RuntimeError)


@pytest.fixture(params=["C", "Python"], autouse=True)
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to look at a tensor: the second is that of an older torch."""
    if request.param == "Python":
        older = hx._C.TensorReader(object)
        monkeypatch.setattr(checks, "TENSORS", older)
        monkeypatch.setattr(ops, "_TENSORS", older)


# ---- kinds ---------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def wrapped_by(transform: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    """What a function sees inside of a transform, taken out of it."""
    seen = []

    def look(y: torch.Tensor) -> torch.Tensor:
        seen.append(y)
        return y.sum()

    transform(look)(x[None] if transform is torch.vmap else x)
    return seen[0]


def resized(x: torch.Tensor, size: int) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(size)
    return x


def cut_in_front(x: torch.Tensor) -> torch.Tensor:
    """The storage is large enough for the shape, but the tensor does not begin at its start."""
    end = torch.zeros(2 * x.numel() + 1, dtype=x.dtype)[x.numel() + 1 :].view(x.shape)
    end.untyped_storage().resize_(x.nbytes)
    return end


REFUSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a subclass that adds nothing": lambda x: x.as_subclass(Subclass),
    "a wrapper subclass": lambda x: TwoTensor(x, x),
    "a masked tensor": lambda x: torch.masked.masked_tensor(x, torch.ones_like(x).bool()),
    "a fake tensor": lambda x: FakeTensorMode().from_tensor(x),
    "an uninitialised parameter": lambda x: torch.nn.UninitializedParameter(),
    "batched": lambda x: wrapped_by(torch.vmap, x),
    "tracked": lambda x: wrapped_by(torch.func.grad, x),
    "functional": torch._to_functional_tensor,
    "freed": lambda x: resized(x, 0),
    "cut by one element": lambda x: resized(x, x.nbytes - x.element_size()),
    "cut in front": cut_in_front,
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "meta": lambda x: x.to("meta"),
    "complex": lambda x: torch.complex(x, x),
    "conjugate": lambda x: torch.complex(x, x).conj(),
    "double": lambda x: x.double() if x.is_floating_point() else x.float() + 0.5,
}

READ: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "negative": lambda x: torch._neg_view(-x),
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "a buffer": lambda x: torch.nn.Buffer(x),
    "shared with numpy": lambda x: torch.from_numpy(x.numpy().copy()),
    "from DLPack": lambda x: torch.from_dlpack(x.clone()),
    "copied when written": torch._lazy_clone,
    "at the very end of its storage": lambda x: torch.cat(
        [torch.zeros(3, dtype=x.dtype), x.flatten()]
    )[3:].view(x.shape),
    "odd strides of single elements": lambda x: (
        x[None]
        .expand(1, *x.shape)
        .as_strided(
            x.shape, [s if n > 1 else 12345 for n, s in zip(x.shape, x.stride(), strict=True)]
        )
    ),
}


# ---- places --------------------------------------------------------------------------------------

QUERY = torch.randn(2, 1, 4, D, generator=torch.Generator().manual_seed(1))
KEY, VALUE = torch.randn(2, 7, 2, D, generator=torch.Generator().manual_seed(2))
ROWS = torch.randn(7, 4, D, generator=torch.Generator().manual_seed(3))
OFFSETS, TOKENS = torch.tensor([[9], [7]]), torch.tensor([[5, 9]])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def op(**given: Any) -> torch.Tensor:
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "offsets": OFFSETS, **given}
    query, key, value, offsets = (
        arguments.pop(name) for name in ("query", "key", "value", "offsets")
    )
    return hx.concurrent_attention(
        query, [key], [value], offsets, **{"inv_freq": INV_FREQ, **arguments}
    )


def attend(**given: Any) -> torch.Tensor:
    cache = hx.SegmentCache(1, 2, D, inv_freq=INV_FREQ, max_tokens=64)
    segment = cache.segment("a")
    try:
        with cache.step([[segment]], [7]) as step:
            return step.attend(**{"layer": 0, "query": ROWS, "key": KEY, "value": VALUE, **given})
    except BaseException:
        assert len(segment) == 0
        raise


def forward(model: Any, tokens: Any) -> torch.Tensor:
    cache = hx.SegmentCache.for_model(model, max_tokens=64)
    return hx.forward(model, cache, [[cache.segment("a")]], tokens)


def step_tokens(tokens: Any) -> torch.Tensor:
    cache = hx.SegmentCache(1, 2, D, inv_freq=INV_FREQ, max_tokens=64)
    segment = cache.segment("a")
    with cache.step([[segment]], [2], tokens) as step:
        step.attend(0, ROWS[:2], KEY[:2], VALUE[:2])
    return torch.tensor(segment.tokens)


Place = tuple[str, torch.Tensor, Callable[[Any, torch.Tensor], Any]]
PLACES: dict[str, Place] = {
    "query of the op": ("query", QUERY, lambda _, x: op(query=x)),
    "keys of the op": ("keys[0]", KEY, lambda _, x: op(key=x)),
    "values of the op": ("values[0]", VALUE, lambda _, x: op(value=x)),
    "out of the op": ("out", torch.zeros_like(QUERY), lambda _, x: op(out=x)),
    "offsets": ("offsets", OFFSETS, lambda _, x: op(offsets=x)),
    "inv_freq": ("inv_freq", INV_FREQ, lambda _, x: op(inv_freq=x)),
    "query of a step": ("query", ROWS, lambda _, x: attend(query=x)),
    "key of a step": ("key", KEY, lambda _, x: attend(key=x)),
    "value of a step": ("value", VALUE, lambda _, x: attend(value=x)),
    "out of a step": ("out", torch.zeros_like(ROWS), lambda _, x: attend(out=x)),
    "rotate": ("keys", KEY, lambda _, x: hx.rotate(x, INV_FREQ)),
    "tokens of a step": ("tokens", TOKENS, lambda _, x: step_tokens(x)),
    "tokens of forward": ("tokens", TOKENS, forward),
}
# Host data may have any type of number. Of a fake query the op asks that the others are fake too.
# Ids on a device, whatever it is, are not read before somebody asks for them.
TAKEN_HERE = {
    ("inv_freq", "double"),
    ("query of the op", "a fake tensor"),
    ("tokens of a step", "meta"),
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[tuple[str, Place]]:
    name, tensor, call = PLACES[request.param]
    before = tensor.clone()
    yield request.param, (name, tensor, call)
    if not name.startswith("out"):
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_memory_is_refused_by_name(
    kind: str, place: tuple[str, Place], model: Any
) -> None:
    where, (name, tensor, call) = place
    if (where, kind) in TAKEN_HERE:
        pytest.skip("is taken here")
    try:
        strange = REFUSED[kind](tensor)
    except REFUSALS:
        pytest.skip("torch makes no such tensor of this type")
    with pytest.raises(REFUSALS) as error:
        call(model, strange)
    assert str(error.value).startswith(f"{name}: expected "), error.value


@pytest.mark.parametrize("kind", READ)
def test_what_has_its_memory_is_read_right(kind: str, place: tuple[str, Place], model: Any) -> None:
    where, (_, tensor, call) = place
    expected = call(model, tensor.clone())
    if where.startswith("out") and kind == "negative":
        with pytest.raises(ValueError, match="out: expected .* negates .*resolve_neg"):
            call(model, READ[kind](tensor))
        return
    source = tensor.clone()
    given = READ[kind](source)
    result = call(model, given)
    assert torch.equal(result, expected)
    if where.startswith("out"):
        assert result is given
    if kind == "copied when written":
        assert torch.equal(source, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [2, 7, 200])
def test_zero_strides_are_read_right(dtype: torch.dtype, length: int) -> None:
    """Of every tensor, in every dimension but the last."""
    shapes = {"query": (2, 3, 4, D), "key": (length, 2, D), "value": (length, 2, D)}
    dense = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    shared = {"offsets": [[length + 1], [length - 1]]}
    for name, shape in shapes.items():
        for dims in ([0], [1], [0, 1], list(range(len(shape) - 1))):
            once = [1 if d in dims else n for d, n in enumerate(shape)]
            wide = torch.randn(once).to(dtype).expand(shape)
            assert [wide.stride(d) for d in dims if shape[d] > 1] == [0] * len(dims)
            expected = op(**{**dense, name: wide.contiguous()}, **shared)
            assert torch.equal(op(**{**dense, name: wide}, **shared), expected), (name, dims)
    rows = {"query": (7, 4, D), "key": (7, 2, D), "value": (7, 2, D)}
    wide = {name: torch.randn(1, 1, D).expand(shape) for name, shape in rows.items()}
    copies = {name: tensor.contiguous() for name, tensor in wide.items()}
    assert torch.equal(attend(**wide), attend(**copies))
    with pytest.raises(ValueError, match="query: expected a dense last dimension"):
        op(query=QUERY[..., :1].expand(QUERY.shape))


@pytest.mark.parametrize("call, shape", [(op, QUERY.shape), (attend, ROWS.shape)])
def test_zero_strides_are_not_written(call: Any, shape: tuple[int, ...]) -> None:
    for dim in range(len(shape) - 1):
        once = [1 if d == dim else n for d, n in enumerate(shape)]
        if shape[dim] > 1:
            with pytest.raises(ValueError, match="out: expected elements that do not overlap"):
                call(out=torch.zeros(once).expand(shape))


def test_empty_tensors_need_no_memory() -> None:
    nothing = resized(torch.zeros(0, 2, D), 0)
    out = hx.concurrent_attention(
        QUERY, [nothing, KEY], [nothing, VALUE], [[9, 9], [7, 7]], inv_freq=INV_FREQ
    )
    assert torch.equal(out, op())
    assert hx.rotate(nothing, INV_FREQ).shape == (0, 2, D)


# ---- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["query", "key", "value", "out"])
@pytest.mark.parametrize("call", [op, attend])
@pytest.mark.parametrize("grad", [True, False])
def test_a_tangent_is_not_dropped(where: str, call: Any, grad: bool) -> None:
    """Tangents travel also under no_grad."""
    tensor = {"query": QUERY if call is op else ROWS, "key": KEY, "value": VALUE}.get(where)
    if tensor is None:
        tensor = torch.zeros_like(QUERY if call is op else ROWS)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        plain = call()  # nothing that has a tangent: nothing to refuse
        dual = forward_ad.make_dual(tensor, torch.ones_like(tensor))
        with pytest.raises(RuntimeError, match=rf"^{where}(s\[0\])?: .* without a tangent"):
            call(**{where: dual})
    assert torch.equal(plain, call())


def test_rotate_drops_no_tangent() -> None:
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="^keys: .* tangent"):
        hx.rotate(forward_ad.make_dual(KEY, KEY), INV_FREQ)


def test_the_registered_op_drops_no_tangent() -> None:
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="tangent"):
        torch.ops.hogwild_ext.concurrent_attention(
            forward_ad.make_dual(QUERY, QUERY), [KEY], [VALUE], OFFSETS.int(), INV_FREQ, None,
            0.1, 1.0, False, 0.0, 0,
        )  # fmt: skip


# ---- modes, traces and transforms ----------------------------------------------------------------


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Watching, WatchingFunctions])
def test_modes_see_the_op(mode: Any) -> None:
    expected = op()
    with mode() as watching:
        result = op()
        result_in_place = op(out=torch.zeros_like(QUERY))
    assert len([name for name in watching.seen if "hogwild_ext.concurrent_attention" in name]) == 2
    assert torch.equal(result, expected) and torch.equal(result_in_place, expected)


def test_traces_record_the_op() -> None:
    zeros = torch.zeros_like(QUERY)
    traced = torch.jit.trace(lambda x: op(query=x), (zeros,), check_trace=False)
    recorded = make_fx(lambda x: op(query=x))(zeros)
    exported = torch.export.export(Module(), (zeros,)).module()
    for run in (traced, recorded, exported):
        assert torch.equal(run(QUERY), op())


class Module(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return op(query=x)


def test_a_fake_mode_computes_shapes() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = op()
    assert isinstance(out, torch._subclasses.FakeTensor) and out.shape == QUERY.shape
    mode = FakeTensorMode()
    query, key, value = (mode.from_tensor(x) for x in (QUERY, KEY, VALUE))
    out = op(query=query, key=key, value=value, offsets=[[9], [7]], inv_freq=INV_FREQ.tolist())
    assert isinstance(out, torch._subclasses.FakeTensor) and out.shape == QUERY.shape
    with pytest.raises(TypeError, match=r"keys\[0\]: expected a FakeTensor, as query is one"):
        op(query=query)


TRANSFORMS: dict[str, Callable[[Callable[..., Any], torch.Tensor], Any]] = {
    "vmap": lambda f, x: torch.vmap(f)(x[None].repeat(3, *[1] * x.dim())),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(transform: str) -> None:
    apply = TRANSFORMS[transform]
    with pytest.raises(RuntimeError, match="query: expected a call outside .* torch.func"):
        apply(lambda x: op(query=x), QUERY)
    with pytest.raises(RuntimeError, match="cache: expected a call outside .* torch.func"):
        apply(lambda x: attend(query=x), ROWS)
    cache = hx.SegmentCache(1, 2, D, inv_freq=INV_FREQ, max_tokens=64)
    with cache.step([[cache.segment("a")]], [7]) as step:
        with pytest.raises(RuntimeError, match="step: expected a call outside .* torch.func"):
            apply(lambda x: step.attend(0, x, KEY, VALUE), ROWS)
        with pytest.raises(RuntimeError, match="step: expected a call outside .* torch.func"):
            apply(lambda x: x * step.attend(0, ROWS, KEY, VALUE), ROWS)  # wraps results only
        step.attend(0, ROWS, KEY, VALUE)


@pytest.mark.parametrize("mode", [Watching, WatchingFunctions, FakeTensorMode])
def test_a_step_is_refused_where_it_would_not_be_seen(mode: Any, model: Any) -> None:
    cache = hx.SegmentCache(1, 2, D, inv_freq=INV_FREQ, max_tokens=64)
    with cache.step([[cache.segment("a")]], [7]) as step:
        with mode(), pytest.raises(RuntimeError, match="step: expected a call outside"):
            step.attend(0, ROWS, KEY, VALUE)
        step.attend(0, ROWS, KEY, VALUE)
    ours = hx.SegmentCache.for_model(model, max_tokens=64)
    segment = ours.segment("a")
    with mode(), pytest.raises(RuntimeError, match="model: expected a call outside"):
        hx.forward(model, ours, [[segment]], [[1, 2]])
    assert len(segment) == 0
    with pytest.raises(RuntimeError, match="model: expected a call outside .* torch.jit.trace"):
        torch.jit.trace(
            lambda x: hx.forward(model, ours, [[segment]], x), (TOKENS,), check_trace=False
        )
    assert len(segment) == 0
    hx.forward(model, ours, [[segment]], [[1, 2]])


def test_a_default_device_is_no_mode_that_watches(model: Any) -> None:
    expected, logits = attend(), forward(model, [[1, 2]])
    with torch.device("cpu"):
        assert torch.equal(attend(), expected) and torch.equal(op(), op())
        assert torch.equal(forward(model, [[1, 2]]), logits)
