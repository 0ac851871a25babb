"""A model in evaluation as a list of equations, and the calls of layers within it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, linen, nnx

from jaxnorm._jax import inner_programs, lower_identity, make_primitive
from jaxnorm.models.adapt import in_evaluation
from jaxnorm.models.calls import Path, hooked_copy, rewritten

# Primitives that run one program once: their equations stand in the list in their place.
INLINED = {
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr",
}  # fmt: skip
ENTER, LEAVE = "enter", "leave"


def _batched(operands, axes, **params):
    [x], [axis] = operands, axes
    return border_p.bind(x, **{**params, "batched": True}), axis


def _jvp(primals, tangents, **params):
    return border_p.bind(*primals, **params), tangents[0]


border_p = make_primitive(
    "jaxnorm_border",  # around the call of a layer: each of its arguments, each of its results
    value=lambda x, **_: x,
    result=lambda x, **_: x,
    jvp=_jvp,
    batch=_batched,
    lowerings={None: lower_identity},
)


@dataclass
class Call:
    """A call of a layer.

    Attributes:
        index: rank among the calls.
        path: of the layer in the model.
        module: the layer: of a copy of an NNX model, or a Linen module without variables.
        arguments: args and kwargs of the call, with None for each array.
        enters: for each array among the arguments: rank among the leaves of (args, kwargs), the
            value outside, the value inside.
        leaves: for each array among the results, the value inside and the value outside.
        span: ranks of the first and of the last equation.
        several: the program runs it more than once.
        loop: the primitive that it stands in, such as a scan or vmap; "" for none.
    """

    index: int
    path: Path
    module: Any
    arguments: Any
    enters: list[tuple[int, int, int]] = field(default_factory=list)
    leaves: list[tuple[int, int]] = field(default_factory=list)
    span: tuple[int, int] = (-1, -1)
    several: bool = False
    loop: str = ""

    @property
    def name(self) -> str:
        """The path as reports show it."""
        return "/".join(self.path) or type(self.module).__name__

    def holds(self, position: int) -> bool:
        """True for an equation within the call."""
        return self.span[0] <= position <= self.span[1]


@dataclass(frozen=True)
class Equation:
    """An equation of a program between values, which are numbers."""

    name: str
    params: Mapping[str, Any]
    operands: tuple[int, ...]
    results: tuple[int, ...]
    traced: Any


@dataclass
class Program:
    """A traced program in one list.

    Attributes:
        equations: in the order of the trace.
        types: shape and dtype of each value.
        constants: values that are written in the program.
        variables: the values that are the model's variables, in the order of their leaves.
        names: of the variables, such as "params/block/gamma".
        inputs: the values that are the example.
        outputs: the values that are returned.
        calls: by index.
        makers: the equation that makes a value.
        readers: the equations that read a value, once for each operand.
    """

    equations: list[Equation] = field(default_factory=list)
    types: list[Any] = field(default_factory=list)
    constants: dict[int, Any] = field(default_factory=dict)
    variables: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    makers: dict[int, int] = field(default_factory=dict)
    readers: dict[int, list[int]] = field(default_factory=dict)

    def shape(self, value: int) -> tuple[int, ...]:
        """The shape of a value."""
        return tuple(self.types[value].shape)

    def add_value(self, aval: Any) -> int:
        """A new value of this type."""
        self.types.append(aval)
        return len(self.types) - 1

    def add(self, name: str, params: Any, operands: Any, outputs: Any, traced: Any) -> list[int]:
        """A new equation, and its results."""
        results = [self.add_value(v.aval) for v in outputs]
        position = len(self.equations)
        self.equations.append(Equation(name, params, tuple(operands), tuple(results), traced))
        self.makers.update(dict.fromkeys(results, position))
        for operand in operands:
            self.readers.setdefault(operand, []).append(position)
        return results


@dataclass(frozen=True, eq=False)
class _Bordering:
    """The hook that puts borders around every call."""

    calls: list[Call]

    def __call__(self, call, path: Path, module: Any, args, kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        if isinstance(module, linen.Module):
            module = module.clone(parent=None)
        blank = tree.unflatten([None if _is_array(leaf) else leaf for leaf in leaves])
        index = len(self.calls)
        self.calls.append(Call(index, path, module, blank))
        args, kwargs = tree.unflatten(_borders(leaves, index, ENTER))
        leaves, tree = jax.tree.flatten(call(*args, **kwargs))
        return tree.unflatten(_borders(leaves, index, LEAVE))


def path_names(path: Any) -> Path:
    """The keys of a path in a tree, as names."""
    keys = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)
    return tuple(map(str, keys))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _borders(leaves: list[Any], index: int, side: str) -> list[Any]:
    return [
        border_p.bind(leaf, call=index, side=side, leaf=i, batched=False)
        if isinstance(leaf, jax.Array)
        else leaf
        for i, leaf in enumerate(leaves)
    ]


def trace_program(
    operation: str, model: Any, variables: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Program:
    """Trace a model in evaluation; nothing is computed.

    Args:
        operation: the public function that is being called; errors begin with it.
        model: a Linen or NNX module.
        variables: collections of the Linen module; of an NNX module, its state, as of `nnx.split`.
        args: example inputs.
        kwargs: further keyword arguments of the call.

    Raises:
        TypeError, ValueError: the model cannot be called with these.
    """
    calls: list[Call] = []
    if isinstance(model, linen.Module):
        hooked = rewritten(model, _Bordering(calls))

        def run(variables, args, kwargs):
            return in_evaluation(operation, hooked, variables, args, kwargs)

    else:
        graph = nnx.graphdef(hooked_copy(model, _Bordering(calls)))

        def run(variables, args, kwargs):
            return in_evaluation(operation, nnx.merge(graph, variables), None, args, kwargs)

    leaves, tree = jax.tree.flatten((variables, args, dict(kwargs)))
    arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def run_on_arrays(given):
        filled = list(leaves)
        for i, array in zip(arrays, given):
            filled[i] = array
        return run(*tree.unflatten(filled))

    try:
        traced = jax.make_jaxpr(run_on_arrays)([leaves[i] for i in arrays])
    except (TypeError, ValueError, errors.FlaxError) as error:
        if str(error).startswith(f"{operation}: "):
            raise
        shapes = ", ".join(str(jax.tree.map(jnp.shape, arg)) for arg in args)
        raise ValueError(
            f"{operation}: the model must accept its variables and the example; "
            f"{type(model).__name__} called with ({shapes}) raised {type(error).__name__}: "
            f"{error}. Pass the variables that belong to this model, and inputs as in training."
        ) from error
    named = jax.tree_util.tree_leaves_with_path(variables)
    names = ["/".join(path_names(path)) for path, leaf in named if _is_array(leaf)]
    program = Program(calls=calls, names=names)
    values = dict(zip(traced.jaxpr.constvars, _constants(program, traced.jaxpr, traced.consts)))
    for rank, variable in enumerate(traced.jaxpr.invars):
        values[variable] = program.add_value(variable.aval)
        (program.variables if rank < len(names) else program.inputs).append(values[variable])
    program.outputs = _inline(program, traced.jaxpr, values)
    _find_calls(program)
    return program


def _constants(program: Program, jaxpr: Any, constants: Any) -> list[int]:
    made = [program.add_value(variable.aval) for variable in jaxpr.constvars]
    program.constants.update(zip(made, constants))
    return made


def _inline(program: Program, jaxpr: Any, values: dict[Any, int]) -> list[int]:
    """Append the equations of a program, those of programs within it in their place."""

    def read(atom: Any) -> int:
        if not hasattr(atom, "val"):
            return values[atom]
        made = program.add_value(atom.aval)
        program.constants[made] = atom.val
        return made

    for traced in jaxpr.eqns:
        operands = [read(atom) for atom in traced.invars]
        name = traced.primitive.name
        inner = list(inner_programs(traced)) if name in INLINED else []
        if len(inner) == 1:
            inner_values = dict(zip(inner[0].invars, operands))
            closed = [p for p in traced.params.values() if getattr(p, "jaxpr", None) is inner[0]]
            if inner[0].constvars:
                constants = _constants(program, inner[0], closed[0].consts)
                inner_values |= dict(zip(inner[0].constvars, constants))
            results = _inline(program, inner[0], inner_values)
        else:
            results = program.add(name, traced.params, operands, traced.outvars, traced)
        values.update(zip(traced.outvars, results))
    return [read(atom) for atom in jaxpr.outvars]


def _find_calls(program: Program) -> None:
    """Fill in where in the program each call is."""
    seen: set[tuple[int, str, int]] = set()
    for position, equation in enumerate(program.equations):
        if equation.name == border_p.name:
            params = equation.params
            call = program.calls[params["call"]]
            key = (call.index, params["side"], params["leaf"])
            call.several |= key in seen
            seen.add(key)
            if params["batched"]:
                call.loop = "vmap"
            [outer], [inner] = equation.operands, equation.results
            if params["side"] == ENTER:
                call.enters.append((params["leaf"], outer, inner))
            else:
                call.leaves.append((outer, inner))
            first = position if call.span[0] < 0 else call.span[0]
            call.span = (first, position)
        else:
            for index in _calls_within(equation.traced):
                program.calls[index].loop = equation.name
    paths: dict[Path, list[Call]] = {}
    for call in program.calls:
        if call.span[0] >= 0 or call.loop:
            paths.setdefault(call.path, []).append(call)
    for same in paths.values():
        for call in same:
            call.several |= len(same) > 1


def _calls_within(traced: Any) -> set[int]:
    """The calls in the programs within an equation."""
    found: set[int] = set()
    for inner in inner_programs(traced):
        for equation in inner.eqns:
            if equation.primitive is border_p:
                found.add(equation.params["call"])
            else:
                found |= _calls_within(equation)
    return found
