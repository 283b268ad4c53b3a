"""PTX, as nvcc writes it, into what the engine loads: one line of text for each instruction.

Only what is understood passes. An opcode that the engine does not have, a modifier that is not part
of a known name, and a wrong number of operands are refused when the kernel is loaded; everything
else here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

LANES = 32
# Bytes of a lane; a predicate is one mask of 32 bits for all lanes. A register of 64 bits may hold
# an address: two more bytes of each lane say into which buffer.
WIDTHS = {"b8": 1, "b16": 2, "f16": 2, "u16": 2, "s16": 2}
WIDTHS |= dict.fromkeys(("b32", "u32", "s32", "f32"), 4)
WIDTHS |= dict.fromkeys(("b64", "u64", "s64", "f64"), 8)
PREDICATE = 0
OPERAND_WIDTHS = {**WIDTHS, "pred": PREDICATE, "bf16": 2, "bf16x2": 4, "f16x2": 4}
MEMORY_WIDTHS = {**WIDTHS, "u8": 1, "s8": 1}
REGISTER_BYTES = {PREDICATE: 8, 1: LANES, 2: 2 * LANES, 4: 4 * LANES, 8: (8 + 2) * LANES}
SPECIALS = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid")
# What stands beside the kernels; of these, the word before ".entry" may be left.
MODULE_DIRECTIVES = re.compile(r"\.(version|target|file)\s.*|\.address_size\s+64|\.visible|\.weak")
KERNEL_DIRECTIVES = re.compile(r"\.(maxntid|minnctapersm)\s+\d+(?:,\s*\d+)*")
SHARED_VARIABLE = re.compile(
    r"(\.extern\s+|\.visible\s+|\.weak\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\];?"
)


class PtxError(ValueError):
    """PTX that is not understood; says where."""


@dataclass
class Statement:
    text: str
    ptx_line: int
    file: int
    line: int


@dataclass
class SharedVariable:
    name: str
    alignment: int
    size: int | None  # None: what the launch asks for


@dataclass
class Kernel:
    """One entry of a module."""

    name: str
    params: list[tuple[str, int]] = field(default_factory=list)  # name, bytes
    max_threads: int = 0
    body: list[Statement] = field(default_factory=list)


@dataclass
class Module:
    kernels: dict[str, Kernel]
    files: dict[int, str]
    shared: list[SharedVariable]


def parse(text: str) -> Module:
    """The kernels of a PTX module."""
    found = re.findall(r'^\s*\.file\s+(\d+)\s+"(.*?)"', text, re.M)
    files = {int(number): path for number, path in found}
    kernels: dict[str, Kernel] = {}
    rest, end = "", 0  # what is not a kernel, with its lines where they were
    pattern = re.compile(r"\.entry\s+(\S+?)\s*\((.*?)\)(.*?)^\{(.*?)^\}", re.S | re.M)
    for entry in pattern.finditer(text):
        name, params, directives, body = entry.groups()
        line = text.count("\n", 0, entry.start()) + 1
        kernel = Kernel(name, _params(params, line), _max_threads(directives, line))
        kernel.body = _statements(body, text.count("\n", 0, entry.start(4)) + 1)
        kernels[name] = kernel
        rest += text[end : entry.start()] + "\n" * entry[0].count("\n")
        end = entry.end()
    if not kernels:
        raise PtxError("no kernel in this PTX")

    rest = re.sub(r"\.section\s.*?^\s*\}", _line_ends, rest + text[end:], flags=re.S | re.M)
    return Module(kernels, files, _module_variables(rest))


def _line_ends(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


def _module_variables(text: str) -> list[SharedVariable]:
    """Variables in shared memory, of a module whose kernels are taken out."""
    variables = []
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.split("//")[0].strip()
        if variable := SHARED_VARIABLE.fullmatch(line):
            variables.append(_shared_variable(variable, number))
        elif line and not MODULE_DIRECTIVES.fullmatch(line):
            raise PtxError(f"PTX line {number}: unknown directive: {line!r}")
    return variables


def _shared_variable(match: re.Match[str], line: int) -> SharedVariable:
    linkage, alignment, name, size = match.groups()
    if (linkage or "").startswith(".extern") == bool(size):
        raise PtxError(f"PTX line {line}: external with a size, or not external without: {name}")
    return SharedVariable(name, int(alignment), int(size) if size else None)


def _max_threads(directives: str, line: int) -> int:
    threads = 0
    for directive in filter(None, map(str.strip, directives.split("\n"))):
        match = KERNEL_DIRECTIVES.fullmatch(directive)
        if not match:
            raise PtxError(f"PTX line {line}: unknown directive of a kernel: {directive!r}")
        if match[1] == "maxntid":
            threads = math.prod(map(int, re.findall(r"\d+", directive)))
    return threads


def _params(text: str, line: int) -> list[tuple[str, int]]:
    params = []
    for param in filter(None, (part.strip() for part in text.split(","))):
        pattern = (
            r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.global\s+)?\.align\s+\d+\s+)?"
            r"(\w+)(?:\[(\d+)\])?"
        )
        match = re.fullmatch(pattern, param)
        kind, name, count = match.groups() if match else ("", "", "")
        width = WIDTHS.get("b8" if kind in ("u8", "s8") else kind)
        if width is None:
            raise PtxError(f"PTX line {line}: unknown kind of parameter: {param!r}")
        params.append((name, width * int(count or 1)))
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
                if code[0] in "{}":  # of a scope, not of a vector
                    statements.append(Statement(code[0], number, file, line))
                    code = code[1:].strip()
                    continue
                if label := re.match(r"([\w$]+):\s*", code):
                    statements.append(Statement(label[1] + ":", number, file, line))
                    code = code[label.end() :]
                    continue
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
        raise PtxError(f"PTX line {pending_line}: statement without an end: {pending!r}")
    return statements


@dataclass
class Scope:
    """Registers declared between two braces."""

    names: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, width
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)  # "%rd": width, how many


class Lowering:
    """Turns one kernel into the engine's text."""

    def __init__(self, module: Module, kernel: Kernel) -> None:
        self._module, self._kernel = module, kernel
        self._scopes = [Scope()]
        self._constants: dict[tuple[int, int], int] = {}  # width, value -> offset
        self._specials: dict[str, int] = {}
        self._bytes = 0
        self._lines: list[str] = []
        self._params: dict[str, tuple[int, int]] = {}  # offset, bytes
        end = 0
        for name, size in kernel.params:
            end = -(-end // 16) * 16  # as the engine lays them out
            self._params[name] = end, size
            end += size
        self._shared: dict[str, int] = {}  # offsets
        self._static_shared = 0  # bytes
        self._place_shared_variables()

    def _place_shared_variables(self) -> None:
        """Those that the kernel names. Static ones first, then what the launch asks for."""
        body = self._kernel.body
        words = {word for statement in body for word in re.findall(r"\w+", statement.text)}
        variables = [v for v in self._module.shared if v.name in words]
        for statement in body:
            if match := SHARED_VARIABLE.fullmatch(statement.text):
                variables.append(_shared_variable(match, statement.ptx_line))
        for variable in sorted(variables, key=lambda v: v.size is None):
            start = -(-self._static_shared // variable.alignment) * variable.alignment
            self._shared[variable.name] = start
            self._static_shared = start + (variable.size or 0)

    def text(self) -> str:
        kernel = self._kernel
        labels: dict[str, int] = {}
        for statement in kernel.body:
            if statement.text == "{":
                self._scopes.append(Scope())
            elif statement.text == "}":
                self._scopes.pop()
            elif statement.text.endswith(":"):
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
                raise PtxError(f"{kernel.name}, PTX line {words[7]}: unknown label {words[4]}")
            words[4] = str(labels.get(words[4], -1))
            code.append("do " + " ".join(words))
        head = [f"kernel {kernel.name} {self._bytes} {self._static_shared} {kernel.max_threads}"]
        head += [f"param {size}" for _, size in kernel.params]
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
        if words[0] == ".pragma" or SHARED_VARIABLE.fullmatch(statement.text):
            return
        if words[0] != ".reg":
            raise self._error(statement, "unknown directive")
        kind = words[1][1:]
        width = PREDICATE if kind == "pred" else WIDTHS.get(kind)
        if width is None or width == 1:
            raise self._error(statement, "unknown type of register")
        for name in map(str.strip, words[2].split(",")):
            if ranged := re.fullmatch(r"(%\w+)<(\d+)>", name):
                self._scopes[-1].ranges[ranged[1]] = width, int(ranged[2])
            elif re.fullmatch(r"[%\w$]+", name):
                self._scopes[-1].names[name] = self._allocate(width), width
            else:
                raise self._error(statement, f"unknown form of register {name}")

    def _allocate(self, width: int) -> int:
        offset = self._bytes
        self._bytes += REGISTER_BYTES[width]
        return offset

    def _find_register(self, name: str) -> tuple[int, int] | None:
        """Offset and width; of the innermost scope that has it."""
        for scope in reversed(self._scopes):
            if name in scope.names:
                return scope.names[name]
            if scope.ranges and (numbered := re.fullmatch(r"(%[a-z]+)(\d+)", name)):
                width, count = scope.ranges.get(numbered[1], (0, 0))
                if int(numbered[2]) < count:
                    scope.names[name] = self._allocate(width), width
                    return scope.names[name]
        return None

    def _register(
        self, statement: Statement, name: str, width: int | None = None
    ) -> tuple[int, int]:
        """Offset and width of a register, which has to have `width` bytes."""
        found = self._find_register(name)
        if not found:
            raise self._error(statement, f"unknown register {name}")
        if width is not None:
            self._check_width(statement, name, found[1], width)
        return found

    def _check_width(self, statement: Statement, name: str, found: int, width: int) -> None:
        if found != width:
            raise self._error(statement, f"{name} has {found} bytes, not {width}")

    def _constant(self, width: int, value: int) -> int:
        key = (width, value & ((1 << (8 * width)) - 1) if width else int(bool(value)))
        if key not in self._constants:
            self._constants[key] = self._allocate(width)
        return self._constants[key]

    def _operand(self, statement: Statement, text: str, width: int) -> int:
        """The register that holds a source operand of `width` bytes."""
        if found := self._find_register(text):
            self._check_width(statement, text, found[1], width)
            return found[0]
        if SPECIALS.fullmatch(text):
            self._check_width(statement, text, 4, width)
            if text not in self._specials:
                self._specials[text] = self._allocate(4)
            return self._specials[text]
        if text.startswith("%"):
            raise self._error(statement, f"unknown register {text}")
        if number := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
            if width != (4 if number[1] else 8):
                raise self._error(statement, f"{text} does not have {width} bytes")
            return self._constant(width, int(number[1] or number[2], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0|[1-9]\d*)U?", text):
            value = int(text.rstrip("U"), 0)
            if width and not -(1 << 8 * width - 1) <= value < 1 << 8 * width:
                raise self._error(statement, f"{text} does not fit into {width} bytes")
            return self._constant(width, value)
        if text in self._shared and width in (4, 8):
            return self._constant(width, self._shared[text])
        if text in self._params and width == 8:
            return self._constant(width, self._params[text][0])
        raise self._error(statement, f"unknown operand {text}")

    def _destination(self, statement: Statement, text: str, width: int) -> int:
        return self._allocate(width) if text == "_" else self._register(statement, text, width)[0]

    def _address(self, statement: Statement, text: str, space: str) -> tuple[int, int, int]:
        """Register, bytes of the register, and what is added."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if not match:
            raise self._error(statement, f"unknown form of address {text}")
        base, added = match[1], int(match[2] or 0)
        if self._find_register(base):
            offset, width = self._register(statement, base)
            if width != 8 and (width, space) != (4, "shared"):
                raise self._error(statement, f"an address of {width} bytes")
            return offset, width, added
        if base not in {"shared": self._shared, "param": self._params}.get(space, ()):
            raise self._error(statement, f"unknown address {text}")
        return self._operand(statement, base, 8), 8, added

    def _instruction(self, statement: Statement) -> None:
        match = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([\w.]+)\s*(.*)", statement.text, re.S)
        if not match:
            raise self._error(statement, "not an instruction")
        negated, predicate, opcode, rest = match.groups()
        operands = _split(rest)
        where = self._register(statement, predicate, PREDICATE)[0] if predicate else -1
        immediate, target = 0, ""
        destinations: list[int] = []
        sources: list[int] = []
        parts = opcode.split(".")
        kind, last = parts[0], parts[-1]

        def expect(*counts: int) -> None:
            if len(operands) not in counts:
                raise self._error(statement, f"{len(operands)} operands")

        if opcode in ("bra", "bra.uni"):
            expect(1)
            if predicate and opcode == "bra.uni":
                raise self._error(statement, "a uniform branch with a predicate")
            target = operands[0]
        elif opcode in ("ret", "exit", "cp.async.commit_group", "cp.async.wait_all"):
            expect(0)
        elif opcode == "cp.async.wait_group":
            expect(1)
            if not operands[0].isdigit():
                raise self._error(statement, "unknown form")
            immediate = int(operands[0])
        elif opcode in ("bar.sync", "barrier.sync"):
            if operands != ["0"]:
                raise self._error(statement, "another barrier than 0 of all threads")
        elif opcode == "bar.warp.sync":
            expect(1)
            sources = [self._operand(statement, operands[0], 4)]
        elif kind in ("ld", "st"):
            expect(2)
            opcode, destinations, sources, immediate = self._memory(statement, parts, operands)
        elif kind == "ldmatrix":
            expect(2)
            base, width, immediate = self._address(statement, operands[1], "shared")
            destinations = [self._destination(statement, r, 4) for r in _vector(operands[0])]
            sources = [base]
            opcode += f".a{width}"
        elif opcode == "cp.async.cg.shared.global":
            expect(3, 4)
            to, width, added = self._address(statement, operands[0], "shared")
            source, _, source_added = self._address(statement, operands[1], "global")
            if operands[2] != "16" or added or source_added:
                raise self._error(statement, "unknown form")
            size = operands[3] if len(operands) > 3 else "16"
            sources = [to, source, self._operand(statement, size, 4)]
            opcode += f".16.a{width}"
        elif kind == "mma":
            expect(4)
            destinations = [self._destination(statement, r, 4) for r in _vector(operands[0])]
            sources = [
                self._operand(statement, r, 4) for group in operands[1:] for r in _vector(group)
            ]
        elif kind == "shfl":
            expect(5)
            value, _, in_range = operands[0].partition("|")
            destinations = [
                self._destination(statement, value, 4),
                self._destination(statement, in_range or "_", PREDICATE),
            ]
            sources = [self._operand(statement, x, 4) for x in operands[1:]]
        elif kind == "vote":
            expect(3)
            destinations = [
                self._destination(statement, operands[0], 4 if last == "b32" else PREDICATE)
            ]
            sources = [
                self._operand(statement, operands[1], PREDICATE),
                self._operand(statement, operands[2], 4),
            ]
        elif kind == "mov" and any(x.startswith("{") for x in operands):
            expect(2)
            if last not in ("b32", "b64"):
                raise self._error(statement, "unknown type")
            whole = WIDTHS[last]
            if operands[0].startswith("{"):
                opcode = f"unpack.{last}"
                destinations = [
                    self._destination(statement, x, whole // 2) for x in _vector(operands[0])
                ]
                sources = [self._operand(statement, operands[1], whole)]
            else:
                opcode = f"pack.{last}"
                destinations = [self._destination(statement, operands[0], whole)]
                sources = [self._operand(statement, x, whole // 2) for x in _vector(operands[1])]
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
        if last not in OPERAND_WIDTHS or len(parts) < 2:
            raise self._error(statement, "unknown opcode or type")
        width = source = OPERAND_WIDTHS[last]
        if kind == "setp":
            width = PREDICATE
        elif kind == "cvt":
            if parts[-2] not in OPERAND_WIDTHS:
                raise self._error(statement, "unknown type")
            width = OPERAND_WIDTHS[parts[-2]]
        elif parts[1] == "wide":
            width = 2 * source
        if len(operands) not in (2, 3, 4, 5):
            raise self._error(statement, f"{len(operands)} operands")
        widths = [source] * (len(operands) - 1)
        if kind in ("shl", "shr"):
            widths[1:] = [4]
        elif kind == "selp":
            widths[2:] = [PREDICATE]
        elif kind == "mad" and parts[1] == "wide":
            widths[2:] = [2 * source]
        elif kind == "redux":
            widths[1:] = [4]
        if len(widths) != len(operands) - 1:
            raise self._error(statement, f"{len(operands)} operands")
        destinations = [self._destination(statement, operands[0], width)]
        found = self._find_register(operands[1])
        if kind == "cvt" and source == 4 and found and found[1] == 8:
            # The low half of a wider register, which PTX lets a conversion read.
            half = self._allocate(4)
            self._emit(statement, "cvt.u32.u64", [half], [found[0]])
            return destinations, [half]
        sources = [
            self._operand(statement, x, w) for x, w in zip(operands[1:], widths, strict=True)
        ]
        return destinations, sources

    def _memory(
        self, statement: Statement, parts: list[str], operands: list[str]
    ) -> tuple[str, list[int], list[int], int]:
        loads = parts[0] == "ld"
        values, address = operands if loads else operands[::-1]
        names = _vector(values) if values.startswith("{") else [values]
        if parts[-1] not in MEMORY_WIDTHS:
            raise self._error(statement, "unknown type")
        width = MEMORY_WIDTHS[parts[-1]]
        space = next((x for x in ("shared", "param", "global") if x in parts), "generic")
        base, base_width, added = self._address(statement, address, space)
        self._check_param(statement, address, added, width * len(names))
        known = [found for name in names if (found := self._find_register(name))]
        register_width = known[0][1] if known else max(width, 2)
        registers = [
            self._register(statement, name, register_width)[0]
            if loads
            else self._operand(statement, name, register_width)
            for name in names
        ]
        opcode = ".".join(parts) + f".{register_width}"
        if space == "shared":
            opcode += f".a{base_width}"
        if loads:
            return opcode, registers, [base], added
        return opcode, [], [*registers, base], added

    def _check_param(self, statement: Statement, address: str, added: int, size: int) -> None:
        """What is read by the parameter's name stays within it."""
        name = re.findall(r"[%\w$]+", address)[0]
        if name in self._params and not 0 <= added <= self._params[name][1] - size:
            raise self._error(statement, "reads past the parameter")


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
