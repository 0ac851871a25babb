"""Layers of a Flax model that weights go to, each with its kind and its arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
from flax import linen, nnx

from jaxnorm.models.layers import called_layers
from jaxnorm.tools.torch.sources import by_number

Path = tuple[str, ...]

KINDS = {
    "MultiHeadDotProductAttention": "attention",
    "MultiHeadAttention": "attention",
    "ConvTranspose": "transposed conv",
    "Conv": "conv",
    "Embed": "embedding",
    "Dense": "dense",
    "DenseGeneral": "dense",
    "Linear": "dense",
    "LinearGeneral": "dense",
    "BatchNorm": "norm",
    "InstanceNorm": "norm",
    "LayerNorm": "norm",
    "GroupNorm": "norm",
    "RMSNorm": "norm",
}
_NAMES = {"kernel", "bias", "embedding", "scale", "mean", "var", "count"}


@dataclass
class Target:
    """A Flax layer that weights go to.

    Attributes:
        path: names of the modules around it and its own; for a lone parameter, its own too.
        kind: "conv", "transposed conv", "dense", "embedding", "norm", "attention", "parameter".
        leaves: role, such as "kernel" -> path in the tree of variables.
        module: the Flax module; None if only its variables are known.
        inputs: shapes of the first argument of its calls, if an example was given.
    """

    path: Path
    kind: str
    leaves: dict[str, Path]
    module: Any = None
    inputs: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The path as it is written in `names`."""
        return "/".join(self.path) or type(self.module).__name__


@dataclass(frozen=True)
class Tree:
    """The variables of a model as a flat dict that can be filled anew.

    Attributes:
        leaves: path -> array, of parameters and statistics.
        flat: every leaf, also those that are no weights.
        paths: the path of each in `flat`.
        structure: puts the leaves back.
        graph: the graph of an NNX model.
    """

    leaves: dict[Path, Any]
    flat: list[Any]
    paths: list[Path]
    structure: Any
    graph: Any = None

    def filled(self, new: dict[Path, Any]) -> Any:
        """The variables, or for NNX a new model, with some of the leaves replaced."""
        tree = self.structure.unflatten([new.get(p, v) for p, v in zip(self.paths, self.flat)])
        return tree if self.graph is None else nnx.merge(self.graph, tree)


def tree_of(operation: str, model: Any, variables: Any) -> Tree:
    """The variables of a Linen model, or those that an NNX model holds."""
    if isinstance(model, linen.Module):
        if not hasattr(variables, "items") or "params" not in variables:
            raise TypeError(
                f"{operation}: variables of a Linen model must be a dict of collections with "
                f"'params'; got {_shown(variables)}. Pass what model.init returns."
            )
        flat, structure = jax.tree_util.tree_flatten_with_path(variables)
        paths = [_names(path) for path, _ in flat]
        chosen = {p for p in paths if p[0] in ("params", "batch_stats")}
        graph = None
    elif isinstance(model, nnx.Module):
        graph, state = nnx.split(model)
        flat, structure = jax.tree_util.tree_flatten_with_path(state)
        paths = [_names(path) for path, _ in flat]
        weights = nnx.state(model, (nnx.Param, nnx.BatchStat))  # pyright: ignore[reportCallIssue]
        chosen = {_names(p) for p, _ in jax.tree_util.tree_flatten_with_path(weights)[0]}
    else:
        raise TypeError(
            f"{operation}: model must be a Flax module, Linen or NNX; got {_shown(model)}. Pass "
            "the module itself."
        )
    values = [value for _, value in flat]
    leaves = {p: v for p, v in zip(paths, values) if p in chosen}
    return Tree(leaves, values, paths, structure, graph)


def _shown(value: Any) -> str:
    keys = f" with {', '.join(map(str, value))}" if isinstance(value, dict) else ""
    return f"{type(value).__name__}{keys}"


def _names(path: Any) -> Path:
    """Names along a path of keys. A box around an array and an NNX variable are no names."""
    keys = [k for k in path if not isinstance(k, jax.tree_util.GetAttrKey)]
    return tuple(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys)


def targets_of(
    operation: str, model: Any, variables: Any, tree: Tree, example: Any, notes: list[str]
) -> list[Target]:
    """Layers with weights, in the order of execution if there is an example.

    Without one, NNX layers come in the order in which they were defined, and Linen layers in that
    of their variables.
    """
    is_linen = isinstance(model, linen.Module)
    # Owner of each leaf: the module whose parameter it is.
    owners: dict[Path, dict[str, Path]] = {}
    for path in tree.leaves:
        inner = path[1:] if is_linen else path
        owners.setdefault(inner[:-1], {})[inner[-1]] = path
    modules: dict[Path, Any] = {}
    inputs: dict[Path, list[Any]] = {}
    if example:
        called = called_layers(operation, model, variables, example)
        modules = {path: layer.module for path, layer in called.items()}
        inputs = {path: layer.inputs for path, layer in called.items()}
        order = list(modules)
    elif is_linen:
        order = _linen_order(list(owners), notes)
        modules = dict.fromkeys(order)
    else:
        modules = dict(_defined(model))
        order = list(modules)
    found: list[Target] = []
    taken: set[Path] = set()

    def add(path: Path, kind: str, leaves: dict[str, Path]) -> None:
        found.append(Target(path, kind, leaves, modules.get(path), inputs.get(path, [])))
        taken.update(leaves.values())

    for path in order:
        kind = kind_of(modules[path]) if modules[path] is not None else _guessed(path, owners, tree)
        if kind == "attention":
            parts = {
                f"{part}/{role}": leaf
                for part in ("query", "key", "value", "out")
                for role, leaf in owners.get((*path, part), {}).items()
            }
            add(path, "attention", parts)
            continue
        known = {r: p for r, p in _in_order(owners.get(path, {})) if p not in taken}
        if kind and set(known) & _NAMES:
            add(path, kind, {r: p for r, p in known.items() if r in _NAMES})
        for role, leaf in known.items():
            if leaf not in taken:
                add((*path, role), "parameter", {"value": leaf})
    for owner, roles in owners.items():  # not called, or the model's own
        for role, leaf in _in_order(roles):
            if leaf not in taken:
                add((*owner, role), "parameter", {"value": leaf})
    return found


def kind_of(module: Any) -> str | None:
    """The kind of a Flax layer by the names of its classes, which jaxnorm's layers share."""
    return next((KINDS[c.__name__] for c in type(module).__mro__ if c.__name__ in KINDS), None)


def _guessed(path: Path, owners: dict[Path, dict[str, Path]], tree: Tree) -> str | None:
    """The kind of a Linen layer by the names of its variables."""
    if all((*path, part) in owners for part in ("query", "key", "value", "out")):
        return "attention"
    roles = owners.get(path, {})
    if "embedding" in roles:
        return "embedding"
    if "scale" in roles or "mean" in roles:
        return "norm"
    if "kernel" in roles:
        dimensions = tree.leaves[roles["kernel"]].ndim
        transposed = "ConvTranspose" in path[-1] if path else False
        return "dense" if dimensions == 2 else "transposed conv" if transposed else "conv"
    return None


def _linen_order(paths: list[Path], notes: list[str]) -> list[Path]:
    """Paths of layers in the order of the variables, each after the modules around it."""
    paths = [p[:n] for p in paths for n in range(len(p) + 1)]
    order = list(dict.fromkeys(paths))
    if order == sorted(order):  # a tree that went through jax.jit: Conv_10 stands before Conv_2
        order.sort(key=lambda path: [by_number(name) for name in path])
    notes.append(
        "No example was given: layers come in the order of the variables, and their kinds are "
        "those of the names of the variables. Pass an example for the order of execution."
    )
    return order


def _in_order(roles: dict[str, Path]) -> list[tuple[str, Path]]:
    """Variables of one module, gamma_2 before gamma_10. Their order in a tree tells nothing."""
    return sorted(roles.items(), key=lambda item: by_number(item[0]))


def _defined(model: Any) -> list[tuple[Path, Any]]:
    """NNX modules in the order in which the attributes were set, each before those within it."""
    found: list[tuple[Path, Any]] = []
    seen: set[int] = set()

    def visit(path: Path, value: Any) -> None:
        if isinstance(value, nnx.Module):
            if id(value) in seen:
                return
            seen.add(id(value))
            found.append((path, value))
            items: Any = [(k, v) for k, v in vars(value).items() if not k.startswith("_")]
        elif isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        else:
            return
        for name, each in items:
            visit((*path, str(name)), each)

    visit((), model)
    return found
