"""Naive LoRA summation (arXiv 2508.11985): adapters of a language model added up."""
