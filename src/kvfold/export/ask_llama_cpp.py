"""Greedy answers of llama.cpp. `kvfold.export.engine_process` also sends this file to a Python without kvfold."""

from __future__ import annotations

from typing import Any


def load(file: str, context: int, threads: int, *, flash_attention: bool = False) -> Any:
    """A GGUF in llama.cpp, with its cache in float32."""
    import llama_cpp

    return llama_cpp.Llama(
        file,
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        flash_attn=flash_attention,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )


def greedy(engine: Any, prompt: list[int], count: int) -> tuple[list[int], list[Any]]:
    """The tokens that continue a prompt, and the logits `(V,)` that chose each."""
    engine.reset()
    engine.eval(prompt)
    tokens: list[int] = []
    rows: list[Any] = []
    for _ in range(count):
        rows.append(engine.scores[engine.n_tokens - 1].copy())
        tokens.append(int(rows[-1].argmax()))
        if len(tokens) < count:
            engine.eval(tokens[-1:])
    return tokens, rows


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to a question of `kvfold.export.engine_process`."""
    import llama_cpp

    prompts, count = question["prompts"], question["new_tokens"]
    engine = load(question["model"], len(prompts[0]) + count, question["threads"])
    answers, logits = [], []
    for prompt in prompts:
        tokens, rows = greedy(engine, prompt, count)
        answers.append(tokens)
        best = [row.argsort()[-question["top"] :] for row in rows]
        logits.append([[[int(n), float(row[n])] for n in each] for row, each in zip(rows, best, strict=True)])
    engine.close()
    return {"version": f"llama-cpp-python {llama_cpp.__version__}", "answers": answers, "logits": logits}
