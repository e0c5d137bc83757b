"""Text that has nothing to do with any task: stories, notes and messages, by which a run sees what was forgotten.

    python scripts/generate_general.py --out lora_ft/builtin/data/general

It is of the kind that the embedded bases were pre-trained on, from a seed of its own. The same seed gives the same
bytes.
"""

import argparse
import hashlib
import json
from pathlib import Path

from wren_corpus import Corpus

NUM_TEXTS, MIN_CHARACTERS = 96, 60


def generate(seed: int) -> list[str]:
    """Different texts of at least `MIN_CHARACTERS` characters, so that each has something to foretell."""
    corpus, texts = Corpus(seed, num_known_products=0), dict[str, None]()
    while len(texts) < NUM_TEXTS:
        text = corpus.plain().text
        if len(text) >= MIN_CHARACTERS:
            texts[text] = None
    return list(texts)


def write(texts: list[str], out: Path, seed: int) -> None:
    """text.jsonl, and provenance.json, which names how it was made and its hash."""
    out.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode("utf-8")
    (out / "text.jsonl").write_bytes(content)
    provenance = {
        "what": "Generated stories, notes and messages, of the kind the embedded bases were pre-trained on",
        "license": "Apache-2.0",
        "script": "scripts/generate_general.py",
        "command": f"python scripts/generate_general.py --seed {seed}",
        "seed": seed,
        "files": {"text.jsonl": {"rows": len(texts), "sha256": hashlib.sha256(content).hexdigest()}},
    }
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lora_ft/builtin/data/general"))
    parser.add_argument("--seed", type=int, default=1907)
    arguments = parser.parse_args()
    write(generate(arguments.seed), arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
