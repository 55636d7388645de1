"""Text and chats from files of every kind, through real tokenizers, as tokens with end tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from esscher.adapters.text import encode, read_rows, read_text
from esscher.errors import UserError
from esscher.types import Tokens

ROWS = [
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
    {"prompt": "Grüße, 世界 🙂", "chosen": " café", "rejected": " ca"},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, **special: str) -> Any:
    """Bytes as tokens, and nothing learned: any text goes in and comes out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{piece: k for k, piece in enumerate(alphabet, 1)}}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", **special)
    made.chat_template = template
    return made


def pairs(rows: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {"name": "prefs", "columns": {}, "max_length": 200}
    return read_text("pairs", rows, tokenizer(), **{**defaults, **options})[0]


# ---- sources


def test_files_of_every_kind_hold_the_same_rows(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    split = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)})
    split.save_to_disk(str(tmp_path / "splits"))
    for name in ("a.jsonl", "b.json", "lines.json", "c.parquet", "saved"):
        assert read_rows(str(tmp_path / name)) == ROWS, name
    assert read_rows(str(tmp_path / "splits"), split="test") == ROWS


def test_a_function_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_prefs.py").write_text(f"def rows():\n    yield from {ROWS!r}\n")
    monkeypatch.chdir(tmp_path)
    assert read_rows("my_prefs:rows") == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": 1}\n{"prompt"', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", "3\n", "row 0: must be an object"),
        ("a.csv", "x", "must be .jsonl, .json, .parquet or .txt"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(str(tmp_path / name))


def test_no_such_source() -> None:
    with pytest.raises(UserError, match="data 'nothing_here:rows' cannot be imported"):
        read_rows("nothing_here:rows")


# ---- tokens


def test_plain_text_is_followed_by_an_end_token() -> None:
    fast = tokenizer()
    found = encode(fast, "2 + 2 =", " 4", "row 0")
    assert fast.decode(found.prompt) == "2 + 2 ="
    assert fast.decode(found.completion) == " 4<end>"
    assert encode(fast, "2", " 4<end>", "row 0").completion == found.completion


def test_any_unicode_comes_back() -> None:
    fast = tokenizer()
    for row in ROWS:
        found = encode(fast, row["prompt"], row["chosen"], "row")
        assert fast.decode(found.prompt + found.completion[:-1]) == row["prompt"] + row["chosen"]


def test_chats_are_written_by_the_template() -> None:
    fast = tokenizer()
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    answer = [{"role": "assistant", "content": "Hello"}]
    for completion in (answer, "Hello"):
        found = encode(fast, prompt, completion, "row 0")
        assert fast.decode(found.prompt) == "<system>Be brief.<end>\n<user>Hi<end>\n<assistant>"
        assert fast.decode(found.completion) == "Hello<end>"


def test_whole_chats_share_their_prompt() -> None:
    shared = [{"role": "user", "content": "Hi"}]
    row = {
        name: [*shared, {"role": "assistant", "content": text}]
        for name, text in (("chosen", "Hello"), ("rejected", "Go away"))
    }
    ((chosen, rejected),) = pairs([row])
    assert chosen.prompt == rejected.prompt
    assert tokenizer().decode(rejected.completion) == "Go away<end>"


def test_columns_may_have_other_names() -> None:
    row = {"question": "a", "good": "b", "bad": "c"}
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert pairs([row], columns=names) == pairs([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(
        UserError, match=r"row 0 has no column 'chosen'.*--text.columns chosen NAME"
    ):
        pairs([row])


def test_an_empty_prompt_needs_a_first_token() -> None:
    with pytest.raises(UserError, match="row 0: the prompt is empty"):
        pairs([{"prompt": "", "chosen": "b", "rejected": "c"}])
    fast = tokenizer(bos_token="<end>")
    assert encode(fast, "", "b", "row 0") == Tokens([0], [fast.encode("b")[0], 0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "row 0: chosen and rejected are equal"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "row 0: the completion is empty"),
        ({"prompt": "a", "chosen": "b<end>", "rejected": "b"}, "equal as tokens"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "no column 'chosen'"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "must be text, or a list of messages"),
        ({"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}, "with role and content"),
        ({"prompt": "a" * 300, "chosen": "b", "rejected": "c"}, "has 302 tokens, and 200 fit"),
        ({"chosen": "a", "rejected": "b"}, "no column 'prompt'"),
    ],
)
def test_bad_rows_are_refused_by_number(row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pairs([row])


def test_rows_that_are_too_long_may_be_dropped() -> None:
    long = {"prompt": "a" * 300, "chosen": "b", "rejected": "c"}
    assert len(pairs([*ROWS, long], too_long="drop")) == 2
    with pytest.raises(UserError, match="no row has at most 200 tokens"):
        pairs([long], too_long="drop")


def test_chats_need_a_template() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(UserError, match="no chat template"):
        encode(tokenizer(None), chat, "Hello", "row 0")
    fickle = "{% if add_generation_prompt %}asked{% else %}answered{% endif %}"
    with pytest.raises(UserError, match="writes the prompt otherwise once it is answered"):
        encode(tokenizer(fickle), chat, "Hello", "row 0")
