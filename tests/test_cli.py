"""The command line: one small run from end to end, and input that cannot be used."""

import json
import subprocess
import sys

import pytest
from recordings import invent

from jaxnorm import cli
from jaxnorm.lab import study


@pytest.fixture
def never_trains(monkeypatch):
    def run_study(*args, **kwargs):
        raise AssertionError("training started before the input was checked")

    monkeypatch.setattr(study, "run_study", run_study)


def small(seed, steps, quick):
    assert (seed, steps, quick) == (3, 20, True)
    plan = study.TrainingPlan("mlp", 4, 20, (0.1,), ("none", "instance"))
    return study.StudyConfig(plans=(plan,), seed=seed, seeds=2, samples=2)


@pytest.mark.sample
@pytest.mark.seconds(90, "it trains a network")
def test_a_small_demo_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "demo_config", small)
    out = tmp_path / "a" / "demo"
    out.mkdir(parents=True)
    (out / "results.json").write_text("an older one")
    (out / "notes.txt").write_text("mine")
    arguments = ["demo", "--quick", "--steps", "20", "--seed", "3", "--out", str(out)]
    assert cli.main(arguments) == 0
    written = {"report.html", "results.json", "recordings"}
    assert {path.name for path in out.iterdir()} == {*written, "notes.txt"}
    recordings = {path.name for path in (out / "recordings").iterdir()}
    assert recordings == {"mlp-none"}
    stored = json.loads((out / "results.json").read_text())
    assert stored["settings"]["seed"] == 3
    assert set(stored["versions"]) >= {"jaxnorm", "jax", "flax", "python"}
    assert len(stored["summaries"]) == 2 and len(stored["curves"]) == 1
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    printed, shown = capsys.readouterr()
    assert "Deep sigmoid MLP" in printed and "not applicable" in printed
    for definition in ("best rate:", "accuracy:", "steps to 90 %:", "stable up to:"):
        assert definition in printed
    assert "validation accuracy" in shown and "Traceback" not in shown


def refused(capsys, arguments, *expected):
    assert cli.main(["demo", *map(str, arguments)]) == 2
    printed, error = capsys.readouterr()
    assert printed == "" and error.startswith("jaxnorm: ") and "Traceback" not in error
    for text in expected:
        assert str(text) in error


@pytest.mark.usefixtures("never_trains")
def test_data_that_cannot_be_read(tmp_path, capsys):
    out = tmp_path / "out"
    refused(capsys, ["--data", tmp_path / "none", "--out", out], tmp_path / "none", "Give the")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    refused(capsys, ["--data", tmp_path / "data", "--out", out], "header takes 16", "Fetch")
    assert not out.exists()


@pytest.mark.usefixtures("never_trains")
def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    refused(capsys, ["--out", tmp_path / "file"], tmp_path / "file", "Choose another")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    refused(capsys, ["--out", tmp_path / "out"], "'report.html' must be a file", "Move it")


@pytest.mark.sample
def test_a_report_on_runs(tmp_path, monkeypatch, capsys):
    for folder, norm in (("a/run", "BatchNorm"), ("b/run", ""), ("c", "LayerNorm")):
        invent(tmp_path / folder, norm=norm)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "a/run"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<title>Inside run</title>" in page and "BatchNorm_0" in page and "LayerNorm" not in page
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    out = tmp_path / "new" / "page.html"
    assert cli.main(["report", "a/run", "b/run", "c", "--out", str(out)]) == 0
    # Folders of the same name are shown with their paths.
    assert "<title>a/run, b/run and c, side by side</title>" in out.read_text()


def test_runs_that_cannot_be_read(tmp_path, capsys):
    def refuse(folder, *expected, name="report.html"):
        assert cli.main(["report", str(folder), "--out", str(tmp_path / name)]) == 2
        printed, error = capsys.readouterr()
        assert printed == "" and error.startswith("jaxnorm: ") and error.count("\n") == 1
        for text in (str(folder), *expected):
            assert text in error

    run = tmp_path / "run"
    invent(run)
    head, [chunk] = run / "recording.json", run.glob("*.npz")
    refuse(tmp_path / "none", "not there", "Give the folder")
    refuse(head, "a file", "Give the folder")
    (tmp_path / "photos").mkdir()
    refuse(tmp_path / "photos", "with none", "Recording.append")
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    refuse(tmp_path / "photos", "other files", "Choose another")
    text, content = head.read_text(), chunk.read_bytes()
    chunk.write_bytes(content[:-100])
    refuse(run, chunk.name, "Move that file away")
    chunk.unlink()
    refuse(run, "with none")
    head.write_text(text.replace('"format": 1', '"format": 9'))
    refuse(run, "another version")
    head.write_text(text[:50])
    refuse(run, head.name)
    head.write_text(text)
    chunk.write_bytes(content)
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "report.html").mkdir()
    assert cli.main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 2
    assert "'report.html' must be a file" in capsys.readouterr().err


@pytest.mark.usefixtures("never_trains")
@pytest.mark.parametrize("arguments", [["--steps", "3"], ["--steps", "x"], ["--seed", "-1"]])
def test_numbers_that_make_no_sense(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--out", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    assert "must be an integer of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("never_trains")
def test_without_the_extra(monkeypatch, capsys, tmp_path):
    for name in ("altair", "rich"):
        monkeypatch.setitem(cli.LAB_PACKAGES, f"no_{name}_here", name)
    refused(capsys, ["--out", tmp_path], "altair, rich are not", 'pip install "jaxnorm[lab]"')


def test_an_interrupt_writes_nothing(monkeypatch, capsys, tmp_path):
    def run_study(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_study", run_study)
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 130
    assert "no report was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.sample
def test_help_loads_nothing_heavy():
    code = (
        "import sys; from jaxnorm import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'flax', 'sklearn', 'altair', 'rich', 'vl_convert'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 2
    assert "usage: jaxnorm" in capsys.readouterr().err


@pytest.mark.sample
def test_doctor_tells_what_is_wrong_and_exits_with_one(tmp_path, capsys):
    def spoil(arrays):
        arrays["observations|values|nonfinite"][8:, 4] = 0.5

    invent(tmp_path / "sick", norm="LayerNorm", spoil=spoil)
    assert cli.main(["doctor", str(tmp_path / "sick")]) == cli.FOUND
    printed = capsys.readouterr().out
    assert printed.startswith("12 samples, steps 0 to 44.\n\ncritical: ")
    assert "not finite at step 32" in printed and "LayerNorm_1:input" in printed


def test_doctor_of_a_healthy_run(tmp_path, capsys):
    def spoil(arrays):
        for name in ("dead", "saturated", "nonfinite"):
            arrays[f"observations|values|{name}"][:] = 0

    invent(tmp_path / "well", norm="LayerNorm", spoil=spoil)
    assert cli.main(["doctor", str(tmp_path / "well")]) == 0
    assert capsys.readouterr().out == "12 samples, steps 0 to 44.\n\nNothing found.\n"


def test_doctor_of_what_is_no_recording(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "none")]) == 2
    assert "doctor: a run must be a folder" in capsys.readouterr().err
