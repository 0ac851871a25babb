"""The timed functions: the right shapes, the right peers, no work left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def test_the_table_of_shapes():
    from benchmarks.shapes import SHAPES

    assert len({shape.model for shape in SHAPES}) == len(SHAPES)
    assert {norm for shape in SHAPES for norm in shape.norms if shape.cpu} == {
        "batch", "layer", "rms", "group", "instance", "weight"
    }  # fmt: skip
    for shape in SHAPES:
        assert shape.source and shape.on("gpu") == shape.shape and shape.on("cpu") == shape.cpu
        if shape.cpu:
            assert shape.cpu[-1] == shape.shape[-1] and len(shape.cpu) == len(shape.shape)
            # A CPU's array is larger than its nearer caches, and is checked in seconds.
            assert 2**18 < np.prod(shape.cpu) <= np.prod(shape.shape) and np.prod(shape.cpu) < 2**23
        if "group" in shape.norms:
            assert shape.shape[-1] % shape.groups == 0
    ragged = [shape for shape in SHAPES if shape.model.startswith("ragged")]
    assert all(shape.shape[-1] % 8 for shape in ragged)


def test_every_norm_has_its_cases_on_every_backend():
    from benchmarks import ops

    for backend in ("cpu", "gpu"):
        cases = ops.cases(backend)
        assert {case.norm.name for case in cases} == {
            "batch", "layer", "rms", "group", "instance", "weight"
        }  # fmt: skip
        assert [case.offset for case in cases if case.note] == [5.0]
        assert all(
            np.prod(case.checked) < 2**23 and case.checked[-1] == case.shape[-1] for case in cases
        )
    assert len(ops.cases("gpu")) > len(ops.cases("cpu"))


@pytest.fixture
def small():
    from benchmarks import ops, peers

    def case(norm, shape=(4, 6, 6, 32)):
        return ops.Case(norm, "small", shape, shape)

    return case, {norm.name: norm for norm in (*peers.norms(4), peers.WEIGHT)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_in_jax_compute_what_the_oracle_does(small, dtype):
    from benchmarks import ops, peers

    case, norms = small
    chosen = (peers.JAXNORM, peers.Functional("xla"), peers.PLAIN, peers.FLAX)
    for norm in norms.values():
        units = ops.checked(case(norm), dtype, chosen)
        found = [u for u in units if u is not None]
        assert len(found) == sum(peer.has(norm) for peer in chosen) >= 2
        assert max(map(max, found)) < 64, (norm.name, units)


def test_a_peer_that_is_wrong_is_not_timed(small):
    from benchmarks import ops, peers

    class Wrong(peers.Plain):
        def function(self, norm, dtype):
            right = super().function(norm, dtype)
            return lambda parameters, x: (right(parameters, x)[0] * 1.5, {})

    case, norms = small
    with pytest.raises(ValueError, match=r"jnp must compute layer norm .* Nothing is timed"):
        ops.checked(case(norms["layer"]), "float32", [Wrong()])


def test_the_training_forward_hands_out_what_the_backward_needs(small, monkeypatch):
    """Bytes beside x and y, returned by the step of the timed loop."""
    from benchmarks import ops, peers, timing

    case, norms = small
    inputs = ops.inputs_of(case(norms["layer"]), (64, 128), np.dtype(jnp.bfloat16))
    inputs["x"], inputs["dy"] = (inputs[k].astype(jnp.bfloat16) for k in ("x", "dy"))
    monkeypatch.setattr(timing, "chained", lambda *given: given)

    def passes(peer, which):
        step, parameters, start = ops.jax_loop(peer, norms["layer"], which, inputs)
        found = jax.tree.leaves(jax.eval_shape(step, parameters, start))
        return sum(a.size * a.dtype.itemsize for a in found) / inputs["x"].nbytes

    small_arrays = 4 * 64 * 4 / inputs["x"].nbytes
    assert passes(peers.JAXNORM, ops.FORWARD) == 1
    # y, and of each row no more than four numbers; x it is given.
    assert 1 < passes(peers.JAXNORM, ops.TRAINING) <= 1 + 2 * small_arrays
    assert passes(peers.FLAX, ops.TRAINING) >= 3
    assert 2 < passes(peers.JAXNORM, ops.BOTH) < 2.2


def test_a_chain_feeds_itself_and_counts():
    from benchmarks import timing

    loop = timing.chained(lambda fixed, state: (state[0] + fixed, state[0]), 1.0, (jnp.zeros(3),))
    assert loop.length == timing.CHAIN == 2
    rows, faults = timing.interleaved([loop, timing.copying((8, 128), jnp.bfloat16)], timing.QUICK)
    assert len(rows) == timing.QUICK.rounds and len(faults) == 2
    assert all(0 < cell < 100 for row in rows for cell in row)


def test_samples_run_as_often_as_they_say():
    from benchmarks import timing

    counts = []
    loop = timing.Loop(lambda count, state: counts.append(count), lambda: None, 4)
    timing.interleaved([loop], timing.Effort(2, 1e-6))
    assert counts and all(count % 4 == 0 for count in counts)


def test_exponents():
    from benchmarks.growth import exponent

    sizes = [128, 256, 512, 1024]
    assert exponent(sizes, [3.0 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert exponent(sizes, [7.0] * 4) == pytest.approx(0)
    # Least squares, by hand: log times 0, 1, 1 at log sizes 0, 1, 2.
    assert exponent(np.exp([0, 1, 2]), np.exp([0, 1, 1])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="two sizes at least"):
        exponent([4, 4], [1.0, 2.0])


def test_blocks_compare_gradients_before_they_are_timed():
    from benchmarks import blocks, peers

    norm = next(n for n in peers.norms(4) if n.name == "layer")
    case = blocks.Case("small", blocks.models.MLPBlocks, (2, 3, 16), (2, 3, 16), ("layer",))
    chosen = (peers.Functional("xla"), peers.FLAX)  # kernels do not run here
    steps = [blocks.Step(case, peer, norm, case.cpu, jnp.float32) for peer in chosen]
    *ours, flax = blocks.compare(["small"], steps, chosen)
    assert flax == 0 and 0 < max(ours) < 1e-5
    bare = blocks.Step(case, peers.FLAX, peers.norms(4)[2], case.cpu, jnp.float32)
    with pytest.raises(ValueError, match=r"argument|gradients"):
        blocks.compare(["small"], [bare, flax_step(steps)], chosen)


def flax_step(steps):
    return steps[-1]
