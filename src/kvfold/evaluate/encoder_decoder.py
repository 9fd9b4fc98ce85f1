"""Quality of an encoder-decoder: loss on targets, distance to the teacher, and what it answers, greedily or by beams.

With what a model says and what was asked for, over all pairs, as strings:

    exact_match = mean of [said = asked]
    cer         = sum of edit distances / characters asked for      (insertions count, so it may pass 1)
    bleu        = sacrebleu's corpus BLEU, 0 to 100, tokenised as it does by default
    rouge1, rouge2, rougeL = mean F of rouge-score without stemming, 0 to 100

Edit distance is Levenshtein's: insertions, deletions and substitutions cost 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvfold import hf
from kvfold.evaluate import loss
from kvfold.progress import SILENT, Progress
from kvfold.text.pairs import UNSEEN, Corpus, Ids, PairFile, batched
from kvfold.train import losses

ROUGE = ("rouge1", "rouge2", "rougeL")
KEYED = ("exact_match", "cer", "bleu", *ROUGE)
"""Metrics of answers; each has a value for each number of beams."""


def score(
    models: Mapping[str, nn.Module], rows: Sequence[tuple[Ids, Ids]], *, batch_size: int, progress: Progress = SILENT
) -> dict[str, Tensor]:
    """Sums over each row's target tokens, as `scores.token_scores` says of them, and `tokens_W`, their number.

    `models` is a `student`, and a `teacher` where there is one.
    """
    device = next(models["student"].parameters()).device
    sums: dict[str, list[Tensor]] = {}
    progress.start("loss", sum(len(asked) for _, asked in rows), "tokens")
    try:
        for first in range(0, len(rows), batch_size):
            batch = batched(rows[first : first + batch_size]).to(device)
            counts_BT = batch.target_BT != UNSEEN
            logits = [
                losses.Head.of(model).logits(losses.hidden_states(model, batch)[counts_BT]) for model in models.values()
            ]
            found = loss.token_scores(*logits, targets_N=batch.target_BT[counts_BT])
            found["tokens"] = torch.ones_like(found["student"])
            for key, value_N in found.items():
                parts = torch.split(value_N, counts_BT.sum(1).tolist())
                sums.setdefault(key, []).extend(part.double().sum().cpu() for part in parts)
            progress.advance(int(counts_BT.sum()))
    finally:
        progress.stop()
    return {key: torch.stack(values) for key, values in sums.items()}


# --- answers ---------------------------------------------------------------------------------------------------------


def answers(
    model: Any,
    tokenizer: Any,
    pairs: PairFile,
    *,
    beams: int,
    count: int,
    length: int,
    new_tokens: int,
    batch_size: int,
    progress: Progress = SILENT,
) -> list[str]:
    """What a model says to the first `count` inputs, cut to `length` tokens: the best of so many beams, as text."""
    said: list[str] = []
    device = next(model.parameters()).device
    rows = [(given[:length], asked) for given, asked in pairs.pairs[:count]]
    progress.start(f"answers, {beams} beam{'s' if beams > 1 else ''}", len(rows), "pairs")
    try:
        for first in range(0, len(rows), batch_size):
            batch = batched(rows[first : first + batch_size]).to(device)
            ids_BT = hf.generate(
                model,
                batch.input_BS,
                attention_mask=batch.seen_BS.long(),
                num_beams=beams,
                max_new_tokens=new_tokens,
            )
            said += tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
            progress.advance(len(batch.input_BS))
    finally:
        progress.stop()
    return said


def judge(said: Sequence[str], asked: Sequence[str]) -> dict[str, float]:
    """The metrics of answers; those of a library that is not installed are left out."""
    same = sum(one.strip() == other.strip() for one, other in zip(said, asked, strict=True))
    errors = sum(edit_distance(one.strip(), other.strip()) for one, other in zip(said, asked, strict=True))
    found = {
        "exact_match": same / len(asked),
        "cer": errors / max(1, sum(len(other.strip()) for other in asked)),
    }
    return found | _bleu(said, asked) | _rouge(said, asked)


def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions and substitutions that make one string the other (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        before, row[0] = row[0], number
        for place, asked in enumerate(other, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != asked))
    return row[-1]


def _bleu(said: Sequence[str], asked: Sequence[str]) -> dict[str, float]:
    try:
        import sacrebleu
    except ImportError:
        return {}
    return {"bleu": float(sacrebleu.corpus_bleu(list(said), [list(asked)]).score)}


def _rouge(said: Sequence[str], asked: Sequence[str]) -> dict[str, float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return {}
    scorer = RougeScorer(list(ROUGE))
    each = [scorer.score(other, one) for one, other in zip(said, asked, strict=True)]
    return {name: 100 * sum(row[name].fmeasure for row in each) / len(each) for name in ROUGE}


def measure(
    models: Mapping[str, Any],
    tokenizer_dir: str | Path,
    read: Corpus,
    *,
    length: int,
    seed: int,
    batch_size: int,
    beams: Sequence[int],
    count: int,
    new_tokens: int,
    samples: int,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Everything that is measured of a `student`, and beside it of a `teacher`, on corrupted text or on pairs.

    Of pairs, the first `count` are answered by each number of beams, and `samples` answers by the fewest are kept.
    """
    with torch.inference_mode():
        rows = list(read.rows(length, seed))
        sums = score(models, rows, batch_size=batch_size, progress=progress)
    own = {who: loss.summary(sums, who, 0) for who in models}
    answered: list[dict[str, str]] = []
    if isinstance(read, PairFile) and count and beams:
        tokenizer, asked = hf.load_tokenizer(tokenizer_dir), [text for _, text in read.texts[:count]]
        answered = [{"input": given, "target": text} for given, text in read.texts[: min(samples, count)]]
        how = {"count": count, "length": length, "new_tokens": new_tokens, "batch_size": batch_size}
        for who, model in models.items():
            for number in sorted(beams):
                said = answers(model, tokenizer, read, beams=number, progress=progress, **how)
                for name, value in judge(said, asked).items():
                    own[who].setdefault(name, {})[str(number)] = value
                if number == min(beams):
                    answered = [{**row, who: text} for row, text in zip(answered, said, strict=False)]
    metrics = {"tokens": int(sums["tokens"].sum()), "windows": len(rows), **own["student"]}
    if "teacher" in models:
        metrics |= {"teacher_loss": own["teacher"]["loss"], **loss.distance(sums), "teacher": own["teacher"]}
    return metrics | ({"answered": answered} if answered else {})
