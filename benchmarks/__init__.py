"""Suites, evaluation, reports, speed comparisons and the command line."""

import os

# Read when torch loads: idle threads sleep instead of spinning. Where another process has one of
# the cores, small models then run about twice as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
