"""What of this package the sandbox sees: the probes without what they are compared with, and what answers may import.

    stage/<digest>/pefttools/
        grading/__init__.py      a stand-in: check() and ask() that do nothing
        grading/inside.py …      what runs a probe and writes its answers down
        grading/probes/lora_forward.py      the probe of that exercise and what it calls, cut out of the chapter's module
        nf4.py …                 what the chapter's own solutions import, and nothing else

An exercise's module holds its reference, its mistakes and other right answers: whoever can import it can hand those in.
So a probe is cut out by its names: the function, the functions and constants that it mentions, and so on. What a
chapter is about (`Exercise.hides`) is left out with everything that imports it, and any other module of this package
is there only if a solution of the chapter needs it.
"""

from __future__ import annotations

import ast
import compileall
import functools
import hashlib
import inspect
import py_compile
import re
import shutil
import tempfile
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pefttools.grading.exercise import Exercise, ExerciseError

MAGIC = re.compile(r"\s*[%!]")
PACKAGE = Path(__file__).resolve().parents[1]
INSIDE = ("exercise", "inside", "leaves", "plain", "probe", "room", "wire")  # of pefttools.grading; nothing of it is secret
STAND_IN = '''\
"""Stands for pefttools.grading while a notebook is graded: the checks are made elsewhere, by the grader."""


def check(*_, **__):
    """Nothing: the grader checks."""


def ask(*_, **__):
    """Nothing: a question for practice."""
'''
ABSENT = '''\
raise ImportError("{name} is not available while this chapter is graded, because the chapter is about writing what it "
                  "does. Use your own.")
'''


@functools.lru_cache(maxsize=512)
def probe_source(exercise: Exercise) -> str:
    """The source of a module with this exercise's `probe` and what it needs, without anything to compare with.

    Raises ExerciseError where the probe is not a function at the top of its module, or needs a reference, a mistake
    or an alternative, or the exercise itself.
    """
    probe = exercise.probe
    where = f"exercise {exercise.name!r}: its probe"
    module = inspect.getmodule(probe)
    name = getattr(probe, "__name__", "")
    if module is None or getattr(module, name, None) is not probe:
        raise ExerciseError(f"{where} must be a function at the top level of a module, to be cut out for the sandbox")
    tree, binds = _bare(module)
    wanted, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current in wanted or current not in binds:
            continue
        wanted.add(current)
        todo += sorted(read(binds[current]))
    works = [exercise.reference, *(work for work, _ in exercise.mistakes.values()), *exercise.alternatives.values()]
    secret = {getattr(work, "__name__", None) for each in works for work in (each if type(each) is tuple else (each,))}
    if leaked := sorted(wanted & {text for text in secret if text} - {name}):
        raise ExerciseError(f"{where} uses {leaked[0]}, with which works are compared; it would be seen in the sandbox")
    body = [node for node in (_kept(node, wanted) for node in tree.body) if node is not None]
    for node in body:
        for part in ast.walk(node):
            if isinstance(part, ast.Call) and getattr(part.func, "id", "") in ("Exercise", "Question"):
                raise ExerciseError(f"{where} needs the definition of an exercise; it would be seen in the sandbox")
    body.append(ast.parse(f"probe = {name}").body[0])
    return "from __future__ import annotations\n\n" + ast.unparse(ast.fix_missing_locations(ast.Module(body, []))) + "\n"


@functools.lru_cache(maxsize=64)
def _bare(module: types.ModuleType) -> tuple[ast.Module, dict[str, ast.stmt]]:
    """A module without its annotations, and what binds each name in it."""
    tree = _Bare().visit(ast.parse(inspect.getsource(module)))
    return tree, _bindings(tree)


def _bindings(tree: ast.Module) -> dict[str, ast.stmt]:
    """The statement at the top of a module that binds each name."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        for name in bound(node):
            found[name] = node
    return found


def bound(node: ast.stmt) -> set[str]:
    """The names that a statement binds in the scope it stands in."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    found = {part.id for part in own_scope(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    for part in own_scope(node):
        if isinstance(part, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)) and part is not node:
            found |= bound(part)
    return found


def own_scope(node: ast.AST) -> Iterable[ast.AST]:
    """A node and the nodes in it, without what stands inside of functions and classes."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield child
        else:
            yield from own_scope(child)


def read(node: ast.AST) -> set[str]:
    """The names that a piece of code reads, wherever in it."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}


class _Bare(ast.NodeTransformer):
    """Takes annotations away: they are never evaluated, and their names would be counted as needed."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None or isinstance(node.target, ast.Name) and not node.simple:
            return node
        return ast.copy_location(ast.Assign([node.target], self.visit(node.value)), node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        return node                                    # a dataclass's annotations are its fields


def _kept(node: ast.stmt, wanted: set[str]) -> ast.stmt | None:
    """The statement if it binds what is wanted; of an import, only the names that are."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return None
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in wanted]
        if not names:
            return None
        return ast.Import(names) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, names, node.level)
    return node if bound(node) & wanted else None


# ------------------------------------------------------------------------------------------------ the folder

def make_stage(folder: str | Path, exercises: Iterable[Exercise], modules: Iterable[str] = (), hide: bool = True) -> Path:
    """Write the package for these exercises into `folder` and return its folder, which goes onto PYTHONPATH.

    `modules` ("pefttools.nf4") are put in with whatever of this package they import; those that an exercise hides,
    and those that import one of these, are put in as modules that say so when imported. (`hide=False`: for probing an
    artefact where no student's code runs.) The folder's name is a digest of what is in it: the same stage serves a
    whole class, and is made once.
    """
    files, data = _contents(tuple(exercises), tuple(sorted(set(modules))), hide)
    stamps = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in sorted(data.items())]
    digest = hashlib.sha256(repr((sorted(files.items()), stamps)).encode()).hexdigest()[:20]
    target = Path(folder) / digest
    if not target.is_dir():
        Path(folder).mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".stage-", dir=folder))
        for path, content in files.items():
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            (scratch / path).write_text(content, encoding="utf-8")
        for path, source in data.items():
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, scratch / path)
        compileall.compile_dir(scratch, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:                                # another worker was first, with the same content
            shutil.rmtree(scratch, ignore_errors=True)
    return target


@functools.lru_cache(maxsize=64)
def _contents(exercises: tuple[Exercise, ...], modules: tuple[str, ...], hide: bool) -> tuple[dict[str, str], dict[str, Path]]:
    """{path in the stage: source}, {path in the stage: file to copy}"""
    hidden = {name for exercise in exercises for name in exercise.hides} if hide else set()
    files = {"pefttools/__init__.py": (PACKAGE / "__init__.py").read_text(encoding="utf-8"),
             "pefttools/grading/__init__.py": STAND_IN, "pefttools/grading/probes/__init__.py": ""}
    files |= {f"pefttools/grading/{name}.py": (PACKAGE / "grading" / f"{name}.py").read_text(encoding="utf-8")
              for name in INSIDE}
    data: dict[str, Path] = {}
    for exercise in exercises:
        if exercise.accepts == "artefact" and hide:    # the student's process only writes the files
            continue
        files[f"pefttools/grading/probes/{probe_module(exercise.name)}.py"] = source = probe_source(exercise)
        modules = (*modules, *own_imports(source))
    # What only a hidden module imports is left out with it: pefttools.lora_update computes what pefttools.lora does.
    absent = {name for name in closure(modules)
              if any(name == h or name.startswith(f"{h}.") for h in hidden) or hidden & closure([name])}
    for name in sorted(closure(set(modules) - absent) | absent & set(modules)):
        path, content = _module_file(name)
        if name in absent:
            content = ABSENT.format(name=name)
        elif path.endswith("__init__.py"):
            data |= _data_files(name)
        files.setdefault(path, content)
    for name in sorted(hidden):
        if name.split(".")[0] == "pefttools" and _is_module(name):
            files[_module_file(name)[0]] = ABSENT.format(name=name)
    return files, data


def _data_files(package: str) -> dict[str, Path]:
    """What lies in a package's folder beside modules: weights, a tokenizer, rows."""
    if package == "pefttools":
        return {}
    folder = PACKAGE.parent.joinpath(*package.split("."))
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if path.is_file() and not path.is_symlink() and path.suffix not in (".py", ".pyc") \
                and not any((folder.joinpath(*inside[:n]) / "__init__.py").exists() for n in range(1, len(inside))):
            found[str(path.relative_to(PACKAGE.parent))] = path
    return found


def own_imports(source: str) -> list[str]:
    """The modules of this package that some source imports anywhere, those of `grading` apart."""
    return sorted({name for node in ast.walk(ast.parse(source)) for name in imported(node)
                   if name.split(".")[0] == "pefttools" and name != "pefttools" and _is_module(name)
                   and name.split(".")[:2] != ["pefttools", "grading"]})


def modules_of(notebook: Any) -> list[str]:
    """The modules of this package that a notebook's own code cells import: what an answer may rely on too.

    Answer cells do not count: a student cannot have a module put into the stage by importing it. `pefttools.grading`
    is a stand-in there in any case.
    """
    found: set[str] = set()
    for cell in notebook["cells"]:
        if cell.get("cell_type") != "code" or cell.get("metadata", {}).get("nbgrader", {}).get("solution"):
            continue
        source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
        try:
            found.update(own_imports("\n".join("" if MAGIC.match(line) else line for line in source.split("\n"))))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return sorted(found)


def hidden_packages(exercises: Iterable[Exercise]) -> tuple[str, ...]:
    """The installed packages that these exercises hide, for the sandbox to leave out."""
    return tuple(sorted({name for exercise in exercises for name in exercise.hides
                         if name.split(".")[0] != "pefttools"}))


def probe_module(name: str) -> str:
    """ "lora-forward" → "lora_forward" """
    return name.replace("-", "_")


@functools.lru_cache(maxsize=256)
def _closure_of(name: str) -> frozenset[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        current = todo.pop()
        if current in found or current.split(".")[:2] == ["pefttools", "grading"]:
            continue
        found.add(current)
        if "." in current:
            todo.append(current.rpartition(".")[0])    # its package is imported first
        tree = ast.parse(_module_file(current)[1])
        for node in tree.body:                         # at the top: what is imported in a function may be absent
            todo += [each for each in imported(node, current) if each.split(".")[0] == "pefttools"]
    return frozenset(found)


def closure(modules: Iterable[str]) -> set[str]:
    """These modules of this package and all of it that they import at their top."""
    return {name for module in modules for name in _closure_of(module)}


def imported(node: ast.AST, module: str = "") -> list[str]:
    """The modules that an import statement names; a `from package import module` names both."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names
                               if node.module.split(".")[0] == "pefttools" and _is_module(f"{node.module}.{alias.name}"))]
    return []


def _is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def _module_file(name: str) -> tuple[str, str]:
    """(its path in the stage, its source)"""
    path = PACKAGE.parent.joinpath(*name.split("."))
    module = path.with_suffix(".py")           # a folder of that name may lie beside it: pefttools/lab/data, data.py
    path = path / "__init__.py" if path.is_dir() and not module.is_file() else module
    if not path.is_file():
        raise ExerciseError(f"there is no module {name}")
    return str(path.relative_to(PACKAGE.parent)), path.read_text(encoding="utf-8")
