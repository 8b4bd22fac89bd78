"""``rung sample``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Continue a prompt with the weights of a finished run, or of any Hugging Face folder that Rung can read."""
    parser = argparse.ArgumentParser(prog="rung sample", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path, metavar="RUN_DIR", help="a run's folder or a Hugging Face folder")
    parser.add_argument(
        "--prompt", default="", help="text to continue; - reads standard input; default: a new document"
    )
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate at most (default 128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens (default 0: all)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="keep the likeliest tokens that hold p (default 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default 0)")
    parser.add_argument("--samples", type=int, default=1, help="how many continuations (default 1)")
    arguments = parser.parse_args(argv)
    from rung.recipes.inspect import sample_texts

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    texts = sample_texts(
        arguments.model,
        prompt,
        samples=arguments.samples,
        max_new_tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    for index, text in enumerate(texts):
        if arguments.samples > 1:
            print(f"--- sample {index + 1} of {arguments.samples}")
        print(prompt + text)
    return 0
