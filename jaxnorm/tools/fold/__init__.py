"""Batch norms in evaluation, folded into the linear maps beside them.

* `program`: the model as a list of equations, with the calls of its layers;
* `exact`: values that the variables determine, in float64; `layout`, `affine`: which value is a
  scaled, shifted and moved copy of which;
* `linear`: the layers that are linear maps; `pairs`: which norm goes into which, or why not;
* `write`: the model with other calls and variables; `check`: the comparison with the first one.
"""

from jaxnorm.tools.fold.fold import FoldedModel, fold
from jaxnorm.tools.fold.report import FoldReport

__all__ = ["FoldReport", "FoldedModel", "fold"]
