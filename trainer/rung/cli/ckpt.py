"""``rung ckpt``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rung.errors import CheckpointError

__all__ = ["main"]

PATH = "a run's folder, its checkpoints folder (of these the newest is taken), a step-… folder, or the URL of one"
FOLDER = "a folder of checkpoints, or the URL of one; the checkpoint lands in DST/step-…, which must not be there yet"


def main(argv: Sequence[str]) -> int:
    """Look into checkpoints, check that they are whole, compare them, convert them."""
    parser = argparse.ArgumentParser(prog="rung ckpt", description=main.__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    some = argparse.ArgumentParser(add_help=False)
    some.add_argument("--model-only", action="store_true", help="leave out the optimizer's state (NAME/STATE)")
    some.add_argument("--prefix", default="", help="only tensors whose names begin with this")

    look = verbs.add_parser(
        "inspect", parents=[some], help="step, size, settings, table of tensors", allow_abbrev=False
    )
    look.add_argument("path", metavar="PATH", help=PATH)
    look.add_argument("--all", action="store_true", help="a line for every tensor, where layers share one otherwise")
    look.add_argument("--json", action="store_true", help="everything, for programs")
    look.set_defaults(run=_inspect)

    check = verbs.add_parser("verify", help="read everything; exit status 1 if damaged", allow_abbrev=False)
    check.add_argument("path", metavar="PATH", help=PATH)
    check.set_defaults(run=_verify)

    name = verbs.add_parser(
        "digest",
        parents=[some],
        help="32 hex digits that are the same whichever layout wrote the state",
        description="Print 32 hex digits that name the state, the same whichever layout wrote it. With --model-only or "
        "--prefix they name those tensors alone; without, also how far the run had come.",
        allow_abbrev=False,
    )
    name.add_argument("path", metavar="PATH", help=PATH)
    name.set_defaults(run=_digest)

    differ = verbs.add_parser(
        "diff",
        parents=[some],
        help="in what two states differ; exit status 1 if they do",
        description="Print in what two states differ; exit status 0 if they are equal, 1 if not. Settings that differ "
        "are shown and are no part of the state; with --model-only or --prefix nor is how far the runs had come.",
        allow_abbrev=False,
    )
    differ.add_argument("one", metavar="A", help=PATH)
    differ.add_argument("other", metavar="B", help="the same")
    differ.set_defaults(run=_diff)

    other_layout = verbs.add_parser(
        "reshard",
        help="write a checkpoint again from another layout",
        description="Load SRC on a layout and write DST from it: the same state (`rung ckpt digest` says so), in the "
        "files of other ranks. A run loads any layout's checkpoints by itself; this is for whoever wants to see that, "
        "or to have files as another number of ranks writes them. Where no launcher has started ranks, as many as the "
        "layout takes are started on this machine; under torchrun or srun: python -m rung.ckpt reshard ...",
        allow_abbrev=False,
    )
    other_layout.add_argument("source", metavar="SRC", help=PATH)
    other_layout.add_argument("destination", metavar="DST", help=FOLDER)
    other_layout.add_argument(
        "overrides",
        metavar="parallel.KEY=VALUE",
        nargs="*",
        help="the layout, as parallel.tp=2 parallel.pp=2 parallel.pp_schedule=zbv (rung train --help parallel); what "
        "is not said is as it is by default",
    )
    other_layout.add_argument("--model-only", action="store_true", help="leave out the optimizer's state (NAME/STATE)")
    other_layout.set_defaults(run=_reshard)

    give = verbs.add_parser(
        "export",
        help="write the model as a Hugging Face folder",
        description="Write a checkpoint's model as a Hugging Face folder (Llama, Mistral, Qwen3): config.json, "
        "safetensors, and the tokenizer where it is found. One process; a shard and a tensor are held in memory.",
        allow_abbrev=False,
    )
    give.add_argument("source", metavar="SRC", help=PATH)
    give.add_argument("directory", metavar="DIR", help="the folder to write; it must not exist yet, or be empty")
    give.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    give.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default %(default)s)")
    give.add_argument(
        "--tokenizer", metavar="PATH", help="a tokenizer.json (default: that of the corpus the run was trained on)"
    )
    give.add_argument(
        "--eos-id", type=int, metavar="ID", help="the token that ends a document (default: as that corpus says)"
    )
    give.set_defaults(run=_export)

    take = verbs.add_parser(
        "import",
        help="make a checkpoint of a Hugging Face folder, to train from",
        description="Make a checkpoint of step 0 of a Hugging Face folder (Llama, Mistral, Qwen3; safetensors). "
        "`rung train run.resume=DST` begins from it, with model.* as in the folder and an optimizer that starts fresh. "
        "One process; a tensor is held in memory.",
        allow_abbrev=False,
    )
    take.add_argument("directory", metavar="DIR", help="the folder that holds config.json and the weights")
    take.add_argument("destination", metavar="DST", help=FOLDER)
    take.add_argument(
        "--dtype",
        default="float32",
        help="what parameters are trained in: float32 (default; also for precision=bf16) or float64",
    )
    take.add_argument(
        "--fused-qkv", action="store_true", help="query, key and value projections as one, for model.fused_qkv=true"
    )
    take.set_defaults(run=_import)

    arguments, rest = parser.parse_known_args(argv)
    if arguments.verb == "reshard" and all("=" in word and not word.startswith("-") for word in rest):
        arguments.overrides += rest  # argparse takes no more of them once an option has come
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status: int = arguments.run(arguments)
    except BrokenPipeError:
        raise
    except OSError as error:  # no permission, no network: storages let it through
        raise CheckpointError(str(error)) from error
    return status


def _inspect(arguments: argparse.Namespace) -> int:
    from rung.checkpoint.inspect import describe, description, select
    from rung.checkpoint.reader import Reader

    with Reader.open(arguments.path) as reader:
        names = select([reader.manifest], arguments.prefix, arguments.model_only)
        if arguments.json:
            import json

            print(json.dumps(description(reader, names), indent=2))
        else:
            print(describe(reader, names, every_tensor=arguments.all))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from rung.checkpoint.reader import Reader

    with Reader.open(arguments.path) as reader:
        manifest = reader.manifest
        print(f"checking {reader.where()}", flush=True)
        problems = 0
        for problem in reader.verify():
            problems += 1
            print(problem, flush=True)
        for note in reader.notes():
            print(f"note: {note}")
        size = sum(file.size for file in manifest.files.values())
        blocks = sum(len(file.blocks) for file in manifest.files.values())
        verdict = f"damaged, {problems} problem{'s' * (problems > 1)}" if problems else "whole"
        print(
            f"{verdict}: {size:,} bytes in {len(manifest.files):,} files, {blocks:,} blocks and "
            f"{len(manifest.tensors):,} tensors checked"
        )
    return 1 if problems else 0


def _digest(arguments: argparse.Namespace) -> int:
    from rung.checkpoint.inspect import select, selected_digest
    from rung.checkpoint.reader import Reader

    with Reader.open(arguments.path) as reader:
        if arguments.prefix or arguments.model_only:
            names = select([reader.manifest], arguments.prefix, arguments.model_only)
            print(selected_digest(reader.manifest, names))
        else:
            print(reader.manifest.digest)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from rung.checkpoint.inspect import config_differences, differences, select
    from rung.checkpoint.reader import Reader

    everything = not (arguments.prefix or arguments.model_only)
    with Reader.open(arguments.one) as one, Reader.open(arguments.other) as other:
        names = select([one.manifest, other.manifest], arguments.prefix, arguments.model_only)
        print(f"A  {one.where()}\nB  {other.where()}")
        for line in config_differences(one, other):
            print(line)
        number = 0
        for line in differences(one, other, names, progress=everything):
            number += 1
            print(line, flush=True)
        what = "states" if everything else f"{len(names):,} tensors"
        print(
            f"the {what} differ in {number:,} places"
            if number
            else f"the {what} are equal, by the digests in their manifests"
        )
    return 1 if number else 0


def _reshard(arguments: argparse.Namespace) -> int:
    from rung.recipes.reshard import ranks_to_start, reshard

    source, destination, overrides = arguments.source, arguments.destination, arguments.overrides
    if number := ranks_to_start(source, destination, overrides):
        from rung.cli.launch import run_local

        flags = ["--model-only"] if arguments.model_only else []
        run_local(number, ["reshard", source, destination, *overrides, *flags], module="rung.ckpt")
    for line in reshard(source, destination, overrides, model_only=arguments.model_only):
        print(line)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from rung.recipes.convert import export_checkpoint

    for line in export_checkpoint(
        arguments.source,
        arguments.directory,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        tokenizer=arguments.tokenizer,
        eos_id=arguments.eos_id,
    ):
        print(line)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from rung.recipes.convert import import_huggingface

    for line in import_huggingface(
        arguments.directory, arguments.destination, dtype=arguments.dtype, fused_qkv=arguments.fused_qkv
    ):
        print(line)
    return 0
