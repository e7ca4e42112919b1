"""Read the rows of the tasks from local files, with the columns that the harness's tasks expect.

`load(task, folder)` returns the split `test` and, for some tasks, the split `shots` of few-shot examples. An error
about a malformed row names its file and line.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from griffin.text_files import lines

Row = dict[str, Any]
Splits = dict[str, list[Row]]

_SHOTS = 5  # few-shot examples: the last rows of GSM8K's test file, as its training set is not among the files


def load(task: str, folder: Path) -> Splits:
    """Read a task's rows.

    Raises:
        ValueError: a file is missing or empty, or a row is malformed.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected the folder of the evaluation data")
    splits = _READERS[task](folder)
    if not splits["test"]:
        raise ValueError(f"the files of task {task} in {folder} hold no rows to test")
    return splits


def _hellaswag(folder: Path) -> Splits:
    rows = []
    path = folder / "hellaswag" / "validation.jsonl.gz"
    for where, row in _json_rows(path, ctx_a=str, ctx_b=str, activity_label=str, endings=list, label=str):
        _index_of(where, "label", row["label"], len(_texts(where, "endings", row["endings"])))
        rows.append({name: row[name] for name in ("ctx_a", "ctx_b", "activity_label", "endings", "label")})
    return {"test": rows}


def _piqa(folder: Path) -> Splits:
    path, labels_path = folder / "piqa" / "valid.jsonl", folder / "piqa" / "valid-labels.lst"
    rows = [row for _, row in _json_rows(path, goal=str, sol1=str, sol2=str)]
    labels = [(where, line.strip()) for where, line in _lines(labels_path) if line.strip()]
    if len(rows) != len(labels):
        raise ValueError(
            f"{path} has {len(rows)} rows and {labels_path} {len(labels)} labels; expected one for each row"
        )
    tested = []
    for row, (where, label) in zip(rows, labels, strict=True):
        row_label = _index_of(where, "the label", label, 2)
        tested.append({"goal": row["goal"], "sol1": row["sol1"], "sol2": row["sol2"], "label": row_label})
    return {"test": tested}


def _copa(folder: Path) -> Splits:
    rows = []
    path = folder / "copa" / "superglue_copa_val.jsonl"
    for where, row in _json_rows(path, premise=str, choice1=str, choice2=str, question=str, label=int):
        _index_of(where, "label", row["label"], 2)
        if row["question"] not in ("cause", "effect"):
            raise ValueError(f"{where}: question is {row['question']!r}; expected cause or effect")
        for name in ("premise", "choice1", "choice2"):
            if not row[name].strip():
                raise ValueError(f"{where}: {name} is empty")
        rows.append({name: row[name] for name in ("premise", "choice1", "choice2", "question", "label")})
    return {"test": rows}


def _arc(name: str) -> Callable[[Path], Splits]:
    def read(folder: Path) -> Splits:
        rows = []
        for where, row in _json_rows(folder / "arc" / f"arc_{name.lower()}.jsonl", query=str, choices=list, gold=int):
            texts = _texts(where, "choices", row["choices"])
            _index_of(where, "gold", row["gold"], len(texts))
            labels = [chr(ord("A") + number) for number in range(len(texts))]
            rows.append(
                {
                    "question": row["query"].removeprefix("Question: "),
                    "choices": {"text": texts, "label": labels},
                    "answerKey": labels[row["gold"]],
                }
            )
        validation = folder / "arc" / f"ARC-{name}_validation.jsonl.gz"  # few-shot examples; none by default
        if not validation.is_file():
            return {"test": rows}
        shots = []
        for where, row in _json_rows(validation, question=str, choices=dict, answerKey=str):
            _check(where, row["choices"], text=list, label=list)
            _texts(where, "the choices' text", row["choices"]["text"])
            if row["answerKey"] not in _texts(where, "the choices' label", row["choices"]["label"]):
                raise ValueError(f"{where}: answerKey {row['answerKey']!r} is none of the choices' labels")
            shots.append({column: row[column] for column in ("question", "choices", "answerKey")})
        return {"test": rows, "shots": shots}

    return read


def _boolq(folder: Path) -> Splits:
    path = folder / "boolq" / "dev.jsonl"
    rows = _json_rows(path, question=str, passage=str, answer=bool)
    return {
        "test": [
            {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])} for _, row in rows
        ]
    }


def _xsum(folder: Path) -> Splits:
    rows = _json_rows(folder / "xsum" / "xsum_1shot_first500.jsonl", article=str, summary_gt=str)
    return {"test": [{"prompt": row["article"], "summary": row["summary_gt"]} for _, row in rows]}


def _cnn_dailymail(folder: Path) -> Splits:
    """The row with the shortest article is the few-shot example, as it fits the window best; it is not tested."""
    path = folder / "cnn_dailymail" / "cnn_dailymail_test.csv"
    rows = []
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(line for _, line in _lines(path))
    try:
        missing = {"article", "highlights"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}, line 1: no column {min(missing)}; expected article and highlights")
        for row in reader:
            if None in row.values() or None in row:
                raise ValueError(f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} columns")
            rows.append({"article": row["article"], "highlights": row["highlights"]})
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no CSV: {error}") from error
    if len(rows) < 2:
        raise ValueError(f"{path} has {len(rows)} rows; expected at least 2, one of which is the shot")
    shot = min(range(len(rows)), key=lambda number: len(rows[number]["article"]))
    return {"test": rows[:shot] + rows[shot + 1 :], "shots": [rows[shot]]}


def _coqa(folder: Path) -> Splits:
    """The last turn of every story, with all earlier turns before it, as in the harness."""
    path = folder / "coqa" / "requests.jsonl.gz"
    last: dict[str, tuple[int, Row]] = {}
    for where, line in _json_rows(path, doc=dict):
        doc = line["doc"]
        _check(where, doc, id=str, story=str, question=str, answers=list, previous_qa=list)
        story, _, digits = doc["id"].rpartition("_turn")
        if not digits.isdecimal():
            raise ValueError(f"{where}: id is {doc['id']!r}; expected it to end in _turn and a number")
        number = int(digits)
        _texts(where, "answers", doc["answers"])
        turns = doc["previous_qa"][:number]  # the list also holds later turns
        if len(turns) < number or not all(
            isinstance(turn, dict) and {"question", "answer"} <= turn.keys() for turn in turns
        ):
            raise ValueError(f"{where}: previous_qa lacks some of the {number} turns before this one")
        if story in last and last[story][0] > number:
            continue
        answer, *others = doc["answers"]
        row = {
            "id": story,
            "story": doc["story"],
            "questions": {"input_text": [*(turn["question"] for turn in turns), doc["question"]]},
            "answers": {"input_text": [*(turn["answer"] for turn in turns), answer]},
            "additional_answers": {str(n): {"input_text": [*[""] * number, other]} for n, other in enumerate(others)},
        }
        last[story] = (number, row)
    annotators = max((len(row["additional_answers"]) for _, row in last.values()), default=0)
    for number, row in last.values():  # all rows need the same columns; a repeated answer counts once
        for n in range(len(row["additional_answers"]), annotators):
            row["additional_answers"][str(n)] = {"input_text": [*[""] * number, row["answers"]["input_text"][-1]]}
    return {"test": [row for _, row in last.values()]}


def _qasper(folder: Path) -> Splits:
    """One row for each paper and question, with all answers to the question."""
    rows: dict[tuple[str, str], Row] = {}
    path = folder / "qasper" / "leval_scientific_qa.jsonl"
    for where, paper in _json_rows(path, input=str, instructions=list, outputs=list):
        questions, answers = (_texts(where, name, paper[name]) for name in ("instructions", "outputs"))
        if len(questions) != len(answers):
            raise ValueError(f"{where}: {len(questions)} instructions and {len(answers)} outputs; expected as many")
        for question, answer in zip(questions, answers, strict=True):
            row = {"context": paper["input"], "question": question, "answers": []}
            accepted = rows.setdefault((paper["input"], question), row)["answers"]
            if answer not in accepted:
                accepted.append(answer)
    return {"test": list(rows.values())}


def _gsm8k(folder: Path) -> Splits:
    path = folder / "gsm8k" / "test_first660.jsonl"
    rows = []
    for where, row in _json_rows(path, question=str, answer=str):
        if "#### " not in row["answer"]:
            raise ValueError(f"{where}: the answer has no '#### ' before its result")
        rows.append({"question": row["question"], "answer": row["answer"]})
    if len(rows) <= _SHOTS:
        raise ValueError(f"{path} has {len(rows)} rows; expected more than {_SHOTS}, as so many are the shots")
    return {"test": rows[:-_SHOTS], "shots": rows[-_SHOTS:]}


def _wikitext2(folder: Path) -> Splits:
    """One row for each article, from its heading ` = Title = ` up to the next heading."""
    path = folder / "wikitext2" / "wiki.valid.raw"
    pages: list[str] = []
    for where, line in _lines(path):
        if re.fullmatch(r" = [^=].*[^=] = \n?", line):
            pages.append("")
        if pages:
            pages[-1] += line
        elif line.strip():
            raise ValueError(f"{where}: text before the first heading; expected a line such as ' = Title = '")
    return {"test": [{"page": page} for page in pages]}


_READERS: dict[str, Callable[[Path], Splits]] = {
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "copa": _copa,
    "arc_easy": _arc("Easy"),
    "arc_challenge": _arc("Challenge"),
    "boolq": _boolq,
    "xsum": _xsum,
    "cnn_dailymail": _cnn_dailymail,
    "coqa": _coqa,
    "qasper": _qasper,
    "gsm8k": _gsm8k,
    "wikitext2": _wikitext2,
}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file, each with its location."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; see docs/evaluation.md for the files that each task reads")
    yield from lines(path)


def _json_rows(path: Path, **fields: type) -> Iterator[tuple[str, Row]]:
    """The rows of a JSON-lines file, each with its location, after a check of the types of their fields."""
    for where, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: no JSON: {error}") from error
        _check(where, row, **fields)
        yield where, row


def _check(where: str, row: object, **fields: type) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found a {type(row).__name__}; expected an object with {', '.join(fields)}")
    for name, kind in fields.items():
        value = row.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            what = f"{name} is a {type(value).__name__}" if name in row else f"there is no {name}"
            raise ValueError(f"{where}: {what}; expected a {kind.__name__}")


def _texts(where: str, name: str, value: list[Any]) -> list[str]:
    if not value or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{where}: {name} is {str(value)[:60]!r}; expected a list of texts that are not empty")
    return value


def _index_of(where: str, name: str, value: object, count: int) -> int:
    if not str(value).isdecimal() or int(str(value)) >= count:
        raise ValueError(f"{where}: {name} is {value!r}; expected a number from 0 to {count - 1}")
    return int(str(value))
