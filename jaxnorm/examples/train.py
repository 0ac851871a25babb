"""Train a small convolutional network on handwritten digits, with one process or with many.

    python -m jaxnorm.examples.train                        # this process, all of its devices
    python -m jaxnorm.examples.train --processes 4          # four processes on this machine
    srun python -m jaxnorm.examples.train                   # one process for each SLURM task
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command="python -m jaxnorm.examples.train"

The program is the same in all four cases. It uses one mesh over the devices of all processes, and
one batch of which each process loads its share. Batch statistics are those of the whole batch. The
order of the data depends on the seed and the step alone. So neither the number of processes nor an
interruption changes the result. With `--checkpoints` a run that was stopped continues.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jaxnorm.distributed import initialize, launch, launched
from jaxnorm.lab.data import Dataset, LabeledImages, load_digits
from jaxnorm.linen import BatchNorm
from jaxnorm.training import (
    Checkpoints,
    Layout,
    create_train_state,
    make_eval_step,
    make_train_step,
)

OPTIMIZER = optax.sgd(0.1, momentum=0.9, nesterov=True)
LAYOUTS = {"data": Layout.data_parallel, "fsdp": Layout.fully_sharded}


class ConvNet(nn.Module):
    """A small convolutional network.

    Nothing in it refers to devices: under `jit`, BatchNorm uses the statistics of the whole batch.
    """

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits (count, classes) of images (count, rows, columns, channels)."""
        x = images
        for features, stride in ((16, 1), (32, 2)):
            x = nn.Conv(features, (3, 3), stride, use_bias=False)(x)
            x = nn.relu(BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))


def loss_fn(logits, batch):
    """Mean cross-entropy over the whole batch, on any number of devices."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def count_correct(logits, batch):
    """The number of correct predictions; rows that only fill up the last batch have weight 0."""
    return {"correct": jnp.sum((logits.argmax(-1) == batch["label"]) * batch["weight"])}


def share(rows: np.ndarray) -> np.ndarray:
    """The rows of a batch, by number, that this process loads."""
    return rows[jax.process_index() :: jax.process_count()]


def training_batch(part: LabeledImages, seed: int, step: int, size: int) -> dict[str, np.ndarray]:
    """This process's share of a step's batch, which depends on the seed and the step alone."""
    epoch, index = divmod(step, len(part.labels) // size)
    order = np.random.default_rng((seed, epoch)).permutation(len(part.labels))
    rows = share(order[index * size : (index + 1) * size])
    return {"x": part.images[rows], "label": part.labels[rows]}


def whole_part(part: LabeledImages) -> dict[str, np.ndarray]:
    """This process's share of all images, with repeated rows so that every device has as many."""
    count = len(part.labels)
    rows = share(np.arange(count + -count % jax.device_count()))
    filled = rows % count
    weight = (rows < count).astype(np.float32)
    return {"x": part.images[filled], "label": part.labels[filled], "weight": weight}


def train_network(data: Dataset, arguments: argparse.Namespace) -> float:
    """Train the network and return its accuracy on the test images."""
    layout = LAYOUTS[arguments.layout]()
    model, example = ConvNet(data.classes), jnp.ones((1, *data.image_shape))
    state = create_train_state(model, OPTIMIZER, arguments.seed, example, layout=layout)
    step = make_train_step(model, OPTIMIZER, loss_fn, layout=layout)
    evaluate = make_eval_step(model, count_correct, layout=layout)

    with Checkpoints(arguments.checkpoints) if arguments.checkpoints else nullcontext() as saved:
        if saved and saved.latest() is not None:
            state, _ = saved.restore(state)
            say(f"going on from step {int(state.step)}")
        for number in range(int(state.step), arguments.steps):
            batch = training_batch(data.train, arguments.seed, number, arguments.batch)
            state, metrics = step(state, batch)
            if (number + 1) % arguments.every == 0 or number + 1 == arguments.steps:
                say(f"step {number + 1:5d}  loss {float(metrics['loss']):.4f}")
                if saved:
                    saved.save(state)
    correct = evaluate(state, whole_part(data.test))["correct"]
    return float(correct) / len(data.test.labels)


def say(text: str) -> None:
    """Print a text, in one process of the run."""
    if jax.process_index() == 0:
        print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status.

    Args:
        argv: the arguments without the program's name. The default is those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.processes and not launched():
        program = ["-m", "jaxnorm.examples.train", *argv]
        return launch(
            program, arguments.processes, devices_per_process=arguments.devices_per_process
        )
    initialize()
    if importlib.util.find_spec("sklearn") is None:
        parser.error('the digits come with scikit-learn. Run: pip install "jaxnorm[lab]"')
    data, devices = load_digits(), jax.device_count()
    if arguments.batch % devices or arguments.batch > len(data.train.labels):
        parser.error(
            f"--batch must be a multiple of the {devices} devices, and no more than the "
            f"{len(data.train.labels)} images; got {arguments.batch}"
        )
    say(f"{jax.process_count()} processes, {devices} devices, batch {arguments.batch}")
    accuracy = train_network(data, arguments)
    say(f"test accuracy {accuracy:.1%}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxnorm.examples.train",
        description="Train a small convolutional network on digits, with one process or many.",
    )
    number = {"type": _positive, "metavar": "N"}
    add = parser.add_argument
    add(
        "--processes",
        **number,
        help="number of processes to start on this machine; leave it out on a cluster",
    )
    add(
        "--devices-per-process",
        **number,
        default=1,
        help="with --processes: simulated CPU devices, or GPUs, of each (default: 1)",
    )
    add("--steps", **number, default=400, help="default: %(default)s")
    add("--batch", **number, default=64, help="images per step, all devices together (default: 64)")
    add(
        "--layout",
        choices=LAYOUTS,
        default="data",
        help="data: parameters whole on every device; fsdp: split over them (default: data)",
    )
    add("--checkpoints", metavar="DIR", help="save here, and continue from the newest one here")
    add("--every", **number, default=50, help="steps between checkpoints (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of parameters and data (default: 0)")
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of 1 or more; got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
