"""Conversations written down and read back."""

import json

import pytest

from ossature.data.conversations import conversation
from ossature.data.harmony import Conversation, Message
from ossature.data.records import record

TOOL = {"name": "f", "description": "Does it.", "parameters": {"type": "object", "properties": {}}}
USER = Message("user", "What?")
ANSWER = Message("assistant", "That.", "final")
THOUGHT = Message("assistant", "Hm.", "analysis")
CALL = Message("assistant", '{"a": 1, "b": "é"}', "commentary", "functions.f")
RESULT = Message("tool", '{"c": [1, 2]}', author="functions.f")
TEXT = Message("tool", "sunny", author="functions.f", content_type="text")
CASES = {
    "plain": [Message("developer", "Be brief."), USER, ANSWER, USER, ANSWER],
    "thinking": [USER, THOUGHT, ANSWER],
    "call": [USER, THOUGHT, CALL, RESULT, THOUGHT, ANSWER],
    "two_calls": [USER, CALL, TEXT, CALL, RESULT, ANSWER],
    "preamble": [USER, THOUGHT, Message("assistant", "I look.", "commentary"), CALL, TEXT, ANSWER],
    "two_thoughts": [USER, THOUGHT, THOUGHT, ANSWER],
    "thought_alone": [USER, THOUGHT],
    "thought_then_user": [USER, THOUGHT, USER, ANSWER],
    "empty_thought": [USER, Message("assistant", "", "analysis"), ANSWER],
    "empty_answer": [USER, THOUGHT, Message("assistant", "", "final")],
    "odd_arguments": [
        USER, Message("assistant", '{"a":1', "commentary", "functions.f"), TEXT, ANSWER,
    ],
    "unspaced": [USER, Message("assistant", '{"a":1}', "commentary", "functions.f"), TEXT, ANSWER],
    "other_type": [
        USER, Message("assistant", "1", "commentary", "python", content_type="code"),
        Message("tool", "1", author="python", content_type="text"), ANSWER,
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_conversation_is_read_back_as_it_was(case):
    chat = Conversation(tuple(CASES[case]), (TOOL,), "high", identity="You are a test.")
    written = json.loads(json.dumps(record(chat)))

    assert conversation(written, "messages", frozenset()) == chat


def test_thinking_shares_an_entry_with_what_it_led_to():
    written = record(Conversation((USER, THOUGHT, CALL, RESULT, THOUGHT, ANSWER)))["messages"]

    assert [sorted(entry) for entry in written] == [
        ["content", "role"],
        ["role", "thinking", "tool_calls"],
        ["content", "name", "role"],
        ["content", "role", "thinking"],
    ]
    assert written[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": "é"}


def asked(*messages: dict) -> Conversation:
    return conversation({"messages": list(messages)}, "messages", frozenset(), answered=False)


def calls(*names: str) -> dict:
    made = [{"id": f"id-{n}", "function": {"name": n, "arguments": "{}"}} for n in names]
    return {"role": "assistant", "tool_calls": made}


def test_results_find_their_calls_by_id():
    first = {"role": "tool", "tool_call_id": "id-f", "content": "1"}
    second = {"role": "tool", "tool_call_id": "id-g", "content": "2"}
    chat = asked({"role": "user", "content": "a"}, calls("f", "g"), first, second)

    assert [m.author for m in chat.messages if m.role == "tool"] == ["functions.f", "functions.g"]


def test_a_result_of_no_call_is_refused():
    with pytest.raises(ValueError, match="message 3: tool_call_id 'id-x' is of no call before it"):
        asked(
            {"role": "user", "content": "a"}, calls("f"),
            {"role": "tool", "tool_call_id": "id-x", "content": "1"},
        )  # fmt: skip


def test_a_question_alone_may_be_asked():
    assert asked({"role": "user", "content": "a"}).messages == (Message("user", "a"),)
    with pytest.raises(ValueError, match="nothing to learn"):
        conversation({"messages": [{"role": "user", "content": "a"}]}, "messages", frozenset())
