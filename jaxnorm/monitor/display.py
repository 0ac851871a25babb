"""The display of recordings and findings in a notebook."""

from __future__ import annotations


class Displayed:
    """Draws itself in a notebook, where the packages of the extra "lab" are there to draw with."""

    def _repr_html_(self) -> str | None:
        try:
            # The one import from a room above: a notebook asks the object, not the report.
            from jaxnorm.report import notebook
        except ModuleNotFoundError:
            return None  # a notebook then shows the text
        return notebook.show(self)
