"""Bugs planted by the grammar: every comparison, sign, index, constant, condition, check of a file.

`mutants(name, text)` lists them, one edit of the text each. What no guarantee hangs on is left out:
annotations, decorators, and the words of errors.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePath

COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
EXTREMES = {"min": "max", "minimum": "maximum", "fmin": "fmax", "amin": "amax"}
EXTREMES |= {"floor": "ceil", "any": "all"}
EXTREMES |= {new: old for old, new in EXTREMES.items()}

Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Mutant:
    """One bug. Its identity holds no line number and no folder: it survives moves."""

    file: str  # the path below the package
    function: str  # qualified name; "" for the module
    kind: str
    line: str  # text of the line that the change begins on
    change: str  # "old -> new", and which one where the function has the same line twice
    source: str = field(repr=False, compare=False)
    # A test that runs one of these lines may see it.
    lines: range = field(compare=False, default=range(0))

    @property
    def identity(self) -> tuple[str, str, str, str]:
        return PurePath(self.file).name, self.function, self.line, self.change

    def order(self, seed: int) -> bytes:
        """Return where it comes in a sample: other mutants do not change that."""
        return hashlib.blake2b(repr((seed, self.identity)).encode()).digest()

    def __str__(self) -> str:
        return f"{self.file}:{self.lines.start} {self.function}: {self.change}"


def mutants(file: str, text: str) -> list[Mutant]:
    """List the bugs of a source, each once; each parses and differs from it."""
    found: dict[str, Mutant] = {}
    alike: Counter[tuple[str, str, str, str]] = Counter()
    for mutant in _Planter(file, text).planted():
        if mutant.source not in found:
            alike[mutant.identity] += 1
            number = alike[mutant.identity]
            change = mutant.change if number == 1 else f"{mutant.change} [{number}]"
            found[mutant.source] = replace(mutant, change=change)
    return list(found.values())


class _Planter:
    def __init__(self, file: str, text: str) -> None:
        self._file, self._text = file, text
        self._tree = ast.parse(text)
        self._rows = text.splitlines(keepends=True)
        self._starts = [0]
        for row in self._rows:
            self._starts.append(self._starts[-1] + len(row))

    def planted(self) -> Iterator[Mutant]:
        yield from self._body(self._tree.body, [])

    def _body(self, body: list[ast.stmt], scopes: list[Scope]) -> Iterator[Mutant]:
        for statement in body:
            yield from self._statement(statement, scopes)

    def _statement(self, node: ast.stmt, scopes: list[Scope]) -> Iterator[Mutant]:
        if isinstance(node, (ast.Import, ast.ImportFrom)) or _is_typing(node):
            return
        where = self._where(node, scopes)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = range(node.body[0].lineno, (node.end_lineno or node.lineno) + 1)
            for default in filter(None, [*node.args.defaults, *node.args.kw_defaults]):
                yield from self._expression(default, [*scopes, node], inner)
            yield from self._body(node.body, [*scopes, node])
        elif isinstance(node, ast.ClassDef):
            yield from self._body(node.body, [*scopes, node])
        elif isinstance(node, ast.Raise):
            yield self._mutant(node, "pass", "raise", scopes, where)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield self._mutant(node, "pass", "statement", scopes, where)
            yield from self._expression(node.value, scopes, where)
        elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            new = copy.copy(node)
            new.op = ARITHMETIC[type(node.op)]()
            yield self._mutant(node, ast.unparse(new), "sign", scopes, where)
            yield from self._expression(node.value, scopes, where)
        else:
            yield from self._parts(node, scopes, where)

    def _parts(self, node: ast.stmt, scopes: list[Scope], where: range) -> Iterator[Mutant]:
        """Go through the expressions and the statements that a statement is made of."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr) and child is not getattr(node, "annotation", None):
                yield from self._expression(child, scopes, where)
            elif isinstance(child, ast.withitem):
                yield from self._expression(child.context_expr, scopes, where)
            elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
                yield from self._body(child.body, scopes)
            elif isinstance(child, ast.stmt):
                yield from self._statement(child, scopes)
        if isinstance(node, (ast.If, ast.While)):
            yield from self._negated(node.test, scopes, where)

    def _where(self, node: ast.stmt, scopes: list[Scope]) -> range:
        """Return the lines whose run may show a bug in this statement."""
        if scopes and not isinstance(scopes[-1], ast.ClassDef):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno
            return range(node.lineno, max(node.lineno, last or 0) + 1)
        scope = (
            scopes[-1] if scopes else None
        )  # it runs at import: whoever uses the class, or module
        if scope is None:
            return range(1, len(self._rows) + 1)
        return range(scope.lineno, (scope.end_lineno or scope.lineno) + 1)

    def _expression(self, node: ast.expr, scopes: list[Scope], where: range) -> Iterator[Mutant]:
        if isinstance(node, ast.JoinedStr):
            return
        for kind, new in _changes(node):
            yield self._mutant(node, f"({ast.unparse(new)})", kind, scopes, where)
        if isinstance(node, ast.Subscript):
            yield from self._indices(node, scopes, where)
        if isinstance(node, ast.IfExp):
            yield from self._negated(node.test, scopes, where)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield from self._expression(child, scopes, where)
            elif isinstance(child, ast.keyword):
                yield from self._expression(child.value, scopes, where)
            elif isinstance(child, ast.comprehension):
                yield from self._expression(child.iter, scopes, where)
                for condition in child.ifs:
                    yield from self._expression(condition, scopes, where)
                    yield from self._negated(condition, scopes, where)

    def _indices(self, node: ast.Subscript, scopes: list[Scope], where: range) -> Iterator[Mutant]:
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for part in parts:
            bounds = [part.lower, part.upper] if isinstance(part, ast.Slice) else [part]
            for bound in bounds:
                if bound is not None and not isinstance(bound, ast.Constant):
                    new = ast.BinOp(bound, ast.Add(), ast.Constant(1))
                    yield self._mutant(bound, ast.unparse(new), "index", scopes, where)

    def _negated(self, test: ast.expr, scopes: list[Scope], where: range) -> Iterator[Mutant]:
        flipped = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], flipped):
            return  # the other comparison is its negation
        if not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
            new = ast.UnaryOp(ast.Not(), test)
            yield self._mutant(test, f"({ast.unparse(new)})", "condition", scopes, where)

    def _mutant(
        self, node: ast.expr | ast.stmt, new: str, kind: str, scopes: list[Scope], where: range
    ) -> Mutant:
        first = self._place(node.lineno, node.col_offset)
        last = self._place(node.end_lineno or 0, node.end_col_offset or 0)
        source = self._text[:first] + new + self._text[last:]
        change = " ".join(f"{self._text[first:last]} -> {new}".split())
        name = ".".join(scope.name for scope in scopes)
        row = self._rows[node.lineno - 1].strip()
        return Mutant(self._file, name, kind, row, change, source, where)

    def _place(self, line: int, byte: int) -> int:
        row = self._rows[line - 1]
        return self._starts[line - 1] + len(row.encode()[:byte].decode())


def _is_typing(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING",)


def _changes(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Yield each bug at this node itself: its kind, and what the node becomes."""
    rule = _RULES.get(type(node))
    if rule is not None:
        yield from rule(node)


def _compare(node: ast.Compare) -> Iterator[tuple[str, ast.expr]]:
    for place, op in enumerate(node.ops):
        new = copy.copy(node)
        new.ops = [*node.ops]
        new.ops[place] = COMPARE[type(op)]()
        yield "compare", new


def _binary(node: ast.BinOp) -> Iterator[tuple[str, ast.expr]]:
    words = any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )
    if type(node.op) in ARITHMETIC and not words:
        new = copy.copy(node)
        new.op = ARITHMETIC[type(node.op)]()
        yield "sign", new


def _unary(node: ast.UnaryOp) -> Iterator[tuple[str, ast.expr]]:
    if not isinstance(node.op, ast.UAdd):
        yield "sign" if isinstance(node.op, ast.USub) else "boolean", node.operand


def _boolean(node: ast.BoolOp) -> Iterator[tuple[str, ast.expr]]:
    new = copy.copy(node)
    new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield "boolean", new


def _constant(node: ast.Constant) -> Iterator[tuple[str, ast.expr]]:
    value = node.value
    if isinstance(value, bool):
        yield "boolean", ast.Constant(not value)
    elif isinstance(value, int):
        yield "constant", ast.Constant(value + 1)
    elif isinstance(value, float):
        yield "constant", ast.Constant(value * 1.03 or 0.03)


def _call(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    name = node.func
    if isinstance(name, ast.Name) and name.id in EXTREMES:
        new = copy.copy(node)
        new.func = ast.Name(EXTREMES[name.id])
        yield "extreme", new
    elif isinstance(name, ast.Attribute) and name.attr in EXTREMES:
        new = copy.copy(node)
        new.func = ast.Attribute(name.value, EXTREMES[name.attr])
        yield "extreme", new
    for keyword in node.keywords:
        if keyword.arg is not None:
            new = copy.copy(node)
            new.keywords = [other for other in node.keywords if other is not keyword]
            yield "argument", new


_RULES: dict[type[ast.expr], Callable[..., Iterator[tuple[str, ast.expr]]]] = {
    ast.Compare: _compare,
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.BoolOp: _boolean,
    ast.Constant: _constant,
    ast.Call: _call,
}
