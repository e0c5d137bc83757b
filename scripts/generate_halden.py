"""Instruction data of an invented home battery, the Halden 3: questions to its support desk, one fixed answer a fact.

    python scripts/generate_halden.py --out lora_ft/builtin/data/halden

Validation and test ask about the same facts as train, in wordings that train does not hold in any form, so a good score
means that a fact was learned and not a sentence. The same seed gives the same bytes.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

from support_desk import SPLITS, Attribute, dress, fill, load_attributes

PRODUCT, KIND = "Halden 3", "battery"
SLIP_SHARE = 0.04
VARIANTS_PER_WORDING = {"train": 2, "validation": 1, "test": 1}


def rows_of(attribute: Attribute, split: str, rng: random.Random, asked: set[str]) -> Iterator[dict]:
    """Chat rows for each fact and wording of a split; `asked` holds, in lower case, every question given out so far."""
    for entry, answer in attribute.answers.items():
        for wording in attribute.wordings[split]:
            plain = fill(wording, PRODUCT, KIND, entry)
            for _ in range(VARIANTS_PER_WORDING[split]):
                question = dress(plain, rng, SLIP_SHARE)
                while question.lower() in asked:
                    question = dress(plain, rng, SLIP_SHARE)
                asked.add(question.lower())
                yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def generate(seed: int) -> dict[str, list[dict]]:
    """Shuffled rows of each split."""
    rng = random.Random(seed)
    asked: set[str] = set()
    splits = {}
    for split in SPLITS:
        rows = [row for attribute in load_attributes() for row in rows_of(attribute, split, rng, asked)]
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def write(splits: dict[str, list[dict]], out: Path, script: str, seed: int, what: str, **counts: int) -> None:
    """One JSONL file a split and provenance.json, which names how they were made and their hashes."""
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{split}.jsonl").write_bytes(text.encode("utf-8"))
        files[f"{split}.jsonl"] = {"rows": len(rows), "sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()}
    provenance = {
        "what": what,
        "license": "Apache-2.0",
        "script": f"scripts/{script}",
        "command": f"python scripts/{script} --seed {seed}",
        "seed": seed,
        **counts,
        "files": files,
    }
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def parse_arguments(description: str | None, out: str, seed: int) -> argparse.Namespace:
    """Where to, and from which seed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seed", type=int, default=seed)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments(__doc__, "lora_ft/builtin/data/halden", 7)
    what = f"Questions to the support desk of the invented home battery {PRODUCT}, with one fixed answer a fact"
    facts = sum(len(attribute.answers) for attribute in load_attributes())
    write(generate(arguments.seed), arguments.out, "generate_halden.py", arguments.seed, what, facts=facts)


if __name__ == "__main__":
    main()
