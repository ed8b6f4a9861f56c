"""Dates: shift, format, compare. Nothing reads the clock."""

from __future__ import annotations

import datetime as dt
from typing import Any

from pefttools.lab.tasks.core import Draw, Kind
from pefttools.lab.tasks.words import MONTHS, WEEKDAYS

SETUP = "import datetime as _dt"
STEPS = {"days": "days", "weeks": "weeks", "hours": "hours", "minutes": "minutes"}
ORDERS = {"%d$sep%m$sep%Y": ("day, month and year", "day, month, year"),
          "%Y$sep%m$sep%d": ("year, month and day", "year, month, day"),
          "%m$sep%d$sep%Y": ("month, day and year", "month, day, year"),
          "%m$sep%Y": "month and year", "%d$sep%m": "day and month"}


def source(value: Any) -> str:
    """A date or time as the tests write it, under a name that no answer uses."""
    return repr(value).replace("datetime.", "_dt.")


def equal(name: str, value: dt.date, right: Any, argument: str = "") -> str:
    """A test: the function's answer for a date, given with the argument's name if there is one."""
    return f"assert {name}({argument and argument + '='}{source(value)}) == {source(right)}"


def date_slots(d: Draw) -> dict:
    """A date, and one of three ways to say it; of its parts the day is held out."""
    day = dt.date(d.rng.randrange(1990, 2031), d.rng.randrange(1, 13), d.number(1, 28))
    month = MONTHS[day.month]
    said = d.one(day.isoformat(), f"{month} {day.day}, {day.year}", f"{day.day} {month} {day.year}")
    return dict(date=f"{day.year}, {day.month}, {day.day}", date_said=said)


def day_of(s: dict) -> dt.date:
    return dt.date(*map(int, s["date"].split(",")))


def as_text(day: dt.date, s: dict) -> str:
    """The date as the slots `order` and `sep` want it."""
    parts = {"%d": f"{day.day:02}", "%m": f"{day.month:02}", "%Y": str(day.year)}
    return s["sep"].join(parts[part] for part in s["order"].split("$sep"))


def weekday_tests(s: dict) -> list[str]:
    """The weekday itself and the day after it, in years up to the slot `year` and later."""
    tests = []
    for year, shift in ((s["year"] + 1, 0), (s["year"], 0), (s["year"] + 3, 1), (s["year"] - 1, 0), (s["year"] + 9, 0)):
        day = dt.date(year, 5, 1)
        day += dt.timedelta((s["weekday"] - day.weekday()) % 7 + shift)
        right = day.strftime("%A") == s["weekday_said"] and day.year - s["year"] >= 1
        tests.append(f"assert {s['name']}({source(day)}) is {right}")
    return tests


KINDS = [
    Kind(
        "shift_date", "dates",
        wordings=(
            "$write that returns the time $n $unit_said $sign_said `$arg`.",
            "$write that gives the moment $n $unit_said $sign_said `$arg`.",
            "`$name($arg)` should return what is $n $unit_said $sign_said `$arg`.",
            "$write: the datetime $n $unit_said $sign_said `$arg`.",
            "Return the time $n $unit_said $sign_said `$arg`. The function is `$head`.",
            "$write to get the datetime $n $unit_said $sign_said `$arg`.",
        ),
        held_out=(
            "$write that finds the moment $n $unit_said $sign_said `$arg`.",
            "What time is $n $unit_said $sign_said `$arg`? Answer with `$head`.",
        ),
        draw=lambda d: dict(name=d.name("shift", "move", "get", "find"), n=d.number(2, 300),
                            arg=d.one("day", "start", "time", "date"),
                            **d.pick("unit", STEPS), **d.pick("sign", {"+": ("after", "later than"),
                                                                       "-": ("before", "earlier than")})),
        head="$name($arg)",
        code="from datetime import timedelta\n\ndef $name($arg):\n    return $arg $sign timedelta($unit=$n)",
        setup=SETUP,
        tests=lambda s: [equal(s.name, t, t + (1 if s.sign == "+" else -1) * dt.timedelta(
            seconds=s.n * {"days": 86400, "weeks": 604800, "hours": 3600, "minutes": 60}[s.unit]), s.arg)
            for t in (dt.datetime(2024, 2, 27, 13, 5), dt.datetime(1999, 12, 31))],
    ),
    Kind(
        "format_date", "dates",
        wordings=(
            "$write that formats a date as $order_said with '$sep' in between.",
            "$write that returns $order_said of a date as numbers joined by '$sep'.",
            "`$name` should write a date as $order_said with '$sep' between.",
            "$write: a text with $order_said of a date, joined by '$sep'.",
            "Format a date as $order_said with '$sep'. Call it `$name`.",
            "$write to show a date as $order_said, with '$sep' in between.",
        ),
        held_out=(
            "$write that shows $order_said of a date with '$sep' between.",
            "As $order_said, joined by '$sep', `$name` should format a date.",
        ),
        draw=lambda d: dict(name=d.name("format", "show", "print", "write"), sep=d.separator(),
                            **d.pick("order", ORDERS)),
        code="def $name(day):\n    return day.strftime('$order')",
        setup=SETUP,
        tests=lambda s: [equal(s.name, day, as_text(day, s)) for day in (dt.date(2024, 3, 17), dt.date(1998, 11, 5))],
        new=True,
    ),
    Kind(
        "month_day", "dates",
        wordings=(
            "$write that returns the date of $month_said $day in a year.",
            "$write that gives $month_said $day of the year as a date.",
            "`$name(year)` should return the date $month_said $day of that year.",
            "$write: for a year, the date of $month_said $day.",
            "Return $month_said $day of a year as a date. Call it `$name`.",
            "$write to get the date $month_said $day in a year.",
        ),
        held_out=(
            "$write that takes a year and returns $month_said $day in it as a date.",
            "For a year, `$name` returns the date of $month_said $day.",
        ),
        draw=lambda d: dict(name=d.name("get", "make", "find", "build"), day=d.number(1, 28),
                            **d.pick("month", MONTHS)),
        code="from datetime import date\n\ndef $name(year):\n    return date(year, $month, $day)",
        setup=SETUP,
        tests=lambda s: [f"assert {s.name}({year}) == _dt.date({year}, {s.month}, {s.day})" for year in (2024, 1987)],
        new=True,
    ),
    Kind(
        "days_until", "dates",
        wordings=(
            "$write that returns how many days it is from `$arg` to $date_said.",
            "$write that gives the days from the date `$arg` until $date_said.",
            "`$name($arg)` should return the number of days from `$arg` to $date_said.",
            "$write: the days from `$arg` to $date_said.",
            "Count the days from `$arg` to $date_said. The function is `$head`.",
            "$write to get the number of days from `$arg` until $date_said.",
        ),
        held_out=(
            "$write that counts the days from `$arg` until $date_said.",
            "How many days is it from `$arg` to $date_said? Answer with `$head`.",
        ),
        draw=lambda d: dict(name=d.name("count", "get", "find", "compute"), arg=d.one("day", "start", "today"),
                            **date_slots(d)),
        head="$name($arg)",
        code="from datetime import date\n\ndef $name($arg):\n    return (date($date) - $arg).days",
        setup=SETUP,
        tests=lambda s: [equal(s.name, day, day_of(s).toordinal() - day.toordinal(), s.arg)
                         for day in (dt.date(2000, 1, 1), dt.date(2030, 12, 24), day_of(s))],
        new=True,
    ),
    Kind(
        "is_weekday", "dates",
        wordings=(
            "$write that tells whether a date is a $weekday_said after the year $year.",
            "$write that checks if a day is a $weekday_said later than the year $year.",
            "`$name` should be True for a $weekday_said after the year $year.",
            "$write: True if the date is a $weekday_said after $year.",
            "Check if a date is a $weekday_said after the year $year. Call it `$name`.",
            "$write to test if a day is a $weekday_said after $year.",
        ),
        held_out=(
            "$write that returns whether a day is a $weekday_said after the year $year.",
            "Is a date a $weekday_said after $year? Answer with `$name`.",
        ),
        draw=lambda d: dict(name=d.name("is", "check", "test", "has"), year=d.number(1950, 2040),
                            **d.pick("weekday", WEEKDAYS)),
        code="def $name(day):\n    return day.weekday() == $weekday and day.year > $year",
        setup=SETUP,
        tests=weekday_tests,
    ),
    Kind(
        "date_before", "dates",
        wordings=(
            "$write that tells whether `$arg` is $op_said $date_said.",
            "$write that checks if the date `$arg` is $op_said $date_said.",
            "`$name($arg)` should be True if `$arg` is $op_said $date_said.",
            "$write: True when `$arg` is $op_said $date_said.",
            "Check if `$arg` is $op_said $date_said. The function is `$head`.",
            "$write to test if `$arg` is $op_said $date_said.",
        ),
        held_out=(
            "$write that returns whether `$arg` is $op_said $date_said.",
            "Is the date `$arg` $op_said $date_said? Answer with `$head`.",
        ),
        draw=lambda d: dict(name=d.name("is", "check", "test", "has"), arg=d.one("day", "start", "today"),
                            **date_slots(d), **d.pick("op", {"<": ("before", "earlier than"),
                                                             ">": ("after", "later than")})),
        head="$name($arg)",
        code="from datetime import date\n\ndef $name($arg):\n    return $arg $op date($date)",
        setup=SETUP,
        tests=lambda s: [f"assert {s.name}({s.arg}={source(day_of(s) + dt.timedelta(shift))}) is "
                         f"{shift < 0 if s.op == '<' else shift > 0}" for shift in (-1, 0, 1)],
        new=True,
    ),
    Kind(
        "time_step", "dates",
        wordings=(
            "$write that adds $h hours and $m minutes to a time.",
            "$write that returns a time plus $h hours and $m minutes.",
            "`$name` should return a time $h hours and $m minutes later.",
            "$write: the time, $h hours and $m minutes later.",
            "Add $h hours and $m minutes to a time. Call it `$name`.",
            "$write to move a time by $h hours and $m minutes.",
        ),
        held_out=(
            "$write that moves a time $h hours and $m minutes later.",
            "`$name` takes a time and adds $h hours, $m minutes.",
        ),
        draw=lambda d: dict(name=d.name("add", "shift", "move", "get"), h=d.number(2, 40), m=d.number(2, 59)),
        code="from datetime import timedelta\n\ndef $name(time):\n    return time + timedelta(hours=$h, minutes=$m)",
        setup=SETUP,
        tests=lambda s: [equal(s.name, t, t + dt.timedelta(seconds=60 * (60 * s.h + s.m)))
                         for t in (dt.datetime(2024, 2, 28, 23, 30), dt.datetime(2001, 7, 4))],
        new=True,
    ),
    Kind(
        "parse_date", "dates",
        wordings=(
            "$write that reads a datetime from a text with $order_said joined by '$sep'.",
            "`$name` should turn a text with $order_said, joined by '$sep', into a datetime.",
        ),
        held_out=("$write that makes a datetime from a text: $order_said with '$sep' between.",),
        draw=lambda d: dict(name=d.name("read", "parse", "load"), sep=d.separator(),
                            **d.pick("order", dict(list(ORDERS.items())[:3]))),
        code="from datetime import datetime\n\ndef $name(text):\n    return datetime.strptime(text, '$order')",
        setup=SETUP,
        tests=lambda s: [f"assert {s.name}({as_text(time, s)!r}) == {source(time)}"
                         for time in (dt.datetime(2024, 3, 7), dt.datetime(1998, 11, 5))],
        new=True,
    ),
]
