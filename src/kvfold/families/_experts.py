"""Experts: MLPs of which a router chooses a few for each token.

Their tensors are copied as they are: on disk one for each expert, in transformers' models one for all of a layer. A
repair takes q and o alone, because down is not one map of what the residual stream lacks.
"""

from __future__ import annotations

from kvfold.contracts.config import WHOLES, WIDTH, YES_NO, Fields, Rules, decimal, whole
from kvfold.contracts.family import Body, Json
from kvfold.contracts.stacked import Stacked

EXPERTS = whole(1, 1 << 16)
NAMES = ("num_experts", "num_local_experts", "n_routed_experts")
"""Of the number of experts: transformers reads and writes more than one of them for most architectures."""

BODY = Body(
    stacked={
        "mlp.experts.gate_up_proj": Stacked(
            ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight")
        ),
        "mlp.experts.down_proj": Stacked(("mlp.experts.{expert}.down_proj.weight",)),
    }
)

RULES: Rules = {
    "num_experts_per_tok": EXPERTS,
    "norm_topk_prob": YES_NO,
    "output_router_logits": YES_NO,
    "router_aux_loss_coef": decimal(0, 1e6),
}
"""The fields of every architecture with experts."""

SPARSE: Rules = {
    **RULES,
    "moe_intermediate_size": WIDTH,
    "decoder_sparse_step": whole(1, 1 << 20),
    "mlp_only_layers": WHOLES.or_null,
}
"""Those of the Qwens, some of whose layers may have no experts."""


def experts_of(config: Json, default: int) -> int:
    """The number of experts of a layer, by any of its names."""
    return next((int(config[name]) for name in NAMES if name in config), default)


def check_experts(fields: Fields, default: int, chosen: int) -> None:
    """Refuse names that disagree, and more experts for a token than there are, with UnsupportedModel.

    The defaults are those of the architecture, for all experts and for the chosen ones.
    """
    fields.check(dict.fromkeys(NAMES, EXPERTS))
    stated = {name: fields.config[name] for name in NAMES if name in fields.config}
    if len(set(stated.values())) > 1:
        raise fields.refusal(
            f"{' and '.join(stated)} are names of one number and differ", got=str(stated), next="remove all but one"
        )
    most, few = experts_of(fields.config, default), fields.config.get("num_experts_per_tok", chosen)
    if few > most:
        raise fields.refusal("num_experts_per_tok is more than there are", got=few, allowed=f"1 to {most}")


def routed(config: Json, experts: int, inner: int) -> int:
    """The parameters of a layer's experts, gated MLPs of this inner width, and of their router."""
    hidden = int(config["hidden_size"])
    return experts * 3 * hidden * inner + experts * hidden


def sparse(config: Json, experts: int, inner: int, shared: int = 0) -> list[int]:
    """The parameters of the MLP of each layer of a Qwen; `shared` are those of a layer with experts besides them."""
    dense = 3 * config["hidden_size"] * config["intermediate_size"]
    step, alone = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return [
        dense if layer in alone or (layer + 1) % step else routed(config, experts, inner) + shared
        for layer in range(config["num_hidden_layers"])
    ]
