"""Decoding one layer of a T5-XXL: heads folded in both attentions, and the encoder's output cached for all layers.

One decoder layer of T5.1.1-XXL's shape with random weights, through transformers: 64 heads of 64, width 4,096, MLP
10,240; 512 tokens of input, 8 and 32 sequences, at the middle of 256 output tokens (128 are cached). Float32
and bfloat16. All variants take turns; medians over the rounds, each with the faster of its kernels:

    grouped 64 to 1   number of key/value heads in self- and cross-attention; 64 is multi-head
    latent 4096       cross-attention absorbed from the encoder's output (`crosslatent`), which is exact
    latent 1024, 512  the same from narrower latents; 512 also with 8 heads of self-attention (`+ grouped 8`)

`layer` is the whole layer with its MLP; `caches` is attention over the caches alone, without the layer's weights,
except those that read a latent. The time of a sample is 256 steps of 24 layers over the batch; the encoder and the
output matrix, which no variant changes, are not in it. Beside it stand the paper's seconds per sample, encoder
included, on 8 TPUv4 (arXiv 2305.13245, table 1): 1.51 multi-head, 0.28 with 8 groups, 0.24 with 1.

Predicted, before it was run whole. A step of the layer reads 227M weights and, of 8 sequences, 42M numbers of cache; of
32, 168M. On two cores of a CPU the weights bound the first (0.45 GB and 3.6 GFLOP in bfloat16) and arithmetic the
second. `layer`, 8 and 1 groups over multi-head: 0.85 and 0.85 for 8 sequences, 0.75 and 0.7 for 32, far from the
paper's 0.19 and 0.16: there each chip holds an eighth of the weights. `caches`: 0.2 and 0.1 of multi-head, the
paper's ratios or better. A latent of 4,096 has half the bytes and 64 times the products (4.3 GFLOP for 8 sequences):
`layer` 1.6 to 2.2 of multi-head, `caches` 5 to 10; a latent of 1,024 1.1 and 2; of 512 about 1.0 and 1.0. It holds 48,
192 and 384 times fewer bytes in 24 layers; its place is memory, not speed.

    python benchmarks/encoder_decoder.py [--quick] [--rounds 7] [--results results] [--note TEXT]
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from kernels import decoding_step, matmul, parser, random_decoder
from kvfold import hf
from kvfold.attention.grouped import grouped_attention
from kvfold.attention.latent import absorbed_attention
from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.site import DTYPE_BYTES, Shape
from kvfold.disk import record
from kvfold.evaluate.timing import interleave
from kvfold.families import all_families
from kvfold.machine import best_device
from kvfold.predict.roofline import decode_step, hardware

XXL = {
    "model": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64},
    "groups": (64, 32, 16, 8, 4, 1),
    "latents": ((4096, 64), (1024, 64), (512, 64), (512, 8)),  # width, heads of self-attention
    "input": 512,
    "output": 256,
    "batch": (8, 32),
}
QUICK = {
    "model": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 8},
    "groups": (8, 2, 1),
    "latents": ((512, 8), (64, 2)),
    "input": 64,
    "output": 32,
    "batch": (2,),
}
LAYERS = 24
KERNELS = (hf.ATTENTION, "sdpa")
AGREE = {"float32": 1e-4, "bfloat16": 4e-2}
PAPER = {"64": 1.51, "8": 0.28, "1": 0.24}  # seconds per sample of T5-XXL, by groups


@dataclass(frozen=True)
class Variant:
    """Key/value heads of self-attention and of cross-attention, or the latent that the latter reads."""

    heads: int
    crossed: int
    latent: int | None = None

    @property
    def name(self) -> str:
        """As it is shown."""
        if self.latent is None:
            return f"grouped {self.crossed}"
        return f"latent {self.latent}" + ("" if self.heads == self.crossed else f" + grouped {self.heads}")

    def fields(self) -> dict[str, Any]:
        """The fields of config.json."""
        heads = {"num_key_value_heads": self.heads, "cross_num_key_value_heads": self.crossed}
        return heads | ({} if self.latent is None else {"cross_latent_dim": self.latent})


def variants(sizes: dict[str, Any]) -> list[Variant]:
    """Multi-head first."""
    heads = sizes["model"]["num_heads"]
    folded = [Variant(count, count) for count in sizes["groups"]]
    return folded + [Variant(own, heads, width) for width, own in sizes["latents"]]


class Layer:
    """One variant as a decoder of one layer, whose weights it shares with the first where they are of one shape."""

    def __init__(self, sizes: dict[str, Any], variant: Variant, dtype: str, first: Layer | None) -> None:
        self.sizes, self.variant, self.dtype = sizes, variant, dtype
        one = {"num_layers": 1, "num_decoder_layers": 1, "vocab_size": 8}
        ours = {"model_type": "kvfold_t5", "architectures": ["KvfoldT5ForConditionalGeneration"]}
        config = {**all_families()["t5"].tiny(), **sizes["model"], **one, **ours, **variant.fields()}
        self.shape: Shape = all_families()["t5"].shape(config)
        self.decoder = random_decoder(config, dtype, first and first.decoder)
        self.decoder.block[0].layer[1].layer_norm.weight.data.fill_(0.1)  # so that no query looks at one token alone

    def fill(self, batch: int) -> None:
        """Caches of random numbers: half of the output, all of the input."""
        given, written = self.sizes["input"], self.sizes["output"] // 2
        width, hidden = self.sizes["model"]["d_kv"], self.sizes["model"]["d_model"]
        draw = torch.Generator().manual_seed(1)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw).to(best_device(), getattr(torch, self.dtype))

        config = self.decoder.config
        own_cache = StaticCache(config=config, max_cache_len=written + 1)  # what is reserved beyond would be read too
        self.cache = EncoderDecoderCache(own_cache, DynamicCache(config=config))
        own = [random(batch, self.variant.heads, written, width) for _ in range(2)]
        self.cache.self_attention_cache.update(*own, 0)
        if self.variant.latent is None:
            crossed = [random(batch, self.variant.crossed, given, width) for _ in range(2)]
        else:
            latent = random(batch, 1, given, self.variant.latent)
            crossed = [latent, latent[..., :0]]
        self.cache.cross_attention_cache.update(*crossed, 0)
        self.cache.is_updated[0] = True
        self.held, self.token = (own, crossed), random(batch, 1, hidden)
        self.encoded = torch.empty(batch, given, hidden, device="meta")  # for its length alone: the cache is full

    def step(self, kernel: str) -> Callable[[], Tensor]:
        """Make ready to decode a token, each time the same."""
        return decoding_step(self.decoder, kernel, self.token, self.encoded, self.cache)

    def caches(self, kernel: Callable[..., Tensor]) -> Callable[[], Tensor]:
        """The attention over what is cached, without the layer's weights; `kernel` is that of heads."""
        batch, heads, width = len(self.token), self.sizes["model"]["num_heads"], self.sizes["model"]["d_kv"]
        q_BH1E = self.token.view(batch, 1, heads, -1)[..., :width].transpose(1, 2)
        own, crossed = self.held
        if self.variant.latent is None:
            return lambda: kernel(q_BH1E, *own) + kernel(q_BH1E, *crossed)
        attention, latent = self.decoder.block[0].layer[1].EncDecAttention, crossed[0][:, 0]
        ups = [each.weight.unflatten(0, (heads, width)) for each in (attention.k, attention.v)]
        bias = torch.zeros(1, width, dtype=latent.dtype, device=latent.device)

        def work() -> Tensor:
            return kernel(q_BH1E, *own) + absorbed_attention(q_BH1E, latent[..., :0], latent, *ups, bias, causal=False)

        return work

    def kernels(self) -> dict[str, Callable[..., Tensor]]:
        """Kernels of heads that this variant may use; multi-head also takes a product of matrices."""
        heads = self.sizes["model"]["num_heads"]
        plain = {"sdpa": sdpa, "matmul": matmul} if self.variant.heads == heads else {}
        return {"kvfold": grouped_attention, **plain}

    def bytes(self, batch: int) -> int:
        """Bytes of the whole model's caches at the end of the output: those of all layers, and a latent once."""
        spec, item = grouped_cache(self.shape), DTYPE_BYTES[self.dtype]
        room = self.sizes["output"] // 2 + 1
        live = spec.bytes(room, batch=batch, itemsize=item, encoder_tokens=self.sizes["input"])
        assert hf.live_cache_bytes(self.cache) == live, self.variant
        own = LAYERS * spec.bytes(self.sizes["output"], batch=batch, itemsize=item)
        crossed = spec.bytes(0, batch=batch, itemsize=item, encoder_tokens=self.sizes["input"])
        return own + crossed * (LAYERS if self.variant.latent is None else 1)

    def roofline(self, batch: int) -> float:
        """Seconds of a step of the layer by what this machine was measured to do."""
        step = decode_step(
            self.shape,
            grouped_cache(self.shape),
            context=self.sizes["output"] // 2,
            batch=batch,
            dtype=self.dtype,
            tied=False,
            encoder_context=self.sizes["input"],
        )
        return step.seconds(hardware("local"), self.dtype)


def agree(layer: Layer) -> None:
    """Every kernel of a variant writes the same; a latent is held against keys and values written out."""
    with torch.inference_mode():
        kernels = KERNELS if layer.variant.latent is None else (hf.ATTENTION, "eager")
        if layer.variant.latent is not None and layer.variant.heads != layer.variant.crossed:
            return  # transformers' eager attention of a T5 knows of no groups
        one, other = (layer.step(kernel)().float() for kernel in kernels)
    assert (one - other).norm() < AGREE[layer.dtype] * other.norm(), layer.variant


def measure(sizes: dict[str, Any], dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of every variant and batch."""
    layers: list[Layer] = []
    for variant in variants(sizes):
        layers.append(Layer(sizes, variant, dtype, layers[0] if layers else None))
    rows = []
    for batch in sizes["batch"]:
        works: dict[tuple[str, str, str], Callable[[], Callable[[], object]]] = {}
        for layer in layers:
            layer.fill(batch)
            if batch == min(sizes["batch"]):
                agree(layer)
            name = layer.variant.name
            for kernel in KERNELS if layer.variant.latent is None else KERNELS[:1]:
                works[name, "layer", kernel] = partial(layer.step, kernel)
            for kernel, function in layer.kernels().items():
                works[name, "caches", kernel] = partial(layer.caches, function)
        with torch.inference_mode():
            seconds = interleave(works, rounds)
        for layer in layers:
            row: dict[str, Any] = {"dtype": dtype, "batch": batch, "variant": layer.variant.name}
            for part in ("layer", "caches"):
                medians = {
                    key[2]: statistics.median(times)
                    for key, times in seconds.items()
                    if key[:2] == (layer.variant.name, part)
                }
                row[f"{part}_kernel"] = min(medians, key=lambda kernel, found=medians: found[kernel])
                row[f"{part}_ms"] = 1e3 * min(medians.values())
            row["roofline_ms"] = 1e3 * layer.roofline(batch)
            row["cache_bytes"] = layer.bytes(batch)
            row["s_per_sample"] = row["layer_ms"] / 1e3 * LAYERS * sizes["output"] / batch
            rows.append(row)
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By dtype and batch: every variant over multi-head, in layer, caches, roofline and bytes; and the paper's."""
    found: dict[str, Any] = {"paper over multi-head": {name: each / PAPER["64"] for name, each in PAPER.items()}}
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["dtype"], row["batch"]) == (dtype, batch)]
        found[f"{dtype}, {batch}"] = {
            row["variant"]: {
                name: row[key] / mine[0][key]
                for name, key in (
                    ("layer", "layer_ms"),
                    ("caches", "caches_ms"),
                    ("roofline", "roofline_ms"),
                    ("bytes", "cache_bytes"),
                )
            }
            for row in mine
        }
    return found


def main() -> None:
    flags = parser(__doc__, rounds=7)
    flags.add_argument("--dtype", choices=list(AGREE), action="append", help="one dtype; may be repeated")
    given = flags.parse_args()
    sizes, start, rows = QUICK if given.quick else XXL, time.perf_counter(), []
    for dtype in given.dtype or AGREE:
        rows += measure(sizes, dtype, given.rounds)
        for row in (row for row in rows if row["dtype"] == dtype):
            parts = (f"{part} {row[f'{part}_ms']:9.2f} ms ({row[f'{part}_kernel']})" for part in ("layer", "caches"))
            print(
                f"{dtype:9} x{row['batch']:<3} {row['variant']:24} {'  '.join(parts)}  "
                f"roofline {row['roofline_ms']:8.2f} ms  {row['s_per_sample']:8.3f} s a sample",
                flush=True,
            )
    metrics: dict[str, Any] = {"rows": rows, **summarise(rows), "load_average": os.getloadavg()[0]}
    for name, each in summarise(rows).items():
        for variant, ratios in each.items():
            parts = {"seconds": ratios} if isinstance(ratios, float) else ratios
            print(name, variant, {part: round(ratio, 3) for part, ratio in parts.items()})
    settings = {**sizes, "rounds": given.rounds, "quick": given.quick, "note": given.note}
    wall = time.perf_counter() - start
    made = record.make("benchmark", "encoder-decoder", settings, metrics, seed=0, wall_seconds=wall)
    print(record.write(made, given.results))


if __name__ == "__main__":
    main()
