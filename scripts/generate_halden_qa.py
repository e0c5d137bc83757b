"""Questions about pages of manuals of the invented Halden series, each answered by words of its page.

    python scripts/generate_halden_qa.py --out lora_ft/builtin/data/halden_qa

Columns as in the classic reading tests: context, question, text (the answer, as it stands there). No page is in
two splits, the values on it are drawn at random, and validation and test ask in wordings that train does not hold: to
learn train by heart helps nobody. The same seed gives the same bytes.
"""

import random

from finch_corpus import ask, draw_facts, write_page
from generate_halden import KIND, parse_arguments, write
from support_desk import SPLITS, load_attributes
from wren_corpus import SUFFIXES, Product

PAGES = {"train": 600, "validation": 60, "test": 120}
QUESTIONS_PER_PAGE = 2
STYLES = (
    "Our data sheet gives {value} as {topic}.",
    "For the {topic} we measured {value}.",
    "{topic} (see the plate): {value}.",
    "Please note the {topic}, which is {value}.",
)
BETWEEN = (
    "This page belongs to the Halden series.",
    "Keep it near the device.",
    "All values hold for new devices.",
    "Ask your installer before you change anything.",
)


def generate(seed: int) -> dict[str, list[dict]]:
    """Rows of each split, two questions a page."""
    rng = random.Random(seed)
    attributes = load_attributes()
    splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for split, count in PAGES.items():
        for page in range(count):
            product = Product(f"Halden {rng.choice(SUFFIXES)}", KIND, "", f"halden/{seed}/{split}/{page}")
            facts = draw_facts(attributes, rng.randint(3, 5), rng)
            context = write_page(product, facts, STYLES, rng, rng.sample(BETWEEN, rng.randint(0, 2)))
            for fact in rng.sample(facts, QUESTIONS_PER_PAGE):
                question = ask(product, fact, [split], rng)
                splits[split].append({"context": context, "question": question, "text": product.value_of(*fact)})
    return splits


def main() -> None:
    arguments = parse_arguments(__doc__, "lora_ft/builtin/data/halden_qa", 13)
    what = "Questions about pages on the invented Halden series, each answered by words of its page"
    pages = sum(PAGES.values())
    write(generate(arguments.seed), arguments.out, "generate_halden_qa.py", arguments.seed, what, pages=pages)


if __name__ == "__main__":
    main()
