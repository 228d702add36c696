"""Merging adapters by orthogonal Monte Carlo dropout, measured (arXiv 2510.03262)."""
