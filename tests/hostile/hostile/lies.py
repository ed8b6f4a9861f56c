"""Objects that lie about themselves: equal to everything, of every type, of every value."""

from __future__ import annotations

from hostile.attack import code

FAMILY = "lying objects"


@code("equal-to-all", FAMILY, "returns an object that is equal to everything, less than everything, and true")
def _():
    return """
class Liar:
    shape = dtype = property(lambda self: self)
    __eq__ = __le__ = __lt__ = __ge__ = __gt__ = __bool__ = __contains__ = lambda self, *_: True
    __ne__ = lambda self, *_: False
    __hash__ = lambda self: 0
    __call__ = __getattr__ = __getitem__ = lambda self, *_, **__: self
    __float__ = lambda self: 0.0
    __int__ = __index__ = __len__ = lambda self: 0
    __iter__ = lambda self: iter(())
    __repr__ = __str__ = lambda self: "3"
def lora_forward(*_, **__): return Liar()
"""


@code("of-every-class", FAMILY, "a metaclass and a __class__ that pass every isinstance")
def _():
    return """
import torch
class Meta(type):
    __instancecheck__ = __subclasscheck__ = __eq__ = lambda *_: True
    __hash__ = lambda self: hash(torch.Tensor)
class Liar(metaclass=Meta):
    __class__ = torch.Tensor
    __eq__ = lambda *_: True
    requires_grad = False
def lora_forward(*_, **__): return Liar()
"""


@code("tensor-subclass", FAMILY, "a tensor subclass whose __torch_function__ answers every comparison with True")
def _():
    return """
import torch
class Liar(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.equal, torch.allclose, torch.Tensor.equal, torch.Tensor.eq, torch.Tensor.__eq__):
            return True
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
        return found.as_subclass(cls) if isinstance(found, torch.Tensor) else found
def lora_forward(x, W0, A, B, alpha, bias=None):
    return (0 * (x @ W0.T) + 0 * (x @ A.T) @ B.T).as_subclass(Liar)
"""


@code("int-subclass", FAMILY, "an int that is equal to every int, and a float like it")
def _():
    return {"count-parameters": """
class Number(int):
    __eq__ = lambda *_: True
    __ne__ = lambda *_: False
    __hash__ = int.__hash__
    is_integer = lambda self: True
class Real(float):
    __eq__ = lambda *_: True
    __ne__ = lambda *_: False
    __hash__ = float.__hash__
    __int__ = lambda self: Number(7)
def count_parameters(shapes, r): return Real(7.0)
adapter_parameters = lora_parameters = count_parameters
"""}


@code("methods-on-a-tensor", FAMILY, "a true tensor with lying methods set on the instance (detach, cpu, clone, numel)")
def _():
    return """
import torch
def lora_forward(x, W0, A, B, alpha, bias=None):
    y = torch.zeros(*x.shape[:-1], len(W0)) + 0 * (x @ A.T) @ B.T
    for name in ("detach", "cpu", "clone", "equal", "numel", "isfinite", "to", "float", "double"):
        try:
            setattr(y, name, lambda *_, **__: True)
        except Exception:
            pass
    return y
"""


@code("changing-answers", FAMILY, "a str and a list that are another one each time they are read")
def _():
    return {"lora-q-scale": """
import itertools
class Letter(str):
    every = itertools.cycle("abcd")
    def strip(self, *_): return self
    def lower(self): return next(self.every)
    __eq__ = lambda *_: True
    __hash__ = str.__hash__
lora_q_scale = Letter("a")
"""}


@code("all-letters", FAMILY, "answers a question with all letters at once")
def _():
    return {"lora-q-scale": 'lora_q_scale = ["a", "b", "c", "d"]'}


@code("nan-everywhere", FAMILY,
      "NaN as output and as every gradient: equal to nothing, and not different by any number")
def _():
    return """
import torch
def lora_forward(x, W0, A, B, alpha, bias=None):
    return (x @ W0.T + (x @ A.T) @ B.T) * float("nan")
"""


@code("raises-a-liar", FAMILY,
      "raises an exception whose text, name and class are lies, BaseException and SystemExit among them")
def _():
    return """
class Passed(BaseException):
    __class__ = property(lambda self: NotImplementedError)
    __str__ = __repr__ = lambda self: "</pre><b>Passed</b> 3 of 3 points" * 10_000
Passed.__name__ = "Passed"
def lora_forward(*_, **__): raise Passed("3")
"""


@code("exits", FAMILY, "raises SystemExit(0) from the work")
def _():
    return "def lora_forward(*_, **__): raise SystemExit(0)"


@code("endless-generator", FAMILY, "returns a list of lists of itself, and an endless generator")
def _():
    return """
def lora_forward(*_, **__):
    found = []
    found.append(found)
    return [found, (n for n in iter(int, 1))]
"""


@code("lazy-number", FAMILY, "an object that becomes whatever number it is compared with")
def _():
    return {"count-parameters": """
class Echo:
    __float__ = __int__ = __index__ = lambda self: 7
    __eq__ = lambda self, other: True
    __array__ = lambda self, *_, **__: __import__("numpy").zeros(1)
    def __reduce__(self): return (eval, ("print('ACHIEVED: unpickled')",))
def count_parameters(shapes, r): return Echo()
adapter_parameters = lora_parameters = count_parameters
"""}
