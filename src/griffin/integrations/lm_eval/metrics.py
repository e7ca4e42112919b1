"""Prompts and metrics of the tasks whose functions in the harness cannot be imported.

The harness's CoQA imports a part of transformers that version 5 no longer has, and its LongBench (QASPER) imports
packages for Chinese text. These functions compute the same: SQuAD's normalisation (Rajpurkar et al., arXiv 1606.05250,
section 6.1) and, for CoQA, the leave-one-out mean over the answers (Reddy et al., arXiv 1808.07042, section 6.1).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

Doc = Mapping[str, Any]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ROUGE = ("rouge1", "rouge2", "rougeL")


def normalised(text: str) -> str:
    """The text in lower case with single spaces, without punctuation and articles."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact(gold: str, answer: str) -> float:
    """1 if the normalised texts are equal, else 0."""
    return float(normalised(gold) == normalised(answer))


def f1(gold: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the normalised words; 1 if neither text has words, 0 if only one has."""
    wanted, given = normalised(gold).split(), normalised(answer).split()
    if not wanted or not given:
        return float(wanted == given)
    same = sum((Counter(wanted) & Counter(given)).values())
    return 2 * same / (len(wanted) + len(given))


def coqa_prompt(doc: Doc) -> str:
    """The passage, the questions and answers so far, and the last question."""
    questions, answers = doc["questions"]["input_text"], doc["answers"]["input_text"]
    turns = [f"Q: {question}\n\nA: {answer}\n\n" for question, answer in zip(questions[:-1], answers, strict=False)]
    return f"{doc['story']}\n\n{''.join(turns)}Q: {questions[-1]}\n\nA:"


def coqa_answers(doc: Doc) -> list[str]:
    """The accepted answers to the last question: the first annotator's, then others that differ in more than case."""
    turn = len(doc["questions"]["input_text"]) - 1
    answers = [doc["answers"]["input_text"][turn]]
    for others in (doc.get("additional_answers") or {}).values():
        if others["input_text"][turn].lower() not in map(str.lower, answers):
            answers.append(others["input_text"][turn])
    return answers


def coqa_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 of the answer's first line."""
    golds = coqa_answers(doc)
    lines = results[0].strip().split("\n")
    return {"em": _leave_one_out_mean(exact, golds, lines[0]), "f1": _leave_one_out_mean(f1, golds, lines[0])}


def _leave_one_out_mean(score: Callable[[str, str], float], golds: Sequence[str], answer: str) -> float:
    """Mean over the golds, each left out in turn, of the best score among the others."""
    if len(golds) == 1:
        return score(golds[0], answer)
    scores = [score(gold, answer) for gold in golds]
    return sum(max(scores[:left] + scores[left + 1 :]) for left in range(len(golds))) / len(golds)


def qasper_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """The best F1 over the accepted answers."""
    return {"qa_f1_score": max(f1(gold, results[0].strip()) for gold in doc["answers"])}


def rouge_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (F measure, stemmed; Lin 2004) of the summary, from 0 to 1."""
    reference = doc["highlights"] if "highlights" in doc else doc["summary"]
    scores = _rouge_scorer().score(reference.strip(), results[0].strip())
    return {name: float(scores[name].fmeasure) for name in _ROUGE}


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(_ROUGE), use_stemmer=True)
