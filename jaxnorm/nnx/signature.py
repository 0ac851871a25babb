"""Signatures of NNX classes, which Flax's metaclass hides."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Metadata = Mapping[str, Any]
# The default of arguments for metadata, which cannot be changed by accident.
NONE: Metadata = MappingProxyType({})


class Signed:
    """A base whose subclasses show the arguments of their constructor to `help` and notebooks.

    A class of NNX is called through its metaclass, and would show ``(*args, **kwargs)``.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class the signature of its `__init__`, without `self`."""
        super().__init_subclass__(**kwargs)
        _, *arguments = inspect.signature(cls.__init__).parameters.values()
        cls.__signature__ = inspect.Signature(arguments)
