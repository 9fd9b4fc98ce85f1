"""Greedy answers of vLLM. `kvfold.export.engine_process` sends this file to the Python that has vLLM."""

from __future__ import annotations

from typing import Any


def allocated(worker: Any) -> int:
    """Bytes of a worker's cache; tensors that share their memory count once."""
    caches = worker.model_runner.kv_caches
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in caches}
    return sum(storages.values())


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to a question of `kvfold.export.engine_process`."""
    import importlib.metadata

    import vllm

    prompts, count = question["prompts"], question["new_tokens"]
    engine = vllm.LLM(
        model=question["model"],
        dtype=question["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=len(prompts[0]) + count,
        max_num_seqs=len(prompts),
        max_logprobs=question["top"],
        logprobs_mode="raw_logits",
        **question["options"],
    )
    how = vllm.SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, logprobs=question["top"], detokenize=False
    )
    made = [each.outputs[0] for each in engine.generate([{"prompt_token_ids": each} for each in prompts], how)]
    cache = engine.llm_engine.vllm_config.cache_config
    tokens = cache.num_gpu_blocks * cache.block_size
    return {
        "version": f"vLLM {vllm.__version__}, transformers {importlib.metadata.version('transformers')}",
        "answers": [list(each.token_ids) for each in made],
        "logits": [[[[n, stated.logprob] for n, stated in step.items()] for step in each.logprobs] for each in made],
        "cache_bytes_per_token": sum(engine.collective_rpc(allocated)) / tokens,
    }
