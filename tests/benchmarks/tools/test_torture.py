"""The campaign's own parts: a job is killed where it should be, and its table counts what went wrong."""

from benchmarks.tools import torture


def test_a_killed_job_ends_with_the_same_bits_as_one_that_was_not(tmp_path):
    case = torture.killed(tmp_path, "baseline", 0)
    assert case["killed"] and not case["bad"], case
    assert not case["leftovers"]


def test_what_differs_is_named(tmp_path):
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "subnet.json").write_text(text)
    assert torture.differing(tmp_path / "a", tmp_path / "b") == ["subnet.json"]
    (tmp_path / "a" / "merged.safetensors").write_text("")
    assert torture.differing(tmp_path / "a", tmp_path / "b") == ["merged.safetensors", "subnet.json"]
    assert torture.differing(tmp_path / "a", tmp_path / "a") == []


def test_threads_at_one_path_get_on(tmp_path):
    assert torture.crowded(tmp_path, 0, rounds=16)["bad"] == []


def test_the_table_counts_what_went_wrong():
    cases = [
        {
            "way": "cuts",
            "cases": 10,
            "outcomes": {"refused": 9, "KeyError": 1},
            "bad": ["cut at 3: KeyError"],
        },
        {"way": "cuts", "cases": 10, "outcomes": {"refused": 10}, "bad": []},
        {"way": "killed prune", "cases": 1, "differing": [], "bad": False},
    ]
    table = torture.markdown(cases)
    assert "| cuts | 20 | refused 19, KeyError 1 | 1 |" in table
    assert "| killed prune | 1 | the same bits | 0 |" in table and "cut at 3" in table
