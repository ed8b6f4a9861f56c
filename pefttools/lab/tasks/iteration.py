"""Loops, generators and recursion."""

from __future__ import annotations

from pefttools.lab.tasks.core import COMPARE, Kind, holds


def steps_down(n: int, k: int, limit: int) -> int:
    return 0 if n < limit else 1 + steps_down(n // k, k, limit)


KINDS = [
    Kind(
        "count_down", "iteration",
        wordings=(
            "$write that lists the numbers from `$arg` down to $stop, $last_said, in steps of $k.",
            "$write that counts down from `$arg` to $stop ($last_said) by $k and returns a list.",
            "`$name($arg)` should count down by $k from `$arg` to $stop, $last_said.",
            "$write: the list of numbers from `$arg` down to $stop, $last_said, by $k.",
            "Count down from `$arg` to $stop, $last_said, by $k. The function is `$head`.",
            "$write to list numbers from `$arg` down to $stop ($last_said) in steps of $k.",
        ),
        held_out=(
            "$write that returns a list from `$arg` down by $k to $stop, $last_said.",
            "In steps of $k, `$head` lists the numbers down to $stop, $last_said.",
        ),
        draw=lambda d: (lambda stop, extra, end: dict(
            name=d.name("count", "list", "step", "walk"), arg=d.one("start", "n", "top", "first"), k=d.number(2, 12),
            stop=stop, last=stop - extra, last_said=end))(
            d.number(2, 60), *d.one((1, "included"), (0, "excluded"))),
        head="$name($arg)",
        keywords=("arg",),
        code="def $name($arg):\n    return list(range($arg, $last, -$k))",
        calls=lambda s: [(s.stop + 3 * s.k,), (s.stop + 3 * s.k + 1,), (s.stop,), (s.stop + 2 * s.k - 1,)],
        answer=lambda s, n: [n - i * s.k for i in range(n) if n - i * s.k >= s.last + 1],
        example=lambda s: f"from {s.stop + 2 * s.k}",
        new=True,
    ),
    Kind(
        "recursive", "iteration",
        wordings=(
            "Write a recursive function `$name`: for 0 it is $base, else `n` times $a plus itself at n - 1.",
            "Write a recursive `$name(n)` that is $base at 0 and otherwise $a * n plus `$name` of n - 1.",
            "`$name(0)` is $base and `$name(n)` is $a times n plus `$name(n - 1)`. Use recursion.",
            "Define `$name(n)` by recursion: $base for n = 0, else $a * n plus `$name(n - 1)`.",
            "Use recursion in `$name(n)`: return $base for 0, else $a * n + `$name(n - 1)`.",
            "I need a recursive `$name(n)`: at 0 it gives $base, else $a times n plus the one before.",
        ),
        held_out=(
            "Please write a recursive `$name(n)`: $base for n = 0, otherwise $a * n plus `$name(n - 1)`.",
            "By recursion, `$name(n)` returns $base at 0 and else $a times n plus `$name(n - 1)`.",
        ),
        draw=lambda d: dict(name=d.name("sum", "compute", "build", "grow"), base=d.number(1, 60), a=d.number(2, 60)),
        code="def $name(n):\n    if n == 0:\n        return $base\n    return $a * n + $name(n - 1)",
        calls=lambda s: [(0,), (1,), (6,)],
        answer=lambda s, n: s.base + s.a * sum(range(n + 1)),
    ),
    Kind(
        "generator", "iteration",
        wordings=(
            "Write a generator `$name($arg)` that yields `$arg` numbers: $start, then each $k more.",
            "Write a generator `$name($arg)`: `$arg` numbers from $start on, in steps of $k.",
            "Define a generator `$name($arg)` that starts at $start and adds $k each time, `$arg` numbers in all.",
            "Create a generator `$name($arg)` of `$arg` numbers that start at $start and grow by $k.",
            "`$name($arg)` should yield `$arg` numbers, beginning with $start and each $k more.",
            "I need a generator `$name($arg)`: it yields `$arg` numbers from $start, $k apart.",
        ),
        held_out=(
            "Please write a generator `$name($arg)` that yields `$arg` numbers from $start by steps of $k.",
            "Starting at $start and adding $k each time, `$name($arg)` yields `$arg` numbers.",
        ),
        draw=lambda d: dict(name=d.name("walk", "count", "make", "iterate"), arg=d.one("n", "count", "limit", "size"),
                            start=d.number(2, 99), k=d.number(2, 60)),
        code="def $name($arg):\n    for i in range($arg):\n        yield $start + i * $k",
        tests=lambda s: [f"assert list({s.name}({s.arg}=4)) == {[s.start + s.k * i for i in (0, 1, 2, 3)]}",
                         f"assert list({s.name}(0)) == []", f"assert next(iter({s.name}(2))) == {s.start}"],
    ),
    Kind(
        "steps_below", "iteration",
        wordings=(
            "$write that counts how often a number must be divided by $k to get below $limit.",
            "$write that divides a number by $k until it is below $limit and returns the count.",
            "`$name` should count the divisions by $k until a number is below $limit.",
            "$write: how many whole divisions by $k bring the number below $limit.",
            "Count how often a number is divided by $k until below $limit. Call it `$name`.",
            "$write to count the steps if a number is divided by $k until it is below $limit.",
        ),
        held_out=(
            "$write that returns how many divisions by $k it takes to get below $limit.",
            "Until a number is below $limit, `$name` divides it by $k and counts the steps.",
        ),
        draw=lambda d: dict(name=d.name("count", "steps", "measure", "get"), k=d.number(2, 20), limit=d.number(2, 99)),
        code="def $name(n):\n    steps = 0\n    while n >= $limit:\n"
             "        n //= $k\n        steps += 1\n    return steps",
        calls=lambda s: [(s.limit - 1,), (s.limit,), (s.limit * s.k,), (s.limit * s.k - 1,), (s.limit * s.k ** 3,)],
        answer=lambda s, n: steps_down(n, s.k, s.limit),
    ),
    Kind(
        "running_total", "iteration",
        wordings=(
            "$write that returns the running totals of a list, starting at $start.",
            "$write that lists the sums so far of a list, counted from $start.",
            "`$name` should return the running sums of a list from $start on.",
            "$write: a list of running totals that begins with a total of $start.",
            "Return the running totals of a list, from a start of $start. Call it `$name`.",
            "$write to get running sums of a list; the total starts at $start.",
        ),
        held_out=(
            "$write that starts a total at $start and returns the running sums of a list.",
            "From a start of $start, `$name` lists the running totals of its numbers.",
        ),
        draw=lambda d: dict(name=d.name("sum", "total", "collect", "track"), start=d.number(2, 300)),
        code="def $name(values):\n    total = $start\n    result = []\n    for x in values:\n"
             "        total += x\n        result.append(total)\n    return result",
        calls=lambda s: [([1, 2, 3],), ([],), ([-5, 10],)],
        answer=lambda s, values: [s.start + sum(values[:i + 1]) for i in range(len(values))],
        example=lambda s: f"[1, 2, 3] gives [{s.start + 1}, {s.start + 3}, {s.start + 6}]",
    ),
    Kind(
        "sequence", "iteration",
        wordings=(
            "$write that starts with $start and `n` times multiplies by $k and adds $b.",
            "$write that repeats n times, from $start: multiply by $k, add $b.",
            "`$name(n)` starts at $start and then, n times, multiplies by $k and adds $b.",
            "$write: from $start, n times multiply by $k and add $b.",
            "Begin with $start; n times multiply by $k and add $b. Call it `$name`.",
            "$write to do this n times, from $start: times $k, plus $b.",
        ),
        held_out=(
            "$write that begins at $start and n times multiplies by $k, then adds $b.",
            "From $start on, `$name(n)` multiplies by $k and adds $b, n times.",
        ),
        draw=lambda d: dict(name=d.name("grow", "repeat", "compute", "run"), start=d.number(1, 60), k=d.number(2, 20),
                            b=d.number(1, 60)),
        code="def $name(n):\n    x = $start\n    for _ in range(n):\n        x = x * $k + $b\n    return x",
        calls=lambda s: [(0,), (1,), (4,)],
        answer=lambda s, n: s.start * s.k ** n + s.b * sum(s.k ** i for i in range(n)),
        new=True,
    ),
    Kind(
        "first_match", "iteration",
        wordings=(
            "$write that returns the first number of a list $op_said $n, or $default if there is none.",
            "$write that finds the first item $op_said $n in a list, else $default.",
            "`$name` should return the first number $op_said $n, or $default.",
            "$write: the first value $op_said $n in a list, $default if none.",
            "Return the first number $op_said $n of a list, $default if none. Call it `$name`.",
            "$write to find the first value $op_said $n, with $default as default.",
        ),
        held_out=(
            "$write that gives the first number in a list $op_said $n, $default if none.",
            "If a list has no number $op_said $n, `$name` returns $default, else the first such.",
        ),
        draw=lambda d: dict(name=d.name("find", "get", "search", "first"),
                            **d.distinct(("n", "default"), range(2, 300)),
                            **d.pick("op", COMPARE)),
        code="def $name(values):\n    for x in values:\n"
             "        if x $op $n:\n            return x\n    return $default",
        calls=lambda s: [([s.n, s.n + 1, s.n - 1],), ([s.n - 1, s.n + 1],),
                         ([],), ([s.n + 0.5, s.n, s.n + 2, -5],), ([s.n - 0.5],)],
        answer=lambda s, values: ([x for x in values if holds(s.op, x, s.n)] + [s.default])[0],
        new=True,
    ),
    Kind(
        "sum_multiples", "iteration",
        wordings=(
            "$write that sums the multiples of $k $end_said `$arg`.",
            "$write that returns the sum of all multiples of $k $end_said `$arg`.",
            "`$name($arg)` should add up the multiples of $k $end_said `$arg`.",
            "$write: the sum of the multiples of $k $end_said `$arg`.",
            "Sum all multiples of $k $end_said `$arg`. The function is `$head`.",
            "$write to add all multiples of $k $end_said `$arg`.",
        ),
        held_out=(
            "$write that adds up all the multiples of $k $end_said `$arg`.",
            "What is the sum of the multiples of $k $end_said `$arg`? Answer with `$head`.",
        ),
        draw=lambda d: dict(name=d.name("sum", "add", "total", "compute"), k=d.number(2, 60),
                            arg=d.one("n", "limit", "stop", "top"),
                            **d.pick("end", {"$arg": ("below", "less than"),
                                             "$arg + 1": ("up to and with", "not above")})),
        head="$name($arg)",
        keywords=("arg",),
        code="def $name($arg):\n    return sum(range(0, $end, $k))",
        calls=lambda s: [(s.k * 4,), (s.k * 4 - 1,), (s.k * 5 + 1,), (s.k,), (0,)],
        answer=lambda s, n: sum(i for i in range(1, n + 1) if i % s.k == 0 and (i < n or s.end != "$arg")),
    ),
    Kind(
        "numbered", "iteration",
        wordings=(
            "$write that pairs each item of a list with a number, from $start on in steps of $k.",
            "`$name` should return (number, item) pairs of a list; numbers start at $start, $k apart.",
        ),
        held_out=("$write that returns pairs of numbers and items: from $start, each $k more.",),
        draw=lambda d: dict(name=d.name("number", "pair", "label"), start=d.number(2, 60), k=d.number(2, 40)),
        code="def $name(items):\n    return [($start + i * $k, item) for i, item in enumerate(items)]",
        calls=lambda s: [(["a", "b", "c"],), ([],)],
        answer=lambda s, items: list(zip(range(s.start, s.start + s.k * len(items), s.k), items)),
        new=True,
    ),
]
