"""Small changes of a source text: a comparison turned, a bound one off, a term left out, a call
dropped.

Each is a fault of its own, and is named by the text that it changes, not by a line number.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .fault import Fault

Span = tuple[int, int]  # of characters


@dataclass(frozen=True)
class Change:
    """Characters [begin, end) of a text become `new`."""

    begin: int
    end: int
    new: str
    kind: str


def faults_of(file: str, text: str) -> list[Fault]:
    """All changes of a file, in the order of its text."""
    changes = python_changes(text) if file.endswith(".py") else cpp_changes(text)
    found = []
    for change in sorted(changes, key=lambda c: (c.begin, c.end, c.new)):
        old, new = _in_context(text, change)
        found.append(Fault(f"{change.kind}: {_short(new)}", file, old, new))
    return found


def _in_context(text: str, change: Change) -> tuple[str, str]:
    """Whole lines around a change, as many as it takes to be there once, before and after it."""
    begin = text.rfind("\n", 0, change.begin) + 1
    end = text.find("\n", change.end)
    end = len(text) if end < 0 else end
    while text.count(text[begin:end]) > 1:
        if begin == 0:
            end = text.find("\n", end + 1)
        else:
            begin = text.rfind("\n", 0, begin - 1) + 1
    return text[begin:end], text[begin : change.begin] + change.new + text[change.end : end]


def _short(text: str) -> str:
    return " ".join(text.split())[-100:]


# ---- Python --------------------------------------------------------------------------------------

TURNED = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip


def python_changes(text: str) -> list[Change]:
    tree = ast.parse(text)
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    data = text.encode()

    def place(line: int, column: int) -> int:
        return len(data[: starts[line - 1] + column].decode())

    def span(node: ast.AST) -> Span:
        return (
            place(node.lineno, node.col_offset),  # type: ignore[attr-defined]
            place(node.end_lineno, node.end_col_offset),  # type: ignore[attr-defined]
        )

    def source(node: ast.AST) -> str:
        begin, end = span(node)
        inner = text[begin:end]
        return f"({inner})" if isinstance(node, (ast.BoolOp, ast.IfExp, ast.Compare)) else inner

    changes = []
    for node in _behaviour(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            turned = TURNED[type(node.ops[0])]
            left, right = span(node.left)[1], span(node.comparators[0])[0]
            between = text[left:right]
            if "(" not in between and ")" not in between:
                changes.append(Change(left, right, f" {turned} ", "a comparison turned"))
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            begin, end = span(node)
            changes.append(Change(begin, end, str(node.value + 1), "a number one off"))
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
            begin, end = span(node)
            if not isinstance(node.left, ast.Constant) or not isinstance(node.left.value, str):
                changes.append(Change(begin, end, source(node.left), "a term left out"))
        elif isinstance(node, ast.BoolOp):
            begin, end = span(node)
            word = " and " if isinstance(node.op, ast.And) else " or "
            for out in node.values:
                kept = [source(value) for value in node.values if value is not out]
                changes.append(Change(begin, end, f"({word.join(kept)})", "a condition left out"))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            changes.append(Change(*span(node), source(node.operand), "a condition turned"))
        elif isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Await)):
            changes.append(Change(*span(node), "pass", "a call dropped"))
        elif isinstance(node, ast.Call) and _is_min_or_max(node):
            name = "max" if ast.unparse(node.func) == "min" else "min"
            changes.append(Change(*span(node.func), name, "a bound turned"))
    return changes


def _is_min_or_max(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id in ("min", "max")


def _behaviour(node: ast.AST) -> Iterator[ast.AST]:
    """All below a node but types, and words that are said to people."""
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert)):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING",):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
        return
    yield node
    for name, field in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_params", "decorator_list"):
            continue
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST):
                yield from _behaviour(child)


# ---- C++ -----------------------------------------------------------------------------------------

CPP_TURNED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}


def cpp_changes(text: str) -> list[Change]:
    """By tokens, in text that clang-format laid out: operators of two operands have spaces."""
    code = _blanked(text)
    changes = []
    for match in re.finditer(r"(?<=[\w)\]]) (<|<=|>|>=|==|!=) (?=[\w(:\-!*&])", code):
        changes.append(Change(*match.span(1), CPP_TURNED[match[1]], "a comparison turned"))
    for match in re.finditer(r"(?<=[\w)\]]) ([+-]) 1\b(?![.\w])", code):
        other = {"+": "- 1", "-": "+ 1"}[match[1]]
        begin, end = match.span(1)
        changes.append(Change(begin, begin + 3, f"{match[1]} 2", "a bound one off"))
        changes.append(Change(begin, begin + 3, other, "a bound one off"))
    for match in re.finditer(r"\bstd::(min|max)\b", code):
        other = {"min": "max", "max": "min"}[match[1]]
        changes.append(Change(*match.span(1), other, "a bound turned"))
    for match in re.finditer(r"(?<=[\w)\]]) ([+\-*]|&&|\|\|) (?=[\w(:!~*\-])", code):
        end = _operand_end(code, match.end(), match[1])
        if end is not None:
            kind = "a condition left out" if match[1] in ("&&", "||") else "a term left out"
            changes.append(Change(match.start(), end, "", kind))
    for match in re.finditer(r"(?<=[\w\]]) ([+\-*|&])= ", code):
        changes.append(Change(*match.span(1), "", "a term left out"))
    for match in re.finditer(r"(?<=[;{}]\n)([ ]+)([\w.>:-]+(?:<[\w, .]+>)?\()", code):
        if re.match(r"(?:return|if|for|while|switch|do|else|using|sizeof)\b", match[2]):
            continue
        close = _closing(code, match.end() - 1)
        if close is not None and code[close + 1 : close + 2] == ";":
            changes.append(Change(match.start(2), close + 2, ";", "a call dropped"))
    return changes


def _blanked(text: str) -> str:
    """The text with spaces in place of comments, strings, preprocessor lines, and of what only asks
    for memory ahead, which changes no result."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", blank, text, flags=re.S)
    text = re.sub(r"^#[^\n]*(?:\\\n[^\n]*)*", blank, text, flags=re.M)
    text = re.sub(r"^class Ahead \{.*?^\};", blank, text, flags=re.S | re.M)
    text = re.sub(r"^[^\n]*(?:ahead\.|_prefetch|static_assert)[^;]*;", blank, text, flags=re.M)
    for name in ("key_lines", "value_lines", "row_lines", "look_ahead", "tile_after", "steps"):
        pattern = (
            rf"^  (?:static |template[^\n]*\n  )*(?:Lines|void|TilePlace|int) {name}\(.*?^  \}}"
        )
        text = re.sub(pattern, blank, text, flags=re.S | re.M)
    return text


def _closing(code: str, at: int) -> int | None:
    """Where the bracket that opens at `at` closes."""
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i] in "([{") - (code[i] in ")]}")
        if depth == 0:
            return i
    return None


def _operand_end(code: str, at: int, operator: str) -> int | None:
    """Where the operand that begins at `at` ends; none where that takes more than a glance."""
    binds_less = {"&&": "", "||": "", "+": " [-+<>=!|&^]", "-": " [-+<>=!|&^]"}
    stop = re.compile(
        r"[;,)\]}:?]| (?:&&|\|\|)|" + (binds_less.get(operator, " [-+*/%<>=!|&^]") or "$")
    )
    i = at
    while i < len(code):
        if code[i] in "([{":
            close = _closing(code, i)
            if close is None:
                return None
            i = close + 1
        elif code.startswith("::", i):
            i += 2
        elif stop.match(code, i):
            return i if i > at else None
        else:
            i += 1
    return None
