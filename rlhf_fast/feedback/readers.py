# SPDX-License-Identifier: Apache-2.0
"""Feedback in the formats of other tools, turned into rows of our schema (schema.py).

    TRL           {"chosen", "rejected"}, text or messages, with a "prompt" or with it in front of both
    NeMo          {"context" or "prompt", "completions": [{"rank": 0, "completion": text or messages}, ...]}
    Argilla       records with a ranking question over fields: version 1 rows and version 2 `to_json` records
    Label Studio  JSON exports of a Ranker over "items", or of a Pairwise

A format is one entry of FORMATS: how its rows are told from others, and a function row -> rows of the schema. One row
may hold the answers of several annotators, which become one row each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rlhf_fast.errors import UserError

Row = dict[str, Any]
PROMPT_FIELDS = ("prompt", "instruction", "question", "input", "text")


def to_schema(row: Row, where: str) -> list[Row]:
    """The rows of the schema that `row` stands for; one that is of no other format is returned as it is."""
    for name, (fits, convert) in FORMATS.items():
        if fits(row):
            try:
                return convert(row)
            except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{where}: looks like a row of {name}, but {reason}") from None
    return [row]


def _trl(row: Row) -> list[Row]:
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if type(chosen) is not type(rejected):
        raise ValueError('"chosen" and "rejected" are not of one kind')
    if prompt is None:  # what both begin with, whole words of it
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        if isinstance(chosen, str):
            shared = max(0, chosen.rfind(" ", 0, shared))
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    made: Row = {"prompt": prompt, "completions": [_text(chosen), _text(rejected)], "ranks": [1, 2]}
    if "score_chosen" in row and "score_rejected" in row:
        made["ratings"] = [float(row["score_chosen"]), float(row["score_rejected"])]
    elif "margin" in row:
        made["ratings"] = [float(row["margin"]), 0.0]
    return [made]


def _nemo(row: Row) -> list[Row]:
    ranks = [int(entry["rank"]) for entry in row["completions"]]
    completions = [_text(entry["completion"]) for entry in row["completions"]]
    best = min(ranks)  # NeMo counts from 0
    prompt = row["context"] if "context" in row else row["prompt"]
    return [{"prompt": prompt, "completions": completions, "ranks": [rank - best + 1 for rank in ranks]}]


def _argilla(row: Row) -> list[Row]:
    fields = row["fields"] if isinstance(row.get("fields"), dict) else row
    questions = row["responses"] if isinstance(row.get("responses"), dict) else row
    prompt = _prompt(fields)
    made = []
    for answers in questions.values():
        for answer in answers if _are_answers(answers) else []:
            if answer.get("status", "submitted") != "submitted" or not isinstance(answer["value"], list):
                continue
            order = [
                entry if isinstance(entry, dict) else {"value": entry, "rank": place}
                for place, entry in enumerate(answer["value"], start=1)
            ]
            order.sort(key=lambda entry: str(entry["value"]))  # one order of completions for all annotators
            if any(entry["value"] not in fields for entry in order):
                raise ValueError(f"its ranking names {[entry['value'] for entry in order]}, which are not all fields")
            made.append(
                {
                    "prompt": prompt,
                    "completions": [fields[entry["value"]] for entry in order],
                    "ranks": [int(entry["rank"]) for entry in order],
                    "annotator": str(answer["user_id"]),
                }
            )
    return made


def _are_answers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and "user_id" in v for v in value)


def _label_studio(row: Row) -> list[Row]:
    data = row["data"]
    prompt = _prompt(data)
    made = []
    for annotation in row["annotations"]:
        for result in [] if annotation.get("was_cancelled") else annotation["result"]:
            if result["type"] == "ranker":
                answer = _ranker(data["items"], result["value"]["ranker"])
            elif result["type"] == "pairwise":
                answer = _pairwise(data, result["value"]["selected"])
            else:
                continue
            made.append({"prompt": prompt, **answer, "annotator": str(_user(annotation.get("completed_by")))})
    return made


def _ranker(items: list[Row], ranked: Any) -> Row:
    """`ranked`: ids in order, or one such list by tag name, or several by bucket: then the buckets are the ranks."""
    buckets = list(ranked.values()) if isinstance(ranked, dict) else [ranked]
    groups: Iterable[list[Any]] = [[item] for item in buckets[0]] if len(buckets) == 1 else buckets
    rank_of = {str(item): rank for rank, group in enumerate(groups, start=1) for item in group}
    return {
        "completions": [item.get("body") or item["title"] for item in items],
        "ranks": [rank_of[str(item["id"])] for item in items],
    }


def _pairwise(data: Row, selected: str) -> Row:
    """The two texts are the values of two keys that end in 1 and 2, such as answer1 and answer2."""
    first = next((key for key in data if key.endswith("1") and f"{key[:-1]}2" in data), None)
    if first is None:
        raise ValueError("its data has no two keys such as answer1 and answer2")
    return {"completions": [data[first], data[f"{first[:-1]}2"]], "ranks": [1, 2] if selected == "left" else [2, 1]}


def _user(value: Any) -> Any:
    return value.get("email") or value["id"] if isinstance(value, dict) else value


def _prompt(fields: Row) -> Any:
    for name in PROMPT_FIELDS:
        if name in fields:
            return fields[name]
    raise ValueError(f"none of its fields is a prompt: wanted one of {', '.join(PROMPT_FIELDS)}")


def _text(completion: Any) -> str:
    """A completion as text; messages are one answer of the assistant."""
    if isinstance(completion, str):
        return completion
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise ValueError("a completion must be text or one message of the assistant")
    return str(completion[0]["content"])


FORMATS: dict[str, tuple[Callable[[Row], bool], Callable[[Row], list[Row]]]] = {
    "TRL": (lambda row: "chosen" in row and "rejected" in row, _trl),
    "NeMo": (lambda row: _is_list_of_objects(row.get("completions")), _nemo),
    "Label Studio": (lambda row: "data" in row and "annotations" in row, _label_studio),
    "Argilla": (lambda row: "fields" in row or any(_are_answers(value) for value in row.values()), _argilla),
}


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)
