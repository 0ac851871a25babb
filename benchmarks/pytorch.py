"""The peer that is not JAX: PyTorch's functional normalizations, on the CPU or on a GPU."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Torch:
    """PyTorch's functional normalizations, on the same memory, features last.

    PyTorch expects features second. So batch, group and instance norm get a transposed view, which
    for images is PyTorch's channels-last format.
    """

    name: str = "torch"
    compiled: bool = False
    takes_masks: ClassVar[bool] = False

    def has(self, norm) -> bool:
        """True if the peer has that normalization; it has no weight standardization."""
        return norm.name != "weight"

    def function(self, norm, dtype=None) -> Callable:
        """A function of tensors (x, scale, bias) that returns y."""
        import torch
        from torch.nn import functional

        del dtype  # x's
        eps = norm.epsilon

        def apply(x, scale, bias):
            if norm.name == "layer":
                if device() != "cpu":  # where the kernel takes one dtype
                    scale, bias = scale.to(x.dtype), bias.to(x.dtype)
                return functional.layer_norm(x, x.shape[-1:], scale, bias, eps)
            if norm.name == "rms":
                # The parameters have the dtype of x: PyTorch warns of any other.
                return functional.rms_norm(x, x.shape[-1:], scale.to(x.dtype), eps)
            x = x.movedim(-1, 1)
            if norm.name == "batch":
                y = functional.batch_norm(x, None, None, scale, bias, training=True, eps=eps)
            elif norm.name == "group":
                y = functional.group_norm(x, norm.groups, scale, bias, eps)
            else:
                y = functional.instance_norm(x, weight=scale, bias=bias, eps=eps)
            return y.movedim(1, -1)

        return torch.compile(apply) if self.compiled else apply

    def run(self, norm, x, scale, bias, dy, mask=None) -> dict[str, np.ndarray] | None:
        """`y`, `dx`, `dscale` and `dbias` in NumPy; None if PyTorch has no such function."""
        import torch

        if mask is not None or not self.has(norm):
            return None
        dtype = getattr(torch, x.dtype.name)
        x, dy = to_torch(x, dtype), to_torch(dy, dtype)
        # In float32, as under autocast: with narrow parameters it stores narrow moments.
        scale, bias = to_torch(scale, torch.float32), to_torch(bias, torch.float32)
        inputs = [x, scale, bias] if norm.has_bias else [x, scale]
        for a in inputs:
            a.requires_grad_()
        y = self.function(norm)(x, scale, bias)
        found = (y, *torch.autograd.grad(y, inputs, dy))
        names = ("y", "dx", "dscale", "dbias")
        return {k: v.detach().float().cpu().numpy() for k, v in zip(names, found)}


def to_torch(a: np.ndarray, dtype) -> Any:
    """A tensor with the numbers of `a`; bfloat16 is converted through float32."""
    import torch

    return torch.tensor(a.astype(np.float32)).to(device(), dtype)


def device() -> str:
    """The device of tensors: a GPU if PyTorch has one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """Wait until all work on the device is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def threads() -> int | None:
    """The number of threads of PyTorch; None if it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.get_num_threads()


TORCH = Torch()
TORCH_COMPILED = Torch("torch.compile", compiled=True)
