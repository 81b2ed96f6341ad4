"""What every reader does to the text and the ids it found, whatever the format.

Guarantee: an accepted text is valid Unicode in normal form C, has no control characters but newline
and tab, and is ``min_chars`` to ``max_chars`` characters long. All steps are linear in its length.
"""

from __future__ import annotations

import math
import re
import unicodedata

from client.notes.note import BadRecord, Reason

MAX_ID = 256  # characters; a longer "id" is a wrongly chosen field, perhaps the note itself

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
_MOST_MARKS = 30  # in a row; no script needs more (Unicode Annex 15, section 13)


def clean_text(text: str, min_chars: int, max_chars: int) -> str:
    """The note's text, normalised. Raises BadRecord: too long, wrong encoding, empty, too short."""
    if len(text) > max_chars:
        raise BadRecord(Reason.TOO_LONG)
    text = _normalised(text)
    if not text:
        raise BadRecord(Reason.EMPTY)
    if len(text) < min_chars:
        raise BadRecord(Reason.TOO_SHORT)
    if len(text) > max_chars:  # a few characters are longer in normal form
        raise BadRecord(Reason.TOO_LONG)
    return text


def clean_id(value: object, field: str) -> str | None:
    """An id or a name as one line of text; None where the record has none.

    Whole numbers are accepted (floats too: a Parquet column of ids with gaps holds floats).
    Raises BadRecord: not text, too long, wrong encoding.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRecord(Reason.FIELD_NOT_TEXT.of(field))
    if (isinstance(value, int) and value.bit_length() > MAX_ID) or len(str(value)) > MAX_ID:
        raise BadRecord(Reason.FIELD_TOO_LONG.of(field))
    return " ".join(_normalised(str(value)).split()) or None


def _normalised(text: str) -> str:
    if not text.isascii():
        if _LONE_SURROGATE.search(text):
            raise BadRecord(Reason.ENCODING)
        text = _composed(text)
    return _CONTROL.sub("", _LINE_END.sub("\n", text)).strip()


def _composed(text: str) -> str:
    """Normal form C. It is quadratic in a run of combining marks, so long runs are refused."""
    marks = "".join(filter(unicodedata.combining, set(text)))
    if marks and re.search(f"[{re.escape(marks)}]{{{_MOST_MARKS + 1}}}", text):
        raise BadRecord(Reason.ENCODING)
    return unicodedata.normalize("NFC", text)
