"""``python -m rung.ckpt`` is ``rung ckpt``: the form that torchrun and srun start."""

import sys

from rung.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit(["ckpt", *sys.argv[1:]])
