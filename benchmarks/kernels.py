"""What several benchmarks of attention kernels share: their flags, and multi-head attention to compare with."""

from __future__ import annotations

import argparse

from torch import Tensor


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The flags of a benchmark of kernels, with its default number of rounds."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="small sizes: a trial of the benchmark, not a result")
    made.add_argument("--rounds", type=int, default=rounds, help="turns of every variant (default: %(default)s)")
    made.add_argument("--results", default="results", help="folder of the record")
    made.add_argument("--note", default="", help="what else ran on the machine")
    return made


def matmul(q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor) -> Tensor:
    """Multi-head attention as two matrix products with the softmax between them."""
    return ((q_BHTE * q_BHTE.shape[-1] ** -0.5) @ k_BHSE.mT).softmax(-1) @ v_BHSE
