"""Side-by-side measurements against what people use otherwise; run as modules."""
