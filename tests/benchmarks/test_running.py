"""An interrupted run continues at the place where it stopped, if it is the same run."""

import json

import pytest


@pytest.fixture
def work():
    """A plan of three units, the last of which fails some times; and a list of calls."""
    from benchmarks.running import Plan, Unit

    ran, failures = [], []

    def unit(key):
        def run():
            ran.append(key)
            if key == "c" and failures:
                raise KeyboardInterrupt
            return {"samples": [[key, (1, 2)]], "checked": [] if key == "b" else [[key]]}

        return Unit(key, run)

    def plan(**settings):
        return Plan({"dtype": "float32", **settings}, [unit(key) for key in "abc"])

    return plan, ran, failures


def interrupted(plan, failures, folder):
    from benchmarks import running

    failures.append(True)
    with pytest.raises(KeyboardInterrupt):
        running.run("work", plan, "command", folder)
    failures.clear()


def test_an_interrupted_run_goes_on(work, tmp_path):
    from benchmarks import records, running

    plan, ran, failures = work
    interrupted(plan(), failures, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["work.partial.jsonl"]
    ran.clear()
    found = running.run("work", plan(), "command", tmp_path)
    assert ran == ["c"] and found["resumed after"] == 2
    # In the order of the plan, each once, the same as in one go.
    assert found["samples"] == [["a", [1, 2]], ["b", [1, 2]], ["c", [1, 2]]]
    assert found["checked"] == [["a"], ["c"]]
    assert records.read("work", tmp_path) == found
    assert [path.name for path in tmp_path.iterdir()] == ["work.json"]
    assert "resumed after" not in running.run("work", plan(), "command", tmp_path)


def test_another_run_begins_anew(work, tmp_path, monkeypatch):
    from benchmarks import records, running

    plan, ran, failures = work

    def ran_again(plan, command="command"):
        ran.clear()
        running.run("work", plan, command, tmp_path)
        return ran.copy()

    interrupted(plan(), failures, tmp_path)
    assert ran_again(plan(dtype="bfloat16")) == ["a", "b", "c"]
    interrupted(plan(), failures, tmp_path)
    assert ran_again(plan(), "command --quick") == ["a", "b", "c"]
    for where in ("_machine", "_versions"):
        interrupted(plan(), failures, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(records, where, lambda: {"other": "1"})
            assert ran_again(plan()) == ["a", "b", "c"]
    interrupted(plan(), failures, tmp_path)
    monkeypatch.setattr(running, "_sources", lambda: "changed")
    assert ran_again(plan()) == ["a", "b", "c"]


def test_a_line_that_was_cut_off_is_done_again(work, tmp_path):
    plan, ran, failures = work
    interrupted(plan(), failures, tmp_path)
    path = tmp_path / "work.partial.jsonl"
    path.write_text(path.read_text()[:-20])
    ran.clear()
    from benchmarks import running

    running.run("work", plan(), "command", tmp_path)
    assert ran == ["b", "c"]


def test_a_finished_file_stays_until_the_next_is_finished(work, tmp_path):
    from benchmarks import records, running

    plan, _, failures = work
    first = running.run("work", plan(), "command", tmp_path)
    interrupted(plan(other=1), failures, tmp_path)
    assert records.read("work", tmp_path) == first
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.write({"name": "work", "samples": [[float("nan")]]}, tmp_path)
    assert json.loads((tmp_path / "work.json").read_text()) == first


def test_progress_names_every_unit(work, tmp_path, capsys):
    from benchmarks import running

    running.run("work", work[0](), "command", tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"work {i}/3: {key}" for i, key in enumerate("abc", 1)]
