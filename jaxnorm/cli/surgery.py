"""Commands on trained networks: `jaxnorm fold`, `jaxnorm recalibrate`, `jaxnorm convert`."""

import argparse
import sys
from typing import Any

from jaxnorm.cli import variables as files
from jaxnorm.cli.arguments import UsageError, integer
from jaxnorm.cli.named import data_batches, example_inputs, named_model, torch_options

MODEL = (
    "module:attribute of a Linen or NNX module, or of a function without arguments that returns "
    "one; the current folder can be imported from"
)
CHECKPOINT = (
    "variables of the model: a folder of Orbax (a tree, or one step of a run, of "
    "jaxnorm.training too) or a .safetensors file"
)
INPUT = (
    "example input: shape and dtype, such as 1,32,32,3:float32, filled with random numbers; or a "
    ".npy or .npz file. Once for each input of the model"
)
OUT = (
    "new path: a .safetensors file if it ends so, else a folder of Orbax. It is written whole or "
    "not at all, and nothing that exists is replaced"
)


def add_commands(commands: Any) -> None:
    """Add these commands to the subparsers of the program."""
    fold = commands.add_parser(
        "fold",
        help="make batch norms part of the layers next to them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Fold the batch norms of a trained network into the linear maps next to them, and\n"
            "print which were folded and why others were kept. The result is checked: it gives\n"
            "the numbers of the network on the example, or nothing is written.\n\n"
            "The folded variables belong to the folded model, which jaxnorm.tools.fold makes:\n\n"
            "    folded = jaxnorm.tools.fold(model, variables, x)     # of CHECKPOINT\n"
            "    y = folded.model.apply(restored, x)                  # Linen\n"
            "    nnx.update(folded.model, restored)                   # NNX, fold(model, x)\n\n"
            "--export writes one file for serving, which needs neither Flax nor jaxnorm:\n\n"
            "    jax.export.deserialize(bytearray(open(file, 'rb').read())).call(x)"
        ),
    )
    fold.set_defaults(command=_fold)
    _common(fold)
    fold.add_argument("--input", action="append", required=True, metavar="SHAPE", help=INPUT)
    fold.add_argument(
        "--export",
        metavar="FILE",
        help="also write the folded network with its variables, by jax.export; for the shapes of "
        "the example",
    )
    fold.add_argument(
        "--platforms",
        metavar="NAMES",
        help="platforms of the exported network, such as cpu,cuda,tpu (default: this one)",
    )
    again = commands.add_parser(
        "recalibrate",
        help="compute running statistics anew from data",
        description=(
            "Compute the running statistics of all batch norms anew, as those of the whole data, "
            "pooled exactly in one pass. Print how far each layer moved."
        ),
    )
    again.set_defaults(command=_recalibrate)
    _common(again)
    again.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help=".npy or .npz file with examples along the first axis; or module:attribute of an "
        "iterable of batches",
    )
    again.add_argument(
        "--arrays",
        metavar="NAMES",
        help="names of the arrays of an .npz file that are the inputs of the model, in order",
    )
    again.add_argument(
        "--batch-size", type=integer(1), default=128, metavar="N", help="default: %(default)s"
    )
    again.add_argument(
        "--num-batches", type=integer(1), metavar="N", help="use this many batches (default: all)"
    )
    again.add_argument(
        "--sequential",
        action="store_true",
        help="layer after layer, with the inputs that evaluation sees; one pass for each layer "
        "that depends on another",
    )
    convert = commands.add_parser(
        "convert",
        help="bring weights from PyTorch, or take them back",
        description=(
            "Convert a state dict of PyTorch to the variables of a model, and print which tensor "
            "becomes which array. With --to-torch, convert the variables of a model to a state "
            "dict. A file that holds code is refused."
        ),
    )
    convert.set_defaults(command=_convert)
    _never_replaces(convert)
    convert.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="FILE",
        help=f"state dict: a {', '.join(files.TORCH)} or .safetensors file; with --to-torch, "
        + CHECKPOINT,
    )
    convert.add_argument("--model", required=True, metavar="NAME", help=MODEL)
    convert.add_argument(
        "--input", action="append", default=[], metavar="SHAPE", help=f"{INPUT}. Needed for Linen"
    )
    convert.add_argument(
        "--options",
        metavar="FILE",
        help="JSON object of arguments of jaxnorm.tools.from_torch: names, flattened, conv1d, "
        "scale_offset, running_var_count, skip, keep",
    )
    convert.add_argument(
        "--like",
        metavar="FILE",
        help="with --to-torch, a state dict whose names and shapes the new one has; --options then "
        "says how it is matched (default: names of the paths in the model)",
    )
    convert.add_argument(
        "--to-torch", action="store_true", help="from the variables of the model to a state dict"
    )
    _outputs(convert, "--to", f"{OUT}. With --to-torch, a .safetensors or .pt file")


def _common(parser: argparse.ArgumentParser) -> None:
    _never_replaces(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    parser.add_argument("--model", required=True, metavar="NAME", help=MODEL)
    _outputs(parser, "--out", OUT)


def _never_replaces(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(interrupted="nothing was written.")


def _outputs(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument(name, dest="out", metavar="PATH", help=text)
    group.add_argument("--dry-run", action="store_true", help="print the report, write nothing")


def _fold(arguments: argparse.Namespace) -> int:
    with files.user_errors("fold"):
        if arguments.dry_run and arguments.export:
            raise UsageError(
                "fold: a dry run must write nothing; got --dry-run and --export. Leave one out."
            )
        if arguments.platforms and not arguments.export:
            raise UsageError(
                "fold: --platforms must be those of an exported network; got no --export. Add "
                "--export FILE."
            )
        files.check_outputs("fold", [arguments.out, arguments.export], arguments.checkpoint)
        inputs = example_inputs("fold", arguments.input)
        model = named_model("fold", arguments.model)
        model, variables = files.restored("fold", model, arguments.checkpoint, inputs)
        tools = files.surgery_tools()
        args = inputs if variables is None else (variables, *inputs)
        folded = tools.fold(model, *args)
        print(folded.report)
        if arguments.dry_run:
            return 0
        outputs = {arguments.out: files.tree_of(folded.model, folded.variables)}
        if arguments.export:
            outputs[arguments.export] = files.exported(folded, inputs, arguments.platforms)
        return files.written("fold", outputs)


def _recalibrate(arguments: argparse.Namespace) -> int:
    command = "recalibrate"
    with files.user_errors(command):
        files.check_outputs(command, [arguments.out], arguments.checkpoint)
        names = tuple(arguments.arrays.split(",")) if arguments.arrays else None
        data, inputs = data_batches(command, arguments.data, arguments.batch_size, names)
        first, keywords = files.first_inputs(command, arguments.data, data, inputs)
        model = named_model(command, arguments.model)
        model, variables = files.restored(command, model, arguments.checkpoint, first, keywords)
        tools = files.surgery_tools()
        args = (data,) if variables is None else (variables, data)
        result = tools.recalibrate(
            model,
            *args,
            sequential=arguments.sequential,
            num_batches=arguments.num_batches,
            inputs=inputs,
            progress=sys.stderr.isatty(),
        )
        print(result.report)
        if arguments.dry_run:
            return 0
        return files.written(
            command, {arguments.out: files.tree_of(result.model, result.variables)}
        )


def _convert(arguments: argparse.Namespace) -> int:
    command = "convert"
    with files.user_errors(command):
        files.check_outputs(command, [arguments.out], arguments.source)
        inputs = example_inputs(command, arguments.input)
        model = named_model(command, arguments.model)
        options = torch_options(command, arguments.options)
        if arguments.to_torch:
            return _convert_back(arguments, model, inputs, options)
        if arguments.like:
            raise UsageError(
                f"{command}: --like must be given with --to-torch; got it without. Add "
                "--to-torch, or leave it out."
            )
        tools = files.surgery_tools()
        variables = files.initial(command, model, inputs)
        if variables is not None:
            variables = tools.from_torch(arguments.source, model, variables, *inputs, **options)
        else:
            model = tools.from_torch(arguments.source, model, *inputs, **options)
        if arguments.dry_run:
            return 0
        return files.written(command, {arguments.out: files.tree_of(model, variables)})


def _convert_back(
    arguments: argparse.Namespace, model: Any, inputs: tuple[Any, ...], options: dict[str, Any]
) -> int:
    """Convert variables to a state dict of PyTorch."""
    command = "convert"
    if arguments.out and not arguments.out.endswith((*files.TORCH, ".safetensors")):
        raise UsageError(
            f"{command}: a state dict must be written to a .safetensors or .pt file; got "
            f"--to {arguments.out}. Add one of these endings."
        )
    if options and not arguments.like:
        raise UsageError(
            f"{command}: --options must say how a state dict is matched; got it with --to-torch "
            "and without --like. Add --like FILE, or leave it out."
        )
    model, variables = files.restored(command, model, arguments.source, inputs)
    tools = files.surgery_tools()
    args = inputs if variables is None else (variables, *inputs)
    keywords = {}
    if arguments.like:
        keywords["like"] = tools.match_torch(arguments.like, model, *args, **options)
    state = tools.to_torch(model, *args, **keywords)
    print(files.table_of(state))
    if arguments.dry_run:
        return 0
    content = files.state_dict_bytes(command, arguments.out, state)
    return files.written(command, {arguments.out: content})
