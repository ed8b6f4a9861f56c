"""Somebody else's text, HTML and pictures as HTML that does nothing: no script, no request, no look of the page's own.

    text ─────► escaped, without terminal colours and control characters, of bounded length
    markdown ─► HTML ──┐
    HTML ──────────────┴► nh3: an allow-list of tags, no attribute but a harmless `style`, no link, no picture
    PNG in base64 ─► decoded, looked at, encoded again, of bounded size ─► <img src="data:image/png…">

The allow-list is nh3's (ammonia, which parses as browsers do); the pages that use this forbid everything in a
Content-Security-Policy as well.
"""

from __future__ import annotations

import base64
import binascii
import html
import re
import unicodedata

import nh3

TAGS = {
    "div",
    "p",
    "br",
    "hr",
    "span",
    "strong",
    "em",
    "b",
    "i",
    "u",
    "s",
    "del",
    "sub",
    "sup",
    "code",
    "pre",
    "kbd",
    "blockquote",
    "ul",
    "ol",
    "li",
    "dl",
    "dt",
    "dd",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "details",
    "summary",
    "h3",
    "h4",
    "h5",
    "h6",
}
# Nothing of these is shown, not even their text.
DROPPED = {
    "script",
    "style",
    "iframe",
    "object",
    "embed",
    "template",
    "noscript",
    "svg",
    "math",
    "title",
    "textarea",
    "select",
    "form",
    "button",
    "xmp",
    "noembed",
    "noframes",
    "audio",
    "video",
    "canvas",
    "applet",
}
STYLES = {
    "border-left",
    "background",
    "color",
    "padding",
    "margin",
    "margin-top",
    "line-height",
    "max-width",
    "display",
    "flex-wrap",
    "gap",
    "opacity",
    "font-size",
    "overflow-x",
}  # what a Verdict's box is made of
HARMLESS = re.compile(r"(?:[\w\s:;.,#%-]|rgba?\([0-9., ]*\))*")
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")

PICTURE = 3 * 2**20  # bytes of one picture
PIXELS = 25_000_000  # a small file may unpack to a picture that no browser survives


def text(value: object, limit: int = 20_000) -> str:
    """Any text, escaped; what stands in the middle of an endless one is left out."""
    value = (
        value
        if isinstance(value, str)
        else "".join(v for v in value if isinstance(v, str))
        if isinstance(value, list)
        else ""
    )
    cut = len(value) > limit
    if cut:
        left_out = len(value) - limit
        value = f"{value[: limit // 2]}\n… ({left_out:,} characters left out) …\n{value[-(limit // 2) :]}"
    value = ESCAPES.sub("", value).encode("utf-8", "replace").decode("utf-8")
    return html.escape("".join(c for c in value if c in "\n\t" or not _acts(c)))


def _acts(letter: str) -> bool:
    """Control characters, and those that turn the direction of the text after them round."""
    return (
        unicodedata.category(letter) in ("Cc", "Cs")
        or letter in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )


def markup(value: object) -> str:
    """HTML with only what the allow-list has; a `style` only of harmless properties and values."""
    if not isinstance(value, str):
        return ""
    return nh3.clean(
        value[:200_000],
        tags=TAGS,
        clean_content_tags=DROPPED,
        attributes={"*": {"style"}},
        attribute_filter=_attribute,
        set_tag_attribute_values={"details": {"open": "open"}},  # paper does not unfold
        filter_style_properties=STYLES,
        url_schemes=set(),
        strip_comments=True,
        link_rel=None,
    )


def _attribute(tag: str, name: str, value: str) -> str | None:
    if name == "style":
        return value if HARMLESS.fullmatch(value[:1000]) else None
    return value


def markdown(value: object, limit: int = 20_000) -> str:
    """Markdown as HTML; tags in it are shown as text, links and pictures by their words."""
    import mistune

    if not isinstance(value, str):
        return ""
    value = value if len(value) <= limit else value[:limit] + "\n\n…"
    try:
        made = mistune.create_markdown(escape=True, plugins=["table", "strikethrough"])(value)
    except Exception:  # whatever a parser makes of a stranger's text
        return f"<pre>{text(value)}</pre>"
    return markup(made)


def picture(value: object, words: str) -> str:
    """A PNG as an <img> with its data in it, or a sentence on why it is not shown."""
    if isinstance(value, list):
        value = "".join(v for v in value if isinstance(v, str))
    if not isinstance(value, str) or len(value) > PICTURE * 4 // 3 + 1000:
        return "<p class='quiet'>A picture was too large to be shown.</p>"
    try:
        data = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or not width or not height:
        return "<p class='quiet'>A picture could not be read.</p>"
    if len(data) > PICTURE or width * height > PIXELS or max(width, height) > 20_000:
        return "<p class='quiet'>A picture was too large to be shown.</p>"
    return f"<img alt='{text(words)}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"
