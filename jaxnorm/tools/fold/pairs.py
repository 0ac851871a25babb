"""Pairs of norms and linear maps, found in the flow of values."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from jaxnorm.models.select import Selection
from jaxnorm.tools.fold.affine import Affine, AffineForms
from jaxnorm.tools.fold.exact import SAME, Exact
from jaxnorm.tools.fold.layout import Move, compact, move, pulled_back
from jaxnorm.tools.fold.linear import Linear, UnfoldableError, find_linear
from jaxnorm.tools.fold.program import Equation, Program, border_p
from jaxnorm.tools.fold.report import Folded, Kept
from jaxnorm.tools.fold.scaling import BATCH_NORMS, Scaling, find_scalings


@dataclass
class Folding:
    """Changes of a model, and the rows of its report.

    Attributes:
        linear: the linear layers that change.
        removed: the layers that become the identity.
        neutral: variables that get other values.
        folded, kept: rows of the report.
    """

    linear: list[Linear] = field(default_factory=list)
    removed: list[Scaling] = field(default_factory=list)
    neutral: dict[int, np.ndarray] = field(default_factory=dict)
    folded: list[Folded] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)


def plan_folding(operation: str, program: Program, exact: Exact, selection: Selection) -> Folding:
    """Decide for every norm whether it can be folded exactly, into what, or why not.

    Args:
        operation: the public function that is being called; errors begin with it.
        program: the traced model.
        exact: its known values.
        selection: of the norms that may be folded.

    Raises:
        ValueError: the model has no norm, or the selection has none.
    """
    return _Planner(program, exact).plan(operation, selection)


class _Planner:
    def __init__(self, program: Program, exact: Exact) -> None:
        self._program, self._exact = program, exact
        self._linear, self._refused = find_linear(program, exact)
        self._by_position = {each.position: each for each in self._linear}
        self._by_result = {each.outer.leaves[0][1]: each for each in self._linear}
        self._at_enter = {
            each.call.enters[0][1]: each for each in self._linear if each.is_convolution
        }
        self._identity: dict[int, int] = {}  # what a removed layer returns -> what it is given
        self._plan = Folding()

    def plan(self, operation: str, selection: Selection) -> Folding:
        """The changes, and the report."""
        scalings, reasons = find_scalings(self._program, self._exact, self._linear)
        computed = [each for each in self._linear if each.variable is None]
        calls = [each.call for each in scalings] + [each.outer for each in computed]
        calls += [self._program.calls[index] for index in reasons]
        if not calls:
            kinds = sorted({type(call.module).__name__ for call in self._program.calls})
            raise ValueError(
                f"{operation}: the model must have a norm, or a kernel that is computed; the "
                f"layers that the example passes through are {', '.join(kinds) or 'none'}. There "
                "is nothing to fold: use the model as it is."
            )
        named = [(call.name, call.module) for call in calls]
        chosen = selection.among(operation, "where", named, object)
        for scaling in scalings:
            name, kind = scaling.call.name, scaling.kind
            if name not in chosen:
                reasons[scaling.call.index] = "where= leaves it out"
                continue
            try:
                self._plan.folded.append(Folded(name, kind, *self._fold(scaling)))
            except UnfoldableError as reason:
                reasons[scaling.call.index] = str(reason)
        self._fold_products(chosen)
        self._materialize([each for each in computed if each.outer.name in chosen], reasons)
        for index, reason in sorted(reasons.items()):
            call = self._program.calls[index]
            row = Kept(call.name, type(call.module).__name__, reason)
            if row not in self._plan.kept:  # a layer that is called twice
                self._plan.kept.append(row)
        self._plan.linear = [each for each in self._linear if each.is_changed]
        return self._plan

    # Where they can go.

    def _fold(self, scaling: Scaling) -> tuple[str, str]:
        """Fold a layer; returns into which others, and how."""
        before = ""
        if not scaling.is_whole and isinstance(scaling.call.module, BATCH_NORMS):
            before = "it uses the statistics of the batch; "
        if scaling.is_whole:
            try:
                return self._into_producer(scaling)
            except UnfoldableError as reason:
                before = f"{reason}; "
        try:
            return self._into_readers(scaling)
        except UnfoldableError as reason:
            raise UnfoldableError(f"{before}{reason}") from None

    def _into_producer(self, scaling: Scaling) -> tuple[str, str]:
        linear, moves = self._producer(scaling.source)
        scale, shift = (pulled_back(moves, each) for each in (scaling.scale, scaling.shift))
        linear.scale_result(scale, shift, scaling.has_shift)
        made = self._program.types[scaling.call.leaves[0][0]].dtype
        linear.dtype = jnp.promote_types(linear.dtype, made)
        self._remove(scaling)
        return linear.call.name, "kernel and bias"

    def _producer(self, value: int) -> tuple[Linear, tuple[Move, ...]]:
        """The linear layer that a value comes from, and the moves since."""
        program = self._program
        moves: list[Move] = []
        while True:
            if len(program.readers.get(value, ())) > 1:
                raise UnfoldableError("its input is used elsewhere")
            if value in program.outputs:
                raise UnfoldableError("its input is a result of the model")
            if value in self._by_result:
                return self._by_result[value], tuple(reversed(moves))
            if value in self._identity:
                value = self._identity[value]
                continue
            position = program.makers.get(value)
            if position is None:
                raise UnfoldableError("its input is the model's")
            equation = program.equations[position]
            if equation.name == border_p.name:
                call = program.calls[equation.params["call"]]
                if call.index in self._refused:
                    raise UnfoldableError(f"{call.name} before it: {self._refused[call.index]}")
            if equation.name in SAME:
                value = equation.operands[0]
                continue
            before = equation.operands[0] if equation.operands else -1
            moved = before >= 0 and move(
                equation.name, equation.params, program.shape(before), program.shape(value)
            )
            if not moved:
                raise UnfoldableError(f"before it is {_described(equation.name)}")
            moves.append(moved)
            value = before

    def _into_readers(self, scaling: Scaling) -> tuple[str, str]:
        targets = self._targets(scaling.result, scaling.scale, scaling.shift)
        if not targets:
            raise UnfoldableError("nothing reads its result")
        for linear, *_ in targets:
            if sum(linear is other for other, *_ in targets) > 1:
                raise UnfoldableError("a layer reads its result twice")
        kept = [dict(vars(linear)) for linear, *_ in targets]
        try:
            for linear, at_layer, scale, shift in targets:
                at = linear.scale_channels if at_layer else linear.scale_data
                at(scale, shift, scaling.has_shift)
        except UnfoldableError:
            for (linear, *_), old in zip(targets, kept):
                vars(linear).update(old)
            raise
        if scaling.is_whole:
            self._remove(scaling)
        else:
            self._plan.neutral.update(scaling.neutral)
        how = "kernel and bias"
        if any(linear.taps is not None for linear, *_ in targets):
            how = "kernel, and a bias that knows the border"
        return ", ".join(linear.call.name for linear, *_ in targets), how

    def _targets(self, value: int, scale: np.ndarray, shift: np.ndarray) -> list[tuple]:
        """The linear layers that read a value, each with the coefficients where it reads it."""
        program = self._program
        if value in program.outputs:
            raise UnfoldableError("its result is a result of the model")
        found: list[tuple] = []
        for position in program.readers.get(value, ()):
            equation = program.equations[position]
            [result] = equation.results if len(equation.results) == 1 else [-1]
            here = self._at_enter.get(value)
            if here is not None and equation.params.get("call") == here.call.index:
                found.append((here, True, scale, shift))
            elif position in self._by_position:
                found.append((self._by_position[position], False, scale, shift))
            elif self._is_removed_call(equation):
                call = program.calls[equation.params["call"]]
                found += self._targets(call.leaves[0][1], scale, shift)
            elif equation.name in SAME:
                found += self._targets(result, scale, shift)
            elif moved := move(
                equation.name, equation.params, program.shape(value), program.shape(result)
            ):
                found += self._targets(result, moved.forward(scale), moved.forward(shift))
            else:
                raise UnfoldableError(f"{_described(equation.name)} reads its result")
        return found

    def _is_removed_call(self, equation) -> bool:
        if equation.name != border_p.name or equation.params["side"] != "enter":
            return False
        return any(s.call.index == equation.params["call"] for s in self._plan.removed)

    def _remove(self, scaling: Scaling) -> None:
        self._identity[scaling.result] = scaling.source
        self._plan.removed.append(scaling)

    def _fold_products(self, chosen: set[str]) -> None:
        """Fold products of a linear layer's result with a variable, such as layer scale."""
        program, exact = self._program, self._exact
        forms = AffineForms(exact, fixed=lambda v: v in exact.known and not exact.variables_of(v))
        for linear in self._linear:
            value, moves = linear.outer.leaves[0][1], []
            while True:
                positions = program.readers.get(value, ())
                if len(positions) != 1 or value in program.outputs:
                    break
                equation = program.equations[positions[0]]
                if equation.name == "mul":
                    [factor] = [o for o in equation.operands if o != value]
                    variable = forms.of(factor)
                    if factor in exact.known and self._is_of_product(variable, positions[0]):
                        self._fold_product(linear, variable.base, factor, tuple(moves))
                    break
                if len(equation.results) != 1 or equation.operands[0] != value:
                    break
                [result] = equation.results
                if equation.name not in SAME:
                    before, after = program.shape(value), program.shape(result)
                    moved = move(equation.name, equation.params, before, after)
                    if moved is None:
                        break
                    moves.append(moved)
                value = self._passed(equation) or result

    def _passed(self, equation: Equation) -> int | None:
        """The value that a removed layer returns, if an equation enters it."""
        if not self._is_removed_call(equation):
            return None
        return self._program.calls[equation.params["call"]].leaves[0][1]

    def _is_of_product(self, factor: Affine, position: int) -> bool:
        """True if a factor is a variable that nothing else reads."""
        program, variable = self._program, factor.base
        if variable not in program.variables or not factor.is_plain:
            return False
        if variable in self._plan.neutral or variable in program.outputs:
            return False
        reads = [program.readers.get(v, []) for v in (variable, *factor.path)]
        return all(len(r) == 1 for r in reads) and reads[-1] == [position]

    def _fold_product(
        self, linear: Linear, variable: int, factor: int, moves: tuple[Move, ...]
    ) -> None:
        name = self._program.names[self._program.variables.index(variable)]
        scale = compact(np.asarray(self._exact.value(factor)))
        try:
            linear.scale_result(pulled_back(moves, scale), np.zeros((1,) * linear.bias.ndim), False)
        except UnfoldableError:
            return
        self._plan.neutral[variable] = np.ones_like(self._exact.value(variable))
        self._plan.folded.append(Folded(name, "parameter", linear.call.name, "kernel and bias"))

    def _materialize(self, computed: list[Linear], reasons: dict[int, str]) -> None:
        """Replace kernels that are computed of several variables by what is computed."""
        for linear in computed:
            call, name = linear.outer, type(linear.outer.module).__name__
            if linear.plain_type is None:
                reasons[call.index] = "its kernel is computed, and it is no layer of Flax"
                continue
            if not linear.is_changed:
                self._plan.folded.append(Folded(call.name, name, call.name, "a plain kernel"))
            linear.is_changed = True


def _described(primitive: str) -> str:
    words = {"add": "a sum", "add_any": "a sum", "concatenate": "a concatenation",
             "max": "a nonlinearity", "custom_jvp_call": "a nonlinearity"}  # fmt: skip
    return words.get(primitive, f"'{primitive}'")
