"""Take a test apart, so that no expected value has to be where the program runs.

    import datetime as _dt                               in both processes
    _it = RankTable()                                    in the program's process
    assert _it.weight == 61       ──►   `_it.weight`     evaluated there; its value comes out as data
                                        `_hole0 == 61`   evaluated by another process, which never sees the program

A test that runs in the program's own process can be forged there: by leaving early, by an `__eq__` that always says
yes, by another AssertionError, by looking into the frames above. A program that sends values has nothing to forge: to
send the right one it has to know it. What cannot be taken apart (`f(1) == f(2)`, loops with an assert inside) is
evaluated in the program's process as before; `Check.apart` says which kind a check is.
"""

from __future__ import annotations

import ast
import builtins
from dataclasses import dataclass, field
from functools import lru_cache

BUILTIN = frozenset(dir(builtins))
# Around a value that is no data (a generator, say) these are evaluated in the program's process too: their one
# argument is that value, so no expected value goes along.
AROUND = frozenset("abs bool dict enumerate float frozenset int iter len list max min next repr reversed round set "
                   "sorted str sum tuple type".split())
# Evaluated whole, for what is inside has names or an order of its own.
WHOLE = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.BoolOp, ast.IfExp, ast.NamedExpr,
         ast.JoinedStr)
TELLS = frozenset("all any callable hasattr isinstance issubclass".split())  # answers yes or no: easily guessed


@dataclass(frozen=True)
class Check:
    """One assert. `holes[i]` lists what to evaluate in the program's process: the first whose value is data counts.

    `conditions[level]` is the condition with the hole of that level replaced by `_hole0`, `_hole1`, … (only the first
    hole may have several levels; `_below` stands for the value of the level before).
    """

    source: str
    holes: tuple[tuple[str, ...], ...]
    conditions: tuple[str, ...]
    apart: bool


@dataclass(frozen=True)
class Test:
    """A test in its order: `steps` for the program's process, statements (str) and checks; `setup` for the judge."""

    steps: tuple[str | Check, ...]
    setup: str = ""
    checks: tuple[Check, ...] = field(default=())


@lru_cache(maxsize=4096)
def take_apart(source: str) -> Test:
    """The test as statements and checks. Raises SyntaxError where it is not Python."""
    body = ast.parse(source).body
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}
    known = BUILTIN | imported
    given = _constants(body, known)
    steps: list[str | Check] = []
    for node in body:
        if isinstance(node, ast.Assert):
            steps += [_check(part, known | set(given)) for part in _parts(node.test)]
        elif not (name := _assigned(node)) or name not in given or _used(name, body, known | set(given)):
            steps.append(ast.unparse(node))
    setup = "\n".join(map(ast.unparse, [*imports, *given.values()]))
    return Test(tuple(steps), setup, tuple(step for step in steps if isinstance(step, Check)))


def free_names(node: ast.AST) -> set[str]:
    """Names that `node` reads and does not bind itself."""
    read, bound = set(), set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            (read if isinstance(part.ctx, ast.Load) else bound).add(part.id)
        elif isinstance(part, ast.arg):
            bound.add(part.arg)
    return read - bound


# ------------------------------------------------------------------------------------------------ the test's own names

def _assigned(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


def _constants(body: list[ast.stmt], known: set[str]) -> dict[str, ast.stmt]:
    """`expected = [1, 2]`: assigned once, from nothing of the program's, and out of its reach if it can be changed."""
    names = [name for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.Name)
             and not isinstance(node.ctx, ast.Load) for name in [node.id]]
    given: dict[str, ast.stmt] = {}
    for node in body:
        name = _assigned(node)
        if name and names.count(name) == 1 and free_names(node.value) <= known | set(given) and (
                isinstance(node.value, ast.Constant) or not _used(name, body, known | {name} | set(given))):
            given[name] = node
    return given


def _used(name: str, body: list[ast.stmt], known: set[str]) -> bool:
    """Whether the program's process needs this name: in a statement, or in what a check evaluates there."""
    for node in body:
        if isinstance(node, ast.Assert):
            if any(name in free_names(ast.parse(source)) for part in _parts(node.test)
                   for hole in _check(part, known).holes for source in hole):
                return True
        elif _assigned(node) != name and name in free_names(node):
            return True
    return False


# ------------------------------------------------------------------------------------------------ one assert

def _parts(test: ast.expr) -> list[ast.expr]:
    """`assert a and b` is two checks."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return [part for value in test.values for part in _parts(value)]
    return [test]


def _check(test: ast.expr, known: set[str]) -> Check:
    inside = known
    if not free_names(test) - known:  # nothing of the program's: what it left behind is looked at, files say
        inside = BUILTIN if free_names(test) - BUILTIN else set()
        left = _holes(test.left, inside)[0] if isinstance(test, ast.Compare) else []
        return _made(test, left or ([[test]] if inside else []))  # on the right stands what is expected
    return _made(test, _holes(test, inside)[0])


def _made(test: ast.expr, found: list[list[ast.expr]]) -> Check:
    several = len(found) == 1  # with more holes each has one level: two choices at once would be four conditions
    levels = len(found[0]) if several else 1
    holes = [chain if several else chain[:1] for chain in found]
    conditions = tuple(_without(test, [chain[min(level, len(chain) - 1)] for chain in holes])
                       for level in range(levels))
    sources = tuple(tuple(ast.unparse(node) if level == 0 else _around(node) for level, node in enumerate(chain))
                    for chain in holes)
    return Check(ast.unparse(test), sources, conditions, _is_apart(test, holes))


def _holes(node: ast.expr, known: set[str]) -> tuple[list[list[ast.expr]], bool]:
    """([chain of nodes from the inside out], whether `node` itself is the end of one)."""
    if not free_names(node) - known and known:
        return [], False
    if isinstance(node, ast.Compare):
        sides = [_holes(side, known) for side in (node.left, *node.comparators)]
        if all(found for found, _ in sides):
            return [[node]], True  # every side is the program's: only its own process can compare them
        if isinstance(node.ops[-1], (ast.In, ast.NotIn)) and len(sides) == 2 and sides[1][1] and len(sides[1][0]) == 1:
            sides[1][0][0].append(node)  # `2 in f(1)`: of a container that is no data, only itself can say
            return sides[1]
        return [chain for found, _ in sides for chain in found], False
    if isinstance(node, WHOLE) or _is_reach(node, known):
        return [[node]], True
    if isinstance(node, ast.Name):
        return ([[node]], True) if node.id not in known else ([], False)
    found, ends = [], False
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.keyword):
            child = child.value
        if isinstance(child, ast.expr):
            below, end = _holes(child, known)
            found, ends = found + below, ends or end
    if ends and len(found) == 1 and _may_climb(node):
        found[0].append(node)
        return found, True
    return found, False


def _is_reach(node: ast.expr, known: set[str]) -> bool:
    """A name of the program's with calls, attributes and indices behind it: `_it.items[0].run(1)`."""
    inner = node
    while isinstance(inner, (ast.Attribute, ast.Subscript, ast.Call)):
        inner = inner.func if isinstance(inner, ast.Call) else inner.value
        if isinstance(inner, ast.Name) and (inner.id not in known or inner.id in TELLS):
            return inner.id not in known or bool(free_names(node) - known)
    return False


def _may_climb(node: ast.expr) -> bool:
    return (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in AROUND
            and len(node.args) == 1 and not any(isinstance(arg, ast.Starred) for arg in node.args)
            and all(isinstance(word.value, (ast.Constant, ast.Lambda)) for word in node.keywords))


def _around(node: ast.expr) -> str:
    """`sorted(f(3), reverse=True)` as `sorted(_below, reverse=True)`, `2 in f(1)` as `2 in _below`."""
    if isinstance(node, ast.Compare):
        return ast.unparse(ast.Compare(node.left, node.ops, [ast.Name("_below", ast.Load())]))
    words = [ast.keyword(word.arg, word.value) for word in node.keywords]
    return ast.unparse(ast.fix_missing_locations(ast.Call(node.func, [ast.Name("_below", ast.Load())], words)))


def _without(test: ast.expr, holes: list[ast.expr]) -> str:
    class Put(ast.NodeTransformer):
        def visit(self, node):
            for i, hole in enumerate(holes):
                if node is hole:
                    return ast.Name(f"_hole{i}", ast.Load())
            return self.generic_visit(node)

    # generic_visit changes nodes in place: work on a copy whose nodes correspond one to one
    copy = ast.parse(ast.unparse(test), mode="eval").body
    where = dict(zip(map(id, ast.walk(test)), ast.walk(copy), strict=True))
    holes = [where[id(hole)] for hole in holes]
    return ast.unparse(ast.fix_missing_locations(Put().visit(copy)))


def _is_apart(test: ast.expr, holes: list[list[ast.expr]]) -> bool:
    """Whether what is expected stays with the judge, who compares the program's value with it."""
    inner = [part for chain in holes for part in ast.walk(chain[0])]
    if any(isinstance(part, ast.Compare) or isinstance(part, ast.Name) and part.id in TELLS for part in inner):
        return False
    if isinstance(test, ast.Compare) and any(part is test for chain in holes for part in chain):
        return False
    return bool(holes) and any(isinstance(part, ast.Compare) or isinstance(part, ast.Call) and len(part.args) > 1
                               for part in ast.walk(test) if not any(part is i for i in inner))
