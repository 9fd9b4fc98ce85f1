"""The plug-in of vLLM (entry point `vllm.general_plugins`): students whose layers differ in their heads, or share them.

vLLM's backend for transformers' classes reads `per_layer_config` and allocates the cache of each layer by it. This
module registers kvfold's classes with it, and says which layers share. Tested with vLLM 0.32 and transformers 5.19.
"""

from __future__ import annotations

from kvfold.contracts.runtimes import IN_VLLM, LAYERS


def register() -> None:
    """Register kvfold's model types with transformers, and their architectures with vLLM; may be called twice."""
    from vllm import ModelRegistry

    import kvfold.hf  # noqa: F401  registers the classes with transformers

    for stock in sorted(IN_VLLM):
        ModelRegistry.register_model(LAYERS.architecture(stock, "ForCausalLM"), "kvfold.hf.vllm_model:Decoder")
