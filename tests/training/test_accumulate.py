"""Micro-batches, rematerialization and mixed precision, compared with a training by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import Dense
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_policies
from training.deep import MAKE, RATE, assert_trained, data, plain, reference, squared_error

import jaxnorm.linen
from jaxnorm.models.adapt import adapt
from jaxnorm.training import Layout, create_train_state, make_eval_step, make_train_step
from jaxnorm.training.objective import Objective
from jaxnorm.training.rematerialize import in_segments

OPTIMIZER = optax.sgd(RATE)


def start(framework, layout=None, **kwargs):
    model = MAKE[framework](**kwargs)
    example = (data(1)[0]["x"],) if framework == "linen" else ()
    return model, create_train_state(model, OPTIMIZER, 0, *example, layout=layout)


def run(step, state, batches):
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return state, losses


def micro_batches(batch, count):
    return [jax.tree.map(lambda x: x[i::count], batch) for i in range(count)]


@pytest.mark.parametrize("framework", MAKE)
@pytest.mark.parametrize("where", ["alone", "mesh"])
def test_micro_batches_are_steps_of_small_batches_with_one_update(framework, where):
    layout = Layout.fully_sharded() if where == "mesh" else None
    (model, state), batches = start(framework, layout), data(2)
    expected = reference(
        plain(state.params), plain(state.batch_stats), [micro_batches(b, 4) for b in batches]
    )
    step = make_train_step(model, OPTIMIZER, squared_error, accumulate=4, layout=layout)
    state, losses = run(step, state, batches)
    assert_trained(state, losses, expected)
    assert int(state.step) == 2


@pytest.mark.sample
@pytest.mark.parametrize("framework", MAKE)
@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
def test_exact_is_one_step_on_the_whole_batch(framework, remat):
    layout = Layout.data_parallel() if remat else None
    (model, state), batches = start(framework, layout), data(2)
    expected = reference(plain(state.params), plain(state.batch_stats), [[b] for b in batches])
    step = make_train_step(
        model,
        OPTIMIZER,
        squared_error,
        accumulate=4,
        statistics="exact",
        remat=remat,
        layout=layout,
    )
    state, losses = run(step, state, batches)
    assert_trained(state, losses, expected)


@pytest.mark.parametrize("statistics", ["micro_batch", "exact"])
def test_loss_and_metrics_are_means_over_micro_batches(statistics):
    # A loss that is no mean over rows, so that it differs between batch and micro-batch.
    def loss_fn(y, b):
        error = abs(y[:, 0] - b["y"][:, 0])
        return b["weight"] * error.max(), {"rows": jnp.int32(len(y)), "least": error.min()}

    model = Dense(1)
    (batch,) = data(1, 12)
    batch = {"x": batch["x"] - 1e3, "y": batch["y"], "weight": np.float32(0.5)}
    state = create_train_state(model, OPTIMIZER, 0, batch["x"])
    params = plain(state.params)
    error = abs(batch["x"] @ params["kernel"] + params["bias"] - batch["y"])[:, 0]
    groups = np.stack([error[i::3] for i in range(3)])
    step = make_train_step(model, OPTIMIZER, loss_fn, accumulate=3, statistics=statistics)
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], 0.5 * groups.max(1).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["least"], groups.min(1).mean(), rtol=1e-5)
    assert metrics["rows"] == 4
    # The gradient is the mean over the three rows that decide.
    rows = [i + 3 * int(groups[i].argmax()) for i in range(3)]
    sign = np.sign((batch["x"] @ params["kernel"] + params["bias"] - batch["y"])[rows])
    gradient = 0.5 * (batch["x"][rows] * sign).mean(0)[:, None]
    np.testing.assert_allclose(
        state.params["kernel"], params["kernel"] - RATE * gradient, rtol=1e-4, atol=1e-6
    )


def test_gradients_are_summed_in_float32():
    # The gradients of the micro-batches are 1, and then 255 times 1/512. Each of these is lost when
    # it is added to 1 in bfloat16, and together they are half of it.
    x = np.full((256, 1), 1 / 512, np.float32)
    x[0] = 1
    model = Dense(1, use_bias=False, param_dtype=jnp.bfloat16)
    optimizer = optax.sgd(256.0)
    state = create_train_state(model, optimizer, 0, x)
    state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    state, _ = make_train_step(model, optimizer, lambda y, b: y.mean(), accumulate=256)(state, x)
    assert float(state.params["kernel"][0, 0]) == -1.5


def test_dropout_differs_between_micro_batches_and_not_with_remat():
    batch = {**data(1)[0]}
    batch = jax.tree.map(lambda x: np.repeat(x[:16], 2, 0), batch)  # equal micro-batches

    def outputs(**kwargs):
        model, state = start("linen", dropout=0.5)
        loss_fn = lambda y, b: (squared_error(y, b), {"square": y**2, "y": y})  # noqa: E731
        state, metrics = make_train_step(model, OPTIMIZER, loss_fn, **kwargs)(state, batch)
        return plain(state.params), {k: np.asarray(v) for k, v in metrics.items()}

    params, metrics = outputs(accumulate=2)
    assert (abs(metrics["square"] - metrics["y"] ** 2) > 1e-3).mean() > 0.9
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (params, metrics),
        outputs(accumulate=2, remat=True),
    )


class Blocks(nn.Module):
    """A network that is deep enough for rematerialization to matter."""

    depth: int

    @nn.compact
    def __call__(self, x, train):
        for _ in range(self.depth):
            h = jaxnorm.linen.BatchNorm(not train)(Dense(64)(x))
            x = x + Dense(32)(nn.gelu(h))
        return x


def test_remat_is_the_same_step_and_sums_no_statistics_again():
    layout = Layout.data_parallel()
    model, x = Blocks(3), np.random.default_rng(0).normal(size=(256, 32)).astype(np.float32)
    state = create_train_state(model, OPTIMIZER, 0, x, layout=layout)
    results, collectives = [], []
    for remat in (False, True, checkpoint_policies.dots_saveable):
        step = make_train_step(
            model, OPTIMIZER, lambda y, b: (y**2).mean(), remat=remat, layout=layout, donate=False
        )
        collectives.append(step.lower(state, x).compile().as_text().count(" all-reduce("))
        new, metrics = step(state, x)
        results.append(plain((new.params, new.batch_stats, metrics)))
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), results[0], other
        )
    assert collectives[1] <= collectives[0]


def test_what_remat_keeps_grows_with_the_root_of_the_depth():
    model, x = Blocks(9), jax.ShapeDtypeStruct((2048, 32), jnp.float32)
    state = jax.eval_shape(lambda: create_train_state(model, OPTIMIZER, 0, np.ones((1, 32))))

    def kept(remat):
        objective = Objective("", adapt("", model), lambda y, b: (y**2).mean(), remat=remat)

        def backward(state, x):
            def loss(params):
                return objective.value(params, state.variables, state.rng, x)

            return jax.vjp(loss, state.params)[1]

        residuals = jax.eval_shape(backward, state, x)
        given = sum(p.size for p in jax.tree.leaves(state.params))
        return (sum(leaf.size for leaf in jax.tree.leaves(residuals)) - given) / x.size

    assert kept(False) > 9 * 6  # of each block at least the input and two hidden layers
    assert kept(True) < 7  # the inputs of five segments, the outputs, and statistics


def test_segments_are_the_function():
    """Segments of functions with literals and arguments among the outputs, calls, loops, keys."""

    def function(tree, key):
        x, y = tree["x"], jnp.float32(2.0)
        a = jnp.tanh(x @ x)
        b = jax.lax.scan(lambda c, _: (jnp.sin(c @ x), c.sum()), a, None, length=3)
        c = jax.nn.relu(b[0] @ a) * jax.random.normal(key, x.shape)
        d = jax.lax.cond(c.sum() > 0, lambda: c @ a, lambda: a)
        return {"value": (d @ x + a).sum() + b[1].sum(), "x": x, "constant": y, "three": 3.0}

    def derivatives(f, x, key):
        """Outputs, gradient and Hessian of a function's value."""

        def gradient(x):
            outputs, back = jax.vjp(lambda x: f({"x": x}, key), x)
            (grad,) = back(jax.tree.map(jnp.zeros_like, outputs) | {"value": jnp.float32(1)})
            return grad, (outputs, grad)

        hessian, (outputs, grad) = jax.jacfwd(gradient, has_aux=True)(x)
        return outputs, (grad, hessian)

    x, key = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32), jax.random.key(1)
    got, want = jax.jit(lambda *a: [derivatives(f, *a) for f in (in_segments(function), function)])(
        x, key
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got[0], want[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got[1], want[1]
    )


@pytest.mark.parametrize("framework", MAKE)
def test_bfloat16_computes_narrow_and_keeps_wide(framework):
    model, state = start(framework)
    batches, seen = data(12), []

    def loss_fn(y, batch):
        seen.append((y.dtype, batch["x"].dtype))
        return squared_error(y, batch)

    # bfloat16 does not resolve data at offset 1e3. That is rounding of the input, not of the norm.
    batches = [{**b, "x": b["x"] - 1e3} for b in batches]
    kinds = jax.tree.map(jax.typeof, state)
    expected = reference(plain(state.params), plain(state.batch_stats), [[b] for b in batches])
    step = make_train_step(model, OPTIMIZER, loss_fn, compute_dtype=jnp.bfloat16)
    text = step.lower(state, batches[0]).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("bf16" in line for line in products)
    state, losses = run(step, state, batches)
    assert seen == [(jnp.float32, jnp.float32)]
    assert jax.tree.map(jax.typeof, state) == kinds
    _, stats, wanted = expected
    np.testing.assert_allclose(losses, wanted, rtol=0.02, atol=0.005)
    # Statistics have the precision of the input, 2^-9, and not of repeated rounding.
    got = plain(state.batch_stats)["before"]
    np.testing.assert_allclose(got["mean"], stats["before"]["mean"], atol=2e-3)
    np.testing.assert_allclose(got["var"], stats["before"]["var"], rtol=2e-3)

    evaluate = make_eval_step(model, lambda y, b: {"y": y}, compute_dtype=jnp.bfloat16)
    exact = make_eval_step(model, lambda y, b: {"y": y})(state, batches[0])["y"]
    outputs = evaluate(state, batches[0])["y"]
    assert outputs.dtype == jnp.float32
    np.testing.assert_allclose(outputs, exact, atol=0.05)
    assert (outputs != exact).any()


def test_small_updates_reach_the_float32_parameters():
    # 1 + 2^-10 is 1 in bfloat16: 64 such updates are lost unless the parameters are float32.
    model = Dense(1, use_bias=False)
    optimizer = optax.sgd(2.0**-10)
    x = np.ones((2, 1), np.float32)
    state = create_train_state(model, optimizer, 0, x)
    state = state.replace(params=jax.tree.map(jnp.ones_like, state.params))
    step = make_train_step(
        model, optimizer, lambda y, b: y.mean(), compute_dtype="bfloat16", scan=True
    )
    state, _ = step(state, np.ones((64, 2, 1), np.float32))
    assert float(state.params["kernel"][0, 0]) == 1 - 64 / 1024


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"statistics": "global"},
            ValueError,
            "statistics must be 'micro_batch'.*'exact'.*'global'",
        ),
        (
            {"accumulate": 0},
            ValueError,
            "accumulate must be the number of micro-batches.*got accum",
        ),
        ({"accumulate": 2.0}, ValueError, "accumulate must be"),
        ({"accumulate": True}, ValueError, "accumulate must be"),
        ({"remat": "dots"}, TypeError, "remat must be a bool or a policy.*got remat='dots'"),
        (
            {"compute_dtype": "float16"},
            ValueError,
            "compute_dtype must .*got float16.*scaled.*bfloat16",
        ),
        ({"compute_dtype": jnp.int8}, ValueError, "compute_dtype must be.*got int8"),
        ({"compute_dtype": "half-ish"}, ValueError, "compute_dtype must be.*got 'half-ish'"),
    ],
)
def test_errors_when_the_step_is_made(options, error, message):
    with pytest.raises(error, match="make_train_step: " + message):
        make_train_step(nn.Dense(1), OPTIMIZER, squared_error, **options)


def test_errors_when_the_step_is_traced():
    model, (batch,) = Dense(1), data(1)
    state = create_train_state(model, OPTIMIZER, 0, batch["x"])
    step = make_train_step(model, OPTIMIZER, squared_error, accumulate=5)
    with pytest.raises(ValueError, match=r"accumulate=5 splits the batch.*\(32, 16\)"):
        step(state, batch)
    step = make_train_step(model, OPTIMIZER, squared_error, accumulate=2)
    with pytest.raises(ValueError, match=r"accumulate=2 splits the batch"):
        step(state, {**batch, "y": batch["y"][:16]})

    class Sum(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dense(1)(x).sum(0)

    step = make_train_step(
        Sum(), OPTIMIZER, lambda y, b: y.mean(), accumulate=2, statistics="exact"
    )
    with pytest.raises(ValueError, match=r"accumulate=2 splits the outputs.*\(1,\)"):
        step(create_train_state(Sum(), OPTIMIZER, 0, batch["x"]), batch)

    class Careless(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen = self.variable("seen", "sum", jnp.zeros, (), jnp.float32)
            seen.value = x.sum().astype(jnp.bfloat16)
            return Dense(1)(x)

    careless = create_train_state(Careless(), OPTIMIZER, 0, batch["x"])
    careless = careless.replace(model_state={"seen": {"sum": jnp.float32(0)}})
    step = make_train_step(Careless(), OPTIMIZER, squared_error, accumulate=2)
    with pytest.raises(
        TypeError, match=r"model_state\['seen'\]\['sum'\] was float32\[\] and became bfloat16"
    ):
        step(careless, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, careless)))
