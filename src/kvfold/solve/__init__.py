"""Closed forms: the mathematics of conversions, in float64, without models or files.

The choices that they offer are named here, because a plan reads the settings of a method without loading torch.
"""

from typing import Literal

Merge = Literal["fit", "align", "align-norm"]
Search = Literal["elite", "contribution", "uniform"]
Metric = Literal["outputs", "inputs", "weights"]
Factor = Literal["joint", "separate"]
