"""Markup becomes the text a reader would see, whatever the markup, in linear time."""

from __future__ import annotations

import time
from html import escape

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from client.notes.markup import to_text

WORDS = st.lists(st.text("abcxyz0<>&\"'", min_size=1, max_size=6), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<p>Alert.</p><p>Afebrile.</p>", "Alert.\n\nAfebrile."),
        ("temp &gt; 38&nbsp;&#176;C, K&lt;3", "temp > 38 °C, K<3"),
        ("one<br/>two<BR>three", "one\ntwo\nthree"),
        ("<ul><li>aspirin</li><li>statin</li></ul>", "- aspirin\n\n- statin"),
        ("<table><tr><td>Na</td><td>140</td></tr></table>", "Na\t140"),
        ("a<b>b</b>c <i title='x > y'>d</i>", "abc d"),
        ("line one\n  line   two", "line one\nline two"),
        ("<style>p {color: red}</style>seen<script>1 < 2</script>", "seen"),
        ("<![CDATA[SpO2 < 90]]> on air", "SpO2 < 90 on air"),
        ("seen <!-- draft > --> today <?pi x?>", "seen today"),
        ("K < 3 and Na > 140", "K < 3 and Na > 140"),
        ("<![endif]>kept<p title=it's>here", "kept\nhere"),
        ("<xhtml:p>a</xhtml:p>b", "a\nb"),
    ],
)
def test_examples(markup: str, text: str) -> None:
    assert to_text(markup) == text


@hypothesis_settings(deadline=None)
@given(st.lists(WORDS, max_size=5))
def test_escaped_paragraphs_come_back(paragraphs: list[list[str]]) -> None:
    markup = "".join(f"<p class='a'>{escape(' '.join(words))}</p>" for words in paragraphs)
    assert to_text(markup) == "\n\n".join(" ".join(words) for words in paragraphs)


@hypothesis_settings(deadline=None)
@given(st.text("<>/!-[]\"' =&;abspCDATA\n", max_size=80))
def test_any_input_gives_text(markup: str) -> None:
    text = to_text(markup)
    assert text == text.strip()
    assert "\n\n\n" not in text


@pytest.mark.parametrize(
    "piece", ["<a ", "<!--", "<a b='", "</", "<", "<script ", "<![CDATA[", "</td>"]
)
def test_hostile_markup_is_quick(piece: str) -> None:
    start = time.perf_counter()
    to_text(piece * 60_000)
    assert time.perf_counter() - start < 2
