"""The main study: networks under several normalizations, seeds and learning rates at once.

A frozen `StudyConfig` goes in, and a frozen `StudyResult` comes out. Nothing is printed or written.
For each network and normalization, one program that is vmapped over seeds x learning rates trains
all runs. Between its calls the validation accuracy is measured. Afterwards the steps of the best
run are repeated with a monitor.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnorm import training
from jaxnorm.lab.data import Dataset, LabeledImages, batch_rows
from jaxnorm.lab.networks import (
    NORMALIZATIONS,
    build_network,
    draw_kernels,
    is_applicable,
)
from jaxnorm.lab.results import Curves, Recorded, StudyResult, summarize_curves
from jaxnorm.monitor import Monitor
from jaxnorm.monitor.samples.buffer import Buffer

VALIDATION_IMAGES = 300  # at most, of the validation part
EVALUATION_BATCH = 60  # images per call; then the patches of all runs fit into the cache
# The gradient-based shift is measured for these two only, since it costs a gradient for each layer
# at every sample. The claim that it rises with batch normalization compares these two.
SHIFT_OF = ("none", "batch")


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """The training of one network: steps, batch size, learning rates, normalizations."""

    network: str
    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    normalizations: tuple[str, ...] = tuple(NORMALIZATIONS)
    decay: bool = False  # True lets the rate fall to zero, along half a cosine


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The settings that determine a study, apart from the data."""

    plans: tuple[TrainingPlan, ...] = (
        TrainingPlan(
            "mlp",
            steps=400,
            batch_size=60,
            learning_rates=(0.3, 1.0, 3.0, 10.0, 30.0),
            normalizations=("none", "batch", "layer", "rms"),
        ),
        TrainingPlan(
            "conv",
            steps=80,
            batch_size=32,
            learning_rates=(0.3, 1.0, 3.0),
            normalizations=("none", "batch", "group", "instance", "weight"),
            # With a constant rate the result of so short a training depends on its last steps.
            decay=True,
        ),
    )
    seed: int = 0
    seeds: int = 3
    samples: int = 12  # number of measurements per run, approximately

    def pairs(self) -> dict[TrainingPlan, list[str]]:
        """For each plan those of its normalizations that its network can have."""
        return {
            plan: [name for name in plan.normalizations if is_applicable(plan.network, name)]
            for plan in self.plans
        }

    def run_seeds(self) -> list[int]:
        """The seed of each run, drawn from the seed of the study."""
        return np.random.SeedSequence(self.seed).generate_state(self.seeds).tolist()


def demo_config(seed: int = 0, steps: int | None = None, quick: bool = False) -> StudyConfig:
    """The configuration of the study of `jaxnorm demo`.

    Args:
        seed: the seed of all randomness.
        steps: the number of steps of the MLP; the convolutional net makes a fifth as many.
        quick: True for two seeds and fewer learning rates and steps. Every normalization is still
            there.

    Returns:
        A `StudyConfig`.

    Raises:
        Nothing of its own.

    Example:
        >>> [plan.steps for plan in demo_config(steps=400).plans]
        [400, 80]
    """
    config = StudyConfig(seed=seed)
    mlp, conv = config.plans
    if quick:
        config = dataclasses.replace(config, seeds=2)
        mlp = dataclasses.replace(mlp, steps=200, learning_rates=(0.3, 3.0, 30.0))
        conv = dataclasses.replace(conv, steps=40, learning_rates=(0.3, 3.0))
    if steps is not None:
        mlp = dataclasses.replace(mlp, steps=steps)
        conv = dataclasses.replace(conv, steps=max(1, steps // 5))
    return dataclasses.replace(config, plans=(mlp, conv))


@dataclasses.dataclass(frozen=True)
class Progress:
    """A report on a running study, for its caller."""

    network: str
    normalization: str
    step: int  # number of steps made; 0 before the program is compiled
    steps: int
    accuracy: float  # best validation accuracy so far of all runs of the program


def run_study(
    config: StudyConfig,
    data: Dataset,
    progress: Callable[[Progress], None] = lambda _: None,
    workers: int | None = None,
) -> StudyResult:
    """Train every network under each of its normalizations, on the given data.

    Args:
        config: what to train, and the seed.
        data: the data to train on.
        progress: a function that is called, by one thread at a time, whenever a program has made
            some steps.
        workers: the number of programs that are compiled and run at the same time. The default is
            two if there are two cores. The numbers do not depend on it.

    Returns:
        For every pair of network and normalization that fit: curves, their summary, and the
        monitor's samples of the first seed at the best rate.

    Raises:
        ValueError: a name in `config` is unknown, or a batch does not fit the data.

    Source: S. Ioffe and C. Szegedy, Batch Normalization, ICML 2015, section 4.1 and Figure 1.
    """
    started = time.perf_counter()
    # The slow programs start first, so that the programs that finish last are short.
    plans = sorted(config.pairs().items(), key=lambda pair: pair[0].network != "conv")
    pairs = [(plan, name) for plan, names in plans for name in names]
    workers = workers or min(2, os.cpu_count() or 1)
    stop = threading.Event()
    lock = threading.Lock()

    def report(state: Progress) -> None:
        with lock:
            progress(state)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_train, config, *pair, data, report, stop) for pair in pairs]
        try:
            trained = [future.result() for future in futures]
        except BaseException:  # an interrupt too must leave no thread running
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    order = [plan.network for plan in config.plans]
    trained = sorted(trained, key=lambda pair: order.index(pair[0].network))
    trained, recorded = zip(*trained) if trained else ((), ())
    return StudyResult(
        settings=dataclasses.asdict(config),
        data={
            "name": data.name,
            "image_shape": data.image_shape,
            "classes": data.classes,
            "train_images": len(data.train.labels),
            "validation_images": len(_validation(data).labels),
            "test_images": len(data.test.labels),
        },
        curves=trained,
        summaries=tuple(
            row
            for plan in config.plans
            for row in summarize_curves(
                [curves for curves in trained if curves.network == plan.network],
                plan.normalizations,
            )
        ),
        recorded=recorded,
        seconds=time.perf_counter() - started,
    )


def _train(
    config: StudyConfig,
    plan: TrainingPlan,
    normalization: str,
    data: Dataset,
    report: Callable[[Progress], None],
    stop: threading.Event,
) -> tuple[Curves, Recorded]:
    """Train all runs of one network under one normalization."""
    report(Progress(plan.network, normalization, 0, plan.steps, 0.0))
    network = build_network(plan.network, normalization, data.classes)
    blank = network.clone(kernel_init=jax.nn.initializers.zeros)  # for `draw_kernels` to fill
    images, labels = jnp.asarray(data.train.images), jnp.asarray(data.train.labels)
    rates = plan.learning_rates
    seeds, hyperparams = training.grid(config.run_seeds(), learning_rate=rates)

    def optimizer(learning_rate: Any) -> optax.GradientTransformation:
        if plan.decay:
            learning_rate = optax.cosine_decay_schedule(learning_rate, plan.steps)
        return optax.sgd(learning_rate)

    state = training.create_sweep_state(blank, optimizer, seeds, hyperparams, images[:2])
    state = state.replace(params=draw_kernels(state.params, seeds))
    rows_of = {
        seed: batch_rows(len(images), plan.batch_size, plan.steps, seed) for seed in set(seeds)
    }
    rows = np.stack([rows_of[seed] for seed in seeds])

    def loss(logits: jax.Array, rows: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
        return losses.mean()

    every = max(1, round(plan.steps / config.samples))
    sampled = [0, *range(every, plan.steps, every), plan.steps]
    step = training.make_sweep_step(
        network,
        optimizer,
        loss,
        batch_per_member=True,
        inputs=lambda rows: (images[rows],),
        scan=True,
    )
    evaluate = training.make_sweep_eval_step(
        network,
        lambda logits, batch: {"correct": ((logits.argmax(-1) == batch[1]) & batch[2]).sum()},
        inputs=lambda batch: (batch[0],),
    )
    validation = list(_batches(_validation(data)))
    accuracy = [_accuracy(evaluate, state, validation)]
    losses, states = [], []
    for start, end in itertools.pairwise(sampled):
        if stop.is_set():
            raise concurrent.futures.CancelledError
        states.append(jax.tree.map(jnp.copy, state))  # a copy, because the step donates its state
        state, metrics = step(state, rows[:, start:end])
        losses.append(np.asarray(metrics["loss"], np.float64))  # float32 would overflow at 1e38
        accuracy.append(_accuracy(evaluate, state, validation))
        best = float(np.max(np.mean(accuracy[-1].reshape(len(rates), -1), 1)))
        report(Progress(plan.network, normalization, end, plan.steps, best))
    test = _accuracy(evaluate, state, list(_batches(data.test)))

    def split(values: Any) -> np.ndarray:
        values = np.asarray(values)  # axis 0 is members, ordered by rate and then by seed
        return values.reshape(len(rates), config.seeds, *values.shape[1:])

    curves = Curves(
        network=plan.network,
        normalization=normalization,
        learning_rates=rates,
        steps=tuple(sampled),
        train_loss=split(np.stack([chunk.mean(1) for chunk in losses], 1)),
        final_loss=split(losses[-1][:, -1]),
        validation_accuracy=split(np.stack(accuracy, 1)),
        test_accuracy=split(test),
    )
    best = curves.best * config.seeds
    monitored: Any = training.make_train_step(
        network,
        optax.inject_hyperparams(optimizer)(learning_rate=rates[curves.best]),
        loss,
        inputs=lambda rows: (images[rows],),
        monitor=Monitor(1, len(states), channels=True, shift=normalization in SHIFT_OF),
    )
    starts = [training.sweep_member(state, best) for state in states]
    lowered = monitored.lower(starts[0], rows[best, 0])
    monitored_step = lowered.compile(_quick_options())
    buffer = Buffer.empty(lowered.args_info[0][0].monitor.schema, len(states))
    for start, state in zip(sampled, starts):
        buffer = monitored_step(state.replace(monitor=buffer), rows[best, start])[0].monitor
    settings = {"seed": seeds[best], "learning rate": rates[curves.best]}
    return curves, Recorded(plan.network, normalization, settings, buffer)


def _quick_options() -> dict[str, Any]:
    """Options of XLA for a program whose compilation takes longer than all its runs."""
    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    # This halves the time. Later versions have only the slower emitters and refuse the option.
    if metadata.version("jaxlib").startswith("0.10."):
        options["xla_cpu_use_fusion_emitters"] = False
    return options


def _validation(data: Dataset) -> LabeledImages:
    return LabeledImages(*(array[:VALIDATION_IMAGES] for array in data.validation))


def _batches(part: LabeledImages) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images, labels and a mask of valid rows, in chunks of one size that one program serves."""
    total = len(part.labels)
    size = math.ceil(total / math.ceil(total / EVALUATION_BATCH))
    for start in range(0, total, size):
        rows = np.arange(start, start + size)
        yield part.images[rows % total], part.labels[rows % total], rows < total


def _accuracy(evaluate: Any, state: Any, batches: list[tuple[np.ndarray, ...]]) -> np.ndarray:
    correct = sum(np.asarray(evaluate(state, batch)["correct"]) for batch in batches)
    counted = sum(int(batch[2].sum()) for batch in batches)
    return np.asarray(correct / counted)
