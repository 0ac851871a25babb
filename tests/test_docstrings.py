"""Every public name of every room is documented, so that `help` answers without the source."""

import ast
import builtins
import doctest
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from pathlib import Path

import pytest

import jaxnorm

# What only functions return. Their docstrings name the fields, the functions' show them at work.
RESULTS = {
    "jaxnorm.monitor.BatchSummary",
    "jaxnorm.monitor.GradientShift",
    "jaxnorm.monitor.Landscape",
    "jaxnorm.monitor.Observation",
    "jaxnorm.monitor.Observations",
    "jaxnorm.monitor.Summary",
}
# The charts' code takes seconds to put together; `tests/report` renders both.
SLOW = {"jaxnorm.report.render_page", "jaxnorm.report.render_runs"}
# A package that gathers names for the package above it, and is nobody's address.
INTERNAL = {"jaxnorm.monitor.diagnosis.rules"}
# A first line stands alone in an index: a noun phrase or an imperative.
OPENERS = ("By ", "Of ", "What ", "How ", "Whether ", "Where ", "Which ", "From ", "With ")


def modules() -> list:
    found = pkgutil.walk_packages(jaxnorm.__path__, "jaxnorm.")
    names = [each.name for each in found if not each.name.endswith(".__main__")]
    return [jaxnorm, *map(importlib.import_module, names)]


MODULES = modules()
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in getattr(module, "__all__", ())
}


def only(*kinds: str):
    return pytest.mark.parametrize("name", [n for n in PUBLIC if kind(n) in kinds])


def kind(name: str) -> str:
    thing = PUBLIC[name]
    if inspect.isclass(thing):
        return "exception" if issubclass(thing, BaseException) else "class"
    if inspect.ismodule(thing):
        return "module"
    return "function" if inspect.isfunction(thing) else "constant"


def docstring(name: str) -> str:
    """What is written at the thing itself; `inspect.getdoc` would take that of a base."""
    if kind(name) == "constant":
        return beside(name)
    return inspect.cleandoc(PUBLIC[name].__doc__ or "")


def beside(constant: str) -> str:
    """The string that follows the assignment."""
    room, _, name = constant.rpartition(".")
    for module in MODULES:
        if not f"{module.__name__}.".startswith(f"{room}."):
            continue
        body = ast.parse(Path(module.__file__).read_text()).body
        for statement, after in zip(body, [*body[1:], ast.Pass()]):
            targets = getattr(statement, "targets", [getattr(statement, "target", None)])
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                text = getattr(getattr(after, "value", None), "value", None)
                return inspect.cleandoc(text) if isinstance(text, str) else ""
    return ""


def section(text: str, *titles: str) -> list[str]:
    """The lines under the first of these headings, without their common indentation."""
    lines = text.splitlines()
    at = next((i for i, line in enumerate(lines) if line in {f"{t}:" for t in titles}), None)
    if at is None:
        return []
    end = next((i for i in range(at + 1, len(lines)) if re.match(r"\S", lines[i])), len(lines))
    return textwrap.dedent("\n".join(lines[at + 1 : end])).strip().splitlines()


def entries(text: str) -> set[str]:
    """Names in the table of arguments or fields: those before a colon, with or without stars."""
    heads = (re.match(r"[*\w]+(, [*\w]+)*(?=: )", s) for s in section(text, "Args", "Attributes"))
    return {name.lstrip("*") for head in heads if head for name in head[0].split(", ")}


def parameters(thing) -> set[str]:
    if inspect.isfunction(thing):
        return set(inspect.signature(thing).parameters)
    make = thing.__new__ if issubclass(thing, tuple) else thing.__init__
    return set(list(inspect.signature(make).parameters)[1:])


def inherited(thing) -> set[str]:
    """Parameters that a class has from outside: Flax documents those of its layers."""
    if inspect.isfunction(thing):
        return set()
    return parameters(next(c for c in thing.__mro__[1:] if c.__module__.split(".")[0] != "jaxnorm"))


def raised(thing) -> set[str]:
    """Exceptions that the function's own lines raise; of a class, those of making and calling."""
    makers = [thing]
    if inspect.isclass(thing):
        names = ("__new__", "__init__", "__post_init__", "__call__")
        makers = [m for n in names if inspect.isfunction(m := vars(thing).get(n))]
    found = set()
    for maker in map(inspect.unwrap, makers):
        known = vars(builtins) | vars(sys.modules[maker.__module__])
        if maker.__code__.co_filename != sys.modules[maker.__module__].__file__:
            continue  # written by a dataclass
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(maker)))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func)
                found |= {name} if inspect.isclass(known.get(name)) else set()
    return found


@pytest.mark.parametrize(
    "module", [m for m in MODULES if hasattr(m, "__path__")], ids=lambda m: m.__name__
)
def test_a_room_lists_what_is_public(module):
    if hasattr(module, "__all__") or module.__name__ in INTERNAL:
        return
    bound = {n for n, v in vars(module).items() if n[0] != "_" and not inspect.ismodule(v)}
    assert not bound, f"no __all__, but these names: {bound}"


def test_no_exception_outlives_its_name():
    assert set(PUBLIC) >= RESULTS | SLOW
    assert {m.__name__ for m in MODULES} >= INTERNAL


@pytest.mark.parametrize("name", PUBLIC)
def test_the_first_paragraph_is_a_sentence(name):
    text = docstring(name)
    assert text, "no docstring"
    first = text.split("\n\n")[0]
    assert "\n" not in first, "more than one line"
    assert re.match(r"[A-Z0-9`].*\.$", first), first
    assert stands_alone(first), first


def stands_alone(first: str) -> bool:
    """In an index of names, far from its module."""
    return len(first.split()) >= 4 and not first.startswith((*OPENERS, "The same "))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_first_line_stands_alone(module):
    """Those of private names too, which readers of the source meet first."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [
        ast.get_docstring(node)
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, documented)
    ]
    short = [text for text in found if text and not stands_alone(text.splitlines()[0])]
    assert not short, short


@only("function", "class")
def test_every_argument_or_field_is_named(name):
    thing, named = PUBLIC[name], entries(docstring(name))
    every, ours = parameters(thing), parameters(thing) - inherited(thing)
    assert named >= ours, f"not documented: {ours - named}"
    assert named <= every, f"documented, but there is none: {named - every}"


@only("function")
def test_the_result_is_told(name):
    returned = inspect.signature(PUBLIC[name]).return_annotation
    assert returned in (None, "None") or section(docstring(name), "Returns")


@only("function", "class")
def test_what_is_raised_is_told(name):
    told = " ".join(section(docstring(name), "Raises"))
    # A function that raises nothing says so: most errors come from the functions that it calls.
    assert told or kind(name) == "class", "no section on what is raised"
    missing = {error for error in raised(PUBLIC[name]) if error not in told}
    assert not missing, f"raised, but not told: {missing}"


@only("function", "class")
def test_there_is_an_example_that_runs(name):
    examples = doctest.DocTestParser().get_examples(docstring(name))
    if name not in RESULTS | SLOW:
        assert examples, "no example"
    assert not any(doctest.SKIP in example.options for example in examples), "is skipped"
    if examples and kind(name) == "function":
        called = name.rpartition(".")[2]
        assert any(called in example.source for example in examples), f"does not show {called}"


@pytest.mark.parametrize("name", [n for n in PUBLIC if n.startswith("jaxnorm.functional.")])
def test_a_normalization_states_its_formula(name):
    assert ".. math::" in docstring(name)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in PUBLIC
        if n.startswith(("jaxnorm.functional.", "jaxnorm.testing.oracle."))
        and kind(n) == "function"
    ],
)
def test_a_normalization_names_its_source(name):
    assert re.search("^Source: ", docstring(name), re.MULTILINE)
