# SPDX-License-Identifier: Apache-2.0
"""Feedback in the formats of other tools, turned into rows of our schema (schema.py).

    TRL           {"chosen", "rejected"}, text or messages; the prompt is in "prompt", or both begin with it, or both;
                  HH-RLHF is text that begins with it; ShareGPT and Alpaca have it in their own keys (data/formats.py)
    NeMo          {"context" or "prompt", "completions": [{"rank": 0, "completion": text or messages}, ...]}
    Argilla       records with a ranking question over fields: version 1 rows and version 2 `to_json` records
    Label Studio  JSON exports of a Ranker over "items", or of a Pairwise

A format is one entry of FORMATS: a test whether a row is of this format, and a function row -> rows of the schema.
One row may hold the answers of several annotators, which become one row each.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from rlhf_fast.data.formats import usual_keys
from rlhf_fast.data.messages import as_chat, is_messages
from rlhf_fast.errors import UserError

Row = dict[str, Any]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # read by the chat template
PROMPT_FIELDS = ("prompt", "instruction", "question", "input", "text")


def to_schema(row: Row, where: str) -> list[Row]:
    """`row` as rows of the schema; a row of no known other format is returned unchanged."""
    name = _format_of(row)
    if name not in ("Label Studio", "Argilla"):  # whose fields may have names such as Alpaca's `instruction`
        row = usual_keys(row)
        name = _format_of(row)
    if name is None:
        return [row]
    try:
        common = {key: row[key] for key in TEMPLATE_COLUMNS if key in row}
        return [{**common, **converted} for converted in FORMATS[name][1](row)]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: looks like a row of {name}, but {reason}") from None


def _format_of(row: Row) -> str | None:
    return next((name for name, (fits, _) in FORMATS.items() if fits(row)), None)


def _trl(row: Row) -> list[Row]:
    """The prompt is in a column of its own, or it is what both sides begin with."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if is_messages(chosen) and is_messages(rejected):
        prompt, chosen, rejected = _split_turns(prompt, chosen, rejected)
    elif type(chosen) is not type(rejected):
        raise ValueError('"chosen" and "rejected" are not of one kind')
    elif isinstance(chosen, str) and prompt is None:
        prompt, chosen, rejected = _split_text(chosen, rejected)
    elif isinstance(prompt, str) and prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    converted: Row = {"prompt": prompt, "completions": [chosen, rejected], "ranks": [1, 2]}
    if chosen == rejected:
        converted["ranks"] = [1, 1]
    if "score_chosen" in row and "score_rejected" in row:
        converted["ratings"] = [float(row["score_chosen"]), float(row["score_rejected"])]
    elif "margin" in row:
        converted["ratings"] = [float(row["margin"]), 0.0]
    return [converted]


def _split_turns(prompt: Any, chosen: list[Row], rejected: list[Row]) -> tuple[Any, list[Row], list[Row]]:
    """(prompt, rest of chosen, rest of rejected): the prompt is the turns both share, and each rest has an answer."""
    pairs = zip(chosen, rejected, strict=False)
    most = min(len(chosen), len(rejected)) - 1
    shared = min(most, next((i for i, (a, b) in enumerate(pairs) if a != b), most))
    while shared and chosen[shared]["role"] != "assistant":
        shared -= 1
    if chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":
        raise ValueError("an answer of the assistant must follow what both sides begin with")
    before = _not_repeated(prompt, chosen)
    if not before and not shared:
        raise ValueError("its two sides have no prompt in common")
    return [*before, *chosen[:shared]], chosen[shared:], rejected[shared:]


def _not_repeated(prompt: Any, chosen: list[Row]) -> list[Row]:
    """The messages of the prompt column that the two sides do not repeat."""
    messages = as_chat(prompt) if isinstance(prompt, str) else prompt or []
    if chosen[0]["role"] == "assistant":  # answers alone
        return list(messages)
    first = next(iter(messages), chosen[0])
    return [first] if first["role"] == "system" != chosen[0]["role"] else []


def _split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, rest of chosen, rest of rejected): the prompt is the whole words both share, and no rest is empty.

    In HH-RLHF dialogues the prompt is everything up to the last "\\n\\nAssistant:" that both share.
    """
    most = min(len(chosen), len(rejected))
    shared = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    turn = chosen.rfind(ASSISTANT, 0, shared)
    if chosen.startswith(HUMAN) and turn >= 0:
        shared = turn + len(ASSISTANT)
        return chosen[:shared], chosen[shared:], rejected[shared:]
    while shared and (shared == most or _inside_word(chosen, shared) or _inside_word(rejected, shared)):
        shared -= 1
    while shared and chosen[shared - 1] == " ":  # a completion begins with its own space
        shared -= 1
    if shared == 0:
        raise ValueError("its two sides have no prompt in common")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _inside_word(text: str, place: int) -> bool:
    """Whether the characters before and at `place` belong to one word of a script that puts spaces between words."""
    return all(char.isalnum() and not _wide(char) for char in text[place - 1 : place + 1])


def _wide(char: str) -> bool:
    return unicodedata.east_asian_width(char) in "WF"


def _nemo(row: Row) -> list[Row]:
    ranks = [int(entry["rank"]) for entry in row["completions"]]
    completions = [entry["completion"] for entry in row["completions"]]
    best = min(ranks)  # NeMo counts from 0
    prompt = row["context"] if "context" in row else row["prompt"]
    return [{"prompt": prompt, "completions": completions, "ranks": [rank - best + 1 for rank in ranks]}]


def _argilla(row: Row) -> list[Row]:
    fields = row["fields"] if isinstance(row.get("fields"), dict) else row
    questions = row["responses"] if isinstance(row.get("responses"), dict) else row
    prompt = _prompt(fields)
    rows = []
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
            rows.append(
                {
                    "prompt": prompt,
                    "completions": [fields[entry["value"]] for entry in order],
                    "ranks": [int(entry["rank"]) for entry in order],
                    "annotator": str(answer["user_id"]),
                }
            )
    return rows


def _are_answers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and "user_id" in v for v in value)


def _label_studio(row: Row) -> list[Row]:
    data = row["data"]
    prompt = _prompt(data)
    rows = []
    for annotation in row["annotations"]:
        for result in [] if annotation.get("was_cancelled") else annotation["result"]:
            if result["type"] == "ranker":
                answer = _ranker(data["items"], result["value"]["ranker"])
            elif result["type"] == "pairwise":
                answer = _pairwise(data, result["value"]["selected"])
            else:
                continue
            rows.append({"prompt": prompt, **answer, "annotator": str(_user(annotation.get("completed_by")))})
    return rows


def _ranker(items: list[Row], ranked: Any) -> Row:
    """`ranked`: ids in order, or {tag: such a list}, or several buckets of ids, whose order gives the ranks."""
    buckets = list(ranked.values()) if isinstance(ranked, dict) else [ranked]
    groups: Iterable[list[Any]] = [[item] for item in buckets[0]] if len(buckets) == 1 else buckets
    rank_of = {str(item): rank for rank, group in enumerate(groups, start=1) for item in group}
    return {
        "completions": [item.get("body") or item["title"] for item in items],
        "ranks": [rank_of[str(item["id"])] for item in items],
    }


def _pairwise(data: Row, selected: str) -> Row:
    """The two texts are under keys that end in 1 and 2, such as answer1 and answer2."""
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


FORMATS: dict[str, tuple[Callable[[Row], bool], Callable[[Row], list[Row]]]] = {
    "TRL": (lambda row: "chosen" in row and "rejected" in row, _trl),
    "NeMo": (lambda row: _is_list_of_objects(row.get("completions")), _nemo),
    "Label Studio": (lambda row: "data" in row and "annotations" in row, _label_studio),
    "Argilla": (lambda row: "fields" in row or any(_are_answers(value) for value in row.values()), _argilla),
}


def _is_list_of_objects(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, dict) and "role" not in entry for entry in value)
    )
