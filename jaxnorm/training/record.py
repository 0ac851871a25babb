"""The record of a checkpoint's leaves: their names, shapes, dtypes and checksums.

Orbax stores plain arrays under names that do not depend on the classes of a state. A random key is
stored as its data, and the record holds the kind of the key. The record is a JSON object:

    {"data": {...}, "leaves": {name: {"shape", "dtype", "checksum", "key"?}},
     "optional": {field: checksum of its structure}, "crc32": of all else}
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, Sharding

from jaxnorm._jax import is_traced
from jaxnorm.training.state import TrainState

Leaves = Mapping[str, Any]  # name, such as params/Dense_0/kernel -> array or ShapeDtypeStruct
# Fields of a TrainState that a run can continue without. They change no other number of the run.
OPTIONAL = ("monitor",)


def named_leaves(operation: str, argument: str, state: Any) -> dict[str, Any]:
    """The leaves of a TrainState, by name such as params/Dense_0/kernel."""
    if not isinstance(state, TrainState):
        raise TypeError(
            f"{operation}: {argument} must be a TrainState; got {type(state).__name__}. Make one "
            "with create_train_state."
        )
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(
                f"{operation}: every leaf of {argument} must be a JAX array; {name} is "
                f"{type(leaf).__name__}. Convert it: jnp.asarray(...)."
            )
    return leaves


def check_values(operation: str, leaves: Leaves) -> None:
    """Raise unless every leaf has values that can be read.

    In a run of many processes every leaf must also lie on a mesh over the devices of all processes.
    """
    for name, leaf in leaves.items():
        if is_traced(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{operation}: state must be made of arrays with values; {name} is "
                f"{type(leaf).__name__}. Call it outside of jax.jit, with the state that a step "
                "returned."
            )
        if not has_values(leaf):
            raise ValueError(
                f"{operation}: the state's buffers must still be there; those of {name} were "
                "donated to a later step. Save the state which that step returned, or build the "
                "step with donate=False."
            )
        if jax.process_count() > 1 and leaf.sharding.is_fully_addressable:
            raise ValueError(
                f"{operation}: with {jax.process_count()} processes every leaf must lie on a mesh "
                f"over the devices of all; {name} lies on this process alone. Place the state: "
                "jax.device_put(state, jax.NamedSharding(mesh, jax.P()))."
            )


def check_places(operation: str, leaves: Leaves) -> None:
    """Raise unless every leaf with a sharding names real devices."""
    for name, leaf in leaves.items():
        sharding = place(leaf)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
            raise TypeError(
                f"{operation}: the template must say which devices to restore to; {name} has "
                f"{sharding}, whose mesh names none. Give its ShapeDtypeStruct a sharding over a "
                "jax.sharding.Mesh, or pass a state of arrays."
            )


def has_values(leaf: Any) -> bool:
    """True if a leaf has values: it is no bare type, and was not donated to a later step."""
    return isinstance(leaf, jax.Array) and not leaf.is_deleted()


def place(leaf: Any) -> Sharding | None:
    """The sharding that a restored leaf gets; None for an array that is bound to no device."""
    bound = getattr(leaf, "committed", True)
    return getattr(leaf, "sharding", None) if bound else None


def is_key(leaf: Any) -> bool:
    """True if a leaf holds random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_plain(leaf: Any) -> jax.Array:
    """The array that is stored for a leaf: for random keys their data, else the leaf itself."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def from_plain(value: jax.Array, stored: Mapping[str, Any]) -> jax.Array:
    """The inverse of `to_plain`; `stored` is the leaf's entry in the record."""
    return jax.random.wrap_key_data(value, impl=stored["key"]) if "key" in stored else value


def plain_type(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of the array that is stored for a leaf."""
    plain = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    plain = jax.eval_shape(jax.random.key_data, plain) if is_key(leaf) else plain
    return plain.shape, plain.dtype


def structures(state: TrainState) -> dict[str, int]:
    """A checksum of the structure of each optional field, which fixes the meaning of its arrays."""
    return {
        field: zlib.crc32(str(jax.tree.structure(getattr(state, field))).encode())
        for field in OPTIONAL
    }


def make_record(
    operation: str, state: TrainState, leaves: Leaves, checksums: Mapping[str, int], data: Any
) -> dict[str, Any]:
    """The record of a state about to be saved."""
    data = {} if data is None else data
    try:
        same = isinstance(data, Mapping) and json.loads(json.dumps(data)) == data
    except (TypeError, ValueError):
        same = False
    if not same:
        raise TypeError(
            f"{operation}: data must be a dict that JSON gives back unchanged (strings as keys, "
            f"lists rather than tuples, Python numbers rather than arrays); got "
            f"{brief(data)}. For example data={{'epoch': 3}}."
        )
    described = {name: {**_type(x), "checksum": checksums[name]} for name, x in leaves.items()}
    for name, leaf in leaves.items():
        if is_key(leaf):
            described[name]["key"] = jax.random.key_impl(leaf)
    record = {"data": dict(data), "leaves": described, "optional": structures(state)}
    return {**record, "crc32": _crc32(record)}


def read_record(stored: Any) -> dict[str, Any]:
    """The record of a checkpoint; a ValueError if it differs from the one that was written."""
    record = {name: value for name, value in stored.items() if name != "crc32"}
    if stored.get("crc32") != _crc32(record):
        raise ValueError("its record is not the one that was written")
    return record


def not_stored(record: Mapping[str, Any], leaves: Leaves, template: Mapping[str, int]) -> set[str]:
    """Names of the leaves of optional fields that the checkpoint lacks or stores in another form.

    `template` is the result of `structures` for the template.
    """
    stored, missing = record["leaves"], set()
    for field in OPTIONAL:
        wanted = {name: _type(leaf) for name, leaf in leaves.items() if _field(name) == field}
        has = {name: _kind(stored[name]) for name in stored if _field(name) == field}
        # The records of older checkpoints hold no structures.
        if wanted != has or record.get("optional", template)[field] != template[field]:
            missing |= wanted.keys()
    return missing


def differences(record: Mapping[str, Any], leaves: Leaves) -> str:
    """The differences between the leaves of a template and those stored, in words.

    The text is empty if there are none. Optional fields may differ.
    """
    stored, found = record["leaves"], []
    names = [*stored, *(name for name in leaves if name not in stored)]
    for name in (name for name in names if _field(name) not in OPTIONAL):
        has = _kind(stored[name]) if name in stored else None
        wants = _type(leaves[name]) if name in leaves else None
        if has != wants:
            found.append(f"{name} is stored as {_shown(has)} and wanted as {_shown(wants)}")
    return first_of(found)


def first_of(items: list[str], limit: int = 4) -> str:
    """The first of many items, and the number of the others."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more


def brief(thing: Any) -> str:
    """One line of text for a value, or for an error of another library."""
    text = " ".join(str(thing).split()) or type(thing).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _field(name: str) -> str:
    """The field of a TrainState that holds a leaf."""
    return name.partition("/")[0]


def _kind(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {key: stored[key] for key in ("shape", "dtype")}


def _type(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _shown(kind: Mapping[str, Any] | None) -> str:
    return f"{kind['dtype']}{kind['shape']}" if kind else "nothing"


def _crc32(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
