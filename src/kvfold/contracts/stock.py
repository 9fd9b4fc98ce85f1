"""transformers' own classes: what they are called for each stock architecture."""

from __future__ import annotations

HEADS = "num_key_value_heads"

PAIRED = {
    **{"t5": "T5", "mt5": "MT5", "umt5": "UMT5", "t5gemma": "T5Gemma"},
    **{"bart": "Bart", "mbart": "MBart", "plbart": "PLBart", "m2m_100": "M2M100", "marian": "Marian"},
    **{"pegasus": "Pegasus", "blenderbot": "Blenderbot", "blenderbot-small": "BlenderbotSmall", "whisper": "Whisper"},
}
STEMS = {
    **{"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "olmo2": "Olmo2"},
    **{"phi": "Phi", "phi3": "Phi3", "gpt_neox": "GPTNeoX", "gptj": "GPTJ", "codegen": "CodeGen", "falcon": "Falcon"},
    **{"gpt2": "GPT2", "gpt_bigcode": "GPTBigCode", "opt": "OPT"},
    **{"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe", "gpt_oss": "GptOss"},
    **{"glm4_moe": "Glm4Moe", "granitemoe": "GraniteMoe", "olmo3": "Olmo3", "exaone4": "Exaone4"},
    **{"gemma2": "Gemma2", "gemma3_text": "Gemma3Text", "gemma3": "Gemma3", "stablelm": "StableLm"},
    **{"gemma": "Gemma", "granite": "Granite", "starcoder2": "Starcoder2", "smollm3": "SmolLM3", "olmo": "Olmo"},
    **{"ministral": "Ministral", "ministral3": "Ministral3", "seed_oss": "SeedOss", "arcee": "Arcee"},
    **{"internlm3": "Llama", "ernie4_5": "Ernie4_5", "helium": "Helium", "glm": "Glm", "glm4": "Glm4"},
    **{"cohere": "Cohere", "cohere2": "Cohere2", "deepseek_v3": "DeepseekV3"},
    **PAIRED,
}
"""Stock model types, and the first part of the names of transformers' classes for them."""

_ODD = {
    ("gemma3_text", "ForCausalLM"): "Gemma3ForCausalLM",
    ("gpt2", "ForCausalLM"): "GPT2LMHeadModel",
    ("gemma3", "ForCausalLM"): "Gemma3ForConditionalGeneration",
    ("marian", "ForConditionalGeneration"): "MarianMTModel",
}


def stock_class(stock: str, end: str) -> str:
    """The name of transformers' class for a stock architecture, such as its `Config`, `Model` or `ForCausalLM`."""
    return _ODD.get((stock, end), f"{STEMS[stock]}{end}")
