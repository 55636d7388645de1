"""Records of text from wherever users keep them, as tokens with masks.

| source | what is read |
|---|---|
| FILE.jsonl, FILE.json | one object a line, or one list of objects |
| FILE.parquet | rows |
| FILE.txt | paragraphs, as a column text |
| FOLDER | a data set saved by Hugging Face datasets |
| NAME | a data set of the Hugging Face hub, or of its local cache |
| module:function | what it returns: an iterable of dictionaries |

Text is a plain string, or a list of chat messages ({"role": ..., "content": ...}), which the
tokenizer's own chat template turns into text.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from esscher.adapters.imports import made, needed
from esscher.errors import UserError, nearest
from esscher.files import readable
from esscher.types import Tokens

Row = Mapping[str, Any]
TooLong = Literal["refuse", "drop"]


def read_rows(source: str, *, split: str = "train") -> list[Row]:
    """All rows of a source; see the module.

    Raises:
        UserError: no such source, or one that cannot be read: which line, and why.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = _read_file(path)
    elif ":" in source and not path.exists():
        rows = list(made(source, "data"))
    else:
        rows = _read_hugging_face(source, path, split)
    if not rows:
        raise UserError(f"{source} holds no rows")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(f"{source}, row {number}: must be an object with columns, got {row!r}")
    return rows


def pick(row: Row, column: str, columns: Mapping[str, str], place: str) -> Any:
    """The value of a column, under the name that the source has for it.

    Raises:
        UserError: there is no such column.
    """
    name = columns.get(column, column)
    if name not in row or row[name] is None:
        hint = nearest(name, row)
        raise UserError(
            f"{place} has no column {name!r}: {hint} (--text.columns {column} NAME maps)"
        )
    return row[name]


def encode(tokenizer: Any, prompt: Any, completion: Any, place: str) -> Tokens:
    """Token ids of a prompt and a completion, with an end token behind the completion.

    The two are turned into tokens apart, as they are when the model is asked. A chat is turned into
    text by the tokenizer's template, whose text for the whole must begin with that for the prompt.

    Raises:
        UserError: neither text nor messages; an empty prompt or completion; no chat template; a
            template that rewrites the prompt when it is answered.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        asked, answer, special = prompt, completion, True
    else:
        asked, answer = _chat(tokenizer, _messages(prompt, "user", place), completion, place)
        special = False  # The template has written them.
    if not answer.strip():
        raise UserError(f"{place}: the completion is empty, so there is nothing to learn from")
    ids = _prompt_ids(tokenizer, asked, special, place)
    completed = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if not completed:
        raise UserError(f"{place}: the completion has no tokens in this tokenizer")
    if tokenizer.eos_token_id not in completed:
        completed.append(tokenizer.eos_token_id)
    return Tokens(ids, completed)


def encode_prompt(tokenizer: Any, prompt: Any, place: str) -> list[int]:
    """Token ids of a prompt alone, a chat with the template's opening of an answer.

    Raises:
        UserError: neither text nor messages, an empty prompt, or no chat template.
    """
    special = isinstance(prompt, str)
    if not special:
        _check_template(tokenizer, place)
        messages = _messages(prompt, "user", place)
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return _prompt_ids(tokenizer, prompt, special, place)


def read_text(
    kind: Literal["pairs", "demonstrations", "prompts"],
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    name: str,
    columns: Mapping[str, str],
    max_length: int,
    too_long: TooLong = "refuse",
) -> tuple[list[Any], list[Row]]:
    """What a kind of method learns from, and the rows that it was made of.

    Raises:
        UserError: which row, and what is wrong with it; nothing is left of the rows.
    """
    items, kept = [], []
    for number, row in enumerate(rows):
        place = f"{name}, row {number}"
        item = _READERS[kind](row, tokenizer, columns, place)
        parts = item if kind == "pairs" else [item]
        longest = max(map(len, parts))
        if longest <= max_length:
            items.append(item)
            kept.append(row)
        elif too_long == "refuse":
            raise UserError(
                f"{place} has {longest} tokens, and {max_length} fit: raise --text.max-length (the "
                "model's context permitting), or leave such rows out with --text.too-long drop"
            )
    if not items:
        raise UserError(f"{name}: no row has at most {max_length} tokens; raise --text.max-length")
    return items, kept


def _read_pair(
    row: Row, tokenizer: Any, columns: Mapping[str, str], place: str
) -> tuple[Tokens, Tokens]:
    """(chosen, rejected) of a row with columns prompt, chosen and rejected.

    Without a prompt column, chosen and rejected are whole chats, and the messages that they share
    at the beginning are the prompt.
    """
    prompt, chosen, rejected = _prompt_and_answers(row, columns, place)
    if chosen == rejected:
        raise UserError(f"{place}: chosen and rejected are equal, so neither is preferred")
    best, worst = (encode(tokenizer, prompt, answer, place) for answer in (chosen, rejected))
    if best == worst:
        raise UserError(f"{place}: chosen and rejected are equal as tokens")
    return best, worst


def _read_demonstration(row: Row, tokenizer: Any, columns: Mapping[str, str], place: str) -> Tokens:
    """Of a row with columns prompt and completion, messages (the last is the completion), or text."""
    if columns.get("text", "text") in row:
        text = pick(row, "text", columns, place)
        first = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        ids = list(tokenizer(str(text), add_special_tokens=False)["input_ids"])
        if not ids:
            raise UserError(f"{place}: the text is empty, so there is nothing to learn from")
        return Tokens([first], [*ids, tokenizer.eos_token_id])
    if columns.get("messages", "messages") in row:
        chat = _messages(pick(row, "messages", columns, place), "user", place)
        if len(chat) < 2:
            raise UserError(f"{place}: messages need a question and an answer, got {len(chat)}")
        return encode(tokenizer, chat[:-1], chat[-1:], place)
    asked, answer = (pick(row, column, columns, place) for column in ("prompt", "completion"))
    return encode(tokenizer, asked, answer, place)


def _read_prompt(row: Row, tokenizer: Any, columns: Mapping[str, str], place: str) -> list[int]:
    return encode_prompt(tokenizer, pick(row, "prompt", columns, place), place)


_READERS: dict[str, Any] = {
    "pairs": _read_pair,
    "demonstrations": _read_demonstration,
    "prompts": _read_prompt,
}


def _prompt_ids(tokenizer: Any, prompt: str, special: bool, place: str) -> list[int]:
    ids = list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    if special and ids[-1:] == [tokenizer.eos_token_id] and len(ids) > 1:
        ids.pop()  # Some tokenizers close whatever they read.
    if not ids:
        if tokenizer.bos_token_id is None:
            raise UserError(f"{place}: the prompt is empty, and the tokenizer has no first token")
        ids = [tokenizer.bos_token_id]
    return ids


def _check_template(tokenizer: Any, place: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{place} holds chat messages, and the tokenizer has no chat template: give plain text, "
            "or a model that is made for chats"
        )


def _prompt_and_answers(row: Row, columns: Mapping[str, str], place: str) -> tuple[Any, Any, Any]:
    chosen, rejected = (pick(row, column, columns, place) for column in ("chosen", "rejected"))
    if columns.get("prompt", "prompt") in row:
        return pick(row, "prompt", columns, place), chosen, rejected
    if isinstance(chosen, str) or isinstance(rejected, str):
        pick(row, "prompt", columns, place)
    both = zip(chosen, rejected, strict=False)
    shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], both)]
    if not shared:
        raise UserError(f"{place}: chosen and rejected share no first message: add a prompt column")
    return shared, list(chosen)[len(shared) :], list(rejected)[len(shared) :]


def _messages(value: Any, role: str, place: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    try:
        messages = [dict(message) for message in value]
        whole = all({"role", "content"} <= message.keys() for message in messages)
    except (TypeError, ValueError):
        messages, whole = [], False
    if not messages or not whole:
        raise UserError(
            f"{place}: must be text, or a list of messages with role and content, got {value!r:.80}"
        )
    return messages


def _chat(tokenizer: Any, prompt: list[Any], completion: Any, place: str) -> tuple[str, str]:
    _check_template(tokenizer, place)
    answer = _messages(completion, "assistant", place)
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
    if not whole.startswith(asked):
        raise UserError(
            f"{place}: the chat template writes the prompt otherwise once it is answered, so that the "
            "completion cannot be told from it: give plain text"
        )
    return asked, whole[len(asked) :].rstrip("\n")


def _read_file(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        parquet: Any = needed("pyarrow.parquet", str(path), "language")
        with readable(f"{path} cannot be read as Parquet"):
            return parquet.read_table(path, page_checksum_verification=True).to_pylist()
    if path.suffix not in (".jsonl", ".json", ".txt"):
        raise UserError(f"{path} must be .jsonl, .json, .parquet or .txt")
    with readable(f"{path} cannot be read as text"):
        text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        return [{"text": part.strip()} for part in text.split("\n\n") if part.strip()]
    if path.suffix == ".json":
        try:
            whole = json.loads(text)
            return whole if isinstance(whole, list) else [whole]
        except (ValueError, RecursionError):
            pass  # Many files of one object a line are named so.
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            with readable(f"{path}, line {number}: not valid JSON"):
                rows.append(json.loads(line))
    return rows


def _read_hugging_face(source: str, path: Path, split: str) -> list[Any]:
    datasets: Any = needed("datasets", source, "language")
    with readable(f"{source} is no data set that can be read"):
        if path.is_dir() and (path / "dataset_info.json").exists():
            return list(datasets.load_from_disk(str(path)))
        if path.is_dir() and (path / "dataset_dict.json").exists():
            return list(datasets.load_from_disk(str(path))[split])
        return list(datasets.load_dataset(source, split=split))
