"""Private data is found by form and check digits, and nothing else is."""

from collections import Counter

import pytest

from lora_ft.data.example import Example
from lora_ft.data.prepare import build_splits
from lora_ft.data.privacy import find_private, redact_example, redact_text
from tests.data.bases import make_tokenizer


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("write to anna.b+x@example.co.uk!", "write to [EMAIL]!"),
        ("call +49 30 1234567 or (415) 555-2671", "call [PHONE] or [PHONE]"),
        ("0044 20 7946 0958", "[PHONE]"),
        ("card 4111 1111 1111 1111.", "card [CARD]."),
        ("card 4111-1111-1111-1112", "card 4111-1111-1111-1112"),
        ("pay DE89 3704 0044 0532 0130 00 now", "pay [IBAN] now"),
        ("pay DE88 3704 0044 0532 0130 00 now", "pay DE88 3704 0044 0532 0130 00 now"),
        ("ip 8.8.8.8, not 192.168.0.1 or 1.2.3", "ip [IP_ADDRESS], not 192.168.0.1 or 1.2.3"),
        ("at 2001:4860:4860::8888", "at [IP_ADDRESS]"),
        ("ssn 536-90-4399, not 000-12-3456", "ssn [NATIONAL_ID], not 000-12-3456"),
        ("DNI 54362315-K", "DNI [NATIONAL_ID]"),
        ("codice RSSMRA85T10A562S", "codice [NATIONAL_ID]"),
        ("cpf 529.982.247-25", "cpf [NATIONAL_ID]"),
        ("key sk-abcdefghijklmnopqrstuvwxyz123456", "key [API_KEY]"),
        ("AKIAIOSFODNN7EXAMPLE", "[API_KEY]"),
        ("ghp_" + "a1" * 18, "[API_KEY]"),
        ("hf_" + "aB" * 17, "[API_KEY]"),
        ("xoxb-123456789012-abcdef", "[API_KEY]"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U", "[TOKEN]"),
        ("https://joe:s3cret@host/x", "https://[PASSWORD]@host/x"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nok", "[PRIVATE_KEY]\nok"),
        ("at 12:30:45 on 2024-01-02, 1234567890, 3.14159265 and v1.2.3.4", None),
        ("48/2 = 24 and 48+24 = 72; 1,000,000", None),
        ("", None),
    ],
)
def test_what_is_masked(text, redacted):
    assert redact_text(text, Counter()) == (text if redacted is None else redacted)


def test_real_arithmetic_holds_nothing_private(shared_data):
    import json

    rows = json.loads((shared_data / "gsm8k_train.json").read_text("utf-8"))
    assert not [finding for row in rows for finding in find_private(row["instruction"] + "\n" + row["output"])]


def test_a_conversation_is_masked_in_all_its_texts():
    call = {"type": "function", "function": {"name": "mail", "arguments": {"to": ["a@example.org"], "n": 1}}}
    messages = ({"role": "user", "content": "I am b@example.org"}, {"role": "assistant", "tool_calls": [call]})
    counts = Counter()
    masked = redact_example(Example("rows:1", messages), counts)
    assert masked.messages[0]["content"] == "I am [EMAIL]"
    assert masked.messages[1]["tool_calls"][0]["function"] == {"name": "mail", "arguments": {"to": ["[EMAIL]"], "n": 1}}
    assert counts == {"EMAIL": 2}


def test_masked_rows_reach_neither_tokens_nor_examples(write_rows):
    rows = [{"prompt": f"{n}: who?", "completion": f"user{n}@example.org"} for n in range(10)]
    tokenizer = make_tokenizer("llama3")
    splits = build_splits(write_rows(rows, redact=True), tokenizer)
    assert splits.report.redacted == {"EMAIL": 10}
    assert {example.reference for example in splits.examples("train")} == {"[EMAIL]"}
    assert not any("@" in tokenizer.decode(ids) for ids in splits.train["input_ids"])
    assert not any(b"example.org" in path.read_bytes() for path in splits.folder.iterdir())
