"""Pairs of a Flax layer and a PyTorch layer: whether they fit, and the moves of their arrays."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxnorm.tools.torch import layouts
from jaxnorm.tools.torch.assignment import Move
from jaxnorm.tools.torch.layers import TorchLayer
from jaxnorm.tools.torch.layouts import ArrayLayout
from jaxnorm.tools.torch.targets import Target, Tree

_SOURCES = {
    "kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias",
    "mean": "running_mean", "var": "running_var", "value": "value",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Settings of PyTorch's model that its weights do not tell.

    Attributes:
        names: pattern of PyTorch's name -> pattern of Flax's path.
        flattened: pattern of PyTorch's name -> (channels, *window), or None for "was not".
        conv1d: patterns of dense layers that are (in, out) in PyTorch.
        scale_offset: pattern -> constant that PyTorch's layer adds to its weight.
        running_var_count: number of values a channel behind each running variance.
        skip: patterns of PyTorch's names that go nowhere.
        keep: patterns of Flax's paths that keep their values.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    flattened: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)
    conv1d: Sequence[str] = ()
    scale_offset: Mapping[str, float] = field(default_factory=dict)
    running_var_count: Mapping[str, float] = field(default_factory=dict)
    skip: Sequence[str] = ()
    keep: Sequence[str] = ()


def told(patterns: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """The value of the first pattern that a name matches."""
    return next((v for p, v in patterns.items() if fnmatch.fnmatchcase(name, p)), default)


@dataclass(frozen=True)
class Pairing:
    """Test of a pair of layers, with all that the answer depends on."""

    tree: Tree
    arrays: Mapping[str, np.ndarray]
    options: Options
    in_out_names: frozenset[str]

    def moves(self, target: Target, layer: TorchLayer) -> list[Move] | None:
        """The moves of all arrays of a pair; None if it does not fit."""
        if target.kind == "attention":
            return self._attention(target, layer)
        moves, used = [], set()
        for role, leaf in target.leaves.items():
            theirs = _SOURCES.get(role)
            if layer.kinds == ("parameter",) and role in ("scale", "embedding"):
                theirs = "value"  # by names alone: a norm that calls its weight otherwise
            if theirs not in layer.keys:
                if role == "count":
                    continue
                return None
            key = layer.keys[theirs]
            shape, flax = self.arrays[key].shape, tuple(self.tree.leaves[leaf].shape)
            layout = self._layout(target, layer, role, shape, flax)
            if layout is None:
                return None
            used.add(theirs)
            moves.append(Move(key, leaf, layout))
        return moves if used == set(layer.keys) else None

    def _layout(
        self, target: Target, layer: TorchLayer, role: str, shape: Any, flax: Any
    ) -> ArrayLayout | None:
        module = target.module
        if role == "kernel":
            if target.kind == "transposed conv":
                transpose = bool(getattr(module, "transpose_kernel", False))
                return layouts.transposed_conv(shape, flax, transpose)
            if target.kind == "conv":
                if len(shape) == 2 and set(flax[:-2]) == {1}:
                    shape = (*shape, *(1 for _ in flax[:-2]))
                return layouts.conv(shape, flax)
            maps = told(self.options.flattened, layer.name)
            return layouts.dense(
                shape, flax, self._in_out(layer, shape, flax), maps, n_in=_inputs(module, flax)
            )
        if role == "scale":
            offset = told(self.options.scale_offset, layer.name, 0.0)
            ours = getattr(module, "scale_offset", 0.0) or 0.0
            return layouts.vector(shape, flax, offset=offset - ours)
        if role == "var":
            count = told(self.options.running_var_count, layer.name)
            factor = 1.0 if count is None else (count - 1.0) / count
            return layouts.vector(shape, flax, factor=factor)
        if role == "embedding":
            return layouts.vector(shape, flax) if shape == flax else None
        return layouts.vector(shape, flax)

    def _in_out(self, layer: TorchLayer, shape: Any, kernel: Any) -> bool:
        """True if PyTorch's weight is (in, out), as GPT-2's are."""
        if any(fnmatch.fnmatchcase(layer.name, p) for p in self.options.conv1d):
            return True
        if layer.module is not None:
            return type(layer.module).__name__ == "Conv1D"
        return layer.name.rpartition(".")[2] in self.in_out_names

    def _attention(self, target: Target, layer: TorchLayer) -> list[Move] | None:
        moves, used = [], set()
        if "qkv/weight" in layer.keys:
            weight = self.arrays[layer.keys["qkv/weight"]].shape
            if len(weight) != 2:
                return None
            in_out = weight[1] == 3 * weight[0] if weight[0] != 3 * weight[1] else False
        else:
            in_out = False
        for role, leaf in target.leaves.items():
            part, kind = role.split("/")
            theirs = {"kernel": "weight", "bias": "bias"}.get(kind)
            name, third = f"{part}/{theirs}", None
            if part != "out" and name not in layer.keys:
                name, third = f"qkv/{theirs}", (("query", "key", "value").index(part), 3)
            if name not in layer.keys:
                return None
            key = layer.keys[name]
            shape, flax = self.arrays[key].shape, tuple(self.tree.leaves[leaf].shape)
            if theirs == "weight":
                n_in = 2 if part == "out" else 1
                layout = layouts.dense(shape, flax, in_out, part=third, n_in=n_in)
            else:
                layout = layouts.vector(shape, flax, third)
            if layout is None:
                return None
            used.add(name)
            moves.append(Move(key, leaf, layout))
        return moves if used == set(layer.keys) else None


def _inputs(module: Any, kernel: tuple[int, ...]) -> int:
    """Number of a kernel's axes that are inputs: those before the features."""
    features = getattr(module, "features", None) or getattr(module, "out_features", 1)
    return len(kernel) - (len(features) if isinstance(features, list | tuple) else 1)


def in_out_names(layers: Sequence[TorchLayer], arrays: Mapping[str, np.ndarray]) -> frozenset[str]:
    """Last names of dense layers whose weights are (in, out): their biases tell."""
    found = set()
    for layer in layers:
        if "dense" in layer.kinds and {"weight", "bias"} <= set(layer.keys):
            shape = arrays[layer.keys["weight"]].shape
            n = arrays[layer.keys["bias"]].size
            if len(shape) == 2 and shape[0] != shape[1] and n == shape[1]:
                found.add(layer.name.rpartition(".")[2])
    return frozenset(found)
