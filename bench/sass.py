"""SASS, as nvdisasm prints it: kernels, their blocks, and the path through a loop that is taken
when nothing unusual happens."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P[T0-9]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Instruction:
    predicate: str | None
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]


@dataclass
class Block:
    """Instructions that run one after the other, and where it goes on from there."""

    code: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass
class Kernel:
    name: str  # mangled
    blocks: list[Block]

    def opcodes(self) -> Counter[str]:
        """How often each opcode stands in the code, modifiers included."""
        return Counter(i.opcode for block in self.blocks for i in block.code)


def find_tool(name: str) -> Path:
    """nvdisasm and the like: beside nvcc, in PATH or from NVIDIA's wheels."""
    wheels = Path(sysconfig.get_path("purelib")).glob(f"nvidia/cu*/bin/{name}")
    places = [shutil.which(name), f"/usr/local/cuda/bin/{name}", *map(str, wheels)]
    for place in places:
        if place and os.access(place, os.X_OK):
            return Path(place)
    raise SystemExit(f"{name} was not found; it comes with: pip install nvidia-cuda-{name}")


def disassemble(cubin: Path) -> list[Kernel]:
    """The kernels of a cubin."""
    command = [str(_nvdisasm()), "-c", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.M)[1:]
    return [
        Kernel(name, _blocks(body.split("\n")))
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    ]


@cache
def _nvdisasm() -> Path:
    return find_tool("nvdisasm")


def _blocks(lines: Iterable[str]) -> list[Block]:
    blocks, starts, jumps = [Block()], dict[str, int](), dict[int, str | None]()
    for line in lines:
        if label := LABEL.match(line):
            if blocks[-1].code:
                blocks.append(Block())
            starts[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.match(line):
            i = Instruction(*found.groups())
            if i.name == "NOP":
                continue
            blocks[-1].code.append(i)
            if i.name in ("BRA", "EXIT", "RET", "BRX", "JMP"):
                target = TARGET.search(i.operands)
                jumps[len(blocks) - 1] = target[1] if target else None
                blocks.append(Block())
    for number, block in enumerate(blocks):
        if number not in jumps:
            if number + 1 < len(blocks):
                block.successors.append(number + 1)
            continue
        target = jumps[number]
        last = block.code[-1]
        conditional = last.predicate is not None or "P" in last.operands.split("`")[0]
        if conditional and number + 1 < len(blocks):
            block.successors.append(number + 1)
        if target is not None:
            block.successors.append(starts[target])
    return blocks


# ---- loops ----------------------------------------------------------------------------------


def _reached(blocks: list[Block], start: int, within: set[int]) -> set[int]:
    seen, waiting = set[int](), [start]
    while waiting:
        for b in blocks[waiting.pop()].successors:
            if b in within and b not in seen:
                seen.add(b)
                waiting.append(b)
    return seen


def cycle_of(blocks: list[Block], block: int, within: set[int]) -> set[int]:
    """The blocks that `block` reaches and from which it is reached: none if it is in no loop."""
    return {b for b in _reached(blocks, block, within) if block in _reached(blocks, b, within)}


def innermost_loop(kernel: Kernel, needs: Counter[str]) -> tuple[int, set[int]]:
    """Header and blocks of the smallest loop that contains, by opcode's name, all of `needs`."""
    best: tuple[int, set[int]] | None = None
    within = set(range(len(kernel.blocks)))
    while True:
        found = None
        for b in sorted(within):
            loop = cycle_of(kernel.blocks, b, within)
            names = Counter(i.name for x in loop for i in kernel.blocks[x].code)
            if all(names[n] >= count for n, count in needs.items()):
                found = loop
                break
        if found is None:
            break
        outside = {
            s
            for x, block in enumerate(kernel.blocks)
            if x not in found
            for s in block.successors
            if s in found
        }
        entries = outside if best is None else outside & found
        header = min(entries) if entries else min(found)
        best = header, found
        within = found - {header}
    if best is None:
        raise ValueError(f"{kernel.name}: no loop with {dict(needs)}")
    return best


def usual_path(kernel: Kernel, header: int, loop: set[int], wanted: str) -> list[Instruction]:
    """One turn of a loop: the path with most instructions named `wanted`, and of these the
    shortest. Loops inside of it are not entered."""
    inner = loop - {header}
    straight = {b for b in inner if not cycle_of(kernel.blocks, b, inner)} | {header}
    memo: dict[int, tuple[int, int, list[int]] | None] = {}

    def cost(b: int) -> tuple[int, int]:
        code = kernel.blocks[b].code
        return -sum(i.name == wanted for i in code), len(code)

    order: list[int] = []
    seen: set[int] = set()

    def visit(b: int) -> None:
        stack = [(b, iter(kernel.blocks[b].successors))]
        seen.add(b)
        while stack:
            node, successors = stack[-1]
            for s in successors:
                if s in straight and s != header and s not in seen:
                    seen.add(s)
                    stack.append((s, iter(kernel.blocks[s].successors)))
                    break
            else:
                order.append(node)
                stack.pop()

    visit(header)
    for b in order:  # successors first
        copies, length = cost(b)
        options = []
        for s in kernel.blocks[b].successors:
            if s == header:
                options.append((copies, length, [b]))
            elif s in straight and (rest := memo.get(s)) is not None:
                options.append((copies + rest[0], length + rest[1], [b, *rest[2]]))
        memo[b] = min(options, key=lambda o: o[:2]) if options else None
    best = memo[header]
    if best is None:
        raise ValueError(f"{kernel.name}: no way round the loop")
    return [i for b in best[2] for i in kernel.blocks[b].code]
