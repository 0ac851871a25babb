"""Layers of PyTorch, found in the names of a state dict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxnorm.tools.torch.sources import Source

_ROLES = {"weight", "bias", "running_mean", "running_var", "gamma", "beta"}
_CLASSES = {
    "_ConvTransposeNd": "transposed conv", "_ConvNd": "conv", "Linear": "dense",
    "NonDynamicallyQuantizableLinear": "dense", "Conv1D": "dense", "Embedding": "embedding",
    "_NormBase": "norm", "LayerNorm": "norm", "GroupNorm": "norm", "RMSNorm": "norm",
}  # fmt: skip
# Names of the projections within an attention: query, key and value (or one for the three), output.
_ATTENTION: Sequence[tuple[tuple[str, ...], str]] = (
    (("qkv",), "proj"),
    (("c_attn",), "c_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_lin", "k_lin", "v_lin"), "out_lin"),
    (("query", "key", "value"), "out"),
)


@dataclass
class TorchLayer:
    """A layer of PyTorch, or a lone parameter.

    Attributes:
        name: name of the module; of a lone parameter, its own.
        kinds: the kinds that it can be, by its module or by its shapes.
        keys: role, such as "weight" -> name in the state dict.
        module: the module, where it is known.
    """

    name: str
    kinds: tuple[str, ...]
    keys: dict[str, str]
    module: Any = None


def resolved(source: Source, notes: list[str]) -> dict[str, np.ndarray]:
    """The arrays, with weight and spectral normalization resolved to the weight they give.

    Computed in float64 and rounded once. Counts of batches are left out.
    """
    arrays = dict(source.arrays)
    for name in list(arrays):
        stem, _, last = name.rpartition(".")
        if last == "num_batches_tracked":
            continue
        if last == "weight_g" and f"{stem}.weight_v" in arrays:
            parts, whole = (name, f"{stem}.weight_v"), f"{stem}.weight"
        elif name.endswith("parametrizations.weight.original0"):
            stem = name[: -len("parametrizations.weight.original0")]
            parts, whole = (name, f"{name[:-1]}1"), f"{stem}weight"
        elif name.endswith("parametrizations.weight.original"):
            stem = name[: -len("parametrizations.weight.original")]
            parts = (name, f"{stem}parametrizations.weight.0._u")
            parts, whole = (*parts, f"{stem}parametrizations.weight.0._v"), f"{stem}weight"
        elif last == "weight_orig" and f"{stem}.weight_u" in arrays:
            parts, whole = (name, f"{stem}.weight_u", f"{stem}.weight_v"), f"{stem}.weight"
        else:
            continue
        if any(part not in arrays for part in parts):
            continue  # it stays as it is, and is named as left over
        values = [arrays[part].astype(np.float64) for part in parts]
        if len(parts) == 2:
            g, v = values
            # g has the length 1 on the axes over which the norm goes.
            axes = tuple(i for i, n in enumerate(g.shape) if n == 1)
            weight = g * v / np.sqrt(np.sum(v * v, axis=axes, keepdims=True))
        else:
            w, u, v = values
            sigma = _largest_singular_value(w, u, v)
            if sigma is None:
                continue
            weight = w / sigma
        order = list(arrays)
        items = [
            (whole, weight.astype(arrays[parts[0]].dtype)) if k == parts[0] else (k, arrays[k])
            for k in order
            if k == parts[0] or k not in parts
        ]
        arrays = dict(items)
        notes.append(f"{whole} is what {', '.join(parts)} give, rounded once.")
    return arrays


def _largest_singular_value(w: np.ndarray, u: np.ndarray, v: np.ndarray) -> float | None:
    """PyTorch's estimate uᵀWv, whose rows are outputs: axis 1 of a transposed convolution.

    Where both axes have one length, W v is along u for the right one.
    """
    found = [
        (u @ product / max(float(np.linalg.norm(product)), 1e-300), u @ product)
        for axis in range(min(w.ndim, 2))
        if (m := _matrix(w, axis)).shape == (u.size, v.size)
        for product in [m @ v]
    ]
    return float(max(found)[1]) if found else None


def _matrix(w: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)


def layers_of(
    arrays: dict[str, np.ndarray], modules: dict[str, Any] | None, attention: bool
) -> list[TorchLayer]:
    """Layers in the order of the state dict.

    Args:
        arrays: the resolved arrays.
        modules: modules by name, where they are known.
        attention: the projections of an attention are one layer.
    """
    groups: dict[str, dict[str, str]] = {}
    for key in arrays:
        stem, _, last = key.rpartition(".")
        if last != "num_batches_tracked":
            groups.setdefault(stem, {})[last] = key
    found: list[TorchLayer] = []
    taken: set[str] = set()
    for stem in groups:
        heads = _attention(stem, groups) if attention else None
        if heads:
            found.append(TorchLayer(stem, ("attention",), heads, (modules or {}).get(stem)))
            taken.update(heads.values())
    for stem, roles in groups.items():
        module = (modules or {}).get(stem)
        known = {
            {"gamma": "weight", "beta": "bias"}.get(r, r): k
            for r, k in roles.items()
            if r in _ROLES and k not in taken
        }
        # A gamma alone scales a branch; a norm of TensorFlow's naming has a beta, too.
        lone = "gamma" in roles and not {"beta", "running_mean"} & set(roles)
        kinds = () if lone else _kinds(module, {r: arrays[k] for r, k in known.items()})
        if kinds and known:
            found.append(TorchLayer(stem, kinds, known, module))
            taken.update(known.values())
        for key in roles.values():
            if key not in taken:
                found.append(TorchLayer(key, ("parameter",), {"value": key}))
                taken.add(key)
    position = {key: i for i, key in enumerate(arrays)}
    return sorted(found, key=lambda layer: min(position[k] for k in layer.keys.values()))


def _attention(stem: str, groups: dict[str, dict[str, str]]) -> dict[str, str] | None:
    """Roles of the arrays of the attention at a name; None if there is none."""
    own, prefix = groups[stem], f"{stem}." if stem else ""
    if "in_proj_weight" in own or "q_proj_weight" in own:
        found = {
            new: own[old]
            for old, new in {
                "in_proj_weight": "qkv/weight", "in_proj_bias": "qkv/bias",
                "q_proj_weight": "query/weight", "k_proj_weight": "key/weight",
                "v_proj_weight": "value/weight",
            }.items()
            if old in own
        }  # fmt: skip
        found |= {f"out/{r}": k for r, k in groups.get(f"{prefix}out_proj", {}).items()}
        return found
    return None


def grouped(layers: list[TorchLayer]) -> list[TorchLayer]:
    """Layers among which the projections of one attention under one name are one layer."""
    by_name = {layer.name: layer for layer in layers}
    found = list(layers)
    for stem in dict.fromkeys(layer.name.rpartition(".")[0] for layer in layers):
        prefix = f"{stem}." if stem else ""
        for inner, out in _ATTENTION:
            names = [f"{prefix}{n}" for n in (*inner, out)]
            if any(n not in by_name or "dense" not in by_name[n].kinds for n in names):
                continue
            parts = ("qkv",) if len(inner) == 1 else ("query", "key", "value")
            keys = {
                f"{part}/{role}": key
                for part, name in zip((*parts, "out"), names)
                for role, key in by_name[name].keys.items()
            }
            whole = TorchLayer(stem or "attention", ("attention",), keys, by_name[names[0]].module)
            place = found.index(by_name[names[0]])
            found[place] = whole
            found = [layer for layer in found if layer.name not in names]
            break
    return found


def _kinds(module: Any, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    classes = [c.__name__ for c in type(module).__mro__] if module is not None else []
    named = next((_CLASSES[name] for name in classes if name in _CLASSES), None)
    if named is None and any("Norm" in name for name in classes):
        named = "norm"  # of another library
    if named:
        return (named,)
    if "running_mean" in arrays:
        return ("norm",)
    if "weight" not in arrays:
        return ()
    dimensions = arrays["weight"].ndim
    if dimensions == 1:
        return ("norm",)
    if dimensions == 2:
        return ("dense", "embedding") if "bias" not in arrays else ("dense",)
    return ("conv", "transposed conv") if dimensions > 2 else ()
