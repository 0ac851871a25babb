"""Names and shapes of PyTorch for a Flax model that came from nowhere else."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from jaxnorm.tools.torch.assignment import Move, TorchAssignment
from jaxnorm.tools.torch.layers import TorchLayer
from jaxnorm.tools.torch.matching import count_move
from jaxnorm.tools.torch.pairs import Options, Pairing
from jaxnorm.tools.torch.targets import Target, Tree, targets_of

_ROLES = {
    "kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias",
    "mean": "running_mean", "var": "running_var",
}  # fmt: skip
_ORDER = ("weight", "bias", "running_mean", "running_var", "value")


def assignment_of(
    operation: str, model: Any, variables: Any, tree: Tree, example: tuple[Any, ...]
) -> TorchAssignment:
    """An assignment to a state dict of zeros whose names are Flax's paths, joined by dots."""
    notes: list[str] = []
    arrays: dict[str, np.ndarray] = {}
    layers: list[tuple[Target, TorchLayer]] = []
    for target in targets_of(operation, model, variables, tree, example, notes):
        name = ".".join(target.path)
        keys: dict[str, str] = {}
        shapes = {role: tree.leaves[leaf] for role, leaf in target.leaves.items()}
        if target.kind == "attention":
            made = _attention(shapes)
        else:
            made = {
                _ROLES.get(role, role): (_shape(target, role, a.shape), a.dtype)
                for role, a in shapes.items()
                if role != "count"
            }
            made = dict(sorted(made.items(), key=lambda item: _ORDER.index(item[0])))
        for role, (shape, dtype) in made.items():
            key = name if role == "value" else f"{name}.{_key(role)}".lstrip(".")
            keys[role] = key
            arrays[key] = np.zeros(shape, dtype)
        if "running_var" in made:
            arrays[f"{name}.num_batches_tracked".lstrip(".")] = np.zeros((), np.int64)
        layers.append((target, TorchLayer(name, (target.kind,), keys)))
    offsets = {
        layer.name: float(getattr(target.module, "scale_offset", 0.0) or 0.0)
        for target, layer in layers
        if target.kind == "norm"
    }
    pairing = Pairing(tree, arrays, Options(scale_offset=offsets), frozenset())
    moves: list[Move] = []
    for target, layer in layers:
        found = pairing.moves(target, layer)
        if found is None:
            raise ValueError(
                f"{operation}: every layer must have a counterpart in PyTorch; got {target.kind} "
                f"{target.name} with {', '.join(target.leaves)}. Pass like=match_torch(...)."
            )
        moves += found
        if "count" in target.leaves:
            moves.append(count_move(target, layer))
    return TorchAssignment(tuple(moves), tuple(notes), arrays, tuple(arrays))


def _key(role: str) -> str:
    """The name of an array within `torch.nn.MultiheadAttention`, or its role."""
    names = {"qkv/weight": "in_proj_weight", "qkv/bias": "in_proj_bias"}
    names |= {"out/weight": "out_proj.weight", "out/bias": "out_proj.bias"}
    names |= {
        f"{part}/{last}": f"{part[0]}_proj.{last}"
        for part in ("query", "key", "value")
        for last in ("weight", "bias")
    }
    return names.get(role, role)


def _shape(target: Target, role: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if role != "kernel":
        return shape if role in ("embedding", "value") else (prod(shape),)
    if target.kind == "dense":
        features = getattr(target.module, "features", None) or getattr(
            target.module, "out_features", 1
        )
        n_out = len(features) if isinstance(features, list | tuple) else 1
        return (prod(shape[len(shape) - n_out :]), prod(shape[: len(shape) - n_out]))
    window, before, last = shape[:-2], shape[-2], shape[-1]
    if target.kind == "transposed conv":
        transpose = getattr(target.module, "transpose_kernel", False)
        return ((last, before) if transpose else (before, last)) + window
    return (last, before, *window)


def _attention(leaves: dict[str, Any]) -> dict[str, Any]:
    """Shapes of an attention's arrays, with one projection for query, key and value if it can."""
    found: dict[str, Any] = {}
    shapes = {leaves[f"{part}/kernel"].shape for part in ("query", "key", "value")}
    fused = len(shapes) == 1
    for role, leaf in leaves.items():
        part, kind = role.split("/")
        theirs = {"kernel": "weight"}.get(kind, kind)
        n_in = 2 if part == "out" else 1
        inner, outer = prod(leaf.shape[:n_in]), prod(leaf.shape[n_in:])
        count = 1
        if fused and part != "out":
            part, count = "qkv", 3
        if kind == "bias":
            shape: tuple[int, ...] = (prod(leaf.shape) * count,)
        else:
            shape = (outer * count, inner)
        found[f"{part}/{theirs}"] = (shape, leaf.dtype)
    return found
