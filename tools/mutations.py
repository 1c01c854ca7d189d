"""Small faults of a Python source: each changes a comparison, operator, constant or statement."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

REPLACEMENTS = {  # of operators, and of names of functions
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
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "startswith": "endswith",
    "endswith": "startswith",
    "sorted": "list",
}
RECORD_LINE = "_record_line"
DROPPED = (ast.Expr, ast.AugAssign, ast.Raise, ast.Continue, ast.Break)
Change = Callable[[ast.AST], None]  # changes a node in place


class Mutant(NamedTuple):
    """A fault; its key does not depend on the position of the function."""

    function: str  # with its class; outside functions, the name of the assigned variable
    before: str
    after: str
    lines: range  # of its statement; empty for code that runs on import
    node: int  # its position in the order of ast.walk
    change: Change

    @property
    def key(self) -> tuple[str, str, str]:
        return self.function, self.before, self.after

    def code(self, source: str, path: str):
        """Return the faulty module, compiled."""
        tree = ast.parse(source)
        self.change(list(ast.walk(tree))[self.node])
        return compile(ast.fix_missing_locations(tree), path, "exec")


def mutants(source: str) -> list[Mutant]:
    """Return every fault of a module, in the order of its lines."""
    tree = ast.parse(source)
    faults = []
    seen = Counter()
    nodes = list(ast.walk(tree))
    numbers = {node: number for number, node in enumerate(nodes)}
    parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
    for node, function, lines in _changeable_nodes(tree, "", range(0)):
        for before, after, change in _changes(node, parents.get(node)):
            seen[function, before, after] += 1
            if (count := seen[function, before, after]) > 1:
                before += f"  # {count}"  # the second of its kind in a function
            faults.append(Mutant(function, before, after, lines, numbers[node], change))
    return faults


def record_lines(source: str) -> ast.Module:
    """Return the module with a call of RECORD_LINE(line) before every statement of a function."""
    tree = ast.parse(source)
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        for inner in ast.walk(node):
            for name in ("body", "orelse", "finalbody"):
                statements = _list(inner, name)
                if statements and isinstance(statements[0], ast.stmt):
                    pairs = [(_record_call(statement), statement) for statement in statements]
                    setattr(inner, name, [statement for pair in pairs for statement in pair])
    return ast.fix_missing_locations(tree)


def _record_call(statement: ast.stmt) -> ast.Expr:
    call = ast.Call(ast.Name(RECORD_LINE, ast.Load()), [ast.Constant(statement.lineno)], [])
    return ast.copy_location(ast.Expr(call), statement)


def _changeable_nodes(
    node: ast.AST, function: str, lines: range
) -> Iterator[tuple[ast.AST, str, range]]:
    """Yield (node, its function, the lines of its statement) of every node that may be changed."""
    yield node, function, lines
    if getattr(node, "arg", "") == "strict":
        return  # zip's strict= changes no result
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "format_spec", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_text(node, child):
                continue
            child_function = function
            child_lines = lines
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                child_function = f"{function}.{child.name}".lstrip(".")
            elif isinstance(child, (ast.Assign, ast.AnnAssign)) and isinstance(node, ast.Module):
                target = child.targets[0] if isinstance(child, ast.Assign) else child.target
                child_function = ast.unparse(target)
            if isinstance(node, ast.FunctionDef):
                # defaults and decorators run on import
                child_lines = _lines(child) if name == "body" else range(0)
            elif isinstance(child, ast.stmt) and lines:
                child_lines = _lines(child)
            yield from _changeable_nodes(child, child_function, child_lines)


def _lines(statement: ast.AST) -> range:
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if isinstance(body, list) else statement.end_lineno
    return range(statement.lineno, max(last, statement.lineno) + 1)


def _is_text(parent: ast.AST, node: ast.AST) -> bool:
    """Whether a node is text for people: docstring, text of an f-string, separator of join."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    is_join = isinstance(parent, ast.Attribute) and parent.attr == "join"
    return isinstance(node, ast.Constant) and (is_join or isinstance(parent, ast.JoinedStr))


def _changes(node: ast.AST, parent: ast.AST | None) -> Iterator[tuple[str, str, Change]]:
    shown = node
    if isinstance(node, (ast.Constant, ast.Name, ast.Attribute)) and isinstance(parent, ast.expr):
        shown = parent if len(ast.unparse(parent)) <= 100 else node  # a single 0 is not clear
    position = list(ast.walk(shown)).index(node)
    for change in _node_changes(node):
        changed = copy.deepcopy(shown)
        change(list(ast.walk(changed))[position])
        yield ast.unparse(shown), ast.unparse(changed), change
    for name in ("body", "orelse", "finalbody"):
        for number, statement in enumerate(_list(node, name)):
            if isinstance(statement, DROPPED) and not _is_text(node, statement):
                yield ast.unparse(statement), "pass", _put(name, number, ast.Pass())
    if isinstance(node, (ast.If, ast.While, ast.IfExp)) and not _is_negated_by_operator(node.test):
        test = ast.unparse(node.test)
        yield f"if {test}", f"if not ({test})", _negate
    for number, test in enumerate(_list(node, "ifs")):
        yield f"for if {ast.unparse(test)}", "for", _without("ifs", number)
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)) and not _is_unpacked(node, parent):
        for number, element in enumerate(node.elts):
            yield ast.unparse(element), "without", _without("elts", number)
    if isinstance(node, ast.Dict):
        for number, (key, value) in enumerate(zip(node.keys, node.values, strict=True)):
            entry = f"{ast.unparse(key) if key else '**'}: {ast.unparse(value)}"
            yield entry, "without", _without_key(number)
    if _is_split(node):
        for word in node.func.value.value.split():
            yield word, "without", _without_word(word)


def _node_changes(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            yield _put("ops", number, REPLACEMENTS[type(operator)]())
    elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in REPLACEMENTS:
        yield _set("op", REPLACEMENTS[type(node.op)]())
        if isinstance(node, ast.BoolOp):
            neutral = ast.Constant(isinstance(node.op, ast.And))
            false = ("0", "''", "[]", "{}")  # replacing these with False changes nothing
            values = [value for value in node.values if ast.unparse(value) not in false]
            yield from (_put("values", node.values.index(value), neutral) for value in values)
    elif isinstance(node, ast.UnaryOp):
        if isinstance(node.op, ast.USub):
            yield _set("op", ast.UAdd())
        else:
            yield _set("operand", ast.UnaryOp(ast.Not(), node.operand))  # not not x
    elif isinstance(node, ast.Return) and node.value and not _is(node.value, None):
        yield _set("value", ast.Constant(None))
    elif isinstance(node, ast.Name) and node.id in REPLACEMENTS:
        yield _set("id", REPLACEMENTS[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in REPLACEMENTS:
        yield _set("attr", REPLACEMENTS[node.attr])
    elif isinstance(node, ast.Constant):
        yield from (_set("value", other) for other in _other_constants(node.value))


def _other_constants(value: object) -> Iterator[object]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield value + 1
    # a string with spaces is a message, which tests of messages check
    elif isinstance(value, (str, bytes)) and len(value.split()) == 1:
        yield value + ("x" if isinstance(value, str) else b"x")


def _is_unpacked(node: ast.AST, parent: ast.AST | None) -> bool:
    """Whether removing an element would always raise a ValueError, or would remove no value."""
    assigned = isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Tuple)
    return (
        assigned
        or isinstance(parent, ast.Subscript)
        or isinstance(getattr(node, "ctx", None), ast.Store)
    )


def _is_negated_by_operator(test: ast.expr) -> bool:
    """Whether negating the test is the same as another fault."""
    if not isinstance(test, ast.Compare):
        return isinstance(test, ast.UnaryOp)
    return not isinstance(test.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE))


def _is(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _is_split(node: ast.AST) -> bool:
    call = (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "split"
    )
    return call and not node.args and isinstance(node.func.value, ast.Constant)


def _list(node: ast.AST, name: str) -> list:
    value = getattr(node, name, None)
    return value if isinstance(value, list) else []


def _set(name: str, value: object) -> Change:
    return lambda node: setattr(node, name, value)


def _put(name: str, number: int, value: ast.AST) -> Change:
    return lambda node: getattr(node, name).__setitem__(number, value)


def _without(name: str, number: int) -> Change:
    return lambda node: getattr(node, name).pop(number)


def _without_key(number: int) -> Change:
    return lambda node: (node.keys.pop(number), node.values.pop(number))


def _without_word(word: str) -> Change:
    def change(node: ast.Call) -> None:
        words = node.func.value.value.split()
        node.func.value.value = " ".join(each for each in words if each != word)

    return change


def _negate(node: ast.AST) -> None:
    node.test = ast.UnaryOp(ast.Not(), node.test)
