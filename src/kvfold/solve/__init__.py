"""Closed forms: the mathematics of conversions, in float64, without models or files."""
