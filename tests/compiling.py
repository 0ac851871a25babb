"""How programs are compiled in tests: quickly, but where it is their rounding that is judged.

Nine tenths of the time of these tests would be the compiler's. What a program computes, and what it
refuses, does not hang on how well it is optimized; its last digits may.
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
    """`jax.jit` with XLA's own options for CPUs, whatever the tests' are."""
    import jax  # not before conftest.py has set the environment

    return jax.jit(function, compiler_options=AS_USERS)


def value_and_vjp(function, jit=None):
    """`(dy, *arguments)` -> y and the cotangents of the arguments, in one program."""
    import jax

    def run(dy, *arguments):
        y, back = jax.vjp(function, *arguments)
        return y, back(dy)

    return (jit or jax.jit)(run)
