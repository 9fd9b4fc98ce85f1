"""vLLM's model of a student whose layers share keys and values. Only vLLM imports this file."""

from __future__ import annotations

from typing import Any

from typing_extensions import override
from vllm.model_executor.models.transformers import TransformersForCausalLM

from kvfold.hf.shared_layers import SharedAttention
from kvfold.predict.engines import ONE_GROUPING


class Decoder(TransformersForCausalLM):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """vLLM's backend for transformers' classes, with one pool for each owner of keys and values.

    vLLM's attention of a consumer reads the pool of its owner by itself, so nothing is handed from layer to layer: the
    attentions become stock ones, and those of consumers compute keys and values of zeros, which vLLM does not store.
    """

    @override
    def recursive_replace(self) -> None:
        """Turn the attentions into stock ones, which vLLM recognises, before it replaces their modules."""
        if self.config.value_heads:
            raise ValueError(f"vLLM {ONE_GROUPING}, and this student groups them apart")
        consumers: dict[type, type] = {}
        for attention in self.model.modules():
            if isinstance(attention, SharedAttention):
                self.model._forward_pre_hooks.clear()  # hand out the container
                module: Any = attention
                stock = type(module).__mro__[2]  # the derived class, SharedAttention, the stock class
                module.__class__ = stock
                if module.kv_source_layer != module.layer_idx:  # of a class of its own: vLLM looks at one of each class
                    module.__class__ = consumers.setdefault(stock, type(f"Consuming{stock.__name__}", (stock,), {}))
                    heads = self.config.per_layer_config[module.layer_idx].num_key_value_heads
                    module.k_proj.width = module.v_proj.width = heads * module.head_dim
        super().recursive_replace()

    @override
    def _create_attention_instances(self, prefix: str = "") -> None:
        super()._create_attention_instances(prefix)
        for layer, source in enumerate(self.config.kv_source_layers or ()):
            if source != layer:
                self._attention(layer).kv_sharing_target_layer_name = self._attention(source).layer_name

    def _attention(self, layer: int) -> Any:
        """vLLM's attention of a layer."""
        return self.get_submodule(self.attention_fusers[layer][0]).attn
