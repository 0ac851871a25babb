"""Commands on runs: `jaxnorm demo`, `jaxnorm doctor`, `jaxnorm report`."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxnorm.cli.arguments import FOUND, UsageError, installed, integer, versions

if TYPE_CHECKING:
    from jaxnorm.lab.results import StudyResult
    from jaxnorm.lab.study import Progress, StudyConfig
    from jaxnorm.monitor import Recording

REPORT, RESULTS, RECORDINGS = "report.html", "results.json", "recordings"
LAB_PACKAGES = {  # module -> distribution, for the extra "lab"
    "sklearn": "scikit-learn",
    "altair": "altair",
    "vl_convert": "vl-convert-python",
    "jinja2": "jinja2",
    "rich": "rich",
}
FEWEST_STEPS = 20


def add_commands(commands: Any) -> None:
    """Add these commands to the subparsers of the program."""
    demo = commands.add_parser(
        "demo",
        help="train two networks with and without normalization, and write a report",
        description=(
            "Train a deep sigmoid MLP and a small convolutional net with no normalization, batch, "
            "layer, group, instance and RMS normalization and weight standardization, over seeds "
            "and learning rates at once; print a table; write one page of HTML that works offline. "
            "One to four minutes on two cores."
        ),
    )
    demo.set_defaults(command=_demo)
    demo.add_argument(
        "--data",
        metavar="DIR",
        help="folder with the four IDX files of MNIST, Fashion-MNIST or the like, gzipped or not "
        "(default: scikit-learn's digits)",
    )
    demo.add_argument(
        "--out",
        metavar="DIR",
        default="jaxnorm-demo",
        help=f"folder for {REPORT}, {RESULTS} and {RECORDINGS}; other files in it are not changed "
        "(default: %(default)s)",
    )
    demo.add_argument(
        "--seed",
        type=integer(0),
        default=0,
        metavar="N",
        help="the seed of all randomness (default: 0)",
    )
    demo.add_argument(
        "--steps",
        type=integer(FEWEST_STEPS),
        metavar="N",
        help="training steps of the MLP; the convolutional net makes a fifth as many "
        "(default: 400, or 200 with --quick)",
    )
    demo.add_argument(
        "--quick",
        action="store_true",
        help="two seeds, fewer learning rates and steps: half the time, and rougher figures",
    )
    doctor = commands.add_parser(
        "doctor",
        help="find out what is wrong with a run, and what to do",
        description=(
            "Read a recording that jaxnorm.monitor.Recording has written. Print what is wrong, the "
            "evidence, the likely cause and the remedy, the gravest finding first. The exit status "
            "is 1 if a finding is critical or a warning, so that scripts can use it."
        ),
    )
    doctor.set_defaults(command=_doctor)
    doctor.add_argument("run", metavar="RUN", help="folder of the recording")
    report = commands.add_parser(
        "report",
        help="write a page of HTML on one run, or on several side by side",
        description=(
            "Read the samples that a monitor recorded, and write one page of HTML that works "
            "offline: findings first, then the values at every layer, step by step. With several "
            "runs the page switches between them, on one scale of colours."
        ),
    )
    report.set_defaults(command=_report)
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder of a recording")
    report.add_argument(
        "--out",
        metavar="FILE",
        default=REPORT,
        help="the page; an existing one is replaced (default: %(default)s)",
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from jaxnorm.monitor import diagnose

    recording = _recording("doctor", Path(arguments.run))
    findings = diagnose(recording)
    steps = recording.steps
    print(f"{len(steps)} samples, steps {steps[0]} to {steps[-1]}.\n\n{findings}")
    return FOUND if any(finding.severity != "advice" for finding in findings) else 0


def _demo(arguments: argparse.Namespace) -> int:
    _check_packages("demo")
    from jaxnorm.report.output import OutputError, check_folder

    try:
        folder = check_folder(arguments.out, (REPORT, RESULTS))
    except OutputError as error:
        raise UsageError(str(error)) from None

    from jaxnorm.lab.data import DataError, load_digits, load_idx

    try:
        if arguments.data is None:
            data = load_digits(arguments.seed)
        else:
            data = load_idx(arguments.data, arguments.seed)
    except DataError as error:
        raise UsageError(str(error)) from None

    from rich.console import Console

    from jaxnorm.lab.study import demo_config
    from jaxnorm.monitor import RecordingError, diagnose
    from jaxnorm.report import Run, build_tables, render_page, write_files
    from jaxnorm.report.words import FOOTNOTE, NETWORKS, NORMALIZATIONS

    config = demo_config(seed=arguments.seed, steps=arguments.steps, quick=arguments.quick)
    result = _run(config, data)
    used = versions()
    stored = {"command": "jaxnorm demo", "versions": used, **result.to_json()}
    try:
        recordings = result.write_recordings(folder / RECORDINGS)
        runs = [
            Run(NORMALIZATIONS[name], NETWORKS[network], recording, diagnose(recording))
            for (network, name), recording in recordings.items()
        ]
        texts = {
            REPORT: render_page(result, used, runs),
            RESULTS: json.dumps(stored, ensure_ascii=False, allow_nan=False) + "\n",
        }
        report, results = write_files(folder, texts)
    except (OutputError, RecordingError) as error:
        raise UsageError(str(error)) from None
    console = Console(highlight=False)
    for table in build_tables(result):
        console.print(table)
    if any(not row.applicable for row in result.summaries):
        console.print(FOOTNOTE, style="dim")
    for name, text in stored["definitions"].items():
        console.print(f"{name}: {text}", style="dim", markup=False)
    done = f"\n{result.seconds:.0f} s. Report: {report}. Figures: {results}."
    console.print(done, soft_wrap=True, markup=False)
    return 0


def _run(config: "StudyConfig", data: object) -> "StudyResult":
    """Run the study, with a progress bar for all of it and a line for each finished part."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from jaxnorm.lab.study import run_study
    from jaxnorm.report.words import NETWORKS, NORMALIZATIONS

    total = sum(plan.steps * len(names) for plan, names in config.pairs().items())
    steps_made: dict[tuple[str, str], int] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )
    with bar:
        task = bar.add_task("compiling", total=total)

        def show(state: "Progress") -> None:
            name = f"{NETWORKS[state.network]}, {NORMALIZATIONS[state.normalization]}"
            steps_made[state.network, state.normalization] = state.step
            bar.update(task, completed=sum(steps_made.values()), description=f"{name:<48}")
            if state.step == state.steps:
                bar.console.print(f"  {name:<48} validation accuracy {state.accuracy:6.1%}")

        return run_study(config, data, show)  # type: ignore[arg-type]


def _report(arguments: argparse.Namespace) -> int:
    _check_packages("report")
    from jaxnorm.report.output import OutputError, check_folder, write_files

    out = Path(os.path.abspath(arguments.out))  # gives "." the name of the folder
    try:
        check_folder(out.parent, (out.name,))
    except OutputError as error:
        raise UsageError(str(error)) from None

    from jaxnorm.monitor import diagnose
    from jaxnorm.report import Run, render_runs

    folders = [Path(folder) for folder in arguments.runs]
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names):
        recording = _recording("report", folder)
        # Two folders with one name are told apart by their paths.
        name = name if names.count(name) == 1 else str(folder)
        runs.append(Run(name, "", recording, diagnose(recording)))
    try:
        [page] = write_files(out.parent, {out.name: render_runs(runs, versions())})
    except OutputError as error:
        raise UsageError(str(error)) from None
    print(f"Report: {page}")
    return 0


def _recording(command: str, folder: Path) -> "Recording":
    """A recording with at least one sample."""
    from jaxnorm.monitor import Recording, RecordingError

    if not folder.is_dir():
        raise UsageError(
            f"{command}: a run must be a folder that a Recording was written to; got '{folder}', "
            f"which is {'a file' if folder.exists() else 'not there'}. Give the folder that was "
            "passed to Recording."
        )
    try:
        recording = Recording(folder)
    except RecordingError as error:
        raise UsageError(str(error)) from None
    if not len(recording):
        raise UsageError(
            f"{command}: a run must have samples; got '{folder}' with none. Train with a monitor, "
            "and hand the state to Recording.append."
        )
    return recording


def _check_packages(command: str) -> None:
    missing = [name for module, name in LAB_PACKAGES.items() if not installed(module)]
    if missing:
        raise UsageError(
            f"{command}: the packages of the extra 'lab' must be installed; {', '.join(missing)} "
            f'{"is" if len(missing) == 1 else "are"} not. Run: pip install "jaxnorm[lab]"'
        )
