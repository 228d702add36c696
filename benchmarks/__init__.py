"""Suites, evaluation, reports, speed comparisons and the command line."""
