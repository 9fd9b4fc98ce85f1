"""Losses of training: cross-entropy and KL to a teacher, chunked over tokens, and the distance of attention outputs.

The losses on the next token are computed from hidden states. For each chunk of tokens, the logits of student and
teacher are computed, then the loss and its gradient by the logits; only the gradients by the hidden states and by the
weight of the head are kept. The logits of all tokens are never in memory, and nothing is computed twice.

With student logits `z_V`, teacher logits `t_V`, `p = softmax(t / c)`, `q = softmax(z / c)` at temperature `c`:

    CE = -log softmax(z)[target]                 dCE/dz = softmax(z) - onehot(target)
    KL = c^2 sum_V p (log p - log q)             dKL/dz = c (q - p)       (Hinton et al. 2015, arXiv 1503.02531)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvfold import hf, ranks
from kvfold.contracts.runtimes import stock_type
from kvfold.predict.training_memory import chunk_tokens
from kvfold.text.pairs import UNSEEN, Pairs, start_id

ENCODED = ("key_value_states", "encoder_hidden_states")  # names of the encoder's output in cross-attentions


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: fp32, or a wider dtype itself."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Head:
    """The output head: logits `z_NV = h_ND w_VD^T (+ b_V)`, then `c tanh(z / c)` if there is a cap."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The output head of a transformers model."""
        layer, config = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
        bias = getattr(model, "final_logits_bias", layer.bias)  # (1, V) in BART and those made from it
        bias_V = None if bias is None else bias.view(-1)
        return cls(layer.weight, bias_V, getattr(config, "final_logit_softcapping", None))

    def logits(self, h_ND: Tensor) -> Tensor:
        """Logits in fp32 or wider, multiplied in the dtype of the hidden states."""
        bias = None if self.bias is None else self.bias.to(h_ND.dtype)
        z_NV = functional.linear(h_ND, self.weight.to(h_ND.dtype), bias)
        z_NV = z_NV.to(_wide(z_NV.dtype))
        return z_NV if self.softcap is None else self.softcap * torch.tanh(z_NV / self.softcap)

    def to(self, dtype: torch.dtype) -> Head:
        """The same head with its weight in this dtype."""
        return replace(self, weight=self.weight.to(dtype))


def parted(batch: Tensor | Pairs) -> tuple[Tensor | Pairs, Tensor, Tensor | None]:
    """The model's input, its targets `target_BT`, and where they count (None: everywhere).

    A batch of ids is one token wider than input and targets.
    """
    if isinstance(batch, Tensor):
        return batch[:, :-1], batch[:, 1:], None
    counts_BT = batch.target_BT != UNSEEN
    return batch, batch.target_BT, None if bool(counts_BT.all()) else counts_BT


def hidden_states(model: Any, batch: Tensor | Pairs) -> Tensor:
    """The input of the output head, `h_BTD`, for ids or pairs."""
    if isinstance(batch, Tensor):
        h_BTD = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
    else:
        config = model.config
        read_BSD, seen_BS = hf.encoded(model, batch.read(model.dtype))
        masked = {} if seen_BS is None else {"encoder_attention_mask": seen_BS}
        h_BTD = model.get_decoder()(
            input_ids=batch.shifted(start_id(config)),
            encoder_hidden_states=read_BSD,
            **masked,
            use_cache=False,
        ).last_hidden_state
        if getattr(config, "scale_decoder_outputs", stock_type({"model_type": config.model_type}) == "umt5"):
            h_BTD = h_BTD * config.d_model**-0.5
    assert isinstance(h_BTD, Tensor)
    return h_BTD


def token_losses(
    h_BTD: Tensor,
    head: Head,
    target_BT: Tensor,
    weights: Mapping[str, float],
    *,
    teacher: tuple[Tensor, Head] | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    targets: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of `ce` and `kl` with a gradient, and each by name without one; nats per token.

    `kl` needs the `teacher`: its hidden states `(B, T, D')` and head. `chunk` is in tokens. `targets` is the number of
    tokens by which sums are divided, by default theirs. Products are in the dtype of autocast if that is on, sums in
    fp32.
    """
    if weights.get("kl") and teacher is None:
        raise ValueError("KL needs a teacher")
    dtype = torch.get_autocast_dtype(h_BTD.device.type) if torch.is_autocast_enabled(h_BTD.device.type) else h_BTD.dtype
    h_ND = h_BTD.flatten(0, -2).to(dtype)
    vocabulary = head.weight.shape[0]
    settings = _Settings(
        ce=weights.get("ce", 0.0),
        kl=weights.get("kl", 0.0),
        temperature=temperature,
        chunk=chunk or chunk_tokens(vocabulary),
        teacher=None if teacher is None else (teacher[0].detach().flatten(0, -2).to(dtype), teacher[1]),
        softcap=head.softcap,
        targets=targets or h_ND.shape[0],
    )
    total, ce, kl = _TokenLosses.apply(  # type: ignore[no-untyped-call]
        h_ND, head.weight, head.bias, target_BT.flatten(), settings
    )
    named = {name: value for name, value in (("ce", ce), ("kl", kl)) if weights.get(name)}
    return total, named


@dataclass(frozen=True)
class _Settings:
    ce: float
    kl: float
    temperature: float
    chunk: int
    teacher: tuple[Tensor, Head] | None
    softcap: float | None
    targets: float


class _TokenLosses(torch.autograd.Function):
    """Losses and gradients in one pass over chunks of tokens."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_h, wants_w, wants_b = ctx.needs_input_grad[:3]
        head = Head(weight_VD, bias_V, settings.softcap).to(h_ND.dtype)
        teacher = settings.teacher
        if teacher is not None:
            teacher = (teacher[0], teacher[1].to(h_ND.dtype))
        ce = kl = h_ND.new_zeros((), dtype=_wide(h_ND.dtype))
        grad_h = torch.empty_like(h_ND) if wants_h else None
        grad_w = torch.zeros_like(weight_VD, dtype=_wide(weight_VD.dtype)) if wants_w else None
        grad_b = torch.zeros_like(bias_V, dtype=_wide(bias_V.dtype)) if wants_b and bias_V is not None else None
        for start in range(0, h_ND.shape[0], settings.chunk):
            rows = slice(start, start + settings.chunk)
            z_NV = head.logits(h_ND[rows])
            t_NV = None if teacher is None or not settings.kl else teacher[1].logits(teacher[0][rows])
            chunk_ce, chunk_kl, grad_NV = _chunk(z_NV, t_NV, target_N[rows], settings)
            if settings.softcap is not None:
                grad_NV.mul_(1 - (z_NV / settings.softcap).square())  # the derivative of the cap at capped z
            ce, kl = ce + chunk_ce, kl + chunk_kl
            grad_NV = grad_NV.div_(settings.targets).to(h_ND.dtype)
            if grad_h is not None:
                torch.mm(grad_NV, head.weight, out=grad_h[rows])
            if grad_w is not None:
                grad_w += grad_NV.T @ h_ND[rows]
            if grad_b is not None:
                grad_b += grad_NV.sum(0)
        ce, kl = ce / settings.targets, kl / settings.targets
        ctx.save_for_backward(grad_h, grad_w, grad_b)
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(ce, kl)
        return settings.ce * ce + settings.kl * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_w, grad_b = ctx.saved_tensors
        scale, (weight_dtype, bias_dtype) = grads[0], ctx.dtypes
        return (
            None if grad_h is None else grad_h * scale.to(grad_h.dtype),
            None if grad_w is None else (grad_w * scale).to(weight_dtype),
            None if grad_b is None else (grad_b * scale).to(bias_dtype),
            None,
            None,
        )


def _chunk(z_NV: Tensor, t_NV: Tensor | None, target_N: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of CE and KL over a chunk, and the gradient of their weighted sum by the student's logits."""
    ce = kl = z_NV.new_zeros(())
    grad_NV: Tensor | None = None
    if settings.ce or t_NV is None:
        logq_NV = torch.log_softmax(z_NV, -1)
        ce = -logq_NV.gather(1, target_N[:, None]).sum()
        grad_NV = logq_NV.exp_()
        grad_NV.scatter_add_(1, target_N[:, None], grad_NV.new_full((len(target_N), 1), -1.0))
        grad_NV.mul_(settings.ce)
    if t_NV is not None:
        c = settings.temperature
        logp_NV, logq_NV = torch.log_softmax(t_NV / c, -1), torch.log_softmax(z_NV / c, -1)
        p_NV = logp_NV.exp()
        kl = c * c * (p_NV * logp_NV.sub_(logq_NV)).sum()
        slope_NV = logq_NV.exp_().sub_(p_NV).mul_(settings.kl * c)
        grad_NV = slope_NV if grad_NV is None else grad_NV.add_(slope_NV)
    assert grad_NV is not None
    return ce, kl, grad_NV


def attention_matching(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """The mean over attentions of `||s - t||^2 / ||t||^2`, for outputs `(B, T, D)` by module path.

    Normalised, every layer has the same weight (Bercovich et al. 2024, Puzzle, arXiv 2411.19146, section 3.2: the loss
    of block-wise local distillation). `||t||^2` is the mean over all ranks.
    """
    apart = [(student[path].float() - target.float()).square().mean() for path, target in teacher.items()]
    sizes = torch.stack([target.float().square().mean() for target in teacher.values()])
    return (torch.stack(apart) / (ranks.sum_in_order(sizes) / ranks.current().world)).mean()


@contextmanager
def same_inputs(student: nn.Module, teacher: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """A context in which the student's attentions at these paths read what the teacher's read in its last forward.

    For a cross-attention, these are the hidden states and the encoder's output. Each attention is then trained by
    itself, on correct inputs from the first step (block-wise local distillation, Puzzle, section 3.2). The output of
    the student means nothing meanwhile.
    """
    read: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            read[path] = hidden_BTD, {key: kwargs[key] for key in ENCODED if key in kwargs}

        return hook

    def give(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden_BTD, encoded = read[path]
            if "hidden_states" in kwargs:
                return args, {**kwargs, **encoded, "hidden_states": hidden_BTD}
            return (hidden_BTD, *args[1:]), {**kwargs, **encoded}

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(make(path), with_kwargs=True)
        for model, make in ((teacher, keep), (student, give))
        for path in paths
    ]
    with hf.hooked(*handles):
        yield
