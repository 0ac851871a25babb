"""The README's example runs, its commands are CI's, its figures are the measured ones."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm
from jaxnorm import linen, nnx
from jaxnorm.testing import assert_close

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.seconds(90, "they are as long as the README has them")
def test_the_examples_run_and_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example, _, _, over_devices, watched, diagnosed, surgery = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 21
    names: dict = {"__name__": "readme"}
    exec(compile(example, "README.md", "exec"), names)
    assert names["metrics"]["loss"] < 0.1
    assert names["evaluate"](names["state"], names["batch"])["loss"] < 0.5
    exec(compile(over_devices, "README.md", "exec"), names)
    first = names["create_train_state"](names["Net"](), names["optax"].adam(1e-2), 0, names["x"])
    alone = names["make_train_step"](names["Net"](), names["optax"].adam(1e-2), names["loss"])
    loss = alone(first, names["batch"])[1]["loss"]
    assert_close(names["metrics"]["loss"], np.asarray(loss, np.float64), what="derivative")
    assert len(names["state"].params["Dense_0"]["kernel"].sharding.device_set) == 8
    exec(compile(watched, "README.md", "exec"), names)
    assert names["recording"].steps.tolist() == [0, 64, 128, 192]
    mean = names["recording"]["BatchNorm_0:input"].value.moments.mean
    np.testing.assert_allclose(mean, 1e4, rtol=1e-3)
    capsys.readouterr()
    exec(compile(diagnosed, "README.md", "exec"), names)
    assert "Frozen statistics are used on data" in capsys.readouterr().out
    exec(compile(surgery, "README.md", "exec"), names)
    assert [row.kind for row in names["folded"].report.folded] == ["BatchNorm"]
    recalibrated, x = names["recalibrated"].variables, names["x"]
    wanted = names["Net"]().apply(recalibrated, x, train=False)
    # At an offset of 1e4 deviations the sums of a dense layer lose their digits, folded or not.
    allowed = names["folded"].report.allowed * float(jnp.max(jnp.abs(wanted)))
    np.testing.assert_allclose(names["y"], wanted, rtol=0, atol=allowed)


def test_the_fused_forms_and_the_explanation_run(capsys):
    _, fused, explained, *_ = blocks("python")
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 3, 64), "residual": (2, 3, 64), "scale": (64,), "bias": (64,)}
    shapes |= {"gamma": (2, 64), "beta": (2, 64)}
    names = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    names |= {"jax": jax, "jaxnorm": jaxnorm}
    exec(compile(fused, "README.md", "exec"), names)
    np.testing.assert_array_equal(names["total"], names["x"] + names["residual"])
    exec(compile(explained, "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["operation", "rms_norm", "group_norm"]


def test_exactly_two_commands_and_ci_runs_them():
    demo, tests = "".join(blocks("sh")).strip().splitlines()
    assert demo.split()[-2:] == [".venv/bin/jaxnorm", "demo"]
    assert tests.split()[-3:] == [".venv-test/bin/pytest", "-n", "2"]
    # What the script takes from here, found as the script finds it.
    (reads,) = re.findall(r"^mapfile .*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    shown = subprocess.run(
        ["bash", "-c", reads + r"""; printf '%s\n' "${commands[@]}" """],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.splitlines() == [demo, tests]


def test_every_public_function_is_shown():
    """In the table of norms, with its layers beside it, or called in an example."""
    rows = re.findall(r"^\| (`[a-z].*?) \| (.*?) \|", README, re.MULTILINE)
    listed = {name: layers for names, layers in rows for name in re.findall(r"`(\w+)`", names)}
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        for example in blocks("python")
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name))
    }
    called |= set(re.findall(r"`jaxnorm\.(\w+)\([^`]*\)`", README))
    functions = {n for n in jaxnorm.__all__ if inspect.isfunction(getattr(jaxnorm, n))}
    assert functions - {"init_batch_stats"} <= listed.keys() | called
    for name in functions & listed.keys():
        layers = re.findall(r"`([A-Z]\w+)`", listed[name])
        assert layers, name
        assert all(hasattr(linen, layer) or hasattr(nnx, layer) for layer in layers), name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_figures_are_the_committed_ones():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import report
    finally:
        sys.path.remove(str(ROOT))
    section = README.split("<!-- measured: begin -->\n")[1].split("<!-- measured: end -->")[0]
    assert section == report.readme(), "python benchmarks/run.py report --readme"
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert page == report.docs(), "python benchmarks/run.py report --docs > docs/benchmarks.md"
