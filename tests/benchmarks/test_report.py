"""The report: figures checked by hand, every committed result shown, pictures drawn."""

import json
import sys

import pytest


@pytest.fixture(scope="module")
def committed(from_the_repository):
    from benchmarks import report

    return report.read()


def record(name, peers, **more):
    machine = {"cpu": "a CPU", "cores": 2, "backend": "cpu", "device": "cpu"}
    return {
        "name": name,
        "command": f"python benchmarks/run.py {name}",
        "date": "2026-01-01",
        "machine": machine,
        "versions": {"torch": "not installed"},
        "settings": {"peers": peers, **more.pop("settings", {})},
        **more,
    }


def ops():
    """Two cells of layer norm, of which torch has only one."""
    moves = {"forward": 2, "forward and backward": 5, "copy": 2}
    return record(
        "ops",
        ["jaxnorm", "flax", "torch", "copy"],
        settings={"arrays that must move": moves},
        samples=[
            *(["layer", "A", [8, 4], "", "float32", "forward", i, [v, 2.0, None, 1.0]]
              for i, v in enumerate((1.0, 3.0, 8.0))),
            *(["layer", "B", [8, 4], "", "float32", "forward and backward", i, [v, 16.0, 2.0, 1.0]]
              for i, v in enumerate((4.0, 6.0, 4.0))),
        ],
    )  # fmt: skip


def test_operations():
    from benchmarks.report import speed

    first, second = speed.operations(ops()).rows
    assert first[2:6] == ("8x4", "float32", "forward", "3.00 (2.00–5.50)")  # noqa: RUF001
    assert first[7] == "-" and second[7].startswith("2.00")
    # Two arrays in 3 ms where a copy takes 1; five in 4 ms.
    assert first[-1] == "0.33" and second[-1] == "0.62"
    (line, everything) = speed.summary(ops(), by="norm").rows
    # 3 / 2 and 4 / 16: their geometric mean is 0.61, the worst is 1.5. PyTorch: 4 / 2.
    assert line == ("LayerNorm", "2", "0.61 (1.50)", "2.00 (2.00)", "0.46")
    assert everything[1:] == line[1:]
    assert [row[:2] for row in speed.summary(ops()).rows][:2] == [
        ("LayerNorm", "forward"), ("LayerNorm", "forward and backward")
    ]  # fmt: skip


def test_train_steps():
    from benchmarks.report import speed

    found = record(
        "blocks",
        ["jaxnorm", "flax", "no norm"],
        settings={"activations": "float32"},
        samples=[["net", "rms", [2], i, [3.0, 4.0, 2.0]] for i in range(3)],
    )
    (row,) = speed.blocks(found).rows
    assert row[1] == "RMSNorm" and row[-2].startswith("0.75") and row[-1] == "0.50"


def test_monitored_steps_are_compared_round_by_round():
    from benchmarks.report import speed

    found = record(
        "monitor",
        ["no monitor", "every 64", "every 1"],
        samples=[["net", [2, 3], i, [v, 1.01 * v, 1.5 * v]] for i, v in enumerate((1.0, 2.0, 9.0))],
    )
    (row,) = speed.monitoring(found).rows
    assert row[:2] == ("net", "2x3") and row[2].startswith("2.00")
    assert row[3].startswith("1.01") and row[4].startswith("1.50")


def test_programs():
    from benchmarks.report import programs

    common = {"norm": "rms", "shape": [8], "topology": "v5e:2x2x1", "peer": "flax", "passes": 3.0,
              "temp bytes": 2e6, "on-chip bytes": 1e6, "kernels": {"fusion": 2}}  # fmt: skip
    crashed = {k: common[k] for k in ("norm", "shape", "topology")} | {"peer": "ours"}
    found = record(
        "tpu",
        ["flax"],
        alone=[{**common, "pass": "forward"}, {**common, "pass": "both", "passes": 7.0}],
        blocks=[
            {**common, "network": "net", "layers": 4, "extra passes": 4.625},
            {**crashed, "network": "net", "layers": 4, "extra passes": None},
        ],
    )
    assert programs.alone(found).rows == [("RMSNorm", "8", "flax", "3.00; 7.00")]
    assert programs.extra(found).rows == [
        ("net", "RMSNorm", "flax", "4.62"), ("net", "RMSNorm", "ours", "compiler crashed")
    ]  # fmt: skip
    assert programs.schedules(found).rows[0][5:] == ("3.00", "2.0", "1.0", "2 fusion")


def test_growth():
    from benchmarks.report import speed

    growth = [
        ["layer", "rows", n, 8, i, [n * (1 + i), 5.0]] for n in (16, 32, 64) for i in range(3)
    ]
    (row,) = speed.growth(record("scaling", ["jaxnorm", "flax"], growth=growth)).rows
    assert row == ("LayerNorm", "rows", "16 to 64", "32.00 to 128.00, 1.00", "5.00 to 5.00, 0.00")


def test_the_worst_error_is_taken():
    from benchmarks.report import accuracy

    found = record(
        "accuracy",
        ["jaxnorm", "flax"],
        values=[
            ["layer", "float32", "ragged", 0.0, 1.0, "none", [1.5, 7.0]],
            ["layer", "float32", "ragged", 0.0, 1.0, "first", [2.5, "nonfinite"]],
        ],
    )
    (row,) = accuracy.accuracy(found, by="norm").rows
    assert row == ("LayerNorm", "2.5", "NaN", "-", "not installed")


def test_the_report_shows_every_result(committed):
    from benchmarks import report

    text, page = report.render(), report.docs()
    assert committed
    for results in committed.values():
        assert results["command"] in text and report.origin(results) in page
        for table in report.tables(results):
            assert table.rows and table.markdown() in text
    assert len(page.splitlines()) < 200


def test_pictures_are_written_beside_the_text(tmp_path):
    pytest.importorskip("altair", reason="pictures are drawn with Altair")
    from benchmarks import records, report

    records.write(ops(), tmp_path)
    page, *pictures = report.write(tmp_path / "out", tmp_path)
    assert {picture.name for picture in pictures} == {"ops_ratio.svg", "ops_bandwidth.svg"}
    for picture in pictures:
        assert f"]({picture.name})" in page.read_text()
        assert "LayerNorm" in picture.read_text() and picture.read_text().startswith("<svg")


def test_tables_without_rich(capsys, monkeypatch):
    from benchmarks import report

    monkeypatch.setitem(sys.modules, "rich", None)
    report.Table("title", ("", "n"), [("a", "1"), ("bb", "22")]).show()
    assert capsys.readouterr().out == "title\n     n\na    1\nbb  22\n\n"


def test_kernels_are_chosen_by_the_committed_results(from_the_repository):
    from benchmarks import report
    from jaxnorm.kernels import dispatch

    assert json.loads(report.evidence()) == dispatch.evidence()


def test_evidence_is_the_mean_over_what_compiled(from_the_repository):
    from benchmarks.report import programs

    def row(peer, topology, passes):
        known = {"network": "MLP", "norm": "layer", "topology": topology}
        return {**known, "peer": peer, "extra passes": passes}

    blocks = [
        row("flax", "v5e:2x2x1", 9.0),
        row("jaxnorm xla", "v5e:2x2x1", 4.0), row("jaxnorm pallas", "v5e:2x2x1", 7.0),
        row("jaxnorm xla", "v6e:2x2x1", 5.0), row("jaxnorm pallas", "v6e:2x2x1", 6.0),
        row("jaxnorm xla", "v5p:2x2x1", 1.0), row("jaxnorm pallas", "v5p:2x2x1", None),
    ]  # fmt: skip
    (found,) = programs.evidence({"blocks": blocks})
    assert (found["operation"], found["xla"], found["pallas"]) == ("layer_norm", 4.5, 6.5)
    assert found["measure"].endswith("(v5e, v6e)")
