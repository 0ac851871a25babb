"""Selection of layers of a model, by path, by class, or by a function."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flax import linen, nnx

NORMS = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
NORM_TYPES = tuple(getattr(flax, name) for flax in (linen, nnx) for name in NORMS)

Layers = str | type | Callable[[str, str], bool] | Sequence[str | type]


@dataclass(frozen=True)
class Selection:
    """The layers and nonlinearities to be observed.

    Attributes:
        layers: None, a function, or a tuple of patterns and types.
    """

    layers: Any = None

    @classmethod
    def of(cls, operation: str, layers: Layers | None) -> Selection:
        """A selection from the argument of a public function."""
        if layers is None or (callable(layers) and not isinstance(layers, type)):
            return cls(layers)
        several = layers if isinstance(layers, list | tuple | set) else (layers,)
        for each in several:
            if not isinstance(each, str | type):
                raise TypeError(
                    f"{operation}: layers must be a path with * for anything, a class of layers, "
                    "several of these, or a function of a path and a name of a class; got "
                    f"{each!r}. For example layers=('*/BatchNorm_*', flax.linen.LayerNorm)."
                )
        return cls(tuple(several))

    def layer(self, path: str, module: Any) -> bool:
        """True if this layer is to be observed."""
        if self.layers is None:
            return isinstance(module, NORM_TYPES)
        if not isinstance(self.layers, tuple):
            return bool(self.layers(path, type(module).__name__))
        types = tuple(t for t in self.layers if isinstance(t, type))
        return isinstance(module, types) or self._matches(path)

    def nonlinearity(self, path: str, name: str) -> bool:
        """True if this nonlinearity is to be observed."""
        if self.layers is None:
            return True
        if not isinstance(self.layers, tuple):
            return bool(self.layers(path, name))
        return self._matches(path)

    def among(
        self, operation: str, argument: str, layers: Iterable[tuple[str, Any]], default: Any
    ) -> set[str]:
        """The names of the layers that are selected, at least one.

        Args:
            operation: the public function that is being called; errors begin with it.
            argument: the name of the selecting argument.
            layers: names and modules to select from.
            default: class or classes that None stands for.

        Raises:
            ValueError: none is selected, or a pattern or a class selects none.
        """
        layers = list(layers)
        parts: list[Any] = [self.layers]
        if isinstance(self.layers, tuple):
            parts = list(self.layers)
        elif self.layers is None:
            parts = list(default) if isinstance(default, tuple) else [default]
        chosen: set[str] = set()
        for part in parts:
            each = Selection((part,) if isinstance(part, str | type) else part)
            found = {name for name, module in layers if each.layer(name, module)}
            if not found and self.layers is not None:
                raise _nothing(operation, argument, part, layers)
            chosen |= found
        if not chosen:
            wanted = default if self.layers is None else self.layers
            raise _nothing(operation, argument, wanted, layers)
        return chosen

    def _matches(self, path: str) -> bool:
        patterns = [p for p in self.layers if isinstance(p, str)]
        return any(fnmatch.fnmatchcase(path, p) for p in patterns)


def _shown(kind: Any) -> str:
    """A class as people import it, such as flax.nnx.BatchNorm; anything else as it is."""
    if not isinstance(kind, type):
        return repr(kind)
    return ".".join((*kind.__module__.split(".")[:2], kind.__name__))


def _nothing(operation: str, argument: str, wanted: Any, layers: list[tuple[str, Any]]):
    """The error for a selection of no layer, with the names that there are."""
    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
    shown = ", ".join(_shown(kind) for kind in kinds) or "()"
    names = ", ".join(f"{name} ({type(module).__name__})" for name, module in layers) or "no layer"
    return ValueError(
        f"{operation}: {argument} must select at least one layer; got {shown}, and the model has "
        f"{names}. Choose among these; in a pattern, * stands for anything."
    )
