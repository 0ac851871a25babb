"""The lowering of each primitive for each platform."""

from importlib import import_module

from jax.interpreters import mlir

# Imported when a kernel is lowered: Pallas takes longer to load than all of jaxnorm.
KERNELS = {"tpu": "jaxnorm.kernels.tpu", "cuda": "jaxnorm.kernels.gpu"}


def lowered(primitive, kernel, plain) -> None:
    """Register what computes a primitive: a kernel where the call says so, `plain` elsewhere.

    Args:
        primitive: of `jaxnorm.kernels.operator`.
        kernel: a function of a module of kernels, a call and operands; None where there is none.
        plain: a function of a call and operands.
    """
    mlir.register_lowering(primitive, _rule(None, kernel, plain))
    for platform in KERNELS:
        mlir.register_lowering(primitive, _rule(platform, kernel, plain), platform=platform)


def _rule(platform: str | None, kernel, plain):
    def rule(context, *operands, call):
        norm = call.norm
        run = plain
        if kernel is not None and norm.interpreted:
            run = _with(kernel, norm.interpreted)
        elif kernel is not None and platform is not None and platform in norm.kernels:
            devices = _partitioned(context)
            if devices == 1:
                run = _with(kernel, platform)
            elif norm.insists:
                raise ValueError(
                    f"{norm.operation}: implementation='pallas' asks for a kernel, which XLA for "
                    f"{platform} cannot partition; got a program for {devices} devices that is "
                    "partitioned automatically. Use a mesh whose axes are Explicit, call it in "
                    "jax.shard_map, or leave implementation=None."
                )
        elif kernel is not None and norm.insists:
            raise ValueError(
                f"{norm.operation}: implementation='pallas' has kernels for this call on "
                f"{' and '.join(norm.kernels)}; got a program for {platform or 'another platform'}."
                " Leave implementation=None."
            )
        lower = mlir.lower_fun(lambda *a, call: run(call, *a), multiple_results=True)
        return lower(context, *operands, call=call)

    return rule


def _with(kernel, platform: str):
    module = import_module(KERNELS[platform])
    return lambda call, *operands: kernel(module, call, *operands)


def _partitioned(context) -> int:
    """Over how many devices the compiler partitions what is not in a `shard_map`."""
    axes = context.module_context.axis_context
    return getattr(axes, "num_devices", None) or 1
