"""JSON within bounds, and shapes of documents."""

import json
from typing import Any, Literal

import pytest

from depthfuse.untrusted import MAX_DEPTH, Either, Positive, conform, parse_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "finite"),
        ("[-Infinity]", "finite"),
        ('{"a": 1e999}', "finite"),
        ("1" + "0" * 30, "64 bits"),
        ("1" * 5000, "4300 digits"),
        ('"\\ud800"', "surrogates"),
        ('{"\\ud800": 1}', "surrogates"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        ("[" * 101 + "]" * 101, "deeper than 100"),
        ("[" * 100_000 + "]" * 100_000, "deeper than 100"),
        ('{"a":' * 100_000, "deeper than 100"),
        (b"\xff\xfe[\x001\x00]\x00", "utf-8"),
        (b'["\xe9"]', "utf-8"),
        ("\ufeff[]", "BOM"),
        ("[] []", "Extra data"),
        ("", "Expecting value"),
        ("\0", "Expecting value"),
    ],
)
def test_what_is_no_plain_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_plain_json_is_read_as_it_is():
    document = {"a": [1, 2.5, None, True, "é"], "b": {"c": -(2**62)}}
    assert parse_json(json.dumps(document).encode()) == document
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json("[NaN, 1e40, 100000000000000000000]", strict_numbers=False)[1] == 1e40
    with pytest.raises(ValueError, match="7 bytes of JSON, where 6 are the most"):
        parse_json("[1,2,3]", at_most=6)


SHAPE = {"a": float, "b?": [int], "c": dict[str, str | None], "d": Literal["x", "y"], "e": Positive, "*": Any}
GOOD = {"a": 1, "c": {"k": None, "l": "m"}, "d": "x", "e": 0.5, "more": []}


def test_a_document_of_the_shape_passes():
    conform(GOOD, SHAPE)
    conform(GOOD | {"b": [1, 2]}, SHAPE)
    conform({"u": 1}, Either({"t": int}, {"u": int}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": True}, "the document.a is bool True, where float is expected"),
        ({"a": "1"}, "the document.a is str"),
        ({"b": [1, 2.0]}, r"the document.b\[1\] is float 2.0, where int is expected"),
        ({"b": {}}, "where a list is expected"),
        ({"c": []}, "the document.c is list"),
        ({"c": {"k": 1}}, "the document.c.k is int 1, where str is expected"),
        ({"d": "z"}, "where one of 'x', 'y' is expected"),
        ({"d": True}, "where one of 'x', 'y' is expected"),
        ({"e": 0}, "a number above zero"),
        ({"e": -1.0}, "a number above zero"),
    ],
)
def test_what_is_amiss_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        conform(GOOD | change, SHAPE)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="the document lacks 'c'"):
        conform({"a": 1.0, "d": "x", "e": 1}, SHAPE)
    with pytest.raises(ValueError, match="is list"):
        conform([], SHAPE)
    with pytest.raises(ValueError, match="lacks 't'"):
        conform({}, Either({"t": int}, {"u": int}))
