"""Conversational rows: `messages`, or TRL's `prompt` and `completion`, to the text of a prompt and an answer.

    {"messages": [{"role": "user", "content": "..."}, ..., {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}          or lists of messages in place of the texts

The last assistant's message is the answer, the messages before it are the prompt. A prompt of several messages is one
text, `Role: content` lines in which the character `TURN` marks where a message begins: without the marks it is the
layout that a model without a chat template sees, and with them the encoder finds the messages again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proper.data.chat import TURN, TextMessage, Turn, conversation_lines, readable
from proper.data.rows import BadValue

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
ROLES = ("system", "user", "assistant")


def join_turns(turns: Sequence[Turn]) -> str:
    """Return the text of a prompt of these messages; a single user's message is its text unchanged."""
    clean = [TextMessage(turn.role, readable(turn.text)) for turn in turns]
    if len(clean) == 1 and clean[0].role == "user":
        return clean[0].text
    return "\n".join(TURN + line for line in [*conversation_lines(clean), "Assistant:"])


def split_turns(prompt: str) -> list[TextMessage] | None:
    """Return the messages of a text of `join_turns`; None for a prompt without marks.

    Text before the first mark, such as retrieved items, goes in front of the first user's message.
    """
    if TURN not in prompt:
        return None
    before, *parts = prompt.split(TURN)
    turns = []
    for part in parts[:-1]:
        role, _, text = part.removesuffix("\n").partition(": ")
        if role == "User":
            before, text = "", before + text
        turns.append(TextMessage(role.lower(), text))
    return turns


def messages_row(row: Mapping[str, object]) -> tuple[str, str]:
    """Return prompt and answer of a row with `messages`; messages behind the last assistant's are ignored.

    Raises:
        BadValue: the messages are malformed, or there is no assistant's message with a message before it.
    """
    return _texts(_messages(row, MESSAGES), MESSAGES)


def completion_row(row: Mapping[str, object]) -> tuple[str, str]:
    """Return prompt and answer of a row with `prompt` and `completion`, which are texts or lists of messages.

    Raises:
        BadValue: a column is missing or malformed, or the completion has no assistant's message.
    """
    prompt, completion = _value(row, PROMPT), _value(row, COMPLETION)
    before = [TextMessage("user", prompt)] if isinstance(prompt, str) else _messages(row, PROMPT)
    after = [TextMessage("assistant", completion)] if isinstance(completion, str) else _messages(row, COMPLETION)
    return _texts([*before, *after], COMPLETION)


def question(row: Mapping[str, object], field: str) -> str:
    """Return the prompt of the messages in a column that wait for an answer; a row's own answer at the end is left out.

    Raises:
        BadValue: the messages are malformed, or all of them are the assistant's.
    """
    turns = _messages(row, field)
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns:
        raise BadValue(field, "no message to answer")
    return join_turns(turns)


def _texts(turns: Sequence[TextMessage], field: str) -> tuple[str, str]:
    last = max((at for at, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if last < 0:
        raise BadValue(field, "no message of the assistant, which would be the answer")
    if last == 0:
        raise BadValue(field, "no message before the assistant's")
    return join_turns(turns[:last]), turns[last].text


def _value(row: Mapping[str, object], field: str) -> object:
    if row.get(field) is None:
        raise BadValue(field, "null" if field in row else "missing")
    return row[field]


def _messages(row: Mapping[str, object], field: str) -> list[TextMessage]:
    found = _value(row, field)
    if not isinstance(found, list) or not found:
        raise BadValue(field, "should be a list of messages" + ("" if field == MESSAGES else ", or text"))
    return [_message(each, f"{field}[{at}]") for at, each in enumerate(found)]


def _message(found: object, where: str) -> TextMessage:
    if not isinstance(found, Mapping):
        raise BadValue(where, "should be an object with role and content")
    role, content = found.get("role"), found.get("content")
    role = "system" if role == "developer" else role  # its newer name in OpenAI's API
    if role not in ROLES:
        what = "missing" if role is None else f"should be one of {', '.join(ROLES)}, not {str(role)[:40]!r}"
        raise BadValue(f"{where}.role", what)
    if isinstance(content, list):  # the parts of OpenAI's format
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise BadValue(f"{where}.content", "has a part that is no text")
        content = "".join(map(str, texts))
    if not isinstance(content, str):
        what = "null" if content is None else f"should be text, not {type(content).__name__}"
        raise BadValue(f"{where}.content", what)
    if not content.strip():
        raise BadValue(f"{where}.content", "empty")
    return TextMessage(str(role), content)
