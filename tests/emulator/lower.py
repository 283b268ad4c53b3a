"""PTX, as nvcc writes it, into what the engine loads: one line of text for each instruction.

Only what is understood passes: an opcode that the engine does not have, or a modifier that is not
part of a known name, is refused when the kernel is loaded, and everything else here.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

LANES = 32
# Bytes of a lane; a predicate is one mask of 32 bits for all lanes.
WIDTHS = {"b8": 1, "b16": 2, "f16": 2, "u16": 2, "s16": 2}
WIDTHS |= dict.fromkeys(("b32", "u32", "s32", "f32"), 4)
WIDTHS |= dict.fromkeys(("b64", "u64", "s64", "f64"), 8)
PREDICATE = 0
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%lanemask_\w+|%warpid|%clock\w*")
KNOWN_SPECIALS = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid")


class PtxError(ValueError):
    """PTX that is not understood; says where."""


@dataclass
class Statement:
    text: str
    ptx_line: int
    file: int
    line: int


@dataclass
class Kernel:
    """One entry of a module."""

    name: str
    params: list[tuple[str, int, int]] = field(default_factory=list)  # name, bytes, alignment
    max_threads: int = 0
    body: list[Statement] = field(default_factory=list)


@dataclass
class Module:
    kernels: dict[str, Kernel]
    files: dict[int, str]
    shared: dict[str, int]  # offsets of variables in shared memory
    static_shared: int  # bytes


def parse(text: str) -> Module:
    """The kernels of a PTX module."""
    found = re.findall(r'^\s*\.file\s+(\d+)\s+"(.*?)"', text, re.M)
    files = {int(number): path for number, path in found}
    shared, static_shared = _shared_variables(text)
    kernels = {}
    pattern = re.compile(r"\.entry\s+(\S+?)\s*\((.*?)\)(.*?)^\{(.*?)^\}", re.S | re.M)
    for entry in pattern.finditer(text):
        name, params, directives, body = entry.groups()
        kernel = Kernel(name, _params(params))
        if bounds := re.search(r"\.maxntid\s+(\d+)(?:,\s*(\d+),\s*(\d+))?", directives):
            sizes = [int(n) for n in bounds.groups() if n]
            kernel.max_threads = sizes[0] * (sizes[1] if len(sizes) > 1 else 1)
            kernel.max_threads *= sizes[2] if len(sizes) > 2 else 1
        first_line = text.count("\n", 0, entry.start(4)) + 1
        kernel.body = _statements(body, first_line)
        kernels[name] = kernel
    if not kernels:
        raise PtxError("no kernel in this PTX")
    return Module(kernels, files, shared, static_shared)


def _shared_variables(text: str) -> tuple[dict[str, int], int]:
    """Static ones first, then the dynamic one, where static memory ends."""
    offsets: dict[str, int] = {}
    end, dynamic = 0, []
    pattern = (
        r"^\s*(\.extern\s+|\.visible\s+|\.weak\s+)?"
        r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]"
    )
    for linkage, align, name, size in re.findall(pattern, text, re.M):
        if not size:
            dynamic.append((name, int(align)))
            continue
        if linkage.startswith(".extern"):
            raise PtxError(f"shared variable {name}: external with a size")
        offsets[name] = -(-end // int(align)) * int(align)
        end = offsets[name] + int(size)
    for name, align in dynamic:
        end = -(-end // align) * align
        offsets[name] = end
    return offsets, end


def _params(text: str) -> list[tuple[str, int, int]]:
    params = []
    for param in filter(None, (part.strip() for part in text.split(","))):
        pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?"
        match = re.fullmatch(pattern, param)
        if not match:
            raise PtxError(f"parameter {param!r}")
        align, kind, name, count = match.groups()
        width = WIDTHS.get("b8" if kind in ("b8", "u8", "s8") else kind)
        if width is None:
            raise PtxError(f"parameter {param!r}: type")
        params.append((name, width * int(count or 1), int(align or width)))
    return params


def _statements(body: str, first_line: int) -> list[Statement]:
    """Statements with the place they came from; labels are statements that end in a colon."""
    statements = []
    file = line = 0
    pending, pending_line = "", 0
    for number, raw in enumerate(body.split("\n"), first_line):
        code = raw.split("//")[0].strip()
        if location := re.match(r"\.loc\s+(\d+)\s+(\d+)", code):
            # Of inlined code the innermost place, which is the one that comes first.
            file, line = int(location[1]), int(location[2])
            continue
        while code:
            if not pending:
                # Braces of a scope, not of a vector.
                code = re.sub(r"^[{}]\s*", "", code)
                if label := re.match(r"([\w$]+):\s*", code):
                    statements.append(Statement(label[1] + ":", number, file, line))
                    code = code[label.end() :]
                    continue
                if not code:
                    break
                pending_line = number
            end = code.find(";")
            if end < 0:
                pending += code + " "
                break
            statements.append(
                Statement((pending + code[:end]).strip(), pending_line or number, file, line)
            )
            pending, code = "", code[end + 1 :].strip()
    if pending.strip():
        raise PtxError(f"line {pending_line}: statement without an end: {pending!r}")
    return statements


class Lowering:
    """Turns one kernel into the engine's text."""

    def __init__(self, module: Module, kernel: Kernel) -> None:
        self._module, self._kernel = module, kernel
        self._registers: dict[str, tuple[int, int]] = {}  # name -> offset, width
        self._ranges: dict[str, int] = {}  # "%rd" -> width
        self._constants: dict[tuple[int, int], int] = {}  # width, value -> offset
        self._specials: dict[str, int] = {}
        self._bytes = 0
        self._lines: list[str] = []
        self._param_offsets: dict[str, int] = {}
        end = 0
        for name, size, _ in kernel.params:
            end = -(-end // 16) * 16  # as the engine lays them out
            self._param_offsets[name] = end
            end += size

    def text(self) -> str:
        kernel = self._kernel
        labels: dict[str, int] = {}
        for statement in kernel.body:
            if statement.text.endswith(":"):
                if statement.text[:-1] in labels:
                    raise self._error(statement, "label seen twice")
                labels[statement.text[:-1]] = len(self._lines)
            elif statement.text.startswith("."):
                self._directive(statement)
            else:
                self._instruction(statement)
        code = []
        for line in self._lines:
            words = line.split(" ")
            if words[4] != "-" and words[4] not in labels:
                raise PtxError(f"{kernel.name}: unknown label {words[4]}")
            words[4] = str(labels.get(words[4], -1))
            code.append("do " + " ".join(words))
        static = self._module.static_shared
        head = [f"kernel {kernel.name} {self._bytes} {static} {kernel.max_threads}"]
        head += [f"param {size}" for _, size, _ in kernel.params]
        head += [f"file {number} {path}" for number, path in self._module.files.items()]
        head += [
            f"constant {offset} {width} {value}"
            for (width, value), offset in self._constants.items()
        ]
        head += [f"special {offset} {name[1:]}" for name, offset in self._specials.items()]
        return "\n".join(head + code) + "\n"

    def _error(self, statement: Statement, why: str) -> PtxError:
        return PtxError(
            f"{self._kernel.name}, PTX line {statement.ptx_line}: {why}: {statement.text!r}"
        )

    def _directive(self, statement: Statement) -> None:
        words = statement.text.split(None, 2)
        if words[0] == ".pragma":
            return
        if words[0] != ".reg":
            raise self._error(statement, "unknown directive")
        kind = words[1][1:]
        width = PREDICATE if kind == "pred" else WIDTHS.get(kind)
        if width is None or width == 1:
            raise self._error(statement, "unknown type of register")
        for name in words[2].split(","):
            if ranged := re.fullmatch(r"(%\w+)<\d+>", name.strip()):
                self._ranges[ranged[1]] = width
            else:
                # Assembler written by hand may use a name in several scopes: they never overlap.
                self._registers.pop(name.strip(), None)
                self._registers[name.strip()] = (self._allocate(width), width)

    def _allocate(self, width: int) -> int:
        offset = self._bytes
        self._bytes += 8 if width == PREDICATE else width * LANES
        return offset

    def _register(self, statement: Statement, name: str) -> tuple[int, int]:
        if name not in self._registers:
            match = re.fullmatch(r"(%[a-z]+)\d+", name)
            if not match or match[1] not in self._ranges:
                raise self._error(statement, f"unknown register {name}")
            width = self._ranges[match[1]]
            self._registers[name] = (self._allocate(width), width)
        return self._registers[name]

    def _constant(self, width: int, value: int) -> int:
        key = (width, value & ((1 << (8 * width)) - 1) if width else int(bool(value)))
        if key not in self._constants:
            self._constants[key] = self._allocate(width)
        return self._constants[key]

    def _operand(self, statement: Statement, text: str, width: int) -> int:
        """The register that holds a source operand of `width` bytes."""
        if SPECIAL.fullmatch(text):
            if not KNOWN_SPECIALS.fullmatch(text):
                raise self._error(statement, f"unknown special register {text}")
            if text not in self._specials:
                self._specials[text] = self._allocate(4)
            return self._specials[text]
        if text.startswith("%") or text in self._registers:
            offset, found = self._register(statement, text)
            if found != width:
                raise self._error(statement, f"{text} has {found} bytes, not {width}")
            return offset
        if hexfloat := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return self._constant(width, int(hexfloat[1], 16))
        if hexdouble := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            return self._constant(width, int(hexdouble[1], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return self._constant(width, int(text.rstrip("U"), 0))
        if text in self._module.shared:
            return self._constant(width, self._module.shared[text])
        if text in self._param_offsets:
            return self._constant(width, self._param_offsets[text])
        raise self._error(statement, f"unknown operand {text}")

    def _destination(self, statement: Statement, text: str, width: int) -> int:
        if text == "_":
            return self._allocate(width)
        offset, found = self._register(statement, text)
        if found != width:
            raise self._error(statement, f"{text} has {found} bytes, not {width}")
        return offset

    def _address(self, statement: Statement, text: str) -> tuple[int, int, int]:
        """Register, bytes of the register, and what is added."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if not match:
            raise self._error(statement, f"address {text}")
        base, added = match[1], int(match[2] or 0)
        if base.startswith("%") or base in self._registers:
            offset, width = self._register(statement, base)
            return offset, width, added
        return self._operand(statement, base, 8), 8, added

    def _instruction(self, statement: Statement) -> None:
        match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.]+)\s*(.*)", statement.text, re.S)
        if not match:
            raise self._error(statement, "not an instruction")
        negated, predicate, opcode, rest = match.groups()
        operands = _split(rest)
        where = self._register(statement, predicate)[0] if predicate else -1
        immediate, target = 0, ""
        destinations: list[int] = []
        sources: list[int] = []
        parts = opcode.split(".")
        kind = parts[0]
        last = parts[-1]

        if opcode in ("bra", "bra.uni"):
            target = operands[0]
        elif opcode in ("ret", "exit", "cp.async.commit_group", "cp.async.wait_all"):
            pass
        elif opcode == "cp.async.wait_group":
            immediate = int(operands[0])
        elif opcode in ("bar.sync", "barrier.sync", "bar.warp.sync"):
            if len(operands) != 1:
                raise self._error(statement, "a barrier with a count")
            sources = [self._operand(statement, operands[0], 4)]
        elif kind in ("ld", "st", "ldu"):
            opcode, destinations, sources, immediate = self._memory(statement, parts, operands)
        elif kind == "ldmatrix":
            base, width, immediate = self._address(statement, operands[1])
            destinations = [self._destination(statement, r, 4) for r in _vector(operands[0])]
            sources = [base]
            opcode += f".a{width}"
        elif opcode == "cp.async.cg.shared.global":
            to, width, added = self._address(statement, operands[0])
            source, source_width, source_added = self._address(statement, operands[1])
            if operands[2] != "16" or added or source_added or source_width != 8:
                raise self._error(statement, "unknown form")
            size = operands[3] if len(operands) > 3 else "16"
            sources = [to, source, self._operand(statement, size, 4)]
            opcode += f".16.a{width}"
        elif kind == "mma":
            destinations = [self._destination(statement, r, 4) for r in _vector(operands[0])]
            sources = [
                self._operand(statement, r, 4) for group in operands[1:] for r in _vector(group)
            ]
        elif kind == "shfl":
            names = operands[0].split("|")
            destinations = [self._destination(statement, names[0], 4)]
            if len(names) > 1:
                destinations.append(self._destination(statement, names[1], PREDICATE))
            sources = [self._operand(statement, x, 4) for x in operands[1:]]
        elif kind == "vote":
            destinations = [
                self._destination(statement, operands[0], 4 if last == "b32" else PREDICATE)
            ]
            sources = [
                self._operand(statement, operands[1], PREDICATE),
                self._operand(statement, operands[2], 4),
            ]
        elif kind == "mov" and operands[1].startswith("{"):
            whole = WIDTHS[last]
            opcode = f"pack.{last}"
            destinations = [self._destination(statement, operands[0], whole)]
            sources = [self._operand(statement, x, whole // 2) for x in _vector(operands[1])]
        elif kind == "mov" and operands[0].startswith("{"):
            whole = WIDTHS[last]
            opcode = f"unpack.{last}"
            destinations = [
                self._destination(statement, x, whole // 2) for x in _vector(operands[0])
            ]
            sources = [self._operand(statement, operands[1], whole)]
        else:
            destinations, sources = self._plain(statement, parts, operands)
        self._emit(
            statement, opcode, destinations, sources, where, bool(negated), immediate, target
        )

    def _emit(
        self,
        statement: Statement,
        opcode: str,
        destinations: list[int],
        sources: list[int],
        predicate: int = -1,
        negated: bool = False,
        immediate: int = 0,
        label: str = "",
    ) -> None:
        fields = [opcode, predicate, int(negated), immediate, label or "-", statement.file]
        fields += [statement.line, statement.ptx_line, len(destinations), *destinations]
        fields += [len(sources), *sources]
        self._lines.append(" ".join(map(str, fields)))

    def _plain(
        self, statement: Statement, parts: list[str], operands: list[str]
    ) -> tuple[list[int], list[int]]:
        """Element by element: one destination, all operands of the type's width."""
        kind, last = parts[0], parts[-1]
        if last == "pred":
            width = source = PREDICATE
        elif last in WIDTHS or last in ("bf16", "bf16x2"):
            width = source = WIDTHS.get(last, 2 if last == "bf16" else 4)
        else:
            raise self._error(statement, "unknown type")
        if kind == "setp":
            width = PREDICATE
        elif kind == "cvt":
            target = parts[-2]
            width = {"bf16": 2, "f16x2": 4, "bf16x2": 4}.get(target) or WIDTHS.get(target, -1)
        elif parts[1:2] == ["wide"]:
            width = 2 * source
        widths = [source] * (len(operands) - 1)
        if kind in ("shl", "shr"):
            widths[1] = 4
        elif kind == "selp":
            widths[2] = PREDICATE
        elif kind == "mad" and parts[1] == "wide":
            widths[2] = 2 * source
        elif kind == "redux":
            widths = [4, 4]
        destinations = [self._destination(statement, operands[0], width)]
        if kind == "cvt" and source == 4 and self._width_of(statement, operands[1]) == 8:
            # The low half of a wider register, which PTX lets a conversion read.
            half = self._allocate(4)
            whole = self._operand(statement, operands[1], 8)
            self._emit(statement, "cvt.u32.u64", [half], [whole])
            return destinations, [half]
        sources = [
            self._operand(statement, x, w) for x, w in zip(operands[1:], widths, strict=True)
        ]
        return destinations, sources

    def _width_of(self, statement: Statement, text: str) -> int | None:
        return self._register(statement, text)[1] if text.startswith("%") else None

    def _memory(
        self, statement: Statement, parts: list[str], operands: list[str]
    ) -> tuple[str, list[int], list[int], int]:
        loads = parts[0] == "ld"
        values, address = operands if loads else operands[::-1]
        names = _vector(values) if values.startswith("{") else [values]
        base, base_width, added = self._address(statement, address)
        width = WIDTHS.get(parts[-1], 1)
        registers = []
        for name in names:
            if name.startswith("%") or name in self._registers:
                registers.append(self._register(statement, name))
            else:
                registers.append((self._operand(statement, name, max(width, 2)), max(width, 2)))
        register_width = registers[0][1]
        opcode = ".".join(parts) + f".{register_width}"
        if "shared" in parts:
            opcode += f".a{base_width}"
        elif base_width != 8:
            raise self._error(statement, "address")
        offsets = [offset for offset, _ in registers]
        return (opcode, offsets, [base], added) if loads else (opcode, [], [*offsets, base], added)


def _split(text: str) -> list[str]:
    """Operands, split at the commas that are not inside of braces or brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]


def _vector(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{} ").split(",")]


def lower(text: str) -> dict[str, str]:
    """The engine's text for every kernel of a PTX module, by the kernel's name."""
    module = parse(text)
    return {name: Lowering(module, kernel).text() for name, kernel in module.kernels.items()}


def float_bits(x: float) -> str:
    """A float32 number as PTX writes it."""
    return f"0f{struct.unpack('>I', struct.pack('>f', x))[0]:08X}"
