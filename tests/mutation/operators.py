"""The fixed list of operators: every small change of a module that its tests should notice."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

Proposal = tuple[str, str, ast.AST]

BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
# The neighbour (an equal value changes sides) and the opposite.
COMPARISON: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_PAIRS = [("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("argmin", "argmax"), ("cummin", "cummax")]
_PAIRS += [("clamp_min", "clamp_max"), ("floor", "ceil"), ("any", "all")]
SIDES = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
# Calls that say the same with their arguments swapped, or whose arguments are words and not data.
UNORDERED = {*SIDES, "equal", "logical_and", "logical_or", "gcd", "isinstance", "issubclass", "hasattr", "getattr"}
UNORDERED |= {"setattr", "field", "cast", "TypeVar", "zip", "transpose", "swapaxes"}
# Roots of names that are modules.
NO_TENSORS = {"torch", "np", "math", "functional", "distributed", "dataclasses"}
# Calls that only speak to people.
SPOKEN = {"logging", "logger", "warnings", "print"}


@dataclass(frozen=True)
class Mutant:
    """One change of one expression or statement.

    Attributes:
        file: path in the repository.
        function: qualified name of the function or class around it, empty for the module.
        line: of the change.
        span: first and last line of the statement around it, for the choice of tests.
        text: the line without its indentation.
        operator: which of the list.
        change: what becomes of it.
        node: position in `walk`.
        variant: number among the changes of that node.
        key: names the mutant as long as its function does not change: function, operator, change, how many before it.
        digest: of the function's code, so that results of older code are not taken for results of this one.
        probe: whether it only counts where the tests let a tensor through that it can change.
        kernel: whether the function is Triton's.
    """

    file: str
    function: str
    line: int
    span: tuple[int, int]
    text: str
    operator: str
    change: str
    node: int
    variant: int
    key: str
    digest: str
    probe: bool = False
    kernel: bool = False


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, parents before children, in the order of the source."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from walk(child)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _root(node: ast.AST) -> str:
    """First name of `a.b.c(...)`."""
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _left_alone(node: ast.AST) -> list[ast.AST]:
    """Roots of what is never changed below this node: types, messages, imports, `__all__`, talk."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.JoinedStr) or _is_docstring(node):
        return [node]
    if isinstance(node, ast.Raise):
        return [node]
    if isinstance(node, ast.AnnAssign):
        return [node.annotation]
    if isinstance(node, ast.arg) and node.annotation is not None:
        return [node.annotation]
    if isinstance(node, ast.FunctionDef) and node.returns is not None:
        return [node.returns]
    if isinstance(node, ast.ClassDef):
        # `@dataclass(frozen=True)` keeps programmers from assigning; nothing that is computed depends on it.
        return [d for d in node.decorator_list if _root(d) == "dataclass"]
    if isinstance(node, ast.Assign):
        names = [t.id for t in node.targets if isinstance(t, ast.Name)]
        return [node] if {"__all__", "__slots__"} & set(names) else []
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return [node]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _root(node.value) in SPOKEN:
        return [node]
    return []


def _leaves(value: ast.AST) -> Iterator[ast.expr]:
    """Names, attributes and entries that an expression is made of: places for a `.detach()`."""
    if isinstance(value, ast.Name | ast.Attribute | ast.Subscript):
        if _root(value) not in NO_TENSORS:
            yield value
    elif isinstance(value, ast.Call):
        # A method's receiver is data; a function is not.
        if isinstance(value.func, ast.Attribute):
            yield from _leaves(value.func.value)
        for argument in [*value.args, *(k.value for k in value.keywords)]:
            yield from _leaves(argument)
    elif isinstance(value, ast.Tuple | ast.List | ast.Dict | ast.BinOp | ast.UnaryOp | ast.IfExp):
        for child in ast.iter_child_nodes(value):
            yield from _leaves(child)


def _detachable(statement: ast.AST) -> list[ast.expr]:
    """Expressions of a statement that may carry a gradient on."""
    if not isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Return) or statement.value is None:
        return []
    value = statement.value
    whole = [value] if isinstance(value, ast.Call | ast.BinOp | ast.UnaryOp) else []
    return [*whole, *_leaves(value)]


def _is_detach(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach"


def _constants(node: ast.Constant, negated: bool) -> Iterator[Proposal]:
    value = node.value
    new: object
    if isinstance(value, bool):
        new = not value
    elif isinstance(value, int):
        new = 0 if value == 1 and not negated else value + 1
    elif isinstance(value, float):
        new = 1.0 if value == 0 else value * 10 if abs(value) < 1e-3 else value + 0.5
    else:
        return
    yield "constant", f"{value} -> {new}", ast.Constant(new)


def _calls(node: ast.Call) -> Iterator[Proposal]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in SIDES:
        new = copy.deepcopy(node)
        if isinstance(new.func, ast.Attribute):
            new.func.attr = SIDES[name]
        elif isinstance(new.func, ast.Name):
            new.func.id = SIDES[name]
        yield "side", f"{name} -> {SIDES[name]}", new
    if name in ("clamp", "clip", "clamp_"):
        new = copy.deepcopy(node)
        for keyword in new.keywords:
            keyword.arg = SIDES.get(keyword.arg or "", keyword.arg)
        if ast.dump(new) != ast.dump(node):
            yield "side", "sides of clamp swapped", new
    plain = not any(isinstance(a, ast.Starred) for a in node.args)
    if plain and name not in UNORDERED:
        for i in range(len(node.args) - 1):
            if ast.dump(node.args[i]) == ast.dump(node.args[i + 1]):
                continue
            new = copy.deepcopy(node)
            new.args[i], new.args[i + 1] = new.args[i + 1], new.args[i]
            yield "argument", f"arguments {i + 1} and {i + 2} of {name or 'call'} swapped", new
    if _is_detach(node) and isinstance(node.func, ast.Attribute):
        yield "detach", ".detach() removed", copy.deepcopy(node.func.value)


def _statements(node: ast.AST) -> Iterator[Proposal]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "statement", "call dropped", ast.Pass()
    elif isinstance(node, ast.AugAssign):
        yield "statement", "assignment dropped", ast.Pass()
        other = BINARY.get(type(node.op))
        if other is not None:
            new = copy.deepcopy(node)
            new.op = other()
            yield "arithmetic", f"{type(node.op).__name__}= -> {other.__name__}=", new
    elif isinstance(node, ast.If):
        new_if = copy.deepcopy(node)
        new_if.body = [ast.Pass()]
        yield "statement", "body of if dropped", new_if


def _expressions(node: ast.AST) -> Iterator[Proposal]:
    if isinstance(node, ast.BinOp):
        other = BINARY.get(type(node.op))
        if other is not None:
            new = copy.deepcopy(node)
            new.op = other()
            yield "arithmetic", f"{type(node.op).__name__} -> {other.__name__}", new
    elif isinstance(node, ast.Compare):
        for i, operation in enumerate(node.ops):
            for kind in COMPARISON[type(operation)]:
                changed = copy.deepcopy(node)
                changed.ops[i] = kind()
                yield "comparison", f"{type(operation).__name__} -> {kind.__name__}", changed
    elif isinstance(node, ast.BoolOp):
        both = copy.deepcopy(node)
        both.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "boolean", f"{type(node.op).__name__} -> {type(both.op).__name__}", both
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        yield "unary", f"{type(node.op).__name__} dropped", copy.deepcopy(node.operand)
    elif isinstance(node, ast.IfExp) and isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
        new_choice = copy.deepcopy(node)
        new_choice.body, new_choice.orelse = new_choice.orelse, new_choice.body
        yield "boolean", "condition negated", new_choice


def proposals(node: ast.AST, negated: bool = False, detachable: bool = False) -> list[Proposal]:
    """(operator, change, new node) of every change of this very node, in a fixed order.

    Args:
        node: of the tree.
        negated: whether a unary minus stands before it.
        detachable: whether its value is returned or assigned.
    """
    found = [*_statements(node), *_expressions(node)]
    if isinstance(node, ast.Constant):
        found += _constants(node, negated)
    if isinstance(node, ast.Call):
        found += _calls(node)
    if detachable and not _is_detach(node):
        assert isinstance(node, ast.expr)
        call = ast.Call(ast.Name("__mutation_detached__", ast.Load()), [copy.deepcopy(node)], [])
        found.append(("detach", f".detach() added to {ast.unparse(node)[:60]}", call))
    return found


class _Scan:
    """Walks a module once and remembers what the operators need to know of every node's surroundings."""

    def __init__(self, source: str, file: str) -> None:
        self.file, self.lines = file, source.splitlines()
        self.tree = ast.parse(source)
        self.position = {id(node): i for i, node in enumerate(walk(self.tree))}
        self.found: list[Mutant] = []
        self.counts: dict[tuple[str, str, str], int] = {}
        self.digests: dict[str, str] = {}
        self.detachable: set[int] = set()
        self.kernels: set[str] = set()

    def run(self) -> list[Mutant]:
        for statement in self.tree.body:
            self._visit(statement, "", (statement.lineno, statement.end_lineno or statement.lineno), False)
        return self.found

    def _visit(self, node: ast.AST, function: str, span: tuple[int, int], negated: bool) -> None:
        alone = _left_alone(node)
        if node in alone:
            return
        in_function = function and not function.endswith(">")
        if isinstance(node, ast.stmt):
            span = _own_lines(node)
            if in_function and function not in self.kernels:
                self.detachable |= {id(e) for e in _detachable(node)}
        for variant, (operator, change, _) in enumerate(proposals(node, negated, id(node) in self.detachable)):
            self._add(node, function, span, operator, change, variant)
        inner = function
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = f"{function}.{node.name}" if function else node.name
            self.digests[inner] = digest(node)
            if any(ast.unparse(d).partition("(")[0] in ("jit", "triton.jit") for d in node.decorator_list):
                self.kernels.add(inner)
        for child in ast.iter_child_nodes(node):
            if child not in alone:
                minus = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
                self._visit(child, inner, span, minus)

    def _add(
        self, node: ast.AST, function: str, span: tuple[int, int], operator: str, change: str, variant: int
    ) -> None:
        line = getattr(node, "lineno", span[0])
        before = self.counts.get((function, operator, change), 0)
        self.counts[function, operator, change] = before + 1
        self.found.append(
            Mutant(
                file=self.file,
                function=function,
                line=line,
                span=span,
                text=self.lines[line - 1].strip(),
                operator=operator,
                change=change,
                node=self.position[id(node)],
                variant=variant,
                key=f"{self.file}|{function}|{operator}|{change}|{before}",
                digest=self.digests.get(function) or digest(self.tree),
                probe=operator == "detach",
                kernel=function in self.kernels,
            )
        )


def _own_lines(statement: ast.stmt) -> tuple[int, int]:
    """Lines of a simple statement, or of the head of a compound one."""
    body = getattr(statement, "body", None)
    if not body or isinstance(statement, ast.FunctionDef | ast.ClassDef):
        last = statement.end_lineno if not body else statement.lineno
    else:
        # Dropping the body of an `if` shows where the condition is evaluated, as well.
        last = max(statement.lineno, body[0].lineno - 1)
    return statement.lineno, last or statement.lineno


def digest(node: ast.AST) -> str:
    """Short digest of code without its docstrings, comments and places."""
    bare = copy.deepcopy(node)
    for inner in ast.walk(bare):
        body = getattr(inner, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            del body[0]
    return hashlib.sha256(ast.dump(bare).encode()).hexdigest()[:12]


def find_mutants(source: str, file: str) -> list[Mutant]:
    """Every mutant of a module, in the order of the source."""
    return _Scan(source, file).run()


class _Replace(ast.NodeTransformer):
    def __init__(self, replacements: dict[int, ast.AST]) -> None:
        self.replacements = replacements

    def visit(self, node: ast.AST) -> ast.AST:
        new = self.replacements.get(id(node))
        return ast.copy_location(new, node) if new is not None else self.generic_visit(node)


def mutated(source: str, mutant: Mutant) -> ast.Module:
    """The module's tree with that change."""
    tree = ast.parse(source)
    nodes = list(walk(tree))
    node = nodes[mutant.node]
    negated = any(isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.USub) and n.operand is node for n in nodes)
    options = proposals(node, negated, detachable=mutant.change.startswith(".detach() added"))
    new = options[mutant.variant][2]
    changed = _Replace({id(node): new}).visit(tree)
    assert isinstance(changed, ast.Module)
    return ast.fix_missing_locations(changed)


def probed(source: str, mutants: list[Mutant]) -> ast.Module:
    """The module's tree, where `__mutation_probe__("file:node", value)` sees what `.detach()` mutants would change."""
    tree = ast.parse(source)
    nodes = list(walk(tree))
    wanted = {id(nodes[m.node]): m for m in mutants if m.probe}

    class Wrap(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            mutant = wanted.get(id(node))
            self.generic_visit(node)
            if mutant is None or not isinstance(node, ast.expr):
                return node
            if _is_detach(node):
                assert isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                node.func.value = _probe(mutant, node.func.value)
                return node
            return _probe(mutant, node)

    return ast.fix_missing_locations(Wrap().visit(tree))


def _probe(mutant: Mutant, value: ast.expr) -> ast.expr:
    place = ast.Constant(f"{mutant.file}:{mutant.node}")
    call = ast.Call(ast.Name("__mutation_probe__", ast.Load()), [place, value], [])
    return ast.copy_location(call, value)
