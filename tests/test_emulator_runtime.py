"""The CUDA runtime of the emulated GPU: what it refuses, what it writes down, what it runs again;
and the sanitizer on kernels that nvcc has compiled."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emulator import build, ptx
from emulator.engine import Engine
from emulator.runtime import Device, Runtime, device

SOURCE = Path(__file__).parent / "emulator" / "kernels" / "launches.cu"
LINE, BOUNDED, STATIC, DYNAMIC, VOLATILE = range(5)  # as in SOURCE
STATIC_BYTES = 4096
PROCESSORS, MAJOR, SHARED_OF_BLOCK = 16, 75, 97  # of cudaDeviceAttr
KB = 1024


class Library:
    """SOURCE, linked with the emulated GPU."""

    def __init__(self, architecture: int) -> None:
        built = build.build_library([SOURCE], architecture)
        self.functions = ctypes.CDLL(str(built.module))
        self.functions.test_error_name.restype = ctypes.c_char_p
        self.functions.test_error_string.restype = ctypes.c_char_p
        self.engine, self.runtime = Engine(self.functions), Runtime(self.functions)
        self.names = [name for path in built.ptx for name in self.engine.know(path.read_text())]
        self.runtime.set_loader(self.engine.load_known)

    def call(self, function: str, *arguments: Any) -> str:
        """The name of the error."""
        error = getattr(self.functions, f"test_{function}")(*arguments)
        return str(self.functions.test_error_name(error).decode())

    def launch(
        self, kernel: int, data: NDArray[np.float32], grid: tuple[int, ...] = (1, 1, 1),
        block: tuple[int, ...] = (32, 1, 1), shared: int = 0, stream: int = 0,
    ) -> str:  # fmt: skip
        sizes = [(ctypes.c_uint * 3)(*size) for size in (grid, block)]
        return self.call(
            "launch", kernel, *sizes, ctypes.c_size_t(shared), ctypes.c_uint64(stream),
            ctypes.c_void_p(data.ctypes.data),
        )  # fmt: skip

    def line(self, data: NDArray[np.float32], slope: float, offset: float, stream: int = 0) -> str:
        return self.call(
            "line", ctypes.c_void_p(data.ctypes.data), data.size, ctypes.c_float(slope),
            ctypes.c_float(offset), ctypes.c_uint64(stream),
        )  # fmt: skip

    def number(self, function: str, *arguments: Any) -> int:
        """What a function writes through its first argument."""
        value = ctypes.c_int(-1)
        assert self.call(function, ctypes.byref(value), *arguments) == "cudaSuccess"
        return value.value


@pytest.fixture(scope="module", params=[90, 100], ids=lambda a: f"sm_{a}")
def compiled(request: pytest.FixtureRequest) -> Library:
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    return Library(request.param)


@pytest.fixture
def library(compiled: Library, request: pytest.FixtureRequest) -> Iterator[Library]:
    """On a GPU that its PTX is for, with nothing left over from other tests."""
    compiled.runtime.set_device(device(request.node.callspec.params["compiled"]))
    compiled.functions.test_last_error()
    compiled.runtime.clear_calls()
    compiled.engine.clear_findings()
    yield compiled
    compiled.engine.clear_findings()


@pytest.fixture
def data(library: Library) -> Iterator[NDArray[np.float32]]:
    values = ptx.aligned(np.arange(64, dtype=np.float32))
    with library.engine.calling([(values.ctypes.data, values.nbytes)], []):
        yield values.view(np.float32)


# ---- launches -----------------------------------------------------------------------------------


def test_a_launch_runs_the_kernel(library: Library, data: NDArray[np.float32]) -> None:
    before = data.copy()
    assert library.line(data, 2, 1) == "cudaSuccess"
    np.testing.assert_array_equal(data, 2 * before + 1)
    assert library.launch(STATIC, data, block=(64, 1, 1)) == "cudaSuccess"
    np.testing.assert_array_equal(data, (2 * before + 1)[::-1])


SHAPES = {
    "no blocks along x": ((0, 1, 1), (32, 1, 1), "cudaErrorInvalidConfiguration"),
    "no blocks along y": ((1, 0, 1), (32, 1, 1), "cudaErrorInvalidConfiguration"),
    "no blocks along z": ((1, 1, 0), (32, 1, 1), "cudaErrorInvalidConfiguration"),
    "no threads": ((1, 1, 1), (0, 1, 1), "cudaErrorInvalidConfiguration"),
    "grid.x": ((1 << 31, 1, 1), (32, 1, 1), "cudaErrorInvalidConfiguration"),
    "grid.y": ((1, 65536, 1), (32, 1, 1), "cudaErrorInvalidConfiguration"),
    "grid.z": ((1, 1, 65536), (32, 1, 1), "cudaErrorInvalidConfiguration"),
    "block.x": ((1, 1, 1), (1025, 1, 1), "cudaErrorInvalidConfiguration"),
    "block.y": ((1, 1, 1), (1, 1025, 1), "cudaErrorInvalidConfiguration"),
    "block.z": ((1, 1, 1), (1, 1, 65), "cudaErrorInvalidConfiguration"),
    "threads": ((1, 1, 1), (32, 32, 2), "cudaErrorInvalidConfiguration"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_shapes_that_no_gpu_takes(what: str, library: Library, data: NDArray[np.float32]) -> None:
    grid, block, error = SHAPES[what]
    before = data.copy()
    assert library.launch(BOUNDED, data, grid, block) == error
    assert library.runtime.calls() == []
    np.testing.assert_array_equal(data, before)


@pytest.mark.parametrize("axis", [1, 2])
def test_the_largest_grid_runs(axis: int, library: Library, data: NDArray[np.float32]) -> None:
    grid = [1, 1, 1]
    grid[axis] = 65535
    assert library.launch(BOUNDED, data, tuple(grid), (1, 1, 1)) == "cudaSuccess"
    (found,) = library.engine.findings()
    library.engine.clear_findings()
    assert found.kind == "race of global writes between blocks, of the same value"
    assert found.count == 2 * 65534  # both halves of one number, by all blocks but the first


def test_launch_bounds(library: Library, data: NDArray[np.float32]) -> None:
    assert library.launch(BOUNDED, data, block=(64, 1, 1)) == "cudaSuccess"
    assert library.launch(BOUNDED, data, block=(65, 1, 1)) == "cudaErrorInvalidValue"
    assert "more threads than its launch bounds: 65" in library.runtime.detail


def test_shared_memory_has_to_be_asked_for(library: Library, data: NDArray[np.float32]) -> None:
    assert library.launch(DYNAMIC, data, shared=48 * KB) == "cudaSuccess"
    assert library.launch(DYNAMIC, data, shared=48 * KB + 4) == "cudaErrorInvalidValue"
    assert "without the attribute: 49156" in library.runtime.detail
    assert library.call("allow_shared", DYNAMIC, 100 * KB) == "cudaSuccess"
    assert library.launch(DYNAMIC, data, shared=100 * KB) == "cudaSuccess"
    assert library.launch(DYNAMIC, data, shared=100 * KB + 4) == "cudaErrorInvalidValue"
    assert library.call("allow_shared", DYNAMIC, 227 * KB) == "cudaSuccess"
    assert library.call("allow_shared", DYNAMIC, 227 * KB + 1) == "cudaErrorInvalidValue"
    assert library.call("allow_shared", DYNAMIC, -1) == "cudaErrorInvalidValue"


def test_static_shared_memory_counts(library: Library, data: NDArray[np.float32]) -> None:
    most = 227 * KB - STATIC_BYTES
    assert library.call("allow_shared", STATIC, most + 1) == "cudaErrorInvalidValue"
    assert library.call("allow_shared", STATIC, most) == "cudaSuccess"
    assert library.launch(STATIC, data, shared=most) == "cudaSuccess"


def test_a_launch_that_does_not_end_is_an_error(
    library: Library, data: NDArray[np.float32]
) -> None:
    assert library.call("spin", ctypes.c_void_p(data.ctypes.data)) == "cudaErrorLaunchFailure"
    assert "does not come to an end" in library.runtime.detail
    (found,) = library.engine.findings()
    library.engine.clear_findings()
    assert found.kind == "does not come to an end"


def test_a_kernel_that_cannot_be_emulated_is_an_error(
    library: Library, data: NDArray[np.float32]
) -> None:
    assert library.launch(VOLATILE, data) == "cudaErrorInvalidDeviceFunction"
    assert "unknown opcode ld.volatile" in library.runtime.detail


# ---- devices ------------------------------------------------------------------------------------

UNUSABLE = {
    "no driver": ({"driver_version": 0}, "cudaErrorInsufficientDriver"),
    "a driver of an older CUDA": ({"driver_version": 12090}, "cudaErrorInsufficientDriver"),
    "no device": ({"count": 0}, "cudaErrorNoDevice"),
    "an older GPU than the code": ({"capability": 80}, "cudaErrorNoKernelImageForDevice"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_machines_that_cannot_run_it(
    what: str, library: Library, data: NDArray[np.float32]
) -> None:
    changes, error = UNUSABLE[what]
    changed = {"capability": library.runtime.device.capability, **changes}
    before = data.copy()
    with library.runtime.on(device(changed.pop("capability"), **changed)):
        assert library.line(data, 2, 1) == error
        assert library.launch(BOUNDED, data) == error
        assert library.call("allow_shared", DYNAMIC, 1024) == error
        blocks = ctypes.c_int()
        assert library.call("blocks_of_processor", ctypes.byref(blocks), LINE, 32, 0) == error
        if "NoKernelImage" not in error:
            assert library.call("device_count", ctypes.byref(blocks)) == error
            assert library.call("set_device", 0) == error
            assert library.call("synchronise") == error
        assert library.number("driver_version") == library.runtime.device.driver_version
    np.testing.assert_array_equal(data, before)
    assert library.call("last_error") == error
    assert library.line(data, 2, 1) == "cudaSuccess"


def test_ptx_runs_on_later_gpus(library: Library, data: NDArray[np.float32]) -> None:
    with library.runtime.on(device(120)):
        assert library.line(data, 2, 1) == "cudaSuccess"


def test_another_device_has_other_limits(library: Library, data: NDArray[np.float32]) -> None:
    """And kernels forget what they have asked for on the last one."""
    assert library.call("allow_shared", DYNAMIC, 100 * KB) == "cudaSuccess"
    with library.runtime.on(device(120, multiprocessors=7)):
        assert library.launch(DYNAMIC, data, shared=99 * KB) == "cudaErrorInvalidValue"
        assert library.call("allow_shared", DYNAMIC, 99 * KB) == "cudaSuccess"
        assert library.call("allow_shared", DYNAMIC, 99 * KB + 1) == "cudaErrorInvalidValue"
        assert library.number("attribute", MAJOR, 0) == 12
        assert library.number("attribute", SHARED_OF_BLOCK, 0) == 99 * KB
        assert library.number("attribute", PROCESSORS, 0) == 7
    assert library.launch(DYNAMIC, data, shared=99 * KB) == "cudaErrorInvalidValue"
    assert library.number("attribute", SHARED_OF_BLOCK, 0) == 227 * KB


def test_devices_are_numbered_from_zero(library: Library) -> None:
    assert library.number("device_count") == 1
    assert library.call("set_device", 0) == "cudaSuccess"
    assert library.call("set_device", 1) == "cudaErrorInvalidDevice"
    value = ctypes.c_int()
    assert library.call("attribute", ctypes.byref(value), MAJOR, 1) == "cudaErrorInvalidDevice"
    assert library.call("attribute", ctypes.byref(value), 9999, 0) == "cudaErrorInvalidValue"


@pytest.mark.parametrize(
    ("kernel", "threads", "shared", "blocks"),
    [
        (LINE, 128, 0, 16),  # 2048 threads
        (LINE, 32, 0, 32),  # blocks
        (LINE, 128, 75 * KB, 3),  # 228 KB, of which each block takes one for the system
        (LINE, 128, 76 * KB, 2),
        (STATIC, 128, 71 * KB, 3),
        (STATIC, 128, 72 * KB, 2),
    ],
)
def test_blocks_of_a_multiprocessor(
    kernel: int, threads: int, shared: int, blocks: int, library: Library
) -> None:
    found = library.number("blocks_of_processor", kernel, threads, ctypes.c_size_t(shared))
    assert found == blocks


# ---- errors -------------------------------------------------------------------------------------


def test_the_last_error_is_kept_until_it_is_read(
    library: Library, data: NDArray[np.float32]
) -> None:
    assert library.launch(BOUNDED, data, block=(65, 1, 1)) == "cudaErrorInvalidValue"
    assert library.launch(BOUNDED, data) == "cudaSuccess"
    assert library.call("peek") == library.call("peek") == "cudaErrorInvalidValue"
    assert library.call("last_error") == "cudaErrorInvalidValue"
    assert library.call("last_error") == "cudaSuccess"
    text = library.functions.test_error_string(1).decode()
    assert text.startswith("invalid argument [") and "bounded_kernel" in text


# ---- the list of calls --------------------------------------------------------------------------


def test_launches_are_written_down_with_their_parameters(
    library: Library, data: NDArray[np.float32]
) -> None:
    library.line(data, 2, 1, stream=5)
    library.launch(DYNAMIC, data, (1, 1, 1), (16, 1, 1), shared=128)
    first, second = library.runtime.calls()
    assert "line_kernel" in first.name and first.is_launch and not first.is_captured
    assert (first.grid, first.block, first.shared, first.stream) == ((2, 1, 1), (32, 1, 1), 0, 5)
    pointer, n, line = first.params
    assert int.from_bytes(pointer, "little") == data.ctypes.data
    assert int.from_bytes(n, "little") == 64
    assert len(line) == 24 and list(np.frombuffer(line, np.float32)[[0, 4]]) == [2, 1]
    assert (second.block, second.shared, second.index) == ((16, 1, 1), 128, 1)


def test_what_costs_time_is_written_down(library: Library) -> None:
    address, host, size = ctypes.c_void_p(), np.arange(4, dtype=np.int32), ctypes.c_size_t(16)
    source = ctypes.c_void_p(host.ctypes.data)
    calls: list[tuple[str, Callable[[], str]]] = [
        ("cudaMalloc", lambda: library.call("malloc", ctypes.byref(address), size)),
        ("cudaMemcpyAsync", lambda: library.call("copy", address, source, size)),
        ("cudaMemsetAsync", lambda: library.call("fill", address, 255, ctypes.c_size_t(4))),
        ("cudaDeviceSynchronize", lambda: library.call("synchronise")),
        ("cudaFree", lambda: library.call("free", address)),
    ]  # fmt: skip
    for name, call in calls:
        assert call() == "cudaSuccess"
        assert library.runtime.calls()[-1].name == name
        if name == "cudaMemsetAsync":
            content = np.frombuffer(ctypes.string_at(address.value or 0, 16), np.int32)
            assert list(content) == [-1, 1, 2, 3]
    assert not any(call.is_launch for call in library.runtime.calls())
    assert library.call("free", address) == "cudaErrorInvalidValue"
    with library.runtime.capture():
        for name, call in calls:
            assert call() == "cudaErrorStreamCaptureUnsupported", name


def test_memory_of_the_runtime_is_known_to_the_sanitizer(library: Library) -> None:
    address = ctypes.c_void_p()
    library.call("malloc", ctypes.byref(address), ctypes.c_size_t(128))
    library.call("shift", address, 0)
    assert library.engine.findings() == []
    library.call("exchange", address, 1)  # of which 64 numbers are read
    kinds = [f.kind for f in library.engine.findings()]
    assert "global read out of bounds" in kinds
    library.engine.clear_findings()
    library.call("free", address)
    fresh = ctypes.c_void_p()
    library.call("malloc", ctypes.byref(fresh), ctypes.c_size_t(256))
    library.call("exchange", fresh, 1)
    assert [f.kind for f in library.engine.findings()] == ["reads uninitialised global memory"]
    library.engine.clear_findings()
    library.call("free", fresh)


def test_a_captured_launch_runs_when_it_is_replayed(
    library: Library, data: NDArray[np.float32]
) -> None:
    before = data.copy()
    capturing = ctypes.c_int()
    with library.runtime.capture(stream=3) as graph:
        assert library.line(data, 2, 1, stream=3) == "cudaSuccess"
        np.testing.assert_array_equal(data, before)
        for stream in (3, 4):
            library.call("is_capturing", ctypes.byref(capturing), ctypes.c_uint64(stream))
            assert capturing.value == (stream == 3)
        assert library.line(data, 1, 1, stream=4) == "cudaSuccess"  # on another stream: at once
        np.testing.assert_array_equal(data, before + 1)
        library.line(data, 1, 10, stream=3)
    assert [call.is_captured for call in library.runtime.calls()] == [True, False, True]
    assert len(graph) == 2
    data[:] = before
    for _ in range(2):
        library.runtime.replay(graph)
    np.testing.assert_array_equal(data, 2 * (2 * before + 11) + 11)
    library.call("is_capturing", ctypes.byref(capturing), ctypes.c_uint64(3))
    assert capturing.value == 0


# ---- what nvcc makes of faults ------------------------------------------------------------------


def place_of(fault: str) -> str:
    lines = SOURCE.read_text().split("\n")
    (number,) = (n for n, line in enumerate(lines, 1) if f"// FOUND {fault}" in line)
    return f"{SOURCE.name}:{number}"


def test_a_missing_barrier_is_found_in_the_inlined_source(
    library: Library, data: NDArray[np.float32]
) -> None:
    library.call("exchange", ctypes.c_void_p(data.ctypes.data), 1)
    assert library.engine.findings() == []
    library.call("exchange", ctypes.c_void_p(data.ctypes.data), 0)
    (found,) = library.engine.findings()
    library.engine.clear_findings()
    assert found.kind == "race of a shared read with a write of another warp"
    assert (found.place, found.thread, found.other_thread) == (place_of("race"), 32, 0)


@pytest.mark.parametrize("by", [-1, 33])
def test_an_overrun_is_found_in_the_source(
    by: int, library: Library, data: NDArray[np.float32]
) -> None:
    library.call("shift", ctypes.c_void_p(data.ctypes.data), 32)
    assert library.engine.findings() == []
    library.call("shift", ctypes.c_void_p(data.ctypes.data), by)
    (found,) = library.engine.findings()
    library.engine.clear_findings()
    assert (found.kind, found.place) == ("global write out of bounds", place_of("bounds"))
    assert (found.thread, found.count) == ((0, 1) if by < 0 else (31, 1))


def test_the_fields_of_a_device_are_those_of_the_runtime(library: Library) -> None:
    other = Device(89, 10, 20, 30, 40, 50)
    with library.runtime.on(other):
        assert library.runtime.device == other
    assert library.runtime.device != other
