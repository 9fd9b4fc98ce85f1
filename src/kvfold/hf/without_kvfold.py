"""Runs a self-contained checkpoint in a process without kvfold: `python -P without_kvfold.py QUESTION ANSWER`.

The export runs this script; nothing imports it. QUESTION is a JSON file, and ANSWER the .npz that the script writes:
greedy `answers` (B, T), and `logits0`, `logits1`, ... (T, V) of each text, or of each answer of an encoder-decoder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.modules["kvfold"] = None  # type: ignore[assignment]  # importing it fails, as if it were not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


def main(question: Path, answer: Path) -> None:
    """Load the checkpoint with its own code, and write its answers and logits."""
    task = json.loads(question.read_text(encoding="utf-8"))
    auto: Any = getattr(transformers, task["auto"])
    model = auto.from_pretrained(task["folder"], trust_remote_code=True, dtype=torch.float32).eval()
    prompts_BT = torch.tensor(task["prompts"])
    with torch.no_grad():
        answered_BT = model.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            max_new_tokens=task["new_tokens"],
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        before = 1 if task["paired"] else prompts_BT.shape[1]
        answers_BT = answered_BT[:, before:]
        logits = {}
        for row, text in enumerate(task["texts"]):
            given = {"input_ids": torch.tensor([text])}
            if task["paired"]:
                given = {"input_ids": prompts_BT[row : row + 1], "decoder_input_ids": answered_BT[row : row + 1, :-1]}
            logits[f"logits{row}"] = model(**given).logits[0].numpy()
    np.savez(answer, answers=answers_BT.numpy(), **logits)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
