"""Files: read, write, list. The tests write what they read, in the current folder, which should be a fresh one."""

from __future__ import annotations

from pefttools.lab.tasks.core import Kind

PATHS = "from pathlib import Path as _Path"


def reads(name: str, content: str, right: object) -> str:
    """A test: write `content` to a file, then `name(path)` must return `right`."""
    return f"_Path('sample.txt').write_text({content!r})\nassert {name}('sample.txt') == {right!r}"


def list_tests(s: dict) -> list[str]:
    """A folder with three files that count and two that do not, and an empty folder."""
    names = [f"{letter}.{s['suffix']}" for letter in "bac"]
    right = sorted(names, reverse=bool(s["order"]))
    return [f"_Path('box').mkdir(exist_ok=True)\n"
            f"for _n in {[*names, 'd.x', s['suffix'] + '.y']}:\n    (_Path('box') / _n).touch()\n"
            f"assert {s['name']}({s['arg']}='box') == {right}",
            f"_Path('none').mkdir(exist_ok=True)\nassert {s['name']}('none') == []"]


KINDS = [
    Kind(
        "count_lines_with", "files",
        wordings=(
            "$write that counts the lines of the file `path` that $keep_said '$word'.",
            "$write that returns how many lines of a file $keep_said '$word'.",
            "`$name(path)` should count the lines in a file that $keep_said '$word'.",
            "$write: the number of lines in the file `path` that $keep_said '$word'.",
            "Count the lines of a file that $keep_said '$word'. Call it `$name`.",
            "$write to open a file and count the lines that $keep_said '$word'.",
        ),
        held_out=(
            "$write that opens a file and returns how many lines $keep_said '$word'.",
            "How many lines of a file $keep_said '$word'? Answer with `$name(path)`.",
        ),
        draw=lambda d: dict(name=d.name("count", "tally", "number"), word=d.word(),
                            **d.pick("keep", {"in": ("contain", "have", "include"),
                                              "not in": ("do not contain", "do not have")})),
        code="def $name(path):\n    with open(path) as file:\n        return sum('$word' $keep line for line in file)",
        setup=PATHS,
        tests=lambda s: [reads(s.name, content, sum((s.word in line) == (s.keep == "in")
                                                    for line in content.splitlines()))
                         for content in (f"a {s.word}\nb\n{s.word} {s.word}\n{s.word}s\nend\n\nx\n", "",
                                         f"{s.word[:-1]}\n{s.word[1:]}\n{s.word}")],
        example="path = 'log.txt'",
    ),
    Kind(
        "save_text", "files",
        wordings=(
            "$write that $mode_said `$arg` to the file '$file'.",
            "$write that takes `$arg` and $mode_said it to '$file'.",
            "`$name($arg)` $mode_said `$arg` to the file '$file'.",
            "$write: it opens '$file' and $mode_said `$arg` to it.",
            "A function `$head` $mode_said the text `$arg` to '$file'. Write it.",
            "$write; it $mode_said `$arg` to a file '$file'.",
        ),
        held_out=(
            "$write that opens the file '$file' and $mode_said `$arg` to it.",
            "To the file '$file', `$head` $mode_said the text `$arg`.",
        ),
        draw=lambda d: dict(name=d.name("save", "store", "log", "keep"), arg=d.one("text", "line", "data", "message"),
                            file=f"{d.word()}.{d.one('txt', 'log', 'csv')}",
                            **d.pick("mode", {"w": "writes", "a": ("appends", "adds")})),
        head="$name($arg)",
        code="def $name($arg):\n    with open('$file', '$mode') as file:\n        file.write($arg)",
        setup=PATHS,
        tests=lambda s: [
            f"_Path({s.file!r}).write_text('old ')\n{s.name}('new')\n"
            f"assert _Path({s.file!r}).read_text() == {('old ' if s.mode == 'a' else '') + 'new'!r}",
            f"_Path({s.file!r}).unlink(missing_ok=True)\n{s.name}({s.arg}='x')\n"
            f"assert _Path({s.file!r}).read_text() == 'x'"],
    ),
    Kind(
        "file_part", "files",
        wordings=(
            "$write that returns $part_said $n lines of a file as a list.",
            "$write that reads the file `path` and gives $part_said $n lines.",
            "`$name(path)` should return a list of $part_said $n lines of a file.",
            "$write: a list of $part_said $n lines in the file `path`.",
            "Return $part_said $n lines of a file as a list. Call it `$name`.",
            "$write to read $part_said $n lines of a file, without line ends.",
        ),
        held_out=(
            "$write that opens a file and returns $part_said $n lines.",
            "From the file `path`, `$name` returns a list of $part_said $n lines.",
        ),
        draw=lambda d: dict(name=d.name("read", "load", "get", "show"), n=d.number(2, 30),
                            **d.pick("part", {":$n": "the first", "-$n:": "the last", "$n:": "all but the first"})),
        code="def $name(path):\n    with open(path) as file:\n        return file.read().splitlines()[$part]",
        setup=PATHS,
        tests=lambda s: [reads(s.name, "".join(f"line {line}\n" for line in range(count)),
                               [f"line {i}" for i in range(count) if {":$n": i < s.n, "-$n:": count - i <= s.n,
                                                                      "$n:": i >= s.n}[s.part]])
                         for count in (s.n * 2 + 1, 1)],
        new=True,
    ),
    Kind(
        "json_field", "files",
        wordings=(
            "$write that loads a JSON file and returns its '$key' plus $n.",
            "$write that reads JSON from `path` and returns '$key' plus $n.",
            "`$name(path)` should read a JSON file and return its '$key' plus $n.",
            "$write: it loads JSON from the file `path` and gives '$key' plus $n.",
            "Load the JSON file `path` and return '$key' plus $n. Call it `$name`.",
            "$write to get '$key', with $n added, from a JSON file.",
        ),
        held_out=(
            "$write that opens a JSON file and adds $n to its '$key'.",
            "From a JSON file, `$name(path)` returns the '$key' plus $n.",
        ),
        draw=lambda d: dict(name=d.name("load", "read", "get", "find"), key=d.field(), n=d.number(2, 300)),
        code="import json\n\ndef $name(path):\n    with open(path) as file:\n"
             "        return json.load(file)['$key'] + $n",
        setup=PATHS,
        tests=lambda s: [reads(s.name, f'{{"{s.key}": {value}, "x": 1}}', value + s.n) for value in (5, -3, 0)],
        new=True,
        example=lambda s: f'{{"{s.key}": {len(s.name)}}}',
    ),
    Kind(
        "change_suffix", "files",
        wordings=(
            "$write that changes folder and suffix of a path like this.",
            "$write that gives a path a new folder and suffix, as in the example.",
            "`$name(path)` should change a path as in the example.",
            "$write: the stem of the path stays, folder and suffix change as shown.",
            "Change the folder and suffix of a path as shown. Call it `$name`.",
            "$write to change paths in this way.",
        ),
        held_out=(
            "$write that changes paths as shown here.",
            "As in the example, `$name` gives a path a new folder and suffix.",
        ),
        draw=lambda d: dict(name=d.name("change", "move", "convert", "target"), folder=d.word(),
                            suffix=d.one("txt", "csv", "json", "log", "md", "py", "html", "xml", "png", "pdf")),
        code="from pathlib import Path\n\ndef $name(path):\n    return f'$folder/{Path(path).stem}.$suffix'",
        calls=lambda s: [("a/b.txt",), ("c.md",), ("x/y/z.data",)],
        answer=lambda s, path: s.folder + "/" + path.split("/")[-1].split(".")[0] + "." + s.suffix,
        example="'old/file.dat' -> '$folder/file.$suffix'",
    ),
    Kind(
        "list_files", "files",
        wordings=(
            "$write that lists the names of all '.$suffix' files in `$arg`, sorted, $order_said.",
            "$write that returns the sorted '.$suffix' file names in `$arg`, $order_said.",
            "`$name($arg)` should list the '.$suffix' files in `$arg`, $order_said.",
            "$write: the names of the '.$suffix' files in `$arg`, $order_said.",
            "List the '.$suffix' files of `$arg`, $order_said. The function is `$head`.",
            "$write to get the names of '.$suffix' files in `$arg`, $order_said.",
        ),
        held_out=(
            "$write that returns the names of '.$suffix' files in `$arg`, $order_said.",
            "Which '.$suffix' files are in `$arg`? `$head` returns their names, $order_said.",
        ),
        draw=lambda d: dict(name=d.name("list", "find", "show", "get"), suffix=d.word(),
                            arg=d.one("folder", "path", "place", "root"),
                            **d.pick("order", {"": "from a to z", ", reverse=True": "from z to a"})),
        head="$name($arg)",
        code="from pathlib import Path\n\ndef $name($arg):\n"
             "    return sorted((p.name for p in Path($arg).glob('*.$suffix'))$order)",
        setup=PATHS,
        tests=list_tests,
    ),
    Kind(
        "csv_column", "files",
        wordings=(
            "$write that returns a list of the parts at index $i of each line of a file, split at '$sep'.",
            "`$name(path)` should split the lines of a file at '$sep' and list the parts at index $i.",
        ),
        held_out=("$write that lists what is at index $i in each line of a file split by '$sep'.",),
        draw=lambda d: dict(name=d.name("read", "load", "list"), i=d.one(0, 1, 2, 3), sep=d.separator()),
        code="def $name(path):\n    with open(path) as file:\n"
             "        return [line.strip().split('$sep')[$i] for line in file]",
        setup=PATHS,
        tests=lambda s: [reads(s.name, "".join(s.sep.join(row) + "\n" for row in rows), [row[s.i] for row in rows])
                         for rows in (["abcde", "fghij"], [["k1", "l2", "m3", "n4"]])],
        new=True,
    ),
]
