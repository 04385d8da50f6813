"""The journal gives back what was scored, bit for bit; a line that is damaged is named and never a score."""

import json
import math
import random

import pytest

from depthfuse.errors import CheckpointError
from depthfuse.searching.intervals import Paired
from depthfuse.searching.journal import Journal
from depthfuse.searching.scoring import SubnetScore

ROWS = [
    ({}, SubnetScore(91.25, 0.30000000000000004)),
    ({"layer1.0": "compact"}, SubnetScore(90.0, 0.5)),
    ({"layer1.0": "dense", "layer2.1": "drop"}, SubnetScore(10.0, math.inf)),
    ({"layer2.1": "drop"}, SubnetScore(0.0, 1e-300)),
    ({"layer3.1": "drop"}, SubnetScore(80.0, 0.7, 0.1 + 0.2)),
    ({"layer3.1": "dense"}, SubnetScore(80.0, 0.7, math.inf)),
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "search.jsonl"
    book = Journal(path)
    for choices, score in ROWS:
        book.add(choices, score)
    return path


def rows_of(path):
    return list(Journal(path).rows.values())


def test_scores_come_back_exactly(path):
    assert rows_of(path) == ROWS
    Journal(path).add({"a": "b"}, SubnetScore(1.0, math.nan))
    assert math.isnan(Journal(path).get({"a": "b"}).loss)


def test_counts_beside_the_unpruned_net_come_back(path):
    Journal(path).add({"a": "b"}, SubnetScore(1.0, 0.5), Paired(200, 7, 3))
    book = Journal(path)
    assert book.pair({"a": "b"}) == Paired(200, 7, 3) and book.pair({}) is None
    assert rows_of(path) == [*ROWS, ({"a": "b"}, SubnetScore(1.0, 0.5))]


def test_a_cut_anywhere_drops_the_last_line_and_no_other(path):
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        rows = rows_of(path)
        assert rows == ROWS[: data[:length].count(b"\n")]
        assert path.stat().st_size == data[:length].rfind(b"\n") + 1


def test_a_flipped_bit_is_found_or_drops_the_last_line(path):
    data = path.read_bytes()
    rng = random.Random(0)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            rows = rows_of(path)
        except CheckpointError as error:
            assert f"{path}, line " in str(error) and "scored again" in str(error)
            assert path.read_bytes() == damaged
        else:  # white space or 1e-300 and 1E-300, or the last line's end
            assert rows == (ROWS[:-1] if position == len(data) - 1 else ROWS)


@pytest.mark.parametrize(
    "line",
    [
        *("[]", "null", "3", "{}", "", "\0", "[" * 10_000, "x" * 70_000),
        '{"choices": {}, "top1": 1.0, "loss": 1.0}',  # of an earlier version
        '{"choices": [], "top1": 1.0, "loss": 1.0, "sha256": ""}',
        '{"choices": {"a": 1}, "top1": 1.0, "loss": 1.0, "sha256": ""}',
        '{"choices": {}, "top1": "1", "loss": 1.0, "sha256": ""}',
        '{"choices": {}, "top1": NaN, "loss": 1.0, "sha256": ""}',
    ],
)
def test_a_line_of_another_kind_is_named(path, line):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(CheckpointError, match=r"search.jsonl, line 2, is damaged or of an earlier version"):
        Journal(path)


def test_a_journal_of_another_encoding_is_refused(path):
    path.write_bytes(path.read_text().encode("utf-16"))
    with pytest.raises(CheckpointError, match="line 1"):
        Journal(path)


def test_a_crafted_score_needs_its_types(path):
    row = json.loads(path.read_text().splitlines()[1])
    row["top1"] = 99.0
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(CheckpointError, match="checksum does not match"):
        Journal(path)
