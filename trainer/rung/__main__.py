"""``python -m rung`` is ``rung``."""

import sys

from rung.cli import run_and_exit

run_and_exit(sys.argv[1:])
