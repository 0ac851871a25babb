"""Run a function, and tell what was seen at the marks in it.

The function is traced and evaluated again, equation by equation, with a summary taken at each mark.
What is seen in inner programs is handed out of these: out of a scan, a branch, a part of a mesh.
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
from jaxnorm.monitor.probe.groups import Detail, Part, by_name, from_names, nothing, whole_parts
from jaxnorm.monitor.probe.marks import GRADIENT, VALUE, Place, mark_p
from jaxnorm.monitor.probe.observations import Sights
from jaxnorm.monitor.probe.subsample import Excerpt, excerpt
from jaxnorm.monitor.probe.summary import (
    FLAT_ENDS,
    BatchParts,
    Summary,
    by_channel,
    joined,
    summarize,
    summarize_batches,
)


def observe(
    function: Callable[..., Any],
    *,
    elements: int | None = None,
    gradients: bool = True,
    channels: bool = False,
) -> Callable[..., tuple[Any, Sights]]:
    """Wrap a function so that it also returns what was seen at the marks in it.

    Args:
        function: pure, with models that `attach` has marked in it. Gradients are seen where it
            takes them itself. Arguments that are no arrays are static.
        elements: as in `Monitor`.
        gradients: whether to look at them.
        channels: as in `Monitor`.

    Returns:
        A function of the same arguments: what `function` returns, and `Sights`. Loops over
        micro-batches and devices of a `shard_map` are pooled; of a loop over layers, each is a
        place of its own.

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

    def run(*args: Any, **kwargs: Any) -> tuple[Any, Sights]:
        of_arrays, arrays = on_arrays(function, args, kwargs)
        closed, shape = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
        outputs, sights = look(closed, arrays, elements, gradients, channels)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs), sights

    return run


def on_arrays(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Callable, list[Any]]:
    """A function of the arrays among some arguments, all else as it is; and these arrays."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

    def run(arrays: list[Any]) -> Any:
        filled = list(leaves)
        for i, array in zip(places, arrays):
            filled[i] = array
        args, kwargs = tree.unflatten(filled)
        return function(*args, **kwargs)

    return run, [leaves[i] for i in places]


def look(
    closed: Any, args: Sequence[Any], elements: int | None, gradients: bool, channels: bool
) -> tuple[list[Any], Sights]:
    """The results of a traced program, and the observations made in it."""
    watch = _Watch(elements, gradients, channels)
    outputs, found = watch.run(closed.jaxpr, closed.consts, args)
    found = whole_parts(found)
    values = [part for part in found if part.role == VALUE]
    if not values:
        raise ValueError(
            "observe: a program must have marks to be looked at; this one has none. Run a model "
            "that jaxnorm.monitor.probe.attach returned."
        )
    places = [watch.places[key] for part in values for key in part.names]
    order = sorted(range(len(places)), key=lambda i: watch.rank(places[i]))
    slopes = [part for part in found if part.role == GRADIENT]
    details, steep = (
        {name: d for part in some for name, d in part.details.items()} for some in (values, slopes)
    )
    sights = Sights(
        values=joined([part.summary for part in values]).take(order),
        gradients=joined([part.summary for part in slopes]) if slopes else None,
        batches={n: d.batch.summary() for n, d in details.items() if d.batch is not None},
        channels={n: d.channels for n, d in details.items() if d.channels is not None},
        channel_gradients={n: d.channels for n, d in steep.items() if d.channels is not None},
        places=tuple(replace(places[i], order=rank) for rank, i in enumerate(order)),
        with_gradient=tuple(name for part in slopes for name in part.names),
    )
    return outputs, sights


class _Watch:
    """One run of a program, and of the programs in it."""

    def __init__(self, elements: int | None, gradients: bool, channels: bool):
        self.elements = elements
        self.gradients = gradients
        self.channels = channels
        self.places: dict[str, Place] = {}
        self._ranks: dict[str, tuple[int, ...]] = {}

    def rank(self, place: Place) -> tuple[int, ...]:
        """Sorts places as a forward pass comes by: all of a loop's turn, then all of the next."""
        return self._ranks.get(place.name, (place.order,))

    def run(self, jaxpr: Any, consts: Any, args: Any) -> tuple[list[Any], list[Part]]:
        """Results of a program, and what was seen in it."""
        values = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
        found: list[Part] = []
        marked: dict[tuple[str, str], list[Any]] = {}

        for eqn in jaxpr.eqns:
            given = read(values, eqn.invars)
            if eqn.primitive is mark_p:
                made = given[:1]
                place, role = eqn.params["place"], eqn.params["role"]
                if role == VALUE or (role == GRADIENT and self.gradients):
                    self.places[place.name] = place
                    marked.setdefault((place.name, role), given)
            elif any(map(_is_marked, inner_programs(eqn))):
                made, within = self._inside(eqn, given)
                found += within
            else:
                made = evaluate(eqn, given)
            values |= dict(zip(eqn.outvars, made))
        known: set[tuple[str, str]] = set()
        parts = []
        for part in [*self._summaries(marked), *found]:
            # What is computed again for the backward pass has been seen.
            part = part.without(known)
            known |= {(name, part.role) for name in part.names}
            parts += [part] if part.names else []
        return read(values, jaxpr.outvars), parts

    def _summaries(self, marked: dict[tuple[str, str], list[Any]]) -> list[Part]:
        """All that was marked in one program, looked at together."""
        parts = []
        for role in (VALUE, GRADIENT):
            keys = [key for key in marked if key[1] == role]
            if not keys:
                continue
            # An array between two layers is the output of one and the input of the other.
            excerpts: dict[tuple[int, str], Excerpt] = {}
            which = []
            for key in keys:
                x, kind = marked[key][0], self._flattening(*key)
                which.append((id(x), kind))
                if which[-1] not in excerpts:
                    excerpts[which[-1]] = excerpt(x, self.elements, kind)
            details = self._details({key[0]: marked[key] for key in keys}, role)
            rows = list(excerpts)
            of = [rows.index(w) for w in which]
            for group, summary in summarize(list(excerpts.values()), values=role == VALUE):
                mine = [i for i, row in enumerate(of) if row in group]
                names = tuple(keys[i][0] for i in mine)
                own = {name: details[name] for name in names if name in details}
                taken = summary.take([group.index(of[i]) for i in mine], 1)
                parts.append(Part(role, names, taken, own))
        return parts

    def _flattening(self, name: str, role: str) -> str:
        """The nonlinearity whose value it is, if it is one's that is flat somewhere."""
        place = self.places[name]
        known = role == VALUE and place.side == "output" and place.kind in FLAT_ENDS
        return place.kind if known else ""

    def _details(self, given: dict[str, list[Any]], role: str) -> dict[str, Detail]:
        """The details of places by channel."""
        batches = self._batches(given) if role == VALUE else {}
        channels: dict[str, Summary] = {}
        if self.channels:
            excerpts = [self._by_channel(name, x, role) for name, (x, *_) in given.items()]
            channels = dict(zip(given, by_channel(excerpts, values=role == VALUE)))
        details = {name: Detail(batches.get(name), channels.get(name)) for name in given}
        return {name: detail for name, detail in details.items() if detail != Detail()}

    def _batches(self, values: dict[str, list[Any]]) -> dict[str, BatchParts]:
        given = {name: g for name, g in values.items() if len(g) > 1}
        inputs = [self._by_channel(name, x, VALUE) for name, (x, *_) in given.items()]
        running = [(mean, var) for _, mean, var in given.values()]
        return dict(zip(given, summarize_batches(inputs, running)))

    def _by_channel(self, name: str, x: Any, role: str) -> Excerpt:
        """An excerpt with all channels."""
        axes = dict(self.places[name].facts).get("feature_axes", (-1,))
        return excerpt(x, self.elements, self._flattening(name, role), axes)

    def _inside(self, eqn: JaxprEqn, given: list[Any]) -> tuple[list[Any], list[Part]]:
        """An equation whose inner programs have marks."""
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
            f"observe: a marked layer must not run inside of '{kind}', whose turns cannot be told "
            f"apart from outside; got {', '.join(sorted(_names(eqn)))}. Leave these out with "
            "layers=, or use jax.lax.scan."
        )

    def _jit(self, params, given):
        given = [_constrained(x, s) for x, s in zip(given, params["in_shardings"])]
        closed = params["jaxpr"]
        made, parts = self.run(closed.jaxpr, closed.consts, given)
        return [_constrained(x, s) for x, s in zip(made, params["out_shardings"])], parts

    def _scan(self, eqn, given):
        params, (consts, carries) = eqn.params, scan_operands(eqn)
        closed, length = params["jaxpr"], params["length"]
        seen: list[Part] = []

        def body(carry, xs):
            made, seen[:] = self.run(closed.jaxpr, closed.consts, [*given[:consts], *carry, *xs])
            return made[:carries], (made[carries:], [part.arrays for part in seen])

        carry, (ys, every) = lax.scan(
            body,
            given[consts : consts + carries],
            given[consts + carries :],
            length=length,
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        parts = [part.of(arrays) for part, arrays in zip(seen, every)]
        ranks = [self.rank(self.places[name]) for part in parts for name in part.names]
        return [*carry, *ys], [self._turns(part, length, min(ranks)[0]) for part in parts]

    def _turns(self, part: Part, length: int, begin: int) -> Part:
        """Observations of a scan's iterations: of layers each, of all else together."""
        places = [self.places[name] for name in part.names]
        scans = places[0].scans
        if not scans or not scans[-1][1]:
            for place in places:
                self.places[place.name] = replace(place, scans=place.scans[:-1])
            return part.pooled()
        names = []
        for i in range(length):
            for place in places:
                own = replace(place, layer=f"{place.layer}[{i}]", scans=place.scans[:-1])
                self.places[own.name] = own
                # The backward pass, which may not come by all of them, finds it set.
                self._ranks.setdefault(own.name, (begin, i, *self.rank(place)))
                names.append(own.name)
        details = {
            f"{place.layer}[{i}]:{place.side}": jax.tree.map(lambda a, i=i: a[i], detail)
            for place in places
            if (detail := part.details.get(place.name)) is not None
            for i in range(length)
        }
        turns = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), part.summary)
        flat = jax.tree.map(lambda a: a.reshape(len(a), -1, *a.shape[3:]), turns)
        return Part(part.role, tuple(names), flat, details)

    def _cond(self, params, given):
        index, *operands = given
        parts: list[list[Part]] = [[] for _ in params["branches"]]

        def branch(i, closed):
            def run(*operands):
                made, parts[i] = self.run(closed.jaxpr, closed.consts, operands)
                return made, by_name(parts[i])

            return run

        branches = [branch(i, closed) for i, closed in enumerate(params["branches"])]
        shapes = [jax.eval_shape(b, *operands)[1] for b in branches]
        every = {key: shape for found in shapes for key, shape in found.items()}

        def filled(run):
            def filling(*operands):
                made, found = run(*operands)
                return made, {k: found.get(k, nothing(s)) for k, s in every.items()}

            return filling

        made, found = lax.switch(index, [filled(b) for b in branches], *operands)
        return made, from_names(found)

    def _shard_map(self, params, given):
        mesh, names = params["mesh"], tuple(sorted(params["newly_manual_axes"]))
        parts: list[Part] = []

        def on_device(*operands):
            made, parts[:] = self.run(params["jaxpr"], (), operands)
            flat, unravel = ravel_pytree([part.arrays for part in parts])
            # All devices' numbers in one collective, whatever is to be done with them.
            size = lax.axis_size(names)
            every = jnp.zeros((size, flat.size), flat.dtype).at[lax.axis_index(names)].set(flat)
            every = jax.vmap(unravel)(lax.psum(every, names))
            return made, [part.of(a).pooled().arrays for part, a in zip(parts, every)]

        made, arrays = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=tuple(params["in_specs"]),
            out_specs=(list(params["out_specs"]), P()),
            check_vma=params["check_vma"],
            axis_names=set(names),
        )(*given)
        return made, [part.of(a) for part, a in zip(parts, arrays)]


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
