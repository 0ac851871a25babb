"""Each rule on a network that has the defect, beside a twin that has not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import initial
from flax import nnx
from recordings import invent

import jaxnorm.linen as jnn
from jaxnorm.monitor import Finding, Findings, Monitor, Recording, attach, diagnose, observe
from jaxnorm.monitor.diagnosis.evidence import Evidence, symmetric_divergence
from jaxnorm.monitor.diagnosis.rules.activations import near_epsilon
from jaxnorm.monitor.diagnosis.rules.statistics import train_eval_divergence
from jaxnorm.training import create_train_state, make_train_step

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 8)).astype(np.float32)
Y = (X @ RNG.normal(size=(8, 4)) / 3).astype(np.float32)


class Net(nn.Module):
    """A healthy one, unless told otherwise."""

    depth: int = 1
    features: int = 16
    norm: str = "batch"
    momentum: float = 0.9
    use_bias: bool = False
    wide: float = 1.0
    """By how much kernels start wider than they should."""
    shift: float = 0.0
    """Of what the nonlinearity is given."""
    function: str = "relu"
    frozen: bool = False

    @nn.compact
    def __call__(self, x, train: bool = True):
        init = nn.initializers.variance_scaling(2.0 * self.wide**2, "fan_in", "normal")
        for _ in range(self.depth):
            x = nn.Dense(self.features, use_bias=self.use_bias, kernel_init=init)(x)
            if self.norm == "batch":
                frozen = self.frozen or not train
                x = nn.BatchNorm(use_running_average=frozen, momentum=self.momentum)(x)
            elif self.norm == "layer":
                x = nn.LayerNorm()(x)
            x = getattr(nn, self.function)(x + self.shift)
        return nn.Dense(4)(x)


def findings_of(model, x=X, change=lambda variables: variables):
    """Findings of one pass, by rule, with running statistics that fit."""
    return by_rule(diagnose(model, change(fitted(model, x)), x))


def fitted(model, x=X):
    """Variables with running statistics that are those of this batch."""
    of_net = isinstance(model, Net)
    variables = initial(model, x, gain=np.sqrt(2) * model.wide if of_net else 1.0)
    if "batch_stats" not in variables:
        return variables
    once = model.clone(frozen=False, momentum=0.9) if of_net else model

    def stats(variables, x):
        after = once.apply(variables, x, mutable=["batch_stats"])[1]
        before = {"batch_stats": variables["batch_stats"]}
        return jax.tree.map(lambda a, b: (a - 0.9 * b) / 0.1, after, before)

    return variables | jax.jit(stats)(variables, x)


def by_rule(findings):
    assert isinstance(findings, Findings)
    return {finding.rule: finding for finding in findings}


@functools.cache
def prepared(model, optimizer):
    """A state and a step, compiled once for all trainings of a model."""

    def loss(y, batch):
        return ((y - batch[1]) ** 2).mean()

    step = make_train_step(
        model, optimizer, loss, inputs=lambda b: (b[0],), scan=True, donate=False,
        monitor=Monitor(every=1),
    )  # fmt: skip
    return create_train_state(model, optimizer, 0, X), step


SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=0.05)


def train(folder, model, xs=None, optimizer=SGD, rates=(0.05, 0.05), stats=lambda a: a):
    """Findings of a training, by rule, and its recording; of equally many steps at each rate."""
    xs = np.broadcast_to(X, (40, *X.shape)) if xs is None else xs
    ys = np.broadcast_to(Y, (len(xs), *Y.shape))
    state, step = prepared(model, optimizer)
    state = state.replace(batch_stats=jax.tree.map(stats, state.batch_stats))
    for rate, x, y in zip(rates, np.split(xs, len(rates)), np.split(ys, len(rates))):
        hyperparams = state.opt_state.hyperparams | {"learning_rate": np.float32(rate)}
        state = state.replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))
        state, _ = step(state, (x, y))
    recording = Recording(folder)
    recording.append(state)
    return by_rule(diagnose(recording)), recording


def batches():
    """Drawn anew for each of 40 steps."""
    return np.random.default_rng(1).normal(size=(40, 64, 8)).astype(np.float32)


class TestOnePass:
    def test_a_healthy_network_has_nothing(self):
        assert findings_of(Net()) == {}
        assert findings_of(Net(norm="layer")) == {}
        assert findings_of(Net(norm="none", use_bias=True)) == {}

    @pytest.mark.sample
    def test_a_small_batch(self):
        found = findings_of(Net(depth=2), X[:4])["small-batch"]
        assert found.evidence["independent numbers per channel"] == 4
        assert found.where == ("BatchNorm_0", "BatchNorm_1")
        assert findings_of(Net(), X[:2])["small-batch"].severity == "critical"
        assert "small-batch" not in findings_of(Net(norm="layer"), X[:4])

    def test_a_virtual_batch_counts_as_the_batch(self):
        whole = nn.Sequential(
            [nn.Dense(8, use_bias=False), jnn.BatchNorm(False, momentum=0.9), nn.relu]
        )
        parts = nn.Sequential(
            [
                nn.Dense(8, use_bias=False),
                jnn.BatchNorm(False, momentum=0.9, virtual_batch_size=4),
                nn.relu,
            ]
        )
        assert findings_of(whole) == {}
        assert findings_of(parts)["small-batch"].evidence["independent numbers per channel"] == 4

    def test_positions_of_an_image_that_are_all_alike_count_once(self):
        model = nn.Sequential([nn.BatchNorm(False, momentum=0.9), nn.relu])
        alike = np.broadcast_to(X[:8, None, None, :], (8, 6, 6, 8))
        found = findings_of(model, alike)["small-batch"]
        assert found.evidence["independent numbers per channel"] == pytest.approx(8, rel=1e-3)
        anew = RNG.normal(size=(8, 6, 6, 8)).astype(np.float32)
        assert findings_of(model, anew) == {}

    def test_an_imported_momentum(self):
        found = findings_of(Net(momentum=0.1))["imported-momentum"]
        assert "momentum=0.9" in found.remedy and found.evidence["momentum"] == 0.1

    def test_statistics_in_half_precision(self):
        def cast(variables):
            stats = jax.tree.map(lambda a: np.asarray(a, jnp.bfloat16), variables["batch_stats"])
            return {**variables, "batch_stats": stats}

        found = findings_of(Net(), change=cast)["half-precision"]
        assert found.evidence["rounding error"] == 2.0**-8

    def test_statistics_computed_in_half_precision(self):
        def model(force):
            norm = nn.BatchNorm(
                False, momentum=0.9, dtype=jnp.bfloat16, force_float32_reductions=force
            )
            return nn.Sequential([norm, nn.relu])

        x = jnp.asarray(X, jnp.bfloat16)
        assert "half-precision" in findings_of(model(False), x)
        assert findings_of(model(True), x) == {}

    def test_constant_channels(self):
        x = np.where(np.arange(8) < 2, np.float32(3), X)
        model = nn.Sequential([nn.BatchNorm(False, momentum=0.9), nn.relu])
        found = findings_of(model, x)["near-epsilon"]
        assert found.evidence["share of channels"] == 0.25
        assert findings_of(model, X * 1e-4)["near-epsilon"].evidence["share of channels"] == 1
        assert "near-epsilon" in findings_of(nn.Sequential([nn.LayerNorm(), nn.relu]), X * 1e-5)
        # What a root mean square is taken of need not vary.
        assert findings_of(nn.Sequential([nn.RMSNorm(), nn.relu]), X * 1e-5 + 3) == {}

    def test_dead_units(self):
        assert findings_of(Net(shift=-20.0))["dead-units"].severity == "critical"
        assert "dead-units" not in findings_of(Net(shift=1.0))

    def test_few_examples_do_not_make_a_unit_dead(self):
        found = findings_of(Net(norm="none", use_bias=True, features=64), X[:1])
        assert "dead-units" not in found  # half of them are zero for any one example

    def test_saturated_sigmoids_and_tanhs(self):
        for function in ("sigmoid", "tanh"):
            found = findings_of(Net(depth=2, function=function, shift=12.0))["saturated"]
            assert found.where == (f"{function}_0", f"{function}_1")
            assert findings_of(Net(function=function)) == {}

    def test_activations_that_grow_or_vanish_with_depth(self):
        for wide in (3.0, 1 / 3):
            model = Net(depth=6, norm="none", wide=wide, features=128)
            found = findings_of(model)["depth-activations"]
            assert found.evidence["factor per layer"] == pytest.approx(wide, rel=0.1)
            assert found.where == tuple(f"relu_{i}" for i in range(6))
        assert findings_of(Net(depth=6, norm="none", features=128)) == {}
        assert findings_of(Net(depth=6, norm="layer", wide=3.0, features=128)) == {}

    def test_frozen_statistics_on_shifted_data(self):
        frozen = Net(frozen=True)
        assert findings_of(frozen) == {}
        variables = fitted(frozen)
        found = by_rule(diagnose(frozen, variables, X + 2))["frozen-on-shifted"]
        assert found.severity == "critical" and "BatchNorm_0" in found.where
        # In evaluation the same question is asked of what is served.
        assert "frozen-on-shifted" in by_rule(diagnose(Net(), variables, 3 * X, train=False))

    def test_a_bias_before_a_batch_norm(self):
        found = findings_of(Net(depth=2, use_bias=True))["idle-bias"]
        assert found.where == ("Dense_0", "Dense_1") and found.severity == "advice"
        assert "idle-bias" not in findings_of(Net(use_bias=True, norm="layer"))

    def test_statistics_that_were_never_updated(self):
        model = Net(depth=2)
        found = by_rule(diagnose(model, initial(model, X), X + 3))
        assert found["never-updated"].where == ("BatchNorm_0", "BatchNorm_1")
        assert "train-eval-divergence" not in found

    def test_nan_in_the_data(self):
        x = X.copy()
        x[3, 2] = np.nan
        found = findings_of(Net(norm="layer"), x)["nonfinite"]
        assert found.where == ("LayerNorm_0:input",) and found.evidence["share"] == 1 / 64
        assert "data" in found.remedy

    def test_an_nnx_model_is_looked_at_and_not_changed(self):
        class Block(nnx.Module):
            def __init__(self, rngs):
                self.linear = nnx.Linear(8, 16, rngs=rngs)
                self.norm = nnx.BatchNorm(16, rngs=rngs, momentum=0.1)

            def __call__(self, x):
                return nnx.relu(self.norm(self.linear(x)))

        block = nnx.jit(lambda: Block(nnx.Rngs(0)))()
        found = by_rule(diagnose(block, X + 1))
        assert set(found) == {"imported-momentum", "idle-bias", "never-updated"}
        assert not block.norm.mean[...].any()

    def test_what_is_no_number_or_of_numpy_is_no_reason_to_fail(self):
        averaging = nn.Sequential([jnn.BatchNorm(False, momentum=None), nn.relu])
        assert diagnose(averaging, initial(averaging, X), X) == ()
        strange = nn.BatchNorm(np.bool_(False), momentum=0.9, epsilon=np.float32(1e-5))
        assert findings_of(nn.Sequential([strange, nn.relu])) == {}

    def test_the_mode_may_come_by_position(self):
        class Positional(nn.Module):
            @nn.compact
            def __call__(self, x, train: bool = True):
                return nn.relu(nn.BatchNorm(momentum=0.9)(x, not train))

        variables = fitted(Positional())
        assert diagnose(Positional(), variables, X[:2], train=False) == ()
        found = by_rule(diagnose(Positional(), variables, X + 3, train=False))
        assert set(found) == {"frozen-on-shifted"}

    def test_few_examples_say_nothing_of_a_shift(self):
        frozen = Net(frozen=True)
        variables = fitted(frozen)
        assert diagnose(frozen, variables, X[:4]) == ()

    def test_serving_what_was_never_trained(self):
        found = by_rule(diagnose(Net(), initial(Net(), X), 3 * X + 1, train=False))
        assert "never-updated" in found and "frozen-on-shifted" not in found

    def test_masked_batches_are_not_judged_by_what_the_mask_hides(self):
        class Masked(nn.Module):
            @nn.compact
            def __call__(self, x):
                mask = (jnp.arange(len(x)) < 32)[:, None]
                return nn.relu(nn.BatchNorm(False, momentum=0.9)(x, mask=mask))

        x = X.copy()
        x[32:] = 100
        assert findings_of(Masked(), x) == {}

    def test_channels_that_are_seldom_other_than_zero(self):
        rng = np.random.default_rng(3)
        x = rng.normal(size=(64, 8, 8, 16)) * (rng.uniform(size=(64, 8, 8, 16)) < 0.05)
        x = x.astype(np.float32)
        model = nn.Sequential([nn.BatchNorm(False, momentum=0.9), nn.relu])

        def run(variables, x):
            return attach(model).apply(variables, x, mutable=["batch_stats"])

        _, seen = jax.jit(observe(run, elements=4096))(fitted(model, x), x)
        assert not list(train_eval_divergence(Evidence.of_observations(seen)))
        assert not list(near_epsilon(Evidence.of_observations(seen)))

    def test_several_feature_axes_in_any_order(self):
        x = (RNG.normal(size=(32, 2, 4, 8)) * np.arange(1, 9)).astype(np.float32)
        norm = nn.BatchNorm(False, axis=(-1, 1), momentum=0.9)
        assert findings_of(nn.Sequential([norm, nn.relu]), x) == {}

    def test_a_probability_at_the_end_may_be_near_one(self):
        class Classifier(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(4, bias_init=nn.initializers.constant(8.0))(nn.LayerNorm()(x))
                return nn.sigmoid(x)

        assert findings_of(Classifier()) == {}

    def test_a_vmap_inside_what_is_looked_at(self):
        model = nn.BatchNorm(False, momentum=0.9, axis_name="b")
        variables = initial(nn.BatchNorm(False), X)
        marked = attach(nn.Sequential([model]))

        def each(x):
            return marked.apply({n: {"layers_0": v} for n, v in variables.items()}, x,
                                mutable=["batch_stats"])[0]  # fmt: skip

        for x in (X, X.reshape(8, 8, 8)):  # an example each, and eight
            y, seen = jax.jit(observe(jax.vmap(each, axis_name="b")))(x)
            batch = seen["layers_0:input"].batch
            np.testing.assert_allclose(batch.moments.mean, X.mean(0), atol=1e-6)
            assert batch.examples == 64
            np.testing.assert_allclose(np.reshape(y, (-1, 8)).std(0), 1, atol=1e-3)


class TestTraining:
    @pytest.mark.sample
    def test_a_healthy_run_has_nothing(self, tmp_path):
        found, _ = train(tmp_path, Net())
        assert found == {}

    def test_running_statistics_that_are_never_updated(self, tmp_path):
        found, _ = train(tmp_path, Net(momentum=1.0), batches() + 2)
        assert found["never-updated"].severity == "critical"
        assert "momentum=1" in found["never-updated"].cause

    def test_running_statistics_that_lag_behind(self, tmp_path):
        found, recording = train(tmp_path, Net(momentum=0.99), batches() + 2)
        skew = found["train-eval-divergence"]
        assert "Recalibrate" in skew.remedy
        assert (
            skew.evidence["after recalibration (nats)"]
            < 0.25
            < skew.evidence["train/eval divergence (nats)"]
        )
        # Independently: the gap of one channel's means, in deviations, of the last sample.
        batch = recording["BatchNorm_0:input"].batch
        gap = np.abs(batch.moments.mean[-1] - batch.running_mean[-1])
        assert (gap > 0.5 * np.sqrt(batch.moments.var[-1])).any()

    def test_batches_that_are_not_drawn_alike(self, tmp_path):
        drift = 4 * np.random.default_rng(2).normal(size=(40, 1, 8)).astype(np.float32)
        found, _ = train(tmp_path, Net(), batches() + drift, rates=(1e-3, 1e-3))
        assert "would not mend it" in found["train-eval-divergence"].remedy

    def test_frozen_statistics_while_fine_tuning(self, tmp_path):
        xs = batches() + 2
        found, _ = train(tmp_path / "a", Net(frozen=True), xs, stats=lambda a: a + 1)
        assert "frozen-on-shifted" in found and "never-updated" not in found
        found, _ = train(tmp_path / "b", Net(frozen=True), xs)
        assert "never-updated" in found and "frozen-on-shifted" not in found

    def test_gradients_that_vanish_towards_the_first_layer(self, tmp_path):
        sick = Net(depth=6, norm="none", function="sigmoid", use_bias=True)
        found, _ = train(tmp_path, sick)
        assert found["depth-gradients"].evidence["factor per layer"] < 0.5

    def test_gradients_that_grow_towards_the_first_layer(self, tmp_path):
        sick = Net(depth=6, norm="none", wide=3.0)
        found, _ = train(tmp_path, sick, rates=(1e-12, 1e-12))
        assert found["depth-gradients"].evidence["factor per layer"] > 2
        assert "small-updates" in found

    def test_updates_out_of_range(self, tmp_path):
        adam = optax.inject_hyperparams(optax.adam)(learning_rate=0.3)
        rates = (0.3, 3.0)
        found, recording = train(tmp_path, Net(norm="layer"), optimizer=adam, rates=rates)
        ratio = recording.parameters["Dense_1/kernel"]
        assert found["large-updates"].evidence["update / weight"] >= np.median(
            (ratio.update / ratio.weight)[20:]
        )

    def test_means_that_drift_after_the_learning_rate_dropped(self, tmp_path):
        still, rates = batches(), (0.05, 0.005)
        found, _ = train(tmp_path / "still", Net(), still, rates=rates)
        assert "drift-after-drop" not in found
        moved = still + np.maximum(np.arange(40, dtype="f") - 20, 0)[:, None, None] / 2
        found, _ = train(tmp_path / "moved", Net(), moved, rates=rates)
        finding = found["drift-after-drop"]
        assert "step 20" in finding.title and "BatchNorm_0" in finding.where
        assert finding.evidence["drift after (deviations)"] > 0.1

    def test_a_run_that_diverges_names_the_first_layer_and_step(self, tmp_path):
        xs = batches()
        xs[7, 0, 0] = np.inf
        found, _ = train(tmp_path, Net(norm="layer"), xs)
        finding = found["nonfinite"]
        assert finding.where == ("LayerNorm_0:input",)
        assert (finding.evidence["step"], finding.evidence["last finite step seen"]) == (7, 6)
        assert finding.evidence["share"] == 1 / 64
        assert "at step 7" in finding.title
        # What follows from it is no finding of its own.
        assert set(found) == {"nonfinite"}
        assert str(finding).count("\n") == 5 and isinstance(finding, Finding)


def test_the_divergence_is_the_closed_form_without_what_chance_brings():
    from jaxnorm.core.moments import Moments

    def of(mean, var):
        return Moments(*(np.full((1, 3), a, np.float32) for a in (1.0, mean, var)))

    # Means m apart, variances v: m^2 / v; variances a and b: (a / b + b / a) / 2 - 1.
    none = np.zeros(1)
    assert symmetric_divergence(of(2.0, 4.0), of(0.0, 4.0), none) == pytest.approx([1.0])
    assert symmetric_divergence(of(0.0, 4.0), of(0.0, 1.0), none) == pytest.approx(
        [(4 + 0.25) / 2 - 1]
    )
    assert symmetric_divergence(of(0.0, 0.0), of(0.0, 0.0), none) == [0]
    assert symmetric_divergence(of(0.0, 0.0), of(0.0, 1.0), none) == [10]
    # The mean over many draws of 20 numbers from the same distribution is what is taken off.
    draws = np.random.default_rng(0).normal(size=(2000, 20, 3))
    drawn = Moments(
        *(np.float32(a) for a in (np.full((2000, 3), 20), draws.mean(1), draws.var(1) * 20))
    )
    truth = Moments(*(np.broadcast_to(a, (2000, 3)) for a in of(0.0, 1.0)))
    assert float(np.mean(symmetric_divergence(drawn, truth, np.zeros(2000)))) == pytest.approx(
        2 / 20, rel=0.2
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("runs/first",), "diagnose: the first argument must be"),
        ((Net(),), "comes with its variables and a batch; got neither"),
        ((Net(), X), "comes with its variables and a batch; got ndarray"),
        ((Net(), {"params": {}}), "comes with its variables and a batch; got dict"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, message):
    with pytest.raises(TypeError, match=message):
        diagnose(*arguments)


def test_an_empty_recording_and_one_with_arguments(tmp_path):
    with pytest.raises(ValueError, match="must have a sample"):
        diagnose(Recording(tmp_path))
    with pytest.raises(TypeError, match="a recording comes alone"):
        diagnose(Recording(tmp_path), X)


def test_nothing_found_says_so():
    assert str(Findings()) == "Nothing found."


def test_the_gravest_come_first(tmp_path):
    def spoil(arrays):
        arrays["observations|values|nonfinite"][8:, 4] = 0.5
        arrays["parameters|update"][:] = 100.0

    found = diagnose(invent(tmp_path, samples=40, norm="LayerNorm", spoil=spoil))
    ranks = [("critical", "warning", "advice").index(finding.severity) for finding in found]
    assert ranks == sorted(ranks) and len(set(ranks)) > 1
