"""Whatever is raised wherever, a cache is as before or as after, and the model works.

HOGWILD_INTERRUPTS=all tries every instruction; without it, every line and a sample of those.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import transformers

import hogwild_ext as hx
from hogwild_ext import patching
from hogwild_ext.pages import PagePool
from interrupts import Interrupt, some_places
from models import plain_logits, random_tokens, tiny_model

TOKENS = random_tokens(70, seed=1)
FAILS = (ZeroDivisionError, hx.OutOfPages)
ERRORS = (KeyboardInterrupt, MemoryError)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return hx.patch(tiny_model("llama"))


class World:
    """A cache of a model with two workers' segments, a fork of one and an empty one."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.model = model
        self.cache = cache = hx.SegmentCache.for_model(model, max_tokens=320, spare_pages=1)
        self.prompt, self.a, self.b = (cache.segment(name) for name in ("prompt", "a", "b"))
        self.views = [[self.prompt, self.b, self.a], [self.prompt, self.a, self.b]]
        hx.forward(model, cache, [[self.prompt], [self.a]], [TOKENS, TOKENS[:60]])
        self.forward()
        self.fork = cache.fork(self.a)
        self.fork.truncate(40)
        self.empty = cache.segment("empty")

    def forward(self, model: Any = None, **options: Any) -> torch.Tensor:
        model = self.model if model is None else model
        logits = hx.forward(model, self.cache, self.views, [[7, 8], [9]], **options)
        assert isinstance(logits, torch.Tensor)
        return logits

    def step(self, size: int = 1, raises: bool = False) -> None:
        shape = hx.model_support.read_model(self.model)
        generator = torch.Generator().manual_seed(size)
        with self.cache.step([[self.a, self.b], [self.fork]], [2, size]) as step:
            for layer in range(shape.num_layers):
                tokens, heads, dim = 2 + size, shape.num_kv_heads, shape.head_dim
                step.attend(layer, *torch.randn(3, tokens, heads, dim, generator=generator))
                if raises:
                    raise ZeroDivisionError

    def contents(self) -> list[Any]:
        cache = self.cache
        found: list[Any] = [cache.used_tokens, cache.free_tokens]
        for segment in cache.segments:
            found += [segment.name, len(segment), segment.tokens]
            for layer in range(cache.num_layers):
                found += [x(layer).numpy().tobytes() for x in (segment.keys, segment.values)]
        return found

    def assert_consistent(self) -> None:
        """The pool is what follows from the segments. For a change, who comes next tidies up."""
        pool, rebuilt = self.cache._pool, PagePool(self.cache._pool.count)
        rebuilt.rebuild(segment._content[:2] for segment in self.cache.segments)
        assert pool.free_pages() == rebuilt.free_pages()
        assert (pool.stored, pool.free) == (rebuilt.stored, rebuilt.free)
        assert pool._holders.tolist() == rebuilt._holders.tolist() and pool._ends == rebuilt._ends
        assert self.cache.used_tokens == pool.stored
        assert list(self.cache._segments.values()) == list(self.cache.segments)


def forward_that_raises(world: World) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = world.model.model.layers[1].mlp.register_forward_hook(fail)
    try:
        world.forward()
    finally:
        handle.remove()


OPERATIONS: dict[str, Callable[[World], Any]] = {
    "segment": lambda w: w.cache.segment("new"),
    "fork": lambda w: w.cache.fork(w.a),
    "truncate": lambda w: w.a.truncate(3),
    "free": lambda w: w.cache.free(w.fork),
    "commit": lambda w: w.cache.commit(w.fork, w.prompt),
    "commit to empty": lambda w: w.cache.commit(w.fork, w.empty),
    "commit without room": lambda w: w.cache.commit(w.prompt, w.a),
    "step": World.step,
    "step that raises": lambda w: w.step(raises=True),
    "step without room": lambda w: w.step(size=400),
    "forward": World.forward,
    "forward that raises": forward_that_raises,
    "read": lambda w: (w.a.keys(1), w.a.tokens, w.cache.free_tokens, repr(w.cache)),
}


def interrupted(world: World, operation: Callable[[World], Any], interrupt: Interrupt) -> bool:
    """Whether it ended well."""
    with interrupt:
        try:
            operation(world)
        except (*FAILS, *ERRORS):
            return False
    return True


@pytest.mark.cpu
@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "instructions"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_cache_is_as_before_or_as_after(
    model: transformers.PreTrainedModel, name: str, opcodes: bool
) -> None:
    operation = OPERATIONS[name]
    plain = plain_logits(model, TOKENS)
    world = World(model)
    before, next_before = world.contents(), world.forward()
    world = World(model)
    count = Interrupt(-1, opcodes=opcodes)
    succeeds = interrupted(world, operation, count)
    after, next_after = world.contents(), world.forward()
    assert succeeds == ("raises" not in name and "without" not in name)
    assert (before != after) == (succeeds and name != "read")

    undone = tried = 0
    for at in some_places(count.places, 40 if opcodes else 100, seed=len(name)):
        world = World(model)
        interrupt = Interrupt(at, ERRORS[at % len(ERRORS)], opcodes=opcodes)
        interrupted(world, operation, interrupt)
        assert interrupt.struck
        found = world.contents()
        assert found in (before, after), interrupt.struck
        assert patching._ACTIVE.get() is None, interrupt.struck
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        assert torch.equal(plain_logits(model, TOKENS), plain), interrupt.struck
        logits = world.forward()
        assert torch.equal(logits, next_before if found == before else next_after)
        world.assert_consistent()
        undone += found == before
        tried += 1
    assert undone >= 0.6 * tried, "most of it lies before the point of no return"


def test_a_callback_of_the_model_that_raises(model: transformers.PreTrainedModel) -> None:
    """At the point of no return of the model's own code: the step is over with the error."""
    world = World(model)
    before, plain = world.contents(), plain_logits(model, TOKENS)
    with pytest.raises(ZeroDivisionError) as caught:
        forward_that_raises(world)
    # While the error, and with it every frame, is still there:
    assert caught.value.__traceback__ is not None
    assert world.contents() == before
    assert torch.equal(plain_logits(model, TOKENS), plain)
    world.forward()
    world.assert_consistent()


def strike(world: World, function: str, error: type[BaseException] = KeyboardInterrupt) -> Any:
    """A step that is struck as it calls this function of step.py; the error."""
    tracer = Interrupt(-1)

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_name == function and frame.f_code.co_filename.endswith("step.py"):
            sys.settrace(None)
            raise error("on purpose")
        return None

    tracer._trace = trace  # type: ignore[method-assign]
    try:
        with tracer:
            world.forward()
    except error as caught:
        return caught
    raise AssertionError("not reached")


def test_the_next_step_works_while_the_error_of_the_last_is_held(
    model: transformers.PreTrainedModel,
) -> None:
    """As in a notebook, which keeps the last traceback, and with it every frame."""
    world = World(model)
    expected, before = World(model).forward(), world.contents()
    plain = plain_logits(model, TOKENS)
    error = strike(world, "__exit__")
    assert error.__traceback__ is not None and world.contents() == before
    assert torch.equal(plain_logits(model, TOKENS), plain)
    assert torch.equal(world.forward(), expected)
    world.assert_consistent()


def test_a_step_that_nobody_holds_is_over(model: transformers.PreTrainedModel) -> None:
    world = World(model)
    cache, before = world.cache, world.contents()
    step = cache.step([[world.b]], [60]).__enter__()
    with pytest.raises(RuntimeError, match=r"^truncate: .*'step'.*abandon"):
        world.b.truncate(0)
    assert cache.used_tokens == before[0] + 60 and len(world.b) == 1
    del step
    assert world.contents() == before
    world.b.truncate(0)
    world.assert_consistent()


def test_a_step_that_was_left_open_can_be_abandoned(model: transformers.PreTrainedModel) -> None:
    world = World(model)
    before = world.contents()
    step = world.cache.step([[world.a]], [60])
    step.__enter__()
    step.abandon()
    assert world.contents() == before
    with pytest.raises(RuntimeError, match=r"^step: .*over"):
        step.__exit__(None, None, None)
    assert world.contents() == before
    world.assert_consistent()


def test_a_signal_handler_may_look_but_not_change(
    model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs inside of a change, in its thread: the change goes on all the same."""
    world, expected = World(model), World(model)
    expected.cache.commit(expected.fork, expected.prompt)
    before, refused = world.contents(), []
    commit = type(world.cache._backend).commit

    def handled(*args: Any) -> None:
        assert world.contents() == before
        for change in (
            lambda: world.cache.segment("x"),
            world.forward,
            lambda: world.b.truncate(0),
        ):
            with pytest.raises(RuntimeError, match="'commit'") as caught:
                change()
            refused.append(caught.value)
        commit(*args)

    monkeypatch.setattr(type(world.cache._backend), "commit", handled)
    world.cache.commit(world.fork, world.prompt)
    assert len(refused) == 3
    assert world.contents() == expected.contents()
    world.assert_consistent()


# ---- patching -----------------------------------------------------------------------------------


def patching_game(name: str) -> None:
    """One of the ways to prepare a model, struck at every line; then the model, and then again."""

    def prepared() -> transformers.PreTrainedModel:
        model = tiny_model("llama")
        if "unpatch" in name:
            hx.patch(model, linear="packed" if "packed" in name else None)
        return model

    linear = "packed" if "packed" in name else None
    calls: dict[str, Callable[[Any], Any]] = {
        "patch": lambda model: hx.patch(model, linear=linear),
        "unpatch": hx.unpatch,
    }
    call = calls[name.split()[0]]
    plain = plain_logits(tiny_model("llama"), TOKENS)
    results = [World(hx.patch(tiny_model("llama"), linear=x)).forward() for x in (None, linear)]
    model = prepared()
    with Interrupt(-1) as count:
        call(model)
    for at in some_places(count.places, 60, seed=1):
        model = prepared()
        with Interrupt(at, ERRORS[at % 2]) as interrupt, suppress(ERRORS):
            call(model)
        assert torch.equal(plain_logits(model, TOKENS), plain), interrupt.struck
        found = World(model).forward()
        assert any(torch.equal(found, result) for result in results), interrupt.struck
        assert torch.equal(World(hx.patch(model, linear=linear)).forward(), results[1])
        call(model)
        assert torch.equal(plain_logits(model, TOKENS), plain), interrupt.struck
        hx.unpatch(model)
        assert not any("in_step" in vars(module) for module in model.modules())
        assert not any(isinstance(getattr(m, "config", None), patching._StepConfig)
                       for m in model.modules())  # fmt: skip
        assert patching._mark_unrotated not in model.model.rotary_emb._forward_hooks.values()


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["patch", "patch packed", "unpatch", "unpatch packed"])
def test_a_model_is_patched_or_not(name: str) -> None:
    patching_game(name)


@pytest.mark.cpu
@pytest.mark.parametrize("linear", [None, "packed"])
def test_forward_patches_again_what_was_cut_short(linear: str | None) -> None:
    """`forward` on a plain model: it patches, packs, and packs weights, and any of it may fail."""
    expected = World(tiny_model("llama")).forward(linear=linear)
    plain = plain_logits(tiny_model("llama"), TOKENS)
    world = World(tiny_model("llama"))
    hx.unpatch(world.model)
    files = ("patching.py", "packed_linear.py", "model_support.py")
    with Interrupt(-1, files=files) as count:
        world.forward(linear=linear)
    for at in some_places(count.places, 80, seed=2):
        world = World(tiny_model("llama"))
        hx.unpatch(world.model)
        before = world.contents()
        with Interrupt(at, ERRORS[at % 2], files=files) as interrupt, suppress(ERRORS):
            world.forward(linear=linear)
        assert torch.equal(plain_logits(world.model, TOKENS), plain), interrupt.struck
        if world.contents() == before:
            assert torch.equal(world.forward(linear=linear), expected), interrupt.struck
        world.assert_consistent()


# ---- a cache that is being made -----------------------------------------------------------------


@pytest.mark.cpu
def test_a_cache_that_is_cut_short_keeps_nothing(model: transformers.PreTrainedModel) -> None:
    reserve = type(hx.SegmentCache.for_model(model, max_tokens=64)._backend).reserve
    kept: list[weakref.ref[torch.Tensor]] = []

    def noted(*args: Any) -> torch.Tensor:
        storage: torch.Tensor = reserve(*args)
        kept.append(weakref.ref(storage))
        return storage

    plain = plain_logits(model, TOKENS)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hx.cpu_backend.CpuBackend, "reserve", noted)
        with Interrupt(-1) as count:
            hx.SegmentCache.for_model(model, max_tokens=64)
        for at in some_places(count.places, 150, seed=3):
            with Interrupt(at, ERRORS[at % 2]) as interrupt, suppress(ERRORS):
                hx.SegmentCache.for_model(model, max_tokens=64)
            assert not any(storage() is not None for storage in kept), interrupt.struck
            kept.clear()
    assert torch.equal(plain_logits(model, TOKENS), plain)


@pytest.mark.cpu
def test_a_freed_segment_stays_freed_whatever_comes_next(
    model: transformers.PreTrainedModel,
) -> None:
    """Done, but not tidied up: the very next call is a step that would write it."""
    world = World(model)
    with Interrupt(-1) as count:
        world.cache.free(world.fork)
    done = 0
    for at in range(count.places):
        world = World(model)
        before = world.cache.used_tokens
        with Interrupt(at) as interrupt, suppress(KeyboardInterrupt):
            world.cache.free(world.fork)
        if world.fork not in world.cache.segments:
            done += 1
            with pytest.raises(ValueError, match="live"):
                world.cache.step([[world.fork]], [1])
            assert repr(world.fork) == "<Segment 'a.1', freed>" and len(world.fork) == 0
            assert world.cache.fork(world.a).name == "a.1", interrupt.struck
            world.assert_consistent()
            assert world.cache.used_tokens == before
    assert done > 2
