"""Every method's formula, in dense float64, written from the paper."""
