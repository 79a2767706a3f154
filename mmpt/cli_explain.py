"""`mmpt explain`: what a run's momentum copy believes of some samples."""

import argparse

from mmpt.evals.explain import Believed, believed_texts, believed_words, check_copy
from mmpt.evals.suite import Rank
from mmpt.methods.method import Method


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run of ALBEF, or one of its checkpoints")
    parser.add_argument("shards", metavar="SHARDS", help="a folder of shards, of which the first samples are shown")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="images and captions to show [4]")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="answers to each question [5]")


def run(rank: Rank, method: Method, parsed: argparse.Namespace) -> None:
    """Print, for each masked word and each image, its place among the copy's answers, and those that come first.

    ValueError for a run without a copy.
    """
    if min(parsed.samples, parsed.top) < 1:
        raise ValueError(f"--samples ({parsed.samples}) and --top ({parsed.top}) are 1 or more")
    copy = check_copy(method)
    caption = ""
    for found in believed_words(rank, copy, parsed.shards, parsed.samples, parsed.top):
        if found.caption != caption:
            caption = found.caption
            print(f"\n{caption}")
        print(line(found))
    print("\nthe texts that the copy puts first for an image, under its own")
    for found in believed_texts(rank, copy, parsed.shards, parsed.samples, parsed.top):
        print(f"{found.caption}\n{line(found)}")


def line(found: Believed) -> str:
    answers = ", ".join(f"{text} {probability:.2f}" for text, probability in found.answers)
    return f"  {found.of:16} place {found.own:<5} {answers}"
