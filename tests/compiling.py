"""Compilation of programs in tests: with little optimization, unless a test judges rounding.

With full optimization the compiler would take nine tenths of the time of these tests. The values
and the errors of a program do not depend on its optimization; its last digits may.
"""

from importlib import metadata

# XLA's newer emitters for CPUs take longer than all the rest for small programs. Versions that have
# no other do not know the flag, and a flag that XLA does not know ends the process.
_CHOICE = metadata.version("jaxlib").startswith("0.10.")
QUICK_FLAGS = (
    "--xla_cpu_parallel_codegen_split_count=1",
    *(("--xla_cpu_use_fusion_emitters=false",) if _CHOICE else ()),
)
AS_USERS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
} | ({"xla_cpu_use_fusion_emitters": True} if _CHOICE else {})


def jit_as_users(function):
    """`jax.jit` with XLA's own options for CPUs, instead of those of the tests."""
    import jax  # not before conftest.py has set the environment

    return jax.jit(function, compiler_options=AS_USERS)


def value_and_vjp(function, jit=None):
    """`(dy, *arguments)` -> y and the cotangents of the arguments, in one program."""
    import jax

    def run(dy, *arguments):
        y, back = jax.vjp(function, *arguments)
        return y, back(dy)

    return (jit or jax.jit)(run)
