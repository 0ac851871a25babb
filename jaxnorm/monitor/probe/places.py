"""Marks on the nonlinearities of a traced model, and a name of its own for each place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from jaxnorm._jax import Jaxpr, JaxprEqn, Literal, Var, scan_operands
from jaxnorm.monitor.probe.marks import FENCE, VALUE, Place, mark_p
from jaxnorm.monitor.probe.nonlinearities import nonlinearities

Chosen = Callable[[str, str], bool]
"""A function of a nonlinearity's path and name: True if it is to be observed."""

# Their inner programs stay as they are: a rule of differentiation of their own belongs to them.
_OPAQUE = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


@dataclass
class Marker:
    """A single walk through a program, in the order in which it runs, that puts marks in it.

    Attributes:
        chosen: selects nonlinearities.
        top: name of the scope that the whole model is in; "" where there is none.
        places: the places that were marked.
        found: paths of all nonlinearities, chosen or not.
    """

    chosen: Chosen
    top: str
    places: list[Place] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    _names: Counter = field(default_factory=Counter)
    _numbers: Counter = field(default_factory=Counter)
    _norms_around: int = 0  # norm layers that the present equation is a part of
    _returned: frozenset[Any] = frozenset()  # results of the whole program

    def marked(self, program: Any, parameters: list[bool]) -> Any:
        """A program with marks on its nonlinearities.

        Args:
            program: a closed jaxpr; the marks of layers are in it already.
            parameters: for each of its inputs, True if it is one of the model's parameters.
        """
        self._returned = frozenset(v for v in program.jaxpr.outvars if isinstance(v, Var))
        return self._closed(program, parameters, (), "")

    def _closed(self, closed: Any, parameters: list[bool], scans, scope: str) -> Any:
        jaxpr = closed.jaxpr
        known = {v for v, yes in zip(jaxpr.invars, parameters) if yes}
        return closed.replace(jaxpr=self._jaxpr(jaxpr, known, scans, scope))

    def _jaxpr(self, jaxpr: Jaxpr, parameters: set[Var], scans, scope: str) -> Jaxpr:
        eqns: list[JaxprEqn] = []
        now: dict[Var, Var] = {}  # a variable -> its marked form, from here on

        def put(eqn: JaxprEqn, x: Var, place: Place) -> None:
            """Put a mark on the present form of `x`."""
            y = Var(x.aval)
            eqns.append(
                eqn.replace(
                    invars=[now.get(x, x)],
                    outvars=[y],
                    primitive=mark_p,
                    params={"place": place, "role": VALUE},
                    effects=frozenset(),
                )
            )
            now[x] = y

        starts = {n.start: n for n in nonlinearities(jaxpr)}
        whole = {i for n in starts.values() for i in range(n.start, n.stop)}
        stops = {}
        for i, eqn in enumerate(jaxpr.eqns):
            here = _joined(scope, str(eqn.source_info.name_stack))
            if i in starts and not self._norms_around:
                function = starts[i]
                path = self._path(here, function.name)
                if self.chosen(path, function.name):
                    shape = tuple(getattr(function.input.aval, "shape", ()))
                    facts = (("shape", shape), ("returned", function.output in self._returned))
                    side = Place(path, function.name, "input", facts=facts)
                    put(eqn, function.input, self._placed(side, scans))
                    stops[function.stop - 1] = function, replace(side, side="output")
            invars = [v if isinstance(v, Literal) else now.get(v, v) for v in eqn.invars]
            if eqn.primitive is mark_p:
                place = eqn.params["place"]
                if place.is_norm:
                    self._norms_around += 1 if place.side == "input" else -1
                if eqn.params["role"] == FENCE:
                    now[eqn.outvars[0]] = cast(Var, invars[0])
                    continue
                placed = self._placed(place, scans)
                eqn = eqn.replace(invars=invars, params={**eqn.params, "place": placed})
            else:
                params = eqn.params
                if i not in whole:  # inside a nonlinearity there are no places
                    params = self._params(eqn, parameters, scans, here)
                eqn = eqn.replace(invars=invars, params=params)
            eqns.append(eqn)
            arrays = [v for v in eqn.invars if isinstance(v, Var)]
            if arrays and all(v in parameters for v in arrays):
                parameters.update(eqn.outvars)
            if i in stops:
                function, place = stops[i]
                put(eqn, function.output, self._placed(place, scans))
        outvars = [v if isinstance(v, Literal) else now.get(v, v) for v in jaxpr.outvars]
        return jaxpr.replace(eqns=eqns, outvars=outvars)

    def _params(self, eqn: JaxprEqn, parameters: set[Var], scans, scope: str) -> dict[str, Any]:
        """An equation's parameters, its inner programs marked."""
        params, kind = eqn.params, eqn.primitive.name
        if kind in _OPAQUE:
            return params
        known = [isinstance(v, Var) and v in parameters for v in eqn.invars]
        if kind == "scan":
            first = sum(scan_operands(eqn))
            # A scan over parameters is one over layers, and each layer has its own places.
            layers = any(known[first:])
            scans = (*scans, (params["length"], layers))
            return {**params, "jaxpr": self._closed(params["jaxpr"], known, scans, scope)}
        if kind == "cond":
            branches = [self._closed(b, known[1:], scans, scope) for b in params["branches"]]
            return {**params, "branches": tuple(branches)}
        name = "jaxpr" if "jaxpr" in params else "call_jaxpr"
        inner = params.get(name)
        if inner is None:
            return params
        if _is_closed(inner):
            return {**params, name: self._closed(inner, known, scans, scope)}
        own = {v for v, yes in zip(inner.invars, known) if yes}
        return {**params, name: self._jaxpr(inner, own, scans, scope)}

    def _placed(self, place: Place, scans) -> Place:
        """Give a place its own name and its rank."""
        self._names[place.name] += 1
        times = self._names[place.name]
        layer = place.layer if times == 1 else f"{place.layer}({times})"
        layer = layer.removeprefix(f"{self.top}/")
        placed = replace(place, layer=layer, order=len(self.places), scans=scans)
        self.places.append(placed)
        return placed

    def _path(self, scope: str, name: str) -> str:
        scope = scope.removeprefix(self.top).removeprefix("/")
        path = _joined(scope, f"{name}_{self._numbers[scope, name]}")
        self._numbers[scope, name] += 1
        self.found.append(path)
        return path


def _joined(scope: str, name: str) -> str:
    # Transformations wrap a scope's name: "vmap(Block)/Dense_0".
    name = re.sub(r"\w+\(([^()]*)\)", r"\1", name)
    return "/".join(part for part in (scope, name) if part)


def _is_closed(jaxpr: Any) -> bool:
    return hasattr(jaxpr, "consts") and hasattr(jaxpr, "jaxpr")
