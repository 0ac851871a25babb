"""The lowering of each primitive for each platform."""

from collections.abc import Callable
from importlib import import_module

from jaxnorm._jax import lower, partitions

# Imported when a kernel is lowered: Pallas takes longer to load than all of jaxnorm.
KERNELS = {"tpu": "jaxnorm.kernels.tpu", "cuda": "jaxnorm.kernels.gpu"}
# The modules that know which calls these refuse.
PLANS = {"tpu": "jaxnorm.kernels.tiles", "cuda": "jaxnorm.kernels.gpu_plan"}


def lowerings(kernel, xla) -> dict[str | None, Callable]:
    """The lowerings of a primitive: a kernel where the call says so, XLA's form elsewhere.

    Args:
        kernel: a function of a module of kernels, a call and operands; None where there is none.
        xla: a function of a call and operands.
    """
    return {platform: _rule(platform, kernel, xla) for platform in (None, *KERNELS)}


def _rule(platform: str | None, kernel, xla):
    def rule(context, *operands, call):
        norm = call.norm
        run = xla
        if kernel is not None and norm.interpreted:
            run = _with(kernel, norm.interpreted)
        elif kernel is not None and platform is not None and platform in norm.platforms:
            devices = partitions(context) or 1
            if devices == 1:
                run = _with(kernel, platform)
            elif norm.required:
                raise ValueError(
                    f"{norm.operation}: implementation='pallas' asks for a kernel, which XLA for "
                    f"{platform} cannot partition; got a program for {devices} devices that is "
                    "partitioned automatically. Use a mesh whose axes are Explicit, call it in "
                    "jax.shard_map, or leave implementation=None."
                )
        elif kernel is not None and norm.required:
            raise ValueError(
                f"{norm.operation}: implementation='pallas' has kernels for this call on "
                f"{' and '.join(norm.platforms)}; got a program for "
                f"{platform or 'another platform'}. Leave implementation=None."
            )
        return lower(lambda *a, call: run(call, *a), context, *operands, call=call, several=True)

    return rule


def _with(kernel, platform: str):
    module = import_module(KERNELS[platform])
    return lambda call, *operands: kernel(module, call, *operands)
