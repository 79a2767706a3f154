"""`mmpt-data VERB ...`: offline programs on data sets. `mmpt-data VERB --help` says what each takes."""

import argparse
import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "pack": "write images and a table of captions as tar shards",
    "index": "scan tar shards, refuse damaged ones, and write the manifest that training reads",
    "verify": "read every byte of every shard, decode every image, and report what is bad",
    "verify-epoch": "run the ranks of a training dry and prove that they deliver each sample once",
    "tokenizer": "train a tokenizer on the captions of a data set",
    "regions": "add regions to every picture of a data set: a detector's, or a grid over an encoder",
    "regions-from-lmdb": "turn the image features that UNITER published into files that pack takes",
    "scenes": "generate a data set of compositional scenes",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb. Exit status 0; 2 for a wrong command line, 1 for anything else that fails, with one line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="mmpt-data", description=__doc__)
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in VERBS.items():
        sub = parsers.add_parser(verb, help=summary, description=summary)
        if argv[:1] == [verb]:  # only the verb that is named is imported
            module = importlib.import_module(f"data_tools.{verb.replace('-', '_')}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()
        sys.exit(f"mmpt-data: error: {reason[0] if reason else type(error).__name__}")


if __name__ == "__main__":
    main()
