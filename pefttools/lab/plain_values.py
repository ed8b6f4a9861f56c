"""A value of Python's own types as JSON, and back: what may leave the process of a program. Standard library only.

    pack((1, {"a"}))   ["tuple", [1, ["set", ["a"]]]]        a JSON array is always [tag, data]

Subclasses go as what they are at bottom (a Counter is a dict, a named tuple a tuple), read by the base class's methods,
so that no method of the program's own decides what is sent. Generators, functions and objects are no data.
"""

import sys

WIDE = 80  # characters of a value in a message


def kinds():
    """{tag: (type, to data, from data)}; what is not imported by the program cannot be among its values."""
    found = {"list": (list, list, list), "tuple": (tuple, list, tuple), "set": (set, list, set),
             "frozenset": (frozenset, list, frozenset)}
    if deque := getattr(sys.modules.get("collections"), "deque", None):
        found["deque"] = deque, list, deque
    return found


def pack(value, depth=0):
    """A value as JSON, tagged: a JSON array is always [tag, data]. Raises TypeError for what is no plain data."""
    if value is None or isinstance(value, (bool, float, str)):
        return value if type(value) in (type(None), bool, float, str) else \
            (float.__float__(value) if isinstance(value, float) else str.__str__(value))
    if isinstance(value, int):
        number = int.__index__(value)
        return number if abs(number) < 1 << 64 else ["int", hex(number)]
    if depth > 50:
        raise TypeError("too deep")
    for tag, (kind, _, _) in kinds().items():
        if isinstance(value, kind):
            return [tag, [pack(item, depth + 1) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["dict", [[pack(k, depth + 1), pack(v, depth + 1)] for k, v in dict.items(value)]]
    if isinstance(value, type({}.keys())):
        return ["set", [pack(item, depth + 1) for item in value]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    import builtins

    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value or value is NotImplemented \
            or value is ...:
        return ["builtin", getattr(value, "__name__", str(value))]
    return pack_more(value)


def pack_more(value):
    """Dates, exact numbers and paths. Whoever has one has imported its module."""
    modules = sys.modules
    if dt := modules.get("datetime"):
        zone = getattr(value, "tzinfo", None)
        if isinstance(value, dt.datetime) and zone in (None, dt.timezone.utc):
            return ["datetime", [*value.timetuple()[:6], value.microsecond, zone is not None, value.fold]]
        if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
            return ["date", [value.year, value.month, value.day]]
        if isinstance(value, dt.time) and zone is None:
            return ["time", [value.hour, value.minute, value.second, value.microsecond]]
        if isinstance(value, dt.timedelta):
            return ["timedelta", [value.days, value.seconds, value.microseconds]]
    if (d := modules.get("decimal")) and isinstance(value, d.Decimal):
        return ["decimal", str(value)]
    if (f := modules.get("fractions")) and isinstance(value, f.Fraction):
        return ["fraction", [hex(value.numerator), hex(value.denominator)]]
    if (p := modules.get("pathlib")) and isinstance(value, p.PurePath):
        return ["path", str(value)]
    raise TypeError(f"a {type(value).__name__} is no plain data")


def unpack(data):
    """The value again. Raises ValueError for anything that `pack` does not make."""
    if not isinstance(data, list):
        if data is not None and not isinstance(data, (bool, int, float, str)):
            raise ValueError(f"no tagged value: {data!r}"[:WIDE])
        return data
    tag, inner = data
    if tag in ("list", "tuple", "set", "frozenset", "deque"):
        import collections  # before kinds() is asked

        assert collections
        return kinds()[tag][2](map(unpack, inner))
    if tag == "dict":
        return {unpack(k): unpack(v) for k, v in inner}
    if tag == "builtin":
        import builtins

        return getattr(builtins, str(inner))
    import datetime
    import decimal
    import fractions
    import pathlib

    def moment(year, month, day, hour, minute, second, micro, utc, fold):
        return datetime.datetime(year, month, day, hour, minute, second, micro, datetime.timezone.utc if utc else None,
                                 fold=fold)

    return {"int": lambda x: int(x, 16), "bytes": bytes.fromhex, "complex": lambda x: complex(*x),
            "range": lambda x: range(*x), "datetime": lambda x: moment(*x), "date": lambda x: datetime.date(*x),
            "time": lambda x: datetime.time(*x), "timedelta": lambda x: datetime.timedelta(*x),
            "decimal": decimal.Decimal, "fraction": lambda x: fractions.Fraction(*(int(n, 16) for n in x)),
            "path": pathlib.Path}[tag](inner)


def short(value):
    """For a message."""
    text = repr(value)
    return text if len(text) <= WIDE else text[:WIDE] + "…"
