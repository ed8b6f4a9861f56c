"""Classes: fields, methods, defaults, errors."""

from __future__ import annotations

from pefttools.lab.tasks.core import Kind


KINDS = [
    Kind(
        "fields_class", "classes",
        wordings=(
            "$make with these two fields, set in its constructor.",
            "$make whose constructor takes these fields and keeps them.",
            "Class `$name` should make an object that keeps these two fields. Write it.",
            "$make that stores these fields.",
            "Write the class `$name`, made from the fields that it stores.",
            "$make with these attributes.",
        ),
        held_out=(
            "$make that is made from these fields and keeps both.",
            "The constructor of class `$name` takes these fields and stores them.",
        ),
        draw=lambda d: dict(name=d.class_name(), **d.fields("a", "b")),
        code="class $name:\n    def __init__(self, $a, $b):\n        self.$a = $a\n        self.$b = $b",
        tests=lambda s: [f"assert {s.name}(1, 'x').{s.a} == 1", f"assert {s.name}(1, 'x').{s.b} == 'x'",
                         f"assert {s.name}({s.b}=5, {s.a}=6).{s.a} == 6"],
        example="$a, $b",
    ),
    Kind(
        "counter_class", "classes",
        wordings=(
            "$make with a `$field` that starts at $start; its method `$method` adds $n to it.",
            "$make: `$field` is $start at first, and `$method()` adds $n.",
            "Class `$name` has a `$field` of $start, which `$method()` raises by $n. Write it.",
            "$make whose `$method` method adds $n to `$field`, which starts at $start.",
            "$make; its `$field` begins at $start and each `$method()` adds $n.",
            "Write `$name`, a class with `$field` = $start at first and `$method()`, which adds $n.",
        ),
        held_out=(
            "$make where `$method()` adds $n to a `$field` that begins at $start.",
            "The class `$name` starts with `$field` $start; calling `$method()` adds $n to it.",
        ),
        draw=lambda d: dict(name=d.class_name(), field=d.field(), start=d.number(0, 60), n=d.number(2, 60),
                            method=d.one("add", "push", "step", "move", "grow", "next", "run", "update", "tick")),
        code="class $name:\n    def __init__(self):\n        self.$field = $start\n\n"
             "    def $method(self):\n        self.$field += $n",
        tests=lambda s: [f"assert {s.name}().{s.field} == {s.start}",
                         f"_it = {s.name}()\n_it.{s.method}()\n_it.{s.method}()\n"
                         f"assert _it.{s.field} == {s.start + 2 * s.n}"],
        new=True,
    ),
    Kind(
        "dataclass_default", "classes",
        wordings=(
            "Write a dataclass `$name` with a text `$a` and a number `$b`, $n by default.",
            "Define a dataclass `$name`: text `$a`, number `$b` with default $n.",
            "Create a dataclass `$name` with a text field `$a` and a number field `$b` = $n.",
            "I need a dataclass `$name` that has a text `$a` and a number `$b` (default $n).",
            "Write `$name`, a dataclass with a text `$a` and a number `$b` that is $n if not given.",
            "Make `$name` a dataclass of a text `$a` and a number `$b`, with default $n.",
        ),
        held_out=(
            "Please write a dataclass `$name` of text `$a` and number `$b`, by default $n.",
            "Give me a dataclass `$name`: a text `$a` and a number `$b` ($n if not given).",
        ),
        draw=lambda d: dict(name=d.class_name(), n=d.number(2, 300), **d.fields("a", "b")),
        code="from dataclasses import dataclass\n\n@dataclass\nclass $name:\n    $a: str\n    $b: int = $n",
        tests=lambda s: [f"assert {s.name}('x').{s.b} == {s.n}",
                         f"assert {s.name}('x', 5) == {s.name}({s.a}='x', {s.b}=5)",
                         f"assert {s.name}('y', 7).{s.a} == 'y'"],
    ),
    Kind(
        "method_class", "classes",
        wordings=(
            "$make made from `$a`, with a method `$method` that returns `$a` $op_said $n.",
            "$make that keeps `$a`; its `$method()` returns `$a` $op_said $n.",
            "Class `$name` takes `$a`, and `$method()` returns `$a` $op_said $n. Write it.",
            "$make with a field `$a` and `$method()`, which gives `$a` $op_said $n.",
            "Write `$name`, a class made from `$a` whose `$method` returns `$a` $op_said $n.",
            "$make of `$a`, where `$method()` is `$a` $op_said $n.",
        ),
        held_out=(
            "$make that takes `$a` and has `$method()`, giving `$a` $op_said $n.",
            "The class `$name` stores `$a`; calling `$method()` returns `$a` $op_said $n.",
        ),
        draw=lambda d: dict(name=d.class_name(), a=d.field(), n=d.number(2, 300),
                            method=d.one("get", "compute", "show", "value", "result", "find", "read", "measure"),
                            **d.pick("op", {"+": "plus", "*": "times", "-": "minus"})),
        code="class $name:\n    def __init__(self, $a):\n        self.$a = $a\n\n"
             "    def $method(self):\n        return self.$a $op $n",
        tests=lambda s: [f"assert {s.name}({given}).{s.method}() == "
                         f"{ {'+': given + s.n, '-': given - s.n, '*': given * s.n}[s.op]}" for given in (9, 0, -41)]
        + [f"assert {s.name}({s.a}=4).{s.a} == 4"],
    ),
    Kind(
        "repr_class", "classes",
        wordings=(
            "$make made from `$a`, whose text form is '$word' plus `$a`.",
            "$make that keeps `$a`; str() of it gives '$word' followed by `$a`.",
            "Class `$name` takes `$a` and its str() is '$word' and `$a` together. Write it.",
            "$make of `$a`, with `__str__` returning '$word' and then `$a`.",
            "Write `$name`, a class made from `$a` whose `__str__` gives '$word' plus `$a`.",
            "$make with a field `$a`; its `__str__` is '$word' followed by `$a`.",
        ),
        held_out=(
            "$make that takes `$a`; `__str__` gives '$word' and `$a` together.",
            "The class `$name` stores `$a`, and its text form is '$word' followed by `$a`.",
        ),
        draw=lambda d: dict(name=d.class_name(), a=d.field(), word=d.word() + d.one("", " ", ": ", "=", "-")),
        code="class $name:\n    def __init__(self, $a):\n        self.$a = $a\n\n"
             "    def __str__(self):\n        return f'$word{self.$a}'",
        tests=lambda s: [f"assert str({s.name}(5)) == {s.word + '5'!r}",
                         f"assert str({s.name}('x y')) == {s.word + 'x y'!r}",
                         f"assert {s.name}({s.a}=3).{s.a} == 3"],
        new=True,
    ),
    Kind(
        "error_class", "classes",
        wordings=(
            "Write an error class `$name` based on `$base`, with `$field` = $n.",
            "Define an exception `$name` based on `$base` with `$field` set to $n.",
            "Create a `$base` subclass `$name` whose `$field` is $n.",
            "I need an error `$name` derived from `$base` that has `$field` $n.",
            "Write a subclass `$name` of `$base` with a class attribute `$field` of $n.",
            "Write `$name`, an exception that extends `$base` and has `$field` = $n.",
        ),
        held_out=(
            "Please write an exception `$name` that is based on `$base`, with `$field` = $n.",
            "Give me a subclass of `$base`, called `$name`, whose `$field` is $n.",
        ),
        draw=lambda d: dict(name=d.class_name() + "Error", field=d.field(), n=d.number(2, 300),
                            base=d.one("ValueError", "KeyError", "TypeError", "IndexError", "RuntimeError", "OSError")),
        code="class $name($base):\n    $field = $n",
        tests=lambda s: [f"assert {s.name}.__mro__[1] is {s.base}", f"assert {s.name}('x').{s.field} == {s.n}"],
    ),
    Kind(
        "limit_class", "classes",
        wordings=(
            "$make with `$limit` = $n and a method `$method` that tells if a value is $op_said it.",
            "$make: its `$limit` is $n, and `$method(x)` checks if x is $op_said `$limit`.",
            "Class `$name` has a `$limit` of $n; `$method(x)` is True if x is $op_said it. Write it.",
            "$make whose `$method(x)` tells if x is $op_said its `$limit`, $n.",
            "Write `$name`, a class with `$limit` $n and `$method(x)`: is x $op_said `$limit`?",
            "$make with a `$limit` of $n, where `$method` tests if x is $op_said it.",
        ),
        held_out=(
            "$make that has a `$limit` of $n and `$method(x)`, True if x is $op_said it.",
            "The class `$name` sets `$limit` to $n, and `$method(x)` tells if x is $op_said that.",
        ),
        draw=lambda d: dict(name=d.class_name(), n=d.number(2, 300), limit=d.field(),
                            method=d.one("check", "allows", "accepts", "test", "fits", "match", "valid"),
                            **d.pick("op", {">": ("more than", "over", "above"), "<": ("less than", "below")})),
        code="class $name:\n    $limit = $n\n\n    def $method(self, x):\n        return x $op self.$limit",
        tests=lambda s: [f"assert {s.name}().{s.method}({s.n + k}) is {k > 0 if s.op == '>' else k < 0}"
                         for k in (-1, 0, 1)]
        + [f"assert {s.name}.{s.limit} == {s.n}"],
        new=True,
    ),
    Kind(
        "named_tuple", "classes",
        wordings=(
            "Write a named tuple `$name` with the fields `$a` and `$b`.",
            "Define `$name` as a named tuple of `$a` and `$b`.",
        ),
        held_out=("Please write `$name`, a named tuple that has `$a` and `$b`.",),
        draw=lambda d: dict(name=d.class_name(), **d.fields("a", "b")),
        code="from collections import namedtuple\n\n$name = namedtuple('$name', ['$a', '$b'])",
        tests=lambda s: [f"assert {s.name}(1, 2) == (1, 2)", f"assert {s.name}({s.b}=3, {s.a}=4) == (4, 3)",
                         f"assert {s.name}(5, 6).{s.b} == 6"],
        new=True,
    ),
]
