"""The order in which running statistics can be settled, from the traced program.

In evaluation a norm's output depends on its running statistics. So norm a feeds norm b exactly if
the moments of b's input depend on the statistics of a.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxnorm._jax import dependencies
from jaxnorm.models.calls import Path


@dataclass(frozen=True)
class Stage:
    """Norms that share passes over the data.

    Attributes:
        norms: their paths. Their inputs depend on norms of earlier stages only, or, of layers that
            are stacked in a loop, on earlier layers of the stack.
        passes: the number of passes after which their statistics are settled, at most.
    """

    norms: tuple[Path, ...]
    passes: int


def stages(
    operation: str, run: Any, norms: Sequence[Path], stacked: Sequence[int], values: Any, rest: Any
) -> list[Stage]:
    """The stages of a model's norms, first to last.

    Args:
        operation: the public function that is being called; errors begin with it.
        run: a function ``(statistics, rest) -> moments``, lists with an entry for each norm.
        norms: their paths.
        stacked: for each, how many layers lie in its statistics; 1 where they are of one layer.
        values: mean and variance of each norm.
        rest: the other arguments of `run`.

    Raises:
        ValueError: a norm's input depends on the norm itself.
    """
    feeds = _feeds(run, values, rest)
    reach = feeds.copy()
    for through in range(len(norms)):
        reach |= np.outer(reach[:, through], reach[through])
    # Norms of one loop, each of which feeds all.
    loop = reach & reach.T
    for i in np.flatnonzero(reach.diagonal()).tolist():
        if stacked[i] == 1:
            name = "/".join(norms[i])
            raise ValueError(
                f"{operation}: with sequential=True no norm may depend on its own statistics, for "
                f"then no order settles them; got {name}, whose input depends on an earlier call "
                f"of {name}. Use sequential=False, which pools the calls as training does."
            )
    found, settled = [], np.zeros(len(norms), bool)
    while not settled.all():
        ready = [
            i
            for i in np.flatnonzero(~settled).tolist()
            if not (reach[:, i] & ~loop[:, i] & ~settled).any()
        ]
        # A pass settles at least one layer of one norm of a loop.
        passes = max(sum(stacked[j] for j in np.flatnonzero(loop[i]).tolist()) or 1 for i in ready)
        found.append(Stage(tuple(norms[i] for i in ready), passes))
        settled[ready] = True
    return found


def _feeds(run: Any, values: Any, rest: Any) -> np.ndarray:
    """A matrix: [a, b] is True if norm a's output flows into norm b's input."""
    program = jax.make_jaxpr(run)(values, rest).jaxpr
    number, fields = len(values), len(program.outvars) // max(len(values), 1)
    feeds = np.zeros((number, number), bool)
    for b in range(number):
        wanted = [k // fields == b for k in range(len(program.outvars))]
        used = dependencies(program, wanted)
        # The statistics are the first operands, two for each norm.
        feeds[:, b] = np.reshape(used[: 2 * number], (number, 2)).any(1)
    return feeds
