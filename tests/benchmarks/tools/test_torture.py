"""A small slice of the torture: kills of one stage, a crowd of threads, and the table that counts what went wrong.

In a process of its own, because forks of a test process would take its threads' locks with them.
"""

import json
import os
import subprocess
import sys
import textwrap

from on_request import on_request

from benchmarks.tools import kills, torture

START = """
    import sys, json, pathlib, torch
    torch.set_num_threads(1)
    from benchmarks.tools import torture
    work = pathlib.Path(sys.argv[1])
"""


def in_a_process(code, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DEPTHFUSE_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", textwrap.dedent(START) + textwrap.dedent(code), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@on_request("half a minute")
def test_a_job_killed_at_any_write_ends_with_the_same_bits(tmp_path):
    rows = in_a_process(
        "print(json.dumps(list(torture.kills(work, 6, torture.baseline_job, 'baseline'))))", tmp_path
    )
    assert len({row["case"] for row in rows}) == 6
    assert [row["wrong"] for row in rows] == [[]] * 6


@on_request("half a minute")
def test_a_job_that_forgets_what_it_did_is_noticed(tmp_path):
    """What the campaign is for: a write that is not atomic differs after a kill."""
    code = """
        import os
        def job(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "done").exists():
                return
            with open(folder / "done", "w") as file:
                file.write("half")
                file.flush()
                os.fsync(file.fileno())
                file.write(" and half")
            os.replace(folder / "done", folder / "done")
        print(json.dumps(list(torture.kills(work, 4, lambda work: job, "bad"))))
    """
    rows = in_a_process(code, tmp_path)
    assert any(row["wrong"] == ["done"] for row in rows)


@on_request("half a minute")
def test_threads_get_on(tmp_path):
    rows = in_a_process("print(json.dumps(list(torture.threads(work, 800))))", tmp_path)
    assert len(rows) == 10 and not any(row["wrong"] for row in rows)


def test_moments_are_spread_over_all_writes():
    assert list(kills.moments(3, 6)) == [(n, after) for n in (1, 2, 3) for after in (False, True)]
    few = list(kills.moments(50, 10))
    assert len(set(few)) == 10 and few[0][0] == 1 and few[-1][0] > 40


def test_the_table_counts_what_went_wrong(tmp_path):
    rows = [
        {
            "case": "latency.json, cut",
            "file": "latency.json",
            "damage": "cut",
            "count": 9,
            "refused": 8,
            "equal": 0,
        },
        {
            "case": "latency.json, flip",
            "file": "latency.json",
            "damage": "flip",
            "count": 5,
            "refused": 4,
            "equal": 1,
        },
    ]
    rows[0]["wrong"], rows[1]["wrong"] = ["cut at 3: KeyError"], []
    rows.append({"finished": 14, "seconds": 3, "wrong": []})
    (tmp_path / "damage.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torture.write_table(tmp_path, tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert "| damage | 14 | 1 | 3 |" in text
    assert "| latency.json | cut | 9 | 8 | 0 |" in text and "| latency.json | flip | 5 | 4 | 1 |" in text
