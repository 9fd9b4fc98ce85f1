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
from kvfold.evaluate.settings import EvaluateSettings
from kvfold.progress import SILENT, Progress
from kvfold.text.pairs import UNSEEN, Corpus, Ids, PairFile, batched
from kvfold.train import losses

ROUGE = ("rouge1", "rouge2", "rougeL")


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
    settings: EvaluateSettings,
    *,
    beams: int,
    length: int,
    progress: Progress = SILENT,
) -> list[str]:
    """A model's answers to the first `settings.answers` inputs, each cut to `length` tokens, by beam search."""
    texts: list[str] = []
    device = next(model.parameters()).device
    rows = [(given[:length], target) for given, target in pairs.pairs[: settings.answers]]
    progress.start(f"answers, {beams} beam{'s' if beams > 1 else ''}", len(rows), "pairs")
    try:
        for first in range(0, len(rows), settings.batch_size):
            batch = batched(rows[first : first + settings.batch_size]).to(device)
            ids_BT = hf.generate(
                model,
                batch.input_BS,
                attention_mask=batch.seen_BS.long(),
                num_beams=beams,
                max_new_tokens=settings.answer_tokens,
            )
            texts += tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
            progress.advance(len(batch.input_BS))
    finally:
        progress.stop()
    return texts


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
    settings: EvaluateSettings,
    *,
    length: int,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """The metrics of a `student`, and beside it of a `teacher`, on corrupted text or on pairs.

    Of pairs, the first `settings.answers` are answered with each number of beams, and the first samples are kept.
    """
    with torch.inference_mode():
        rows = list(read.rows(length, settings.seed))
        sums = score(models, rows, batch_size=settings.batch_size, progress=progress)
    own = {who: loss.summary(sums, who, 0) for who in models}
    answered: list[dict[str, str]] = []
    if isinstance(read, PairFile) and settings.answers and settings.beams:
        tokenizer, texts = hf.load_tokenizer(tokenizer_dir), read.texts[: settings.answers]
        answered = [{"input": given, "target": text} for given, text in texts[: settings.samples]]
        for who, model in models.items():
            for beams in sorted(settings.beams):
                said = answers(model, tokenizer, read, settings, beams=beams, length=length, progress=progress)
                for name, value in judge(said, [text for _, text in texts]).items():
                    own[who].setdefault(name, {})[str(beams)] = value
                if beams == min(settings.beams):
                    answered = [{**row, who: text} for row, text in zip(answered, said, strict=False)]
    return loss.metrics(own, sums) | ({"answered": answered} if answered else {})
