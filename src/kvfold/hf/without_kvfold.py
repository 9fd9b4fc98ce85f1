"""Ask a self-contained checkpoint in a process that has no kvfold: `python -P without_kvfold.py QUESTION ANSWER`.

A script, run by the export and imported by nobody. QUESTION is a JSON file, ANSWER the .npz that it writes: greedy
`answers` (B, T), and `logits0`, `logits1`, ... (T, V) of each text, of an encoder-decoder at each token of its answer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.modules["kvfold"] = None  # type: ignore[assignment]  # to import it is an error, as where it is not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


def main(question: Path, answer: Path) -> None:
    """Load the checkpoint with its own code and write what it says."""
    asked = json.loads(question.read_text(encoding="utf-8"))
    auto: Any = getattr(transformers, asked["auto"])
    model = auto.from_pretrained(asked["folder"], trust_remote_code=True, dtype=torch.float32).eval()
    prompts_BT = torch.tensor(asked["prompts"])
    with torch.no_grad():
        said_BT = model.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            max_new_tokens=asked["new_tokens"],
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        before = 1 if asked["paired"] else prompts_BT.shape[1]
        answers_BT = said_BT[:, before:]
        logits = {}
        for row, text in enumerate(asked["texts"]):
            given = {"input_ids": torch.tensor([text])}
            if asked["paired"]:
                given = {"input_ids": prompts_BT[row : row + 1], "decoder_input_ids": said_BT[row : row + 1, :-1]}
            logits[f"logits{row}"] = model(**given).logits[0].numpy()
    np.savez(answer, answers=answers_BT.numpy(), **logits)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
