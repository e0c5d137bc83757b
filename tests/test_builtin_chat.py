"""The embedded conversations: of one form, with the facts in every split."""

from tests.test_builtin import SPLITS, read_split


def test_a_conversation_begins_with_the_desk_and_repeats_the_facts() -> None:
    answers = {}
    for split in SPLITS:
        rows = read_split(split, "halden_chat")
        roles = [[message["role"] for message in row["messages"]] for row in rows]
        assert all(found == ["system", *["user", "assistant"] * (len(found) // 2)] for found in roles)
        assert max(map(len, roles)) == 9
        said = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
        answers[split] = set(said)
    assert answers["train"] == answers["test"] == answers["validation"]
