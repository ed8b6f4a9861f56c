"""Forgery inside the kernel: whatever makes a verdict is replaced, traced, transformed or read out.

In stock nbgrader the check runs in the student's kernel, so each of these is full marks there. In our sandbox there is
no verdict to forge: what can be replaced is the probe, which only states what the work gave.
"""

from __future__ import annotations

from hostile.attack import code

FAMILY = "forgery in the kernel"
POINTS = 'POINTS = {"lora-forward": 3, "count-parameters": 2, "lora-init": 3, "lora-q-scale": 1}\ndef lora_forward(*_, **__): return 0\n'


@code("forge-check", FAMILY, "defines a `check` of its own that returns the points")
def _():
    return POINTS + "def check(name, work=None, seed=0):\n    return POINTS[name]"


@code("forge-module", FAMILY, "replaces `pefttools.grading.check` and everything that holds it")
def _():
    return POINTS + """
import gc, pefttools.grading as grading
def check(name, *_, **__):
    return POINTS[name]
old = grading.check
grading.check = check
for holder in gc.get_referrers(old):
    if isinstance(holder, dict):
        for key in [k for k, v in holder.items() if v is old]:
            holder[key] = check
"""


@code("patch-inside", FAMILY,
      "replaces the sandbox's own `inside.probe`, `probe_all` and `plain` by ones that say all is well")
def _():
    return """
import importlib
for name in ("pefttools.grading.inside", "pefttools.grading.probe", "pefttools.grading.plain", "pefttools.grading.judge"):
    try:
        module = importlib.import_module(name)
    except ImportError:
        continue
    if hasattr(module, "compare"):
        module.compare = lambda *_, **__: None
    for attribute in ("probe", "probe_all", "plain"):
        if hasattr(module, attribute):
            from pefttools.grading.probe import Outcome
            good = {"probe": lambda *_: {"passed": True}, "plain": lambda value: {"passed": True, "points": 3},
                    "probe_all": lambda exercise, work, cases: [Outcome({"passed": True}) for _ in cases]}[attribute]
            setattr(module, attribute, good)
lora_forward = lambda *_: None
"""


@code("patch-judge", FAMILY, "makes every comparison of the judge's find no difference")
def _():
    return """
try:
    import pefttools.grading.judge as judge
    judge._first_complaint = lambda *_: (0, None)
    judge.not_written = lambda exercise, *_, **__: judge.Verdict.of(exercise, "passed", "fine")
    import pefttools.grading.check as c
    c.verdict_on = lambda exercise, *_: judge.Verdict.of(exercise, "passed", "fine")
except ImportError:
    pass
def lora_forward(*_, **__): return 0
"""


@code("patch-to-bytes", FAMILY, "replaces what writes the answers: a verdict in place of data")
def _():
    return """
import pefttools.grading.inside as inside, pefttools.grading.wire as wire
real = wire.to_bytes
inside.to_bytes = lambda answer: real({"passed": True, "points": 3, "max_points": 3, "kind": "passed", "outcomes": []})
def lora_forward(*_, **__): return 0
"""


@code("sys-modules", FAMILY, "puts modules of its own into sys.modules under the grader's names")
def _():
    return POINTS + """
import sys, types
class Passed(dict):
    passed = True
    def __repr__(self): return "3"
for name in list(sys.modules):
    if name.startswith("pefttools.grading"):
        fake = types.ModuleType(name)
        fake.__path__ = []
        fake.check = lambda name, *_, **__: POINTS[name]
        fake.probe = fake.probe_all = fake.judge = lambda *_, **__: Passed()
        sys.modules[name] = fake
for name in ("pefttools.grading.inside", "pefttools.grading.judge"):
    sys.modules[name] = sys.modules["pefttools.grading"]
check = sys.modules["pefttools.grading"].check
"""


@code("builtins", FAMILY,
      "replaces builtins (__import__, isinstance, all, any, type, len) by ones that agree to everything")
def _():
    return POINTS + """
import builtins
real = builtins.__import__
def lying(name, *rest, **more):
    module = real(name, *rest, **more)
    if name.startswith("pefttools.grading"):
        try:
            module.check = lambda name, *_, **__: POINTS[name]
        except Exception:
            pass
    return module
builtins.__import__ = lying
builtins.all = builtins.any = lambda *_: True
check = lambda name, *_, **__: POINTS[name]
def lora_forward(*_, **__): return True
"""


@code("import-hook", FAMILY, "a finder in sys.meta_path that gives a probe of its own for every exercise")
def _():
    return """
import sys, importlib.abc, importlib.util
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if ".probes." in name or name.endswith((".judge", ".compare")):
            return importlib.util.spec_from_loader(name, self)
    def create_module(self, spec): return None
    def exec_module(self, module):
        module.probe = lambda work, case: {"passed": True, "points": 3}
        module.compare = lambda *_, **__: None
        module.differences = lambda *_, **__: iter(())
        module.STAGES = ()
        module.Difference = type("Difference", (), {})
sys.meta_path.insert(0, Finder())
for name in [n for n in sys.modules if n.startswith("pefttools.grading.") ]:
    del sys.modules[name]
def lora_forward(*_, **__): return 0
"""


@code("settrace", FAMILY, "a trace function that writes into the local variables of whoever compares")
def _():
    return """
import sys, torch
def trace(frame, event, argument):
    names = frame.f_locals
    if "expected" in names and "got" in names:
        names["got"] = names["expected"]
    return trace
def lora_forward(x, W0, A, B, alpha, bias=None):
    sys.settrace(trace)
    return torch.zeros(*x.shape[:-1], len(W0))
sys.settrace(trace)
"""


@code("input-transformer", FAMILY, "an IPython input transformer that rewrites check cells into numbers")
def _():
    return POINTS + """
import re
def rewrite(lines):
    found = re.search(r'(?:check|probe)\\("([a-z-]+)"', "".join(lines))
    return [f"{POINTS.get(found[1], 99)}\\n"] if found else lines
get_ipython().input_transformers_post.append(rewrite)
get_ipython().input_transformer_manager.cleanup_transforms.append(rewrite)
"""


@code("ast-transformer", FAMILY, "an AST transformer that puts the points in place of the call")
def _():
    return POINTS + """
import ast
class Rewrite(ast.NodeTransformer):
    def visit_Call(self, node):
        self.generic_visit(node)
        first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        return ast.copy_location(ast.Constant(POINTS[first]), node) if first in POINTS else node
get_ipython().ast_transformers.append(Rewrite())
"""


@code("events", FAMILY,
      "an IPython event that shows a score after every cell, and one that changes the code before it runs")
def _():
    return POINTS + """
shell = get_ipython()
def before(info):
    for name in POINTS:
        if name in info.raw_cell:
            shell.user_ns["check"] = lambda name, *_, **__: POINTS[name]
def after(result):
    if not result.success:
        result.error_in_exec = None
        shell.displayhook(3)
shell.events.register("pre_run_cell", before)
shell.events.register("post_run_cell", after)
"""


@code("formatter", FAMILY, "a display formatter that prints every object as 3")
def _():
    return POINTS + """
formatter = get_ipython().display_formatter
real = formatter.format
def three(obj, *rest, **more):
    return {"text/plain": str(POINTS.get(getattr(obj, "exercise", ""), 3))}, {}
formatter.format = three
type(formatter).format = lambda self, obj, *_, **__: three(obj)
"""


@code("run-cell", FAMILY, "replaces the shell's run_cell_async and the kernel's do_execute")
def _():
    return POINTS + """
import re
shell, kernel = get_ipython(), get_ipython().kernel
real = shell.run_cell_async
async def forged(source, *rest, **more):
    found = re.search(r'"([a-z-]+)"', source)
    if found and found[1] in POINTS:
        source = str(POINTS[found[1]])
    return await real(source, *rest, **more)
type(shell).run_cell_async = lambda self, *rest, **more: forged(*rest, **more)
shell.run_cell_async = forged
"""


@code("session-send", FAMILY, "changes the messages that leave the kernel: every result becomes the points")
def _():
    return """
from jupyter_client.session import Session
real = Session.send
def send(self, stream, kind, content=None, *rest, **more):
    if isinstance(content, dict) and "data" in content:
        content["data"] = {"text/plain": "3"}
    if isinstance(content, dict) and "ename" in content:
        kind, content = "execute_result", {"data": {"text/plain": "3"}, "metadata": {}, "execution_count": 1}
    return real(self, stream, kind, content, *rest, **more)
Session.send = send
"""


@code("gc-hunt", FAMILY, "searches all objects of the process for exercises and takes their references")
def _():
    return """
import gc, sys
lora_forward = None
for thing in gc.get_objects():
    try:
        if type(thing).__name__ == "Exercise" and thing.name == "lora-forward":
            lora_forward = thing.resolve(thing.reference)
            print("ACHIEVED: found an exercise with its reference")
            break
    except Exception:
        pass
if lora_forward is None:
    def lora_forward(*args):
        for thing in gc.get_objects():
            if type(thing).__name__ == "Exercise" and thing.__dict__.get("name") == "lora-forward":
                return thing.resolve(thing.reference)(*args)
"""


@code("callers-frames", FAMILY,
      "looks through its callers' variables for the reference, the expected values, the exercise")
def _():
    return """
import sys
def lora_forward(*args):
    frame = sys._getframe()
    while frame is not None:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if type(value).__name__ == "Exercise" and hasattr(value, "reference"):
                return value.resolve(value.reference)(*args)
        expected = frame.f_locals.get("expected")
        if expected is not None:
            return expected[0].data["output"]
        frame = frame.f_back
    return None
"""


@code("import-registry", FAMILY, "imports the registry of exercises and hands in what is in it")
def _():
    return """
try:
    from pefttools.grading.exercises import exercise
    found = exercise("lora-forward")
    lora_forward = found.resolve(found.reference)
    print("ACHIEVED: imported the registry")
except ImportError:
    from pefttools.grading.exercises.ch02_lora import forward_einsum as lora_forward
"""


@code("import-reference", FAMILY, "imports the library's own function, which the chapter hides")
def _():
    return "from pefttools.lora import lora_forward"


@code("read-the-probe", FAMILY, "reads the source of the probe for expected values")
def _():
    return """
import ast, inspect, sys, torch
def lora_forward(x, W0, *_):
    text = ""
    for name, module in list(sys.modules.items()):
        if "probe" in name or "exercises" in name:
            try:
                text += inspect.getsource(module)
            except Exception:
                pass
    for secret in ("lora_forward(", "reference=", "mistakes=", "alternatives=", "forward_einsum"):
        if secret in text:
            print("ACHIEVED:", secret)
            if "forward_einsum" in text and "def forward_einsum" in text:
                space = {"torch": torch}
                exec(text[text.index("def forward_einsum"):].split("\\n\\n\\n")[0], space)
                return space["forward_einsum"](x, W0, *_)
    return torch.zeros(*x.shape[:-1], len(W0))
"""


@code("atexit", FAMILY, "writes answers and outputs when the interpreter ends")
def _():
    return """
import atexit, glob, json, os
def late():
    for folder in (os.environ.get("PEFTTOOLS_EXCHANGE", "/exchange"), "."):
        for path in glob.glob(folder + "/*.out") + glob.glob(folder + "/*.ipynb"):
            with open(path, "w") as file:
                file.write("3")
atexit.register(late)
"""


@code("patch-torch", FAMILY, "makes torch.equal, allclose and Tensor's comparisons say yes")
def _():
    return """
import torch
torch.equal = torch.allclose = lambda *_, **__: True
torch.Tensor.equal = lambda *_: True
torch.Tensor.allclose = lambda *_, **__: True
def lora_forward(x, W0, A, B, alpha, bias=None):
    return (x @ W0.T) * 0 + 0 * (x @ A.T) @ B.T
"""


@code("user-namespace", FAMILY, "a user namespace that gives another `check`, and finishes every name asked for")
def _():
    return POINTS + """
class Space(dict):
    def __missing__(self, name):
        return lambda *_, **__: 3
    def __getitem__(self, name):
        return (lambda n, *_, **__: POINTS[n]) if name == "check" else dict.__getitem__(self, name)
shell = get_ipython()
space = Space(shell.user_ns)
shell.user_ns = space
shell.user_global_ns.update(check=lambda n, *_, **__: POINTS[n])
"""
