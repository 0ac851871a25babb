"""Matching of PyTorch's layers with Flax's: by names that are told, else by order and shape."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxnorm.tools.torch.assignment import Move, TorchAssignment
from jaxnorm.tools.torch.checks import check_pairs
from jaxnorm.tools.torch.layers import TorchLayer, grouped, layers_of, resolved
from jaxnorm.tools.torch.layouts import ArrayLayout
from jaxnorm.tools.torch.pairs import Options, Pairing, in_out_names
from jaxnorm.tools.torch.sources import Source
from jaxnorm.tools.torch.targets import Target, Tree, targets_of

Pair = tuple[Target, TorchLayer]


def assign(
    operation: str,
    source: Source,
    model: Any,
    variables: Any,
    tree: Tree,
    example: tuple[Any, ...],
    options: Options,
) -> TorchAssignment:
    """The assignment of a source to a model.

    Raises:
        ValueError: something is left over on either side, does not fit, or means something else.
    """
    notes = list(source.notes)
    arrays = resolved(source, notes)
    targets = targets_of(operation, model, variables, tree, example, notes)
    layers = layers_of(arrays, source.modules, any(t.kind == "attention" for t in targets))
    in_out = in_out_names(layers, arrays)
    if any(t.kind == "attention" for t in targets):
        layers = grouped(layers)
    pairing = Pairing(tree, arrays, options, in_out)
    layers = _without(operation, "skip", options.skip, layers, lambda layer: layer.keys.values())
    targets = _without(operation, "keep", options.keep, targets, lambda target: [target.name])
    named = _by_names(operation, options, targets, layers)
    rest_targets = [t for t in targets if not any(t is a for a, _ in named)]
    rest_layers = [x for x in layers if not any(x is b for _, b in named)]
    for target, layer in named:
        if pairing.moves(target, layer) is None:
            raise ValueError(
                f"{operation}: layers that names puts together must have arrays that fit; got "
                f"{_layer(layer, arrays)} for {_target(target, tree)}. Change names, or the model."
            )
    rest_layers = _without_tied(rest_layers, rest_targets, layers, arrays, notes)
    if not source.ordered:
        _check_order(operation, rest_targets, rest_layers, pairing)
    ordered = _by_order(operation, rest_targets, rest_layers, pairing, notes)
    place = {id(t): i for i, t in enumerate(targets)}
    pairs = sorted([*named, *ordered], key=lambda pair: place[id(pair[0])])
    crossing = _crossing(pairs, layers)
    if crossing and ordered:
        notes.append(
            f"names say that the orders differ at {crossing}. Layers near it that names does not "
            "hold, such as its norm, are still matched by order: name them, too."
        )
    check_pairs(operation, pairs, arrays, tree, options, source.modules is not None, notes)
    moves: list[Move] = []
    for target, layer in pairs:
        moves += pairing.moves(target, layer) or []
        if "count" in target.leaves and count_move(target, layer).key in arrays:
            moves.append(count_move(target, layer))
    used = {move.key for move in moves}
    aside = [k for k in arrays if k not in used and k.endswith("num_batches_tracked")]
    if aside:
        notes.append(
            f"num_batches_tracked of {len(aside)} layers goes nowhere: only momentum=None uses it."
        )
    return TorchAssignment(tuple(moves), tuple(notes), arrays, tuple(arrays))


def _crossing(pairs: list[Pair], layers: list[TorchLayer]) -> str | None:
    """The first PyTorch layer that comes earlier there, within its kind, than it does here."""
    place = {id(x): i for i, x in enumerate(layers)}
    last: dict[str, int] = {}
    for target, layer in pairs:
        if target.kind != "parameter" and place[id(layer)] < last.get(target.kind, -1):
            return layer.name
        last[target.kind] = place[id(layer)]
    return None


def count_move(target: Target, layer: TorchLayer) -> Move:
    """The move of a norm's number of updates."""
    key = f"{layer.name}.num_batches_tracked".lstrip(".")
    return Move(key, target.leaves["count"], ArrayLayout("as it is", (), ()))


def _without(
    operation: str, argument: str, patterns: Sequence[str], items: list, names: Callable
) -> list:
    """The items whose names match no pattern. Each pattern must match."""
    if isinstance(patterns, str):
        patterns = (patterns,)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(n, pattern) for item in items for n in names(item)):
            there = ", ".join(n for item in items for n in names(item))
            raise ValueError(
                f"{operation}: {argument} must match something; got {pattern!r}, and there are "
                f"{there}. Choose among these; in a pattern, * stands for anything."
            )
    return [
        item
        for item in items
        if not all(any(fnmatch.fnmatchcase(n, p) for p in patterns) for n in names(item))
    ]


def _by_names(
    operation: str, options: Options, targets: list[Target], layers: list[TorchLayer]
) -> list[Pair]:
    by_name = {target.name: target for target in targets}
    pairs: list[Pair] = []
    for theirs, ours in options.names.items():
        matched = False
        for layer in layers:
            found = _pattern(theirs).fullmatch(layer.name)
            if not found:
                continue
            matched = True
            name = _filled_in(operation, theirs, ours, found.groupdict())
            if name not in by_name or any(t.name == name for t, _ in pairs):
                problem = "is matched twice" if name in by_name else "is no layer of the model"
                raise ValueError(
                    f"{operation}: names must name layers of the model, each once; got {name!r} "
                    f"for {layer.name!r}, which {problem}. The layers are {', '.join(by_name)}."
                )
            pairs.append((by_name[name], layer))
        if not matched:
            raise ValueError(
                f"{operation}: every entry of names must match a layer of the source; got "
                f"{theirs!r}. The layers are {', '.join(layer.name for layer in layers)}."
            )
    return pairs


def _pattern(text: str) -> re.Pattern[str]:
    """A pattern in which {i} stands for one part of a name."""
    parts = re.split(r"\{(\w+)\}", text)
    seen: set[str] = set()
    made = ""
    for i, part in enumerate(parts):
        if i % 2 == 0:
            made += re.escape(part)
        else:
            made += f"(?P={part})" if part in seen else f"(?P<{part}>[^.]+)"
            seen.add(part)
    return re.compile(made)


def _filled_in(operation: str, theirs: str, ours: str, values: dict[str, str]) -> str:
    """A pattern of Flax's path with the values that PyTorch's name has."""

    def fill(placeholder: re.Match[str]) -> str:
        name, step = placeholder.groups()
        value = values.get(name)
        if value is None or (step and not value.isdigit()):
            raise ValueError(
                f"{operation}: {{{name}}} in names must stand on both sides, for a number if one "
                f"is added to it; got {theirs!r}: {ours!r}. Write the same letter on both sides."
            )
        return str(int(value) + int(step)) if step else value

    return re.sub(r"\{(\w+)([+-]\d+)?\}", fill, ours)


def _without_tied(
    rest: list[TorchLayer], targets: list[Target], layers: list[TorchLayer], arrays: Any, notes: Any
) -> list[TorchLayer]:
    """The layers without heads that hold an embedding once more, if Flax has no place for them."""
    wanted = Counter("matrix" for t in targets if t.kind in ("dense", "embedding"))["matrix"]
    there = [x for x in rest if {"dense", "embedding"} & set(x.kinds)]
    kept = list(rest)
    for layer in reversed(there):
        if len(there) <= wanted or set(layer.keys) != {"weight"}:
            continue
        weight = arrays[layer.keys["weight"]]
        for other in layers:
            gone = other is layer or (other in rest and other not in kept)
            if gone or "embedding" not in other.kinds:
                continue
            if np.array_equal(arrays[other.keys["weight"]], weight):
                notes.append(f"{layer.name} holds the embedding {other.name} once more: left out.")
                kept.remove(layer)
                there = [x for x in there if x is not layer]
                break
    return kept


def _by_order(
    operation: str,
    targets: list[Target],
    layers: list[TorchLayer],
    pairing: Pairing,
    notes: list[str],
) -> list[Pair]:
    """Pairs of the same kind in the same order; everything must be matched."""
    groups: list[tuple[str, ...]] = [
        ("attention",), ("conv",), ("transposed conv",), ("dense",), ("embedding",), ("norm",),
    ]  # fmt: skip
    for both in {layer.kinds for layer in layers if len(layer.kinds) > 1}:
        groups = [g for g in groups if g[0] not in both] + [both]
    pairs: list[Pair] = []
    alike = 0
    for kinds in groups:
        ours = [t for t in targets if t.kind in kinds]
        theirs = [x for x in layers if set(x.kinds) & set(kinds)]
        fits = [
            [t.kind in x.kinds and pairing.moves(t, x) is not None for x in theirs] for t in ours
        ]
        pairs += [(ours[i], theirs[j]) for i, j in _longest(fits)]
        alike += sum(a and b for row in fits for a, b in itertools.pairwise(row))
    pairs += _lone(operation, targets, layers, pairing)
    over = [t for t in targets if not any(t is a for a, _ in pairs)]
    left = [x for x in layers if not any(x is b for _, b in pairs)]
    if over or left:
        nothing = "nothing"
        raise ValueError(
            f"{operation}: every layer must have its counterpart of the same kind and shape in "
            f"the same order; got, left over in the source: "
            f"{'; '.join(_layer(x, pairing.arrays) for x in left) or nothing}; left over in the "
            f"model: {'; '.join(_target(t, pairing.tree) for t in over) or nothing}. Tell pairs "
            "with names={'layer{i}.conv': 'block_{i}/Conv_0'}, or leave out with skip= (of the "
            "source) and keep= (of the model)."
        )
    if alike:
        notes.append(
            "Neighbours of one kind and shape are matched by their order alone: compare the names."
        )
    return pairs


def _check_order(
    operation: str, targets: list[Target], layers: list[TorchLayer], pairing: Pairing
) -> None:
    """Refuse layers that only an order tells apart, where the source has none but numbers."""
    for target in targets:
        fitting = [
            x for x in layers if target.kind in x.kinds and pairing.moves(target, x) is not None
        ]
        names = {re.sub(r"\d+", "0", x.name): x.name for x in fitting}
        if len(names) > 1:
            raise ValueError(
                f"{operation}: a .safetensors file does not keep the order of the layers, so that "
                f"those of one kind and shape must be told apart; got {', '.join(names.values())} "
                f"for {target.name}. Tell names={{...}}, or order=list(model.state_dict()) of "
                "PyTorch's model."
            )


def _lone(
    operation: str, targets: list[Target], layers: list[TorchLayer], pairing: Pairing
) -> list[Pair]:
    """Pairs of lone parameters, which no call puts in an order: by shape, then by number."""
    ours = [t for t in targets if t.kind == "parameter"]
    theirs = [x for x in layers if x.kinds == ("parameter",)]
    for a, b in itertools.combinations(ours, 2):
        if (
            a.path[:-1] == b.path[:-1]
            and re.sub(r"\d+", "", a.path[-1]) != re.sub(r"\d+", "", b.path[-1])
            and any(pairing.moves(a, x) and pairing.moves(b, x) for x in theirs)
        ):
            raise ValueError(
                f"{operation}: parameters of one shape within one module must be told apart; got "
                f"{_target(a, pairing.tree)} and {_target(b, pairing.tree)}. Tell "
                f"names={{'name in PyTorch': {a.name!r}}}."
            )
    pairs: list[Pair] = []
    for target in ours:
        fitting = [x for x in theirs if pairing.moves(target, x) is not None]
        if fitting:
            pairs.append((target, fitting[0]))
            theirs = [x for x in theirs if x is not fitting[0]]
    return pairs


def _longest(fits: list[list[bool]]) -> list[tuple[int, int]]:
    """The longest list of pairs that fit, rising in both: a longest common subsequence."""
    n, m = len(fits), len(fits[0]) if fits else 0
    best = np.zeros((n + 1, m + 1), np.int64)
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            best[i, j] = max(
                best[i + 1, j], best[i, j + 1], best[i + 1, j + 1] + 1 if fits[i][j] else 0
            )
    pairs, i, j = [], 0, 0
    while i < n and j < m:
        if fits[i][j] and best[i, j] == best[i + 1, j + 1] + 1:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1, j] >= best[i, j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def _layer(layer: TorchLayer, arrays: Any) -> str:
    shapes = ", ".join(f"{k} {arrays[k].shape}" for k in layer.keys.values())
    return f"{'/'.join(layer.kinds)} {shapes}"


def _target(target: Target, tree: Tree) -> str:
    shapes = ", ".join(f"{r} {tuple(tree.leaves[p].shape)}" for r, p in target.leaves.items())
    return f"{target.kind} {target.name} ({shapes})"
