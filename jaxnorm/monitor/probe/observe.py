"""Observation of a function: what it returns, and summaries of the arrays at the marks in it.

The function is traced and evaluated again, equation by equation, with a summary at each mark.
Programs within it, such as a scan or a branch, return their observations as further results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm._jax import JaxprEqn, evaluate, inner_programs, read, scan_operands, traced_under
from jaxnorm.models.trace import on_arrays
from jaxnorm.monitor.probe.groups import (
    Group,
    Key,
    by_key,
    completed_groups,
    empty_group,
    stack_summaries,
    without_repetitions,
)
from jaxnorm.monitor.probe.marks import GRADIENT, VALUE, Place, mark_p
from jaxnorm.monitor.probe.observations import Observations
from jaxnorm.monitor.probe.subsample import Subsample, subsample
from jaxnorm.monitor.probe.summarize import summarize, summarize_batches, summarize_channels
from jaxnorm.monitor.probe.summary import FLAT_ENDS, BatchSummary, Summary


def observe(
    function: Callable[..., Any],
    *,
    elements: int | None = None,
    gradients: bool = True,
    channels: bool = False,
) -> Callable[..., tuple[Any, Observations]]:
    """Wrap a function so that it also returns observations of the marks in it.

    Args:
        function: a pure function that calls models which `attach` has marked. Gradients are
            observed where the function takes them itself. Arguments that are no arrays are static.
        elements: as in `Monitor`.
        gradients: True to observe gradients, too.
        channels: as in `Monitor`.

    Returns:
        A function of the same arguments, which returns what `function` returns, and
        `Observations`. Iterations over micro-batches and devices of a `shard_map` are pooled; in a
        loop over layers, each layer is a place of its own.

    Raises:
        ValueError: when traced: there is no mark; a marked layer runs in a `while_loop`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxnorm.monitor import attach, observe
        >>> model = attach(nn.Sequential([nn.Dense(3), nn.relu]))
        >>> x = jnp.arange(8.0).reshape(4, 2)
        >>> variables = model.init(jax.random.key(0), x)
        >>> y, seen = jax.jit(observe(model.apply))(variables, x)
        >>> seen["relu_0:output"].value.maximum.item() == y.max().item()
        True
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Any, Observations]:
        of_arrays, arrays = on_arrays(function, args, kwargs)
        closed, shape = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
        outputs, observations = observe_program(closed, arrays, elements, gradients, channels)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs), observations

    return run


def observe_program(
    closed: Any, args: Sequence[Any], elements: int | None, gradients: bool, channels: bool
) -> tuple[list[Any], Observations]:
    """Run a traced program, and observe the marks in it.

    Args:
        closed: the program, a closed jaxpr.
        args: its inputs.
        elements: as in `Monitor`.
        gradients: as in `observe`.
        channels: as in `Monitor`.

    Returns:
        The program's results, and the observations.
    """
    observer = _Observer(elements, gradients, channels)
    outputs, groups = observer.run(closed.jaxpr, closed.consts, args)
    groups = completed_groups(groups)
    values = [group for group in groups if group.role == VALUE]
    slopes = [group for group in groups if group.role == GRADIENT]
    if not values:
        raise ValueError(
            "observe: a program must have marks to be observed; this one has none. Run a model "
            "that jaxnorm.monitor.attach returned."
        )
    places = [observer.places[name] for group in values for name in group.names]
    order = sorted(range(len(places)), key=lambda i: observer.rank(places[i]))
    observations = Observations(
        values=stack_summaries(values).take(order),
        gradients=stack_summaries(slopes) if slopes else None,
        batches={name: b for group in values for name, b in group.batches.items()},
        channels={name: c for group in values for name, c in group.channels.items()},
        channel_gradients={name: c for group in slopes for name, c in group.channels.items()},
        places=tuple(replace(places[i], order=rank) for rank, i in enumerate(order)),
        with_gradient=tuple(name for group in slopes for name in group.names),
    )
    return outputs, observations


class _Observer:
    """One run of a program, and of the programs in it."""

    def __init__(self, elements: int | None, gradients: bool, channels: bool):
        self.elements = elements
        self.gradients = gradients
        self.channels = channels
        self.places: dict[str, Place] = {}
        self._ranks: dict[str, tuple[int, ...]] = {}

    def rank(self, place: Place) -> tuple[int, ...]:
        """Sort key for a forward pass: all places of one iteration, then all of the next."""
        return self._ranks.get(place.name, (place.order,))

    def run(self, jaxpr: Any, consts: Any, args: Any) -> tuple[list[Any], list[Group]]:
        """Run a program, and observe the marks in it."""
        values = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
        inner: list[Group] = []
        marked: dict[Key, list[Any]] = {}

        for eqn in jaxpr.eqns:
            given = read(values, eqn.invars)
            if eqn.primitive is mark_p:
                results = given[:1]
                place, role = eqn.params["place"], eqn.params["role"]
                if role == VALUE or (role == GRADIENT and self.gradients):
                    self.places[place.name] = place
                    marked.setdefault((place.name, role), given)
            elif any(map(_is_marked, inner_programs(eqn))):
                results, groups = self._inside(eqn, given)
                inner += groups
            else:
                results = evaluate(eqn, given)
            values |= dict(zip(eqn.outvars, results))
        groups = without_repetitions([*self._summarized(marked), *inner])
        return read(values, jaxpr.outvars), groups

    def _summarized(self, marked: dict[Key, list[Any]]) -> list[Group]:
        """Summarize the marked arrays of one program, those of one shape together."""
        groups = []
        for role in (VALUE, GRADIENT):
            given = {name: arrays for (name, of), arrays in marked.items() if of == role}
            if not given:
                continue
            # An array between two layers is the output of one and the input of the other.
            subsamples: dict[tuple[int, str], Subsample] = {}
            source: dict[str, tuple[int, str]] = {}
            for name, (x, *_) in given.items():
                kind = self._flattening(name, role)
                source[name] = id(x), kind
                if source[name] not in subsamples:
                    subsamples[source[name]] = subsample(x, self.elements, kind)
            batches = self._batches(given) if role == VALUE else {}
            channels = self._channels(given, role) if self.channels else {}
            sources = list(subsamples)
            for members, summary in summarize(list(subsamples.values()), values=role == VALUE):
                row = {sources[member]: i for i, member in enumerate(members)}
                names = tuple(name for name in given if source[name] in row)
                groups.append(
                    Group(
                        role,
                        names,
                        summary.take([row[source[name]] for name in names], 1),
                        {name: batches[name] for name in names if name in batches},
                        {name: channels[name] for name in names if name in channels},
                    )
                )
        return groups

    def _flattening(self, name: str, role: str) -> str:
        """The nonlinearity that gave this value, if it is flat somewhere; else ""."""
        place = self.places[name]
        known = role == VALUE and place.side == "output" and place.kind in FLAT_ENDS
        return place.kind if known else ""

    def _channels(self, given: dict[str, list[Any]], role: str) -> dict[str, Summary]:
        subsamples = [self._all_channels(name, x, role) for name, (x, *_) in given.items()]
        return dict(zip(given, summarize_channels(subsamples, values=role == VALUE)))

    def _batches(self, values: dict[str, list[Any]]) -> dict[str, BatchSummary]:
        norms = {name: given for name, given in values.items() if len(given) > 1}
        inputs = [self._all_channels(name, x, VALUE) for name, (x, *_) in norms.items()]
        running = [(mean, var) for _, mean, var in norms.values()]
        return dict(zip(norms, summarize_batches(inputs, running)))

    def _all_channels(self, name: str, x: Any, role: str) -> Subsample:
        """A subsample with all channels."""
        axes = dict(self.places[name].facts).get("feature_axes", (-1,))
        return subsample(x, self.elements, self._flattening(name, role), axes)

    def _inside(self, eqn: JaxprEqn, given: list[Any]) -> tuple[list[Any], list[Group]]:
        """Run an equation whose inner programs have marks."""
        kind, params = eqn.primitive.name, eqn.params
        with traced_under(eqn):
            if kind in ("jit", "pjit"):
                return self._jit(params, given)
            if kind in ("checkpoint", "remat", "remat2"):
                if params["differentiated"] and params["prevent_cse"]:
                    # As JAX does: else the compiler sees that it was all computed before.
                    given = list(lax.optimization_barrier(tuple(given)))
                return self.run(params["jaxpr"], (), given)
            if kind in ("custom_jvp_call", "custom_vjp_call"):
                closed = params["call_jaxpr"]
                return self.run(closed.jaxpr, closed.consts, given)
            if kind == "scan":
                return self._scan(eqn, given)
            if kind == "cond":
                return self._cond(params, given)
            if kind == "shard_map":
                return self._shard_map(params, given)
        raise ValueError(
            f"observe: a marked layer must not run inside of '{kind}', whose iterations cannot be "
            f"told apart from outside; got {', '.join(sorted(_names(eqn)))}. Leave these out with "
            "layers=, or use jax.lax.scan."
        )

    def _jit(self, params, given):
        given = [_constrained(x, s) for x, s in zip(given, params["in_shardings"])]
        closed = params["jaxpr"]
        results, groups = self.run(closed.jaxpr, closed.consts, given)
        return [_constrained(x, s) for x, s in zip(results, params["out_shardings"])], groups

    def _scan(self, eqn, given):
        params, (consts, carries) = eqn.params, scan_operands(eqn)
        closed, length = params["jaxpr"], params["length"]

        def body(carry, xs):
            inputs = [*given[:consts], *carry, *xs]
            results, groups = self.run(closed.jaxpr, closed.consts, inputs)
            return results[:carries], (results[carries:], groups)

        carry, (ys, groups) = lax.scan(
            body,
            given[consts : consts + carries],
            given[consts + carries :],
            length=length,
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        ranks = [self.rank(self.places[name]) for group in groups for name in group.names]
        return [*carry, *ys], [self._iterations(each, length, min(ranks)[0]) for each in groups]

    def _iterations(self, group: Group, length: int, begin: int) -> Group:
        """The iterations of a scan: each a place of its own over layers, otherwise pooled."""
        places = [self.places[name] for name in group.names]
        scans = places[0].scans
        if not scans or not scans[-1][1]:
            for place in places:
                self.places[place.name] = replace(place, scans=place.scans[:-1])
            return group.pooled()
        sources: dict[str, tuple[str, int]] = {}  # name -> the name in the scan, and the iteration
        for i in range(length):
            for place in places:
                own = replace(place, layer=f"{place.layer}[{i}]", scans=place.scans[:-1])
                self.places[own.name] = own
                # The backward pass, which may not come by all of them, finds it set.
                self._ranks.setdefault(own.name, (begin, i, *self.rank(place)))
                sources[own.name] = place.name, i

        def separate(summaries: dict[str, Any]) -> dict[str, Any]:
            return {
                new: jax.tree.map(lambda a, i=i: a[i], summaries[name])
                for new, (name, i) in sources.items()
                if name in summaries
            }

        by_parts = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), group.summary)
        flat = jax.tree.map(lambda a: a.reshape(len(a), -1, *a.shape[3:]), by_parts)
        batches, channels = separate(group.batches), separate(group.channels)
        return Group(group.role, tuple(sources), flat, batches, channels)

    def _cond(self, params, given):
        index, *operands = given

        def branch(closed):
            def run(*operands):
                results, groups = self.run(closed.jaxpr, closed.consts, operands)
                return results, by_key(groups)

            return run

        branches = [branch(closed) for closed in params["branches"]]
        shapes = [jax.eval_shape(b, *operands)[1] for b in branches]
        every = {key: shape for found in shapes for key, shape in found.items()}

        def filled(run):
            def filling(*operands):
                results, found = run(*operands)
                return results, {
                    k: found[k] if k in found else empty_group(s) for k, s in every.items()
                }

            return filling

        results, found = lax.switch(index, [filled(b) for b in branches], *operands)
        return results, list(found.values())

    def _shard_map(self, params, given):
        mesh, names = params["mesh"], tuple(sorted(params["newly_manual_axes"]))

        def on_device(*operands):
            results, groups = self.run(params["jaxpr"], (), operands)
            flat, unravel = ravel_pytree(groups)
            # All devices' numbers in one collective, whatever is to be done with them.
            size = lax.axis_size(names)
            every = jnp.zeros((size, flat.size), flat.dtype).at[lax.axis_index(names)].set(flat)
            every = jax.vmap(unravel)(lax.psum(every, names))
            return results, [group.pooled() for group in every]

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=tuple(params["in_specs"]),
            out_specs=(list(params["out_specs"]), P()),
            check_vma=params["check_vma"],
            axis_names=set(names),
        )(*given)


def _is_marked(jaxpr: Any) -> bool:
    return any(
        eqn.primitive is mark_p or any(map(_is_marked, inner_programs(eqn))) for eqn in jaxpr.eqns
    )


def _names(eqn: JaxprEqn) -> set[str]:
    """Names of the marked layers in an equation."""
    if eqn.primitive is mark_p:
        return {eqn.params["place"].layer}
    inner = (e for jaxpr in inner_programs(eqn) for e in jaxpr.eqns)
    return {name for e in inner for name in _names(e)}


def _constrained(x: Any, sharding: Any) -> Any:
    return lax.with_sharding_constraint(x, sharding) if isinstance(sharding, NamedSharding) else x
