"""Markup to plain text, for FHIR narratives (XHTML) and HTML attachments.

Not html.parser: on 200,000 characters of unclosed tags or attributes it needed minutes (it is
quadratic there), and on ``<![`` it raises with a piece of the note in the message. The pattern
below never looks past the next ``<`` twice, so any input takes linear time, and nothing is raised.
"""

from __future__ import annotations

import re
from html import unescape

_TOKEN = re.compile(
    r"""
      <!--.*?(?:-->|\Z)                                             # comment
    | <!\[CDATA\[(?P<literal>.*?)(?:\]\]>|\Z)
    | <(?P<hidden>script|style)\b[^<>]*(?<!/)>.*?(?:</(?P=hidden)\s*>|\Z)
    | <(?P<end>/?)(?P<tag>[a-z][a-z0-9:]*)
        (?:  (?:[^<>"']++ | "[^"<]*+" | '[^'<]*+')*+>               # a well-formed tag
           | [^<>]*>  )                                             # a stray quote in it
    | <[!?/][^<>]*>                                                 # declaration, instruction
    | (?P<text>[^<]+ | <)
    """,
    re.DOTALL | re.IGNORECASE | re.VERBOSE,
)
_BLOCKS = frozenset({
    "address", "article", "blockquote", "body", "br", "caption", "dd", "div", "dl", "dt", "figure",
    "footer", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header", "hr", "html", "li", "main",
    "ol", "p", "pre", "section", "table", "tbody", "tfoot", "thead", "title", "tr", "ul",
})  # fmt: skip
_SPACES = re.compile(r"[^\S\n]+")


def to_text(markup: str) -> str:
    """Text with one line a block, ``- `` before list items and a tab between the cells of a table.

    Line ends in the source are kept: many systems put plain text into a ``div``.
    """
    parts: list[str] = []
    for token in _TOKEN.finditer(markup):
        if token["text"]:
            parts.append(_SPACES.sub(" ", unescape(token["text"])))
        elif token["literal"]:
            parts.append(_SPACES.sub(" ", token["literal"]))
        elif token["tag"]:
            parts.append(_break(token["tag"].lower().rpartition(":")[2], bool(token["end"])))
    joined = re.sub(" {2,}", " ", "".join(parts))  # spaces on both sides of a tag
    lines = [line.strip() for line in joined.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _break(tag: str, end: bool) -> str:
    if tag in ("td", "th"):
        return "\t" if end else ""
    if tag == "li" and not end:
        return "\n- "
    return "\n" if tag in _BLOCKS else ""
