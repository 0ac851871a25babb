"""The benchmarks run, and their committed results keep the promises of the README."""

import json
import re

import pytest


@pytest.fixture(scope="module")
def quick(from_the_repository):
    from benchmarks import accuracy, memory

    return {
        "accuracy": measured("accuracy", accuracy.plan(quick=True, peers=("jaxnorm",))),
        "memory": measured("memory", memory.plan(quick=True)),
    }


def measured(name, plan):
    from benchmarks import running

    return running.run(name, plan, "quick")


@pytest.fixture(scope="module")
def committed(from_the_repository):
    from benchmarks import report

    return report.read()


def numbers_are_right(results):
    """jaxnorm's promises: units by dtype, exactness at the edge, and no NaN at all."""
    ours = results["settings"]["peers"].index("jaxnorm")
    assert results["values"] and results["derivatives"]
    for row in results["values"]:
        limit = 32 if row[1] == "float32" else 0.51
        assert row[-1][ours] <= limit, row
    for row in results["derivatives"]:
        found = [units for units in row[-1][ours] if units is not None]
        assert len(found) == (2 if row[0] == "rms" else 3)
        assert max(found) <= (64 if row[1] == "float32" else 0.51), row
    for case, norm, row in results["special"]:
        units, finite = row[ours]
        assert finite and units <= (0 if case.startswith("constant") else 32), (case, norm)


def memory_is_small(results):
    assert len(results["samples"]) == 16
    for norm, shape, jit, (ours, flax) in results["samples"]:
        # x itself, which Flax keeps in float32 and more than once.
        assert 1 <= ours <= 1.05 and flax >= 4, (norm, shape, jit)


@pytest.mark.seconds(90, "it measures all that it judges")
def test_the_quick_forms_keep_the_promises(quick):
    numbers_are_right(quick["accuracy"])
    memory_is_small(quick["memory"])


def test_the_committed_results_keep_the_promises(committed):
    numbers_are_right(committed["accuracy"])
    memory_is_small(committed["memory"])
    dtypes = {row[1] for row in committed["accuracy"]["values"]}
    assert dtypes == {"float32", "bfloat16"}
    assert len({row[2] for row in committed["accuracy"]["values"]}) == 3


def test_what_is_committed_was_checked_against_the_oracle(committed):
    timed = committed["ops"]
    ours = timed["settings"]["peers"].index("jaxnorm")
    cases = {json.dumps(row[:5]) for row in timed["samples"]}
    assert cases == {json.dumps(row[:5]) for row in timed["checked"]}
    assert all(max(row[-1][ours]) <= 64 for row in timed["checked"])


def test_a_measurement_notices_a_wrong_layer(quick, monkeypatch):
    from benchmarks import accuracy, peers

    run = peers.Linen.run
    monkeypatch.setattr(peers.Linen, "run", lambda self, *args, **options: {
        k: v * (1 + 1e-3) for k, v in run(self, *args, **options).items()
    })  # fmt: skip
    found = measured("accuracy", accuracy.plan(quick=True, peers=("jaxnorm",)))
    with pytest.raises(AssertionError):
        numbers_are_right(found)


def test_results_say_where_they_come_from_and_stay_small(committed):
    from benchmarks import records

    for name, results in committed.items():
        path = records.RESULTS / f"{name}.json"
        assert path.stat().st_size < 200_000
        assert not re.search(r"/(root|home|work|tmp|Users)/", path.read_text())
        assert results["command"] == f"python benchmarks/run.py {name}"
        assert results["machine"]["cpu"] and results["machine"]["cores"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", results["date"])
        named = {"python", "jaxnorm", "jax", "jaxlib", "flax", "numpy", "torch"}
        assert named <= set(results["versions"])


def test_a_run_prints_and_writes(tmp_path, capsys):
    from benchmarks import records, run

    run.main(["memory", "--quick", "--out", str(tmp_path)])
    written = records.read("memory", tmp_path)
    memory_is_small(written)
    assert "--quick" in written["command"] and "LayerNorm" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]
    run.main(["report", "--results", str(tmp_path)])
    assert "| LayerNorm | 4096x1024 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["time"])
