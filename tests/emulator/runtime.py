"""The fake CUDA runtime, as tests see it: the device's properties and the list of calls."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields

_LOADER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)


@dataclass(frozen=True)
class Device:
    """What the runtime says of its GPU; the fields of `Device` in runtime.cpp, in that order."""

    capability: int = 90  # 90 for 9.0
    multiprocessors: int = 4
    shared_of_block: int = 227 * 1024
    shared_of_processor: int = 228 * 1024
    driver_version: int = 13000  # 0: no driver
    count: int = 1


# Shared memory of a block and of a multiprocessor, in KB.
_SHARED = {75: (64, 64), 80: (163, 164), 86: (99, 100), 89: (99, 100), 90: (227, 228)} | {
    100: (227, 228),
    120: (99, 100),
}


def device(capability: int, **changes: int) -> Device:
    """A GPU of this compute capability."""
    block, processor = _SHARED[capability]
    sizes = {"shared_of_block": block * 1024, "shared_of_processor": processor * 1024}
    return Device(capability, **{**sizes, **changes})


@dataclass(frozen=True)
class Call:
    """Something that would have cost time on a GPU: a launch, or another call of the runtime."""

    index: int
    name: str  # of the kernel (mangled), or of the runtime's function
    is_launch: bool
    is_captured: bool  # written into a graph, not run
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # dynamic shared memory, bytes
    stream: int
    params: tuple[bytes, ...]


class Runtime:
    """The runtime linked into `library`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.emulated_call_name.restype = ctypes.c_char_p
        library.emulated_call_shape.restype = ctypes.c_uint64
        library.emulated_call_param.restype = ctypes.c_void_p
        library.emulated_num_calls.restype = ctypes.c_int64
        library.emulated_num_kernels.restype = ctypes.c_int64
        library.emulated_detail.restype = ctypes.c_char_p
        self._loader: object = None  # ctypes does not keep it alive
        self.is_capturing = False

    # ---- the device -----------------------------------------------------------------------------

    @property
    def device(self) -> Device:
        values = (ctypes.c_int32 * len(fields(Device)))()
        self._library.emulated_device_get(values)
        return Device(*values)

    def set_device(self, device: Device) -> None:
        """Another GPU from now on. Kernels forget the shared memory that they asked for."""
        values = astuple(device)
        self._library.emulated_device_set((ctypes.c_int32 * len(values))(*values))

    @contextmanager
    def on(self, device: Device) -> Iterator[None]:
        """Another GPU for a while."""
        before = self.device
        self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

    # ---- kernels --------------------------------------------------------------------------------

    def set_loader(self, load: object) -> None:
        """`load(mangled name: bytes) -> int` gives the engine a kernel that is about to run."""
        self._loader = _LOADER(load)
        self._library.emulated_set_loader(self._loader)

    @property
    def num_kernels(self) -> int:
        """How many kernels the host code knows."""
        return int(self._library.emulated_num_kernels())

    @property
    def detail(self) -> str:
        """What the emulation knows about the last failed call, beyond the error's name."""
        return str(self._library.emulated_detail().decode())

    # ---- the list of calls ----------------------------------------------------------------------

    def clear_calls(self) -> None:
        self._library.emulated_clear_calls()

    def calls(self) -> list[Call]:
        """All calls since `clear_calls`, oldest first."""
        return [self._call(i) for i in range(self._library.emulated_num_calls())]

    def _call(self, i: int) -> Call:
        index, shape, size = ctypes.c_int64(i), (ctypes.c_uint32 * 10)(), ctypes.c_int64()
        stream = self._library.emulated_call_shape(index, shape)
        params = []
        for p in range(shape[7]):
            at = self._library.emulated_call_param(index, p, ctypes.byref(size))
            params.append(ctypes.string_at(at, size.value))
        return Call(
            index=i,
            name=self._library.emulated_call_name(index).decode(),
            is_launch=bool(shape[8]),
            is_captured=bool(shape[9]),
            grid=(shape[0], shape[1], shape[2]),
            block=(shape[3], shape[4], shape[5]),
            shared=shape[6],
            stream=stream,
            params=tuple(params),
        )

    def replay(self, calls: Sequence[Call]) -> None:
        """Run launches again with the parameters that they were given, as a CUDA graph does."""
        for call in calls:
            if self._library.emulated_replay(ctypes.c_int64(call.index)):
                raise RuntimeError(f"replay of {call.name}: {self.detail}")

    @contextmanager
    def capture(self, stream: int = 0) -> Iterator[list[Call]]:
        """Launches inside of the block on `stream` are not run, but end up in the list given."""
        captured: list[Call] = []
        first = self._library.emulated_num_calls()
        self._library.emulated_capture(1, ctypes.c_uint64(stream))
        self.is_capturing = True
        try:
            yield captured
        finally:
            self.is_capturing = False
            self._library.emulated_capture(0, ctypes.c_uint64(0))
        calls = [self._call(i) for i in range(first, self._library.emulated_num_calls())]
        captured += [call for call in calls if call.is_captured]
