"""Checksums of arrays on their devices, which do not depend on the mesh.

    checksum(x) = sum over words w of x of mix(w xor mix(p)) mod 2^32,   p the word's place in x

`mix` is the finalizer of MurmurHash3, a bijection. So one wrong word always changes the checksum,
and several wrong words change it with probability 1 - 2^-32. A sum may be taken in any order: each
device sums over its own shard, and the shards of any mesh add up to the same number. Devices that
hold the same shard must have equal sums. If they have not, the replicas differ. The cost is one
read of the data on the device, and four bytes for each array and device to the host.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding


def checksums(operation: str, arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """The checksum of every array, computed on the devices.

    Args:
        operation: the public function that is being called; errors begin with it.
        arrays: name -> array of any dtype but a random key's, on one device or a mesh. Over several
            processes every process must call with the same names.

    Returns:
        name -> checksum, a Python integer below 2^32.

    Raises:
        TypeError: an array is laid out over devices in another way than by a mesh.
        ValueError: devices that should hold the same values hold different ones.
    """
    # Start the sums of all arrays before waiting for the first.
    sums = [_over_devices(operation, name, array) for name, array in arrays.items()]
    found, drifted = {}, {}
    for (name, array), by_device in zip(arrays.items(), _from_all_processes(sums)):
        shards: dict[str, list[Any]] = {}
        for device, index in array.sharding.devices_indices_map(array.shape).items():
            shards.setdefault(str(index), []).append(device)
        found[name] = sum(by_device[copies[0]] for copies in shards.values()) % 2**32
        for one, *others in shards.values():
            other = [device for device in others if by_device[device] != by_device[one]]
            if other:
                drifted.setdefault(name, (one, other[0]))
    if drifted:
        name, (one, other) = next(iter(drifted.items()))
        more = f" (and {len(drifted) - 1} other arrays differ)" if len(drifted) > 1 else ""
        raise ValueError(
            f"{operation}: all copies of a replicated array must be the same, bit for bit; "
            f"{name} differs between devices {one} and {other}{more}. One copy would be kept and "
            "the others lost: synchronise them where they are computed (axis_name=... of the "
            "layer, jax.lax.pmean of the gradients), or choose one and place it on every device."
        )
    return found


def _over_devices(operation: str, name: str, array: jax.Array) -> jax.Array:
    """Sums of the shards, one for each device in the order of the mesh. uint32, (devices,)."""
    sharding = array.sharding
    if isinstance(sharding, SingleDeviceSharding):
        return _single(array)
    if isinstance(sharding, NamedSharding):
        return _sharded(sharding.mesh, sharding.spec)(array)
    raise TypeError(
        f"{operation}: every array must lie on one device or be laid out by a mesh; {name} has "
        f"{sharding}. Place it with jax.device_put({name}, jax.NamedSharding(mesh, spec))."
    )


@jax.jit
def _single(x: jax.Array) -> jax.Array:
    return _sum(x, x.shape, [0] * x.ndim)[None]


@functools.lru_cache
def _sharded(mesh: Any, spec: PartitionSpec) -> Any:
    """A function that gives the sums of all devices of a mesh, each on its own device."""

    def over_mesh(x: jax.Array) -> jax.Array:
        def local(shard: jax.Array) -> jax.Array:
            names = [*spec, *[None] * (x.ndim - len(spec))]
            starts = [jax.lax.axis_index(n) * k if n else 0 for n, k in zip(names, shard.shape)]
            return _sum(shard, x.shape, starts)[None]

        # check_vma=False: values whose types say "replicated" may differ here, and that is what
        # this function looks for. There is no communication either: hundreds of small collectives
        # in flight can starve each other.
        all_axes = PartitionSpec(mesh.axis_names)
        return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=all_axes, check_vma=False)(
            x
        )

    return jax.jit(over_mesh)


def _from_all_processes(sums: list[jax.Array]) -> list[dict[Any, int]]:
    """For each array a mapping device -> sum, with the devices of other processes too."""
    shards = [array.addressable_shards for array in sums]
    values = jax.device_get([[shard.data for shard in row] for row in shards])
    mine = [{s.device: int(v[0]) for s, v in zip(*pair)} for pair in zip(shards, values)]
    if jax.process_count() == 1:
        return mine
    slots = jax.local_devices()
    table = np.array([[by.get(device, 0) for device in slots] for by in mine], np.uint32)
    # One exchange for all arrays. The result has axes (processes, arrays, slots).
    tables = multihost_utils.process_allgather(table)
    place = {
        device: (process, slot)
        for process in range(jax.process_count())
        for slot, device in enumerate(jax.local_devices(process_index=process))
    }
    return [
        {device: int(tables[p, n, s]) for device, (p, s) in place.items()} for n in range(len(mine))
    ]


def _sum(shard: jax.Array, shape: tuple[int, ...], starts: list[Any]) -> jax.Array:
    """The contribution of the shard at `starts` to the checksum of an array of `shape`."""
    words = _words(shard)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, (size, start) in enumerate(zip((*shape, words.shape[-1]), (*starts, 0))):
        here = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * np.uint32(size % 2**32) + here + jnp.asarray(start).astype(jnp.uint32)
    return _mix(words ^ _mix(place)).sum(dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as uint32, along one more axis."""
    if jnp.iscomplexobj(x):
        words = _words(jnp.stack([x.real, x.imag], -1))
        return words.reshape(*x.shape, words.shape[-2] * words.shape[-1])
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)[..., None]
    bits = (jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo)(x.dtype).bits
    if bits == 64:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32)[..., None]


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
