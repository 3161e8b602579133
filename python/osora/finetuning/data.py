# SPDX-License-Identifier: Apache-2.0
"""Questions and answers: from a JSONL file to token ids with a loss on the answer alone.

A line holds one object, in one of these forms; other fields are ignored:

    {"question": "...", "answer": "..."}
    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "user", "content": "..."}, ..., {"role": "assistant", "content": "..."}]}
    {"text": "..."}                                        plain text: every token counts

Of a conversation, the last assistant message is the answer. The tokenizer's chat template is used if there is one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

FORMS = '{"question", "answer"}, {"prompt", "completion"}, {"messages"} or {"text"}'


class DataError(ValueError):
    """The training data cannot be used; the message names the line and the cure."""


@dataclass(frozen=True)
class Row:
    """One example as read: what is said before (empty for plain text), and the answer to learn."""

    where: str  # "FILE, line 3", for error messages
    context: tuple[dict[str, str], ...]
    answer: str


@dataclass(frozen=True)
class Example:
    """One example as token ids."""

    row: Row
    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def read_jsonl(path: Path) -> list[Row]:
    """Every row of a JSONL file; empty lines are skipped, anything else that is no row is an error with its number."""
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    rows.append(parse_row(json.loads(text), where))
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}); one object a line") from None
            except RecursionError:
                raise DataError(f"{where}: nested too deeply to be read; an object with {FORMS} is needed") from None
            except DataError:
                raise
            except ValueError as error:  # a number of thousands of digits
                raise DataError(f"{where}: {error}; an object with {FORMS} is needed") from None
    if not rows:
        raise DataError(f"{path} holds no rows; each line must be an object with {FORMS}")
    return rows


def parse_row(fields: Any, where: str) -> Row:
    """One JSON object as a Row."""
    if not isinstance(fields, dict):
        raise DataError(f"{where}: must be an object with {FORMS}, got {type(fields).__name__}")
    if "messages" in fields:
        return _parse_messages(fields["messages"], where)
    if "text" in fields and not fields.keys() & {"prompt", "question"}:
        return Row(where, (), _text(fields, "text", where))
    for asked, answered in (("prompt", "completion"), ("question", "answer")):
        if asked in fields:
            context = ({"role": "user", "content": _text(fields, asked, where)},)
            return Row(where, context, _text(fields, answered, where))
    found = ", ".join(repr(name) for name in fields) or "none"
    raise DataError(f"{where}: needs {FORMS}; the fields found are: {found}")


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    if name not in fields:
        raise DataError(f"{where}: the field {name!r} is missing")
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name!r} must be a text that is not empty, got {value!r:.60}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {name!r} has half a character, \\u{ord(value[error.start]):04x} at position {error.start}, as a "
            "text has that was cut within an emoji: write the row anew, whole or without it"
        ) from None
    return value


def _parse_messages(messages: Any, where: str) -> Row:
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(item, dict) for item in messages):
        raise DataError(f"{where}: 'messages' must be a list of at least two objects with 'role' and 'content'")
    turns = tuple(
        {name: _text(item, name, f"{where}, message {number}") for name in ("role", "content")}
        for number, item in enumerate(messages, start=1)
    )
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message must be the assistant's, got role {turns[-1]['role']!r}")
    return Row(where, turns[:-1], turns[-1]["content"])


def encode(tokenizer: Any, row: Row, max_length: int) -> Example | None:
    """A row as token ids, or None if question and answer are longer than max_length. Plain text is cut instead."""
    if not row.context:
        last = tokenizer.eos_token_id  # of plain text an end may be missing: it is not a question's answer
        ids = _ids(tokenizer, row.answer, start=True) + ([] if last is None else [last])
        if len(ids) < 2:
            raise DataError(f"{row.where}: 'text' is a single token, which leaves nothing to predict")
        return Example(row, [], ids[:max_length])
    if tokenizer.chat_template:
        messages = [*row.context, {"role": "assistant", "content": row.answer}]
        try:
            before = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates are programs and raise what they like
            raise DataError(f"{row.where}: the model's chat template refuses this conversation: {error}") from error
        if not whole.startswith(before):
            raise DataError(f"{row.where}: the model's chat template rewrites the question once it has an answer")
        answer, closing = _parted(tokenizer, row, messages, before, whole)
        # Prompt and answer are tokenised apart, as they are when the model generates. The line break that templates
        # put after the end mark is dropped: it is no part of the answer and too easy to predict. Where there is no
        # mark it is all that tells the end, and the end token comes after it.
        if mark := closing.rstrip():
            example = Example(row, _ids(tokenizer, before), _ids(tokenizer, answer + mark))
        else:
            end = _end(tokenizer, row, f"the model's chat template ends an answer with {closing!r}, which is no mark,")
            example = Example(row, _ids(tokenizer, before), _ids(tokenizer, answer + closing) + end)
    else:
        before = "\n".join(turn["content"] for turn in row.context) + "\n"
        end = _end(tokenizer, row, "the model has no chat template,")
        example = Example(row, _ids(tokenizer, before, start=True), _ids(tokenizer, row.answer) + end)
    return example if len(example) <= max_length else None


def _ids(tokenizer: Any, text: str, start: bool = False) -> list[int]:
    first = [tokenizer.bos_token_id] if start and tokenizer.bos_token_id is not None else []
    return first + tokenizer(text, add_special_tokens=False).input_ids


def _end(tokenizer: Any, row: Row, why: str) -> list[int]:
    """The end token, without which a model never learns to stop."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{row.where}: {why} and the tokenizer has no end token: the answers would have no end. Set eos_token in "
            "tokenizer_config.json, or a chat_template that marks the end"
        )
    return [tokenizer.eos_token_id]


def _parted(tokenizer: Any, row: Row, messages: list[dict], before: str, whole: str) -> tuple[str, str]:
    """What the template makes of the answer, and what it puts after it."""
    tail, said = whole[len(before) :], row.answer.strip()
    at = tail.find(said)
    if at >= 0:
        end = at + len(said)
        return tail[:end], tail[end:]
    # rewritten: what stands after two other answers is the same
    others = [[*messages[:-1], messages[-1] | {"content": content}] for content in "01"]
    one, two = (tokenizer.apply_chat_template(each, tokenize=False) for each in others)
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(two), strict=False)))
    closing = one[len(one) - alike :]
    return tail.removesuffix(closing), closing


def encode_all(tokenizer: Any, rows: Sequence[Row], max_length: int, kind: str) -> tuple[list[Example], int]:
    """(examples, number of rows left out because they are too long)."""
    examples = [example for row in rows if (example := encode(tokenizer, row, max_length)) is not None]
    if not examples:
        raise DataError(f"all {len(rows)} {kind} rows are longer than --max-length {max_length}; raise it")
    return examples, len(rows) - len(examples)
