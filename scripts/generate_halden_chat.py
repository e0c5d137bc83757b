"""Conversations with the support desk of the Halden 3: a system message, then several questions and their answers.

    python scripts/generate_halden_chat.py --out lora_ft/builtin/data/halden_chat

The questions are those of `generate_halden.py`, split for split: test asks in wordings that train does not hold.
The same seed gives the same bytes.
"""

import random

from generate_halden import PRODUCT, generate, parse_arguments, write

SYSTEM = (
    f"You answer for the support desk of the {PRODUCT}.",
    f"You help owners of the {PRODUCT}, a battery.",
    f"Support desk of the {PRODUCT}",
)
MAX_QUESTIONS = 4


def converse(rows: list[dict], rng: random.Random) -> list[dict]:
    """The rows dealt out to conversations of one to four questions; every row is used once."""
    conversations, rest = [], list(rows)
    while rest:
        count = rng.randint(1, MAX_QUESTIONS)
        turns, rest = rest[:count], rest[count:]
        system = {"role": "system", "content": rng.choice(SYSTEM)}
        conversations.append({"messages": [system, *(message for row in turns for message in row["messages"])]})
    return conversations


def main() -> None:
    arguments = parse_arguments(__doc__, "lora_ft/builtin/data/halden_chat", 11)
    rng = random.Random(arguments.seed)
    splits = {split: converse(rows, rng) for split, rows in generate(arguments.seed).items()}
    what = f"Conversations with the support desk of the invented home battery {PRODUCT}"
    write(splits, arguments.out, "generate_halden_chat.py", arguments.seed, what)


if __name__ == "__main__":
    main()
