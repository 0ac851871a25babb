"""Meanings that weights do not show: epsilon, padding, strides, momentum, flattened inputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxnorm.tools.torch import windows
from jaxnorm.tools.torch.layers import TorchLayer
from jaxnorm.tools.torch.pairs import Options, told
from jaxnorm.tools.torch.targets import Target, Tree

Pair = tuple[Target, TorchLayer]


def check_pairs(
    operation: str,
    pairs: Sequence[Pair],
    arrays: Any,
    tree: Tree,
    options: Options,
    modules_known: bool,
    notes: list[str],
) -> None:
    """Refuse pairs of layers that compute something else, and note what cannot be checked.

    Raises:
        ValueError: a setting of the Flax layer is not that of PyTorch's.
    """
    _check_patterns(operation, pairs, options)
    for target, layer in pairs:
        if target.module is None:
            continue
        if target.kind == "norm":
            _check_norm(operation, target, layer, options, notes)
        elif layer.module is not None and target.kind in ("conv", "transposed conv"):
            _check_conv(operation, target, layer, notes)
        elif target.kind == "attention":
            heads = getattr(layer.module, "num_heads", target.module.num_heads)
            _agree(operation, target, layer, "num_heads", target.module.num_heads, heads)
    _check_flattened(operation, pairs, arrays, tree, options)
    if not modules_known:
        _note_unknown(pairs, notes)
    _note_variances(pairs, options, notes)


def _agree(
    operation: str, target: Target, layer: TorchLayer, what: str, ours: Any, theirs: Any
) -> None:
    if ours != theirs:
        raise ValueError(
            f"{operation}: {target.name} must compute what {layer.name} does; got {what}={ours} "
            f"here and {theirs} in PyTorch. Set {what}={theirs} in the Flax layer."
        )


def _check_patterns(operation: str, pairs: Sequence[Pair], options: Options) -> None:
    """Refuse a pattern that no layer of its kind matches: it is likely misspelt."""
    asked = {
        "flattened": (options.flattened, ("dense",)),
        "conv1d": (dict.fromkeys(options.conv1d), ("dense",)),
        "scale_offset": (options.scale_offset, ("norm",)),
        "running_var_count": (options.running_var_count, ("norm",)),
    }
    for argument, (patterns, kinds) in asked.items():
        names = [layer.name for target, layer in pairs if target.kind in kinds]
        for pattern in patterns:
            if not any(told({pattern: True}, name) for name in names):
                raise ValueError(
                    f"{operation}: {argument} must match a layer of the source; got {pattern!r}, "
                    f"and there are {', '.join(names) or 'none'}. Choose among these."
                )
    for pattern, count in options.running_var_count.items():
        if not count > 1:
            raise ValueError(
                f"{operation}: running_var_count must be more than one; got {count} for "
                f"{pattern!r}. Give the number of values a channel in a batch of training."
            )


def _check_norm(
    operation: str, target: Target, layer: TorchLayer, options: Options, notes: list[str]
) -> None:
    ours, theirs = target.module, layer.module
    offset = getattr(ours, "scale_offset", 0.0) or 0.0
    of_torch = type(theirs).__module__.startswith("torch.nn")
    if offset and told(options.scale_offset, layer.name) is None and not of_torch:
        raise ValueError(
            f"{operation}: what PyTorch adds to a norm's weight must be known where Flax's layer "
            f"adds something; got scale_offset={offset} of {target.name} for {layer.name}. Tell "
            f"scale_offset={{'{layer.name}': {offset}}} if PyTorch adds it too, or 0.0."
        )
    if theirs is None:
        return
    epsilon = next(
        (getattr(theirs, n) for n in ("eps", "variance_epsilon", "epsilon") if hasattr(theirs, n)),
        math.nan,
    )
    if epsilon is None:  # RMSNorm: that of the input's dtype
        epsilon = float(np.finfo(np.float32).eps)
    if math.isnan(epsilon):
        notes.append(f"The epsilon of {layer.name} cannot be read: compare {ours.epsilon}.")
    elif not math.isclose(epsilon, ours.epsilon, rel_tol=1e-6):
        _agree(operation, target, layer, "epsilon", ours.epsilon, epsilon)
    if hasattr(theirs, "num_groups") and hasattr(ours, "num_groups"):
        groups = ours.num_groups
        if groups is None and ours.group_size:
            groups = theirs.num_channels // ours.group_size
        _agree(operation, target, layer, "num_groups", groups, theirs.num_groups)
    if hasattr(ours, "momentum") and "running_mean" in layer.keys:
        if theirs.momentum is None:
            notes.append(
                f"{layer.name} has momentum=None in PyTorch: a cumulative average; "
                f"{target.name} has momentum={ours.momentum}. This matters in training alone."
            )
        elif not math.isclose(1 - theirs.momentum, ours.momentum, rel_tol=1e-6):
            notes.append(
                f"{layer.name} has momentum={theirs.momentum} in PyTorch, here "
                f"{1 - theirs.momentum:g}; {target.name} has {ours.momentum}. This matters in "
                "training alone."
            )


def _check_conv(operation: str, target: Target, layer: TorchLayer, notes: list[str]) -> None:
    ours, theirs = target.module, layer.module
    if not hasattr(theirs, "kernel_size"):  # a dense layer as a convolution of one point
        return
    n = len(theirs.kernel_size)
    strides = windows.several(ours.strides, n)
    _agree(operation, target, layer, "strides", strides, tuple(theirs.stride))
    dilation = windows.several(ours.kernel_dilation, n)
    _agree(operation, target, layer, "kernel_dilation", dilation, tuple(theirs.dilation))
    if target.kind == "transposed conv":
        found = windows.flax_transposed(ours)
        _agree_padding(operation, target, layer, found, windows.torch_transposed(theirs))
        return
    groups = getattr(ours, "feature_group_count", 1)
    _agree(operation, target, layer, "feature_group_count", groups, theirs.groups)
    modes = {"zeros": None, "circular": "CIRCULAR", "reflect": "REFLECT"}
    mode = modes.get(theirs.padding_mode, theirs.padding_mode)
    if mode or ours.padding in ("CIRCULAR", "REFLECT"):
        _agree(operation, target, layer, "padding", ours.padding, mode or "zeros")
    sizes = {tuple(x.shape[-n - 1 : -1]) for x in target.inputs} or {None}
    if type(theirs).__name__.endswith("Same"):
        if ours.padding != "SAME" and any(s > 1 for s in strides):
            _agree(operation, target, layer, "padding", ours.padding, "SAME")
        return
    for size in sizes:
        found = windows.flax_conv(ours, size)
        if found is None:
            notes.append(
                f"padding={ours.padding!r} of {target.name} depends on the size of its input, and "
                f"{layer.name} has {windows.torch_conv(theirs)}. Pass an example to compare them."
            )
        else:
            _agree_padding(operation, target, layer, found, windows.torch_conv(theirs), size)


def _agree_padding(
    operation: str, target: Target, layer: TorchLayer, ours: Any, theirs: Any, size: Any = None
) -> None:
    if ours is not None and ours != theirs:
        raise ValueError(
            f"{operation}: {target.name} must compute what {layer.name} does; got "
            f"padding={target.module.padding!r} here, which is {ours}"
            f"{f' for an input of {size}' if size else ''}, and {theirs} in PyTorch. Set "
            f"padding={theirs} in the Flax layer."
        )


def _check_flattened(
    operation: str, pairs: Sequence[Pair], arrays: Any, tree: Tree, options: Options
) -> None:
    """Refuse a dense layer whose inputs seem to be a flattened map, unless it is told."""
    channels = None
    for target, layer in pairs:
        if target.kind == "dense" and channels and told(options.flattened, layer.name, 0) == 0:
            kernel = tree.leaves[target.leaves["kernel"]].shape
            ranks = {len(x.shape) for x in target.inputs} or {2}
            n_in = kernel[0]
            if len(kernel) == 2 and n_in > channels and n_in % channels == 0 and ranks == {2}:
                raise ValueError(
                    f"{operation}: the order of the inputs of a dense layer must be known where "
                    f"they may be a flattened map: PyTorch has channels first, Flax last; got "
                    f"{layer.name} with {n_in} inputs after {channels} channels. Tell "
                    f"flattened={{'{layer.name}': ({channels}, height, width)}}, or "
                    f"{{'{layer.name}': None}} if it is not one."
                )
        if target.kind in ("conv", "transposed conv"):
            channels = arrays[layer.keys["weight"]].shape[target.kind == "transposed conv"]
        elif target.kind in ("dense", "attention", "embedding"):
            channels = None


def _note_unknown(pairs: Sequence[Pair], notes: list[str]) -> None:
    """Note the settings that a state dict does not tell."""
    norms = Counter(
        (type(t.module).__name__, t.module.epsilon)
        for t, _ in pairs
        if t.kind == "norm" and hasattr(t.module, "epsilon")
    )
    if norms:
        shown = ", ".join(f"{name} {epsilon:g} ({n})" for (name, epsilon), n in norms.items())
        notes.append(
            f"A state dict holds no epsilon. This model has {shown}: compare with the "
            "configuration there (BatchNorm 1e-5, in EfficientNet 1e-3; LayerNorm 1e-5, 1e-6, "
            "1e-12), or pass the torch.nn.Module."
        )
    elif any(t.kind == "norm" for t, _ in pairs):
        notes.append("A state dict holds no epsilon: compare it, or pass the torch.nn.Module.")
    convs = [t for t, _ in pairs if t.kind in ("conv", "transposed conv")]
    if convs:
        strided = [
            t.name
            for t in convs
            if getattr(t.module, "padding", "SAME") == "SAME"
            and any(s > 1 for s in windows.several(getattr(t.module, "strides", 2), 1))
        ]
        notes.append(
            f"A state dict holds no strides, dilation or padding: those of {len(convs)} "
            "convolutions are not compared; pass the torch.nn.Module."
            + (
                " SAME with a stride is not PyTorch's padding=1: see " + ", ".join(strided) + "."
                if strided
                else ""
            )
        )


def _note_variances(pairs: Sequence[Pair], options: Options, notes: list[str]) -> None:
    untold = [
        t
        for t, x in pairs
        if "running_var" in x.keys and told(options.running_var_count, x.name) is None
    ]
    if not untold:
        return
    counts = [math.prod(i.shape[:-1]) for t in untold for i in t.inputs]
    smallest = min((n for n in counts if n > 1), default=None)
    size = f", at most {smallest / (smallest - 1):.6g} with this example" if smallest else ""
    notes.append(
        f"PyTorch's running variance divides by n - 1, so it is n/(n - 1) of ours{size}. The "
        "values are carried over; running_var_count={'*': n} converts them."
    )
