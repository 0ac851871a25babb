"""Values of a program that depend on its variables alone, in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm._jax import evaluate, inner_programs
from jaxnorm.tools.fold.program import Equation, Program, border_p

# Primitives that return their first operand.
SAME = {
    border_p.name, "convert_element_type", "copy", "copy_p", "stop_gradient", "name", "device_put",
    "reduce_precision", "sharding_constraint", "mesh_cast", "reshard", "pvary", "pcast",
    "jaxnorm_materialize",
}  # fmt: skip


class Exact:
    """The values of a program that its variables determine.

    Rounding to a narrower dtype within the program is left out: a result is rounded once, when it
    is stored.

    Attributes:
        program: the traced model.
        known: the values that depend on no example.
    """

    def __init__(self, program: Program, variables: list[Any]) -> None:
        self.program = program
        self._values: dict[int, Any] = dict(program.constants)
        self._values.update(zip(program.variables, variables))
        self.known: set[int] = set(self._values)
        for equation in program.equations:
            if self.known.issuperset(equation.operands):
                self.known.update(equation.results)
        self._variables = set(program.variables)
        self._ancestors: dict[int, frozenset[int]] = {}

    def variables_of(self, value: int) -> frozenset[int]:
        """The variables that a known value is computed from."""
        if value in self._variables:
            return frozenset((value,))
        if value not in self.program.makers:
            return frozenset()
        if value not in self._ancestors:
            # In the order of the program, which a recursion might be too deep for.
            for position in self._needed(value):
                equation = self.program.equations[position]
                found = frozenset().union(
                    *(
                        self._ancestors.get(o, frozenset((o,)) if o in self._variables else ())
                        for o in equation.operands
                    )
                )
                self._ancestors.update(dict.fromkeys(equation.results, found))
        return self._ancestors[value]

    def value(self, value: int) -> np.ndarray:
        """A known value, in float64 if it is real."""
        if value not in self._values:
            cpu = jax.local_devices(backend="cpu")[0]
            with (
                jax.enable_x64(True),
                jax.default_device(cpu),
                jax.numpy_dtype_promotion("standard"),
                jax.numpy_rank_promotion("allow"),
            ):
                for position in self._needed(value):
                    equation = self.program.equations[position]
                    if equation.results[0] not in self._values:
                        self._values.update(zip(equation.results, self._evaluated(equation)))
        return _wide(self._values[value])

    def _needed(self, value: int) -> list[int]:
        """The equations that lead to a value, in the order of the program."""
        needed: set[int] = set()
        wanted = [value]
        while wanted:
            position = self.program.makers.get(wanted.pop())
            if position is not None and position not in needed:
                needed.add(position)
                wanted.extend(self.program.equations[position].operands)
        return sorted(needed)

    def _evaluated(self, equation: Equation) -> list[Any]:
        operands = [self._values[o] for o in equation.operands]
        if equation.name in SAME and _is_real(operands[0]) == _is_real_type(
            self.program.types[equation.results[0]]
        ):
            return operands[:1]
        exact = not list(inner_programs(equation.traced)) and all(map(_is_numeric, operands))
        if exact:
            operands = [jnp.asarray(_wide(o)) for o in operands]
        else:
            # Programs within an equation, and keys, have the dtypes that they were traced with.
            types = [self.program.types[o] for o in equation.operands]
            operands = [
                jnp.asarray(o).astype(t.dtype) if _is_numeric(o) else o
                for o, t in zip(operands, types)
            ]
        traced = equation.traced
        if exact and equation.params.get("preferred_element_type") is not None:
            traced = traced.replace(params={**traced.params, "preferred_element_type": None})
        return [_wide(made) for made in evaluate(traced, operands)]


def _is_numeric(array: Any) -> bool:
    return not jnp.issubdtype(jnp.result_type(array), jax.dtypes.extended)


def _is_real(array: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jnp.floating)


def _is_real_type(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)


def _wide(array: Any) -> Any:
    return np.asarray(array, np.float64) if _is_real(array) else array
