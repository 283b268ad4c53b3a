"""The engine, from Python: kernels in, findings and counters out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .lower import lower


class _Finding(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char_p),
        ("kernel", ctypes.c_char_p),
        ("file", ctypes.c_char_p),
        ("line", ctypes.c_int),
        ("ptx_line", ctypes.c_int),
        ("block", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("other_thread", ctypes.c_int),
        ("address", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
    ]


class Counters(ctypes.Structure):
    """What kernels did; see engine.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "blocks", "warp_instructions", "lane_instructions", "load_sectors", "store_sectors",
            "wavefronts", "least_wavefronts", "mma", "barriers",
        )
    ]  # fmt: skip

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name, *_ in self._fields_}


@dataclass(frozen=True)
class Finding:
    """Something that a GPU would have done wrong without telling."""

    kind: str
    kernel: str
    place: str  # file:line of the source
    ptx_line: int
    block: int
    thread: int
    other_thread: int
    address: int
    count: int

    def __str__(self) -> str:
        other = f", and thread {self.other_thread}" if self.other_thread >= 0 else ""
        return (
            f"{self.kind}: {self.place} (PTX line {self.ptx_line} of {self.kernel}), block "
            f"{self.block}, thread {self.thread}{other}, address {self.address:#x}, "
            f"{self.count} times"
        )


class SanitizerError(AssertionError):
    """The sanitizer found something."""


class Engine:
    """The engine in a shared library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.emu_error.restype = ctypes.c_char_p
        library.emu_opcodes.restype = ctypes.c_char_p
        library.emu_finding.restype = _Finding
        library.emu_num_findings.restype = ctypes.c_int64
        library.emu_counters.restype = Counters
        self._known: dict[str, str] = {}

    # ---- kernels --------------------------------------------------------------------------------

    def know(self, ptx: str) -> list[str]:
        """Lowers the kernels of a PTX module; they are loaded when they run first. Their names."""
        kernels = lower(ptx)
        self._known |= kernels
        return list(kernels)

    def load(self, name: str) -> None:
        """Gives the engine a kernel that is known. Raises ValueError if it is refused."""
        if self._library.emu_load(self._known[name].encode()):
            raise ValueError(f"{name}: {self._library.emu_error().decode()}")

    def load_known(self, name: bytes) -> int:
        """For the runtime: 0 if the kernel could be loaded."""
        return (
            -1
            if name.decode() not in self._known
            else self._library.emu_load(self._known[name.decode()].encode())
        )

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        params: Sequence[bytes],
        shared: int = 0,
    ) -> None:
        """Runs a loaded kernel. Raises RuntimeError if it does not come to an end."""
        buffers = [ctypes.create_string_buffer(p, len(p)) for p in params]
        pointers = (ctypes.c_void_p * len(buffers))(*(ctypes.addressof(b) for b in buffers))
        sizes = [(ctypes.c_uint * 3)(*size, *(1,) * (3 - len(size))) for size in (grid, block)]
        if self._library.emu_launch(name.encode(), *sizes, ctypes.c_uint(shared), pointers):
            raise RuntimeError(self._library.emu_error().decode())

    def opcodes(self) -> list[str]:
        """Every opcode there is, as `lower` spells it."""
        return str(self._library.emu_opcodes().decode()).split()

    # ---- memory ---------------------------------------------------------------------------------

    def register(self, address: int, size: int, initialised: bool) -> None:
        """Kernels may use this memory."""
        self._library.emu_memory_register(
            ctypes.c_uint64(address), ctypes.c_uint64(size), int(initialised)
        )

    def unregister(self, address: int) -> None:
        self._library.emu_memory_unregister(ctypes.c_uint64(address))

    @contextmanager
    def calling(
        self, inputs: Sequence[tuple[int, int]], outputs: Sequence[tuple[int, int]]
    ) -> Iterator[None]:
        """Memory (address, bytes) for one call. Raises SanitizerError for what was found in it."""
        for ranges, initialised in ((outputs, False), (inputs, True)):
            for address, size in ranges:
                self.register(address, size, initialised)
        try:
            yield
        finally:
            for address, size in (*inputs, *outputs):
                if size:
                    self.unregister(address)
            found = self.findings()
            self.clear_findings()
        if found:
            raise SanitizerError("\n".join(map(str, found)))

    # ---- results --------------------------------------------------------------------------------

    def set_checks(self, level: int) -> None:
        self._library.emu_set_checks(level)

    def findings(self) -> list[Finding]:
        found = []
        for i in range(self._library.emu_num_findings()):
            f = self._library.emu_finding(ctypes.c_int64(i))
            place = f"{Path(f.file.decode()).name}:{f.line}" if f.file else "?"
            found.append(
                Finding(
                    f.kind.decode(),
                    f.kernel.decode(),
                    place,
                    f.ptx_line,
                    f.block,
                    f.thread,
                    f.other_thread,
                    f.address,
                    f.count,
                )
            )
        return found

    def clear_findings(self) -> None:
        self._library.emu_clear_findings()

    def counters(self) -> Counters:
        counters: Counters = self._library.emu_counters()
        return counters

    def clear_counters(self) -> None:
        self._library.emu_clear_counters()

    def line_counts(self, name: str) -> list[int]:
        """Warp instructions by line of the PTX."""
        size = self._library.emu_line_counts(name.encode(), None, 0)
        counts = (ctypes.c_uint64 * size)()
        self._library.emu_line_counts(name.encode(), counts, size)
        return list(counts)
