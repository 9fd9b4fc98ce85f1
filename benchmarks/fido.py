"""Decoding of a reader of 40 passages of 256 tokens: cross-attention in fewer layers, and one key/value head.

A decoder of T5-XL's shape (24 layers, 32 heads of 64, width 2,048, MLP 5,120) with random weights, through
transformers, at the middle of an output of 32 tokens; 1 and 8 questions, bfloat16. All variants take turns; medians
over the rounds, each with the faster of its kernels:

    FiD               cross-attention of 32 key/value heads in every layer
    layer-sparse      in every sixth layer alone (`fido`)
    multi-query       in every layer, with one key/value head, as in self-attention (`gqa`)
    both              FiDO without asymmetric scaling

Six layers run, of which one keeps cross-attention, and stand for 24: their time and their caches count four times. The
output matrix runs once. `decode_ms` is the time of a step, and `roofline_ms` what this machine's measured bandwidth and
arithmetic allow. The cache of the six layers is measured and must be the predicted one to the byte.

Predicted, before it was run whole. A step of FiD reads 2.8 GB of weights, and 2.0 GB of cache for one question, 16.1 GB
for eight. By bytes, both are 2.3 times faster than FiD for one question, whose weights remain, and 8.6 times for eight;
layer-sparse alone 1.7 and 3.6, multi-query alone 1.9 and 6.4. A CPU reads faster than it multiplies where 32 heads
share what is read: rather 6 than 8.6. Measured: 2.1 and 5.4; layer-sparse 1.6 and 3.1, multi-query 1.6 and 3.1.

    python benchmarks/fido.py [--quick] [--rounds 5] [--results results] [--note TEXT]
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from kernels import decoding_step, parser, random_decoder
from kvfold import hf
from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.site import DTYPE_BYTES, Shape
from kvfold.disk import record
from kvfold.evaluate.timing import interleave
from kvfold.families import all_families
from kvfold.machine import best_device
from kvfold.predict.roofline import decode_step, hardware

XL = {
    "model": {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32, "vocab_size": 32128},
    "passages": 40,
    "passage_tokens": 256,
    "output": 32,
    "batch": (1, 8),
}
QUICK = {**XL, "model": {"d_model": 128, "d_kv": 16, "d_ff": 256, "num_heads": 8, "vocab_size": 512}, "batch": (2,)}
LAYERS, EVERY, DTYPE = 24, 6, "bfloat16"
ONE_HEAD = {"num_key_value_heads": 1, "cross_num_key_value_heads": 1}
SPARSE = {"cross_attention_layers": [EVERY - 1]}
VARIANTS: dict[str, dict[str, Any]] = {
    "FiD": {},
    "layer-sparse": SPARSE,
    "multi-query": ONE_HEAD,
    "both": {**SPARSE, **ONE_HEAD},
}
KERNELS = (hf.ATTENTION, "sdpa")
AGREE = 4e-2


class Reader:
    """One variant: `EVERY` decoder layers and the output matrix; weights of one shape are shared with the first."""

    def __init__(self, sizes: dict[str, Any], name: str, first: Reader | None) -> None:
        self.sizes, self.name = sizes, name
        ours = {"model_type": "kvfold_t5", "architectures": ["KvfoldT5ForConditionalGeneration"]}
        layers = {"num_layers": 1, "num_decoder_layers": EVERY}
        config = {**all_families()["t5"].tiny(), **sizes["model"], **layers, **ours, **VARIANTS[name]}
        self.shape: Shape = all_families()["t5"].shape(config)
        self.decoder = random_decoder(config, DTYPE, first and first.decoder)
        for block in self.decoder.block:  # so that no query looks at one token alone
            for branch in block.layer[:-1]:
                for norm in branch.layer_norm.parameters():  # of a removed branch none
                    norm.data.fill_(0.1)

    @property
    def given(self) -> int:
        """Tokens of all passages."""
        return int(self.sizes["passages"] * self.sizes["passage_tokens"])

    @property
    def written(self) -> int:
        """Tokens of the output so far."""
        return int(self.sizes["output"] // 2)

    def fill(self, batch: int) -> None:
        """Caches of random numbers: half of the output, all passages."""
        draw = torch.Generator().manual_seed(1)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.bfloat16).to(best_device())

        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for site in self.shape.cached_sites:
            attention, crosses = self.shape.sites[site], site.kind == "cross"
            size = (batch, attention.num_key_value_heads, self.given if crosses else self.written, attention.head_dim)
            part = self.cache.cross_attention_cache if crosses else self.cache.self_attention_cache
            part.update(random(*size), random(*size), site.layer)
            if crosses:
                self.cache.is_updated[site.layer] = True
        self.token = random(batch, 1, self.sizes["model"]["d_model"])
        self.encoded = torch.empty(batch, self.given, self.sizes["model"]["d_model"], device="meta")  # for its length

    def step(self, kernel: str) -> Callable[[], Tensor]:
        """Make ready to decode a token, each time the same."""
        return decoding_step(self.decoder, kernel, self.token, self.encoded, self.cache)

    def head(self) -> Callable[[], Tensor]:
        """The product with the output matrix, here the embedding."""
        return lambda: self.token @ self.decoder.embed_tokens.weight.T

    def bytes(self, batch: int) -> int:
        """Bytes of the caches of all layers, four times those that are measured here."""
        spec, item = grouped_cache(self.shape), DTYPE_BYTES[DTYPE]
        predicted = spec.bytes(self.written, batch=batch, itemsize=item, encoder_tokens=self.given)
        assert hf.live_cache_bytes(self.cache) == predicted, self.name
        return predicted * LAYERS // EVERY

    def roofline(self, batch: int) -> float:
        """Seconds of a step of these layers by what this machine was measured to do."""
        return decode_step(
            self.shape,
            grouped_cache(self.shape),
            context=self.written,
            batch=batch,
            dtype=DTYPE,
            tied=False,
            encoder_context=self.given,
        ).seconds(hardware("local"), DTYPE)


def measure(sizes: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Rows of every variant and number of questions."""
    readers: list[Reader] = []
    for name in VARIANTS:
        readers.append(Reader(sizes, name, readers[0] if readers else None))
    rows = []
    for batch in sizes["batch"]:
        works: dict[tuple[str, str], Callable[[], Callable[[], object]]] = {}
        for reader in readers:
            reader.fill(batch)
            with torch.inference_mode():
                one, other = (reader.step(kernel)().float() for kernel in KERNELS)
            assert (one - other).norm() < AGREE * other.norm(), reader.name
            works |= {(reader.name, kernel): partial(reader.step, kernel) for kernel in KERNELS}
        works["head", ""] = readers[0].head
        with torch.inference_mode():
            seconds = {key: statistics.median(times) for key, times in interleave(works, rounds).items()}
        for reader in readers:
            times = {kernel: seconds[reader.name, kernel] for kernel in KERNELS}
            kernel = min(times, key=lambda each, found=times: found[each])
            row = {"batch": batch, "variant": reader.name, "kernel": kernel, "cache_bytes": reader.bytes(batch)}
            row["decode_ms"] = 1e3 * (times[kernel] * LAYERS / EVERY + seconds["head", ""])
            row["roofline_ms"] = 1e3 * reader.roofline(batch) * LAYERS / EVERY
            rows.append(row)
            print(
                f"x{batch:<3} {reader.name:14} {row['decode_ms']:9.1f} ms a step ({kernel}), "
                f"roofline {row['roofline_ms']:8.1f} ms, cache {row['cache_bytes'] / 1e9:.3f} GB",
                flush=True,
            )
        for reader in readers:
            del reader.cache
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By number of questions: how much faster than FiD each variant decodes, and by how much less it caches."""
    found: dict[str, Any] = {}
    for batch in dict.fromkeys(row["batch"] for row in rows):
        mine = [row for row in rows if row["batch"] == batch]
        found[str(batch)] = {
            row["variant"]: {
                name: mine[0][key] / row[key]
                for name, key in (("decode", "decode_ms"), ("roofline", "roofline_ms"), ("bytes", "cache_bytes"))
            }
            for row in mine
        }
    return found


def main() -> None:
    flags = parser(__doc__, rounds=5)
    given = flags.parse_args()
    sizes, start = QUICK if given.quick else XL, time.perf_counter()
    rows = measure(sizes, given.rounds)
    metrics = {"rows": rows, "faster": summarise(rows), "load_average": os.getloadavg()[0]}
    settings = {**sizes, "layers": LAYERS, "run": EVERY, "rounds": given.rounds, "quick": given.quick}
    wall = time.perf_counter() - start
    made = record.make("benchmark", "fido", {**settings, "note": given.note}, metrics, seed=0, wall_seconds=wall)
    print(record.write(made, given.results))


if __name__ == "__main__":
    main()
