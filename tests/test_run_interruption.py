"""A run that is cut short anywhere: what there was is told, and no memory is kept."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hogwild_ext as hx
from hogwild_ext.cpu_backend import CpuBackend
from interrupts import Interrupt, some_places
from models import plain_logits, tiny_model
from scripted import PROMPTS, STOP, VOCABULARY, A, B, Script, say, team

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]

FILES = ("run.py", "engine.py", "cache.py", "step.py", "changes.py", "patching.py")
LINES = {"A": [A, STOP, B, STOP, A], "B": [B, A, STOP, A], "C": [A, *say("\\boxed{4}")]}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", vocab_size=VOCABULARY)


@pytest.fixture
def storages(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[torch.Tensor]]:
    """Those that caches have reserved."""
    reserved: list[weakref.ref[torch.Tensor]] = []
    reserve = CpuBackend.reserve

    def noted(*args: Any) -> torch.Tensor:
        storage = reserve(*args)
        reserved.append(weakref.ref(storage))
        return storage

    monkeypatch.setattr(CpuBackend, "reserve", noted)
    return reserved


def paragraphs(result: hx.Result) -> list[str]:
    return sorted(result.text.split("\n\n"))


@pytest.mark.parametrize(
    "error, functions",
    [(KeyboardInterrupt, ()), (MemoryError, ()), (KeyboardInterrupt, ("_commit",))],
    ids=["ctrl c", "memory", "ctrl c in a commit"],
)
def test_a_run_that_is_struck_anywhere(
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    storages: list[weakref.ref[torch.Tensor]],
    tmp_path: Path,
    error: type[BaseException],
    functions: tuple[str, ...],
) -> None:
    prompts = replace(PROMPTS, closing="So: ")
    names = list(LINES)
    workers = team(model, names, prompts=prompts, answer_tokens=3, question_every=2)

    def play(interrupt: Interrupt) -> hx.Run:
        with monkeypatch.context() as patched:
            Script(patched, LINES)
            run = workers.stream("p", 14, snapshots=[4], trace=tmp_path / "trace.jsonl")
            with interrupt, suppress(error):
                for _ in run:
                    pass
        return run

    plain = plain_logits(model, [5, 6, 7])
    count = Interrupt(-1, files=FILES, functions=functions)
    whole = play(count)
    expected = whole.result()
    assert expected.answer == "4" and len(expected.snapshots) == 1
    del whole

    for at in some_places(count.places, 60 if functions else 20, seed=4):
        storages.clear()
        interrupt = Interrupt(at, error, files=FILES, functions=functions)
        run = play(interrupt)
        assert interrupt.struck
        result = run.result()
        assert result.steps <= expected.steps, interrupt.struck
        for worker, whole_worker in zip(result.workers, expected.workers, strict=True):
            assert whole_worker.text.startswith(worker.text), interrupt.struck
            assert whole_worker.tokens[: len(worker.tokens)] == worker.tokens, interrupt.struck
        # Every paragraph that a worker has written stands in the text, once.
        for worker in result.workers:
            for text in filter(None, worker.text.split("\n\n")):
                assert text.strip() in result.text, interrupt.struck
        assert len(paragraphs(result)) == len(set(paragraphs(result))), interrupt.struck
        run.close()
        assert run.result().text == result.text
        gc.collect()
        assert storages and not any(storage() is not None for storage in storages)
        assert torch.equal(plain_logits(model, [5, 6, 7]), plain), interrupt.struck
    assert play(Interrupt(-1)).result().text == expected.text


@pytest.mark.parametrize("what", ["final_answer", "paragraph_ends", "logits_processors", "model"])
def test_a_callback_that_raises(
    model: Any, storages: list[weakref.ref[torch.Tensor]], what: str
) -> None:
    calls = []

    def fail(*args: Any) -> Any:
        calls.append(what)
        if len(calls) == 7:
            raise ZeroDivisionError
        return args[1] if what == "logits_processors" else None

    changes: dict[str, Any] = {what: [fail] if what == "logits_processors" else fail}
    if what == "model":
        changes = {}
        handle = model.model.layers[1].register_forward_hook(fail)
    plain = plain_logits(model, [5, 6, 7])
    calls.clear()
    run = team(model, 2, **changes).stream("p", 20)
    with pytest.raises(ZeroDivisionError):
        for _ in run:
            pass
    if what == "model":
        handle.remove()
    assert len(calls) == 7
    result = run.result()
    assert result.answer is None and 0 < result.steps < 20
    assert any(worker.text for worker in result.workers)
    run.close()
    gc.collect()
    assert not any(storage() is not None for storage in storages)
    assert torch.equal(plain_logits(model, [5, 6, 7]), plain)
    assert team(model, 2).run("p", 3).steps == 3
