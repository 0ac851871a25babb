"""Constructors that are Flax's, whichever version is installed, plus a few arguments."""

import functools
import inspect
from collections.abc import Callable


def extends(base: type) -> Callable:
    """Give an ``__init__(self, *args, <new>, **kwargs)`` the signature of `base`'s plus the new.

    The arguments go to Flax's own constructor, so neither their order nor their defaults are
    written here a second time; `inspect.signature` and editors see all of them.
    """

    def decorate(init: Callable) -> Callable:
        kinds = inspect.Parameter
        new = [
            p for p in inspect.signature(init).parameters.values() if p.kind is kinds.KEYWORD_ONLY
        ]
        theirs = inspect.signature(base.__init__)

        @functools.wraps(init)
        def wrapped(self, *args, **kwargs):
            init(self, *args, **kwargs)

        wrapped.__signature__ = theirs.replace(  # type: ignore[attr-defined]
            parameters=[*theirs.parameters.values(), *new]
        )
        return wrapped

    return decorate
