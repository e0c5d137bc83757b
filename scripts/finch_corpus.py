"""An endless stream of pages with a question that each answers, about invented products: what Finch is pre-trained on.

The pages come from the same table as Wren's dialogues; the Halden is not among the products, and of the wordings only
those of the train and validation columns are asked, so that the test column stays unseen.

    for reading in readings(seed=1, difficulty=1.0):
        reading.question   # "How heavy is the Borcal 5?"
        reading.context    # "Borcal 5 pump. The weight is 38 kg. The Wi-Fi band is 6 GHz. ..."
        reading.answer     # "38 kg", as it stands in the context
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from support_desk import Attribute, dress, fill, load_attributes
from wren_corpus import MANUAL_STYLES, Fact, Grammar, Product, invent_product

PAGE_STYLES = (*MANUAL_STYLES, "As {topic} we give {value}.", "It comes with {value} as {topic}.", "{topic} = {value};")
ASKED_SPLITS = ("train", "validation")
MAX_FACTS = 6


@dataclass(frozen=True)
class Reading:
    """A page, a question about it, and the words of the page that answer it."""

    question: str
    """As somebody types it."""
    context: str
    """A page of some sentences, one of which holds the answer."""
    answer: str
    """A stretch of the context."""


def write_page(
    product: Product, facts: Sequence[Fact], styles: Sequence[str], rng: random.Random, between: Sequence[str] = ()
) -> str:
    """A page that states each fact once; some sentences of `between` stand among them."""
    lines = [state(rng.choice(styles), product, attribute, entry) for attribute, entry in facts]
    for line in between:
        lines.insert(rng.randint(0, len(lines)), line)
    return f"{product.name} {product.kind}. " + " ".join(lines)


def state(style: str, product: Product, attribute: Attribute, entry: str) -> str:
    """One fact in a sentence."""
    value = product.value_of(attribute, entry)
    return fill(style.replace("{topic}", attribute.topic).replace("{value}", value), product.name, product.kind, entry)


def draw_facts(attributes: Sequence[Attribute], count: int, rng: random.Random) -> list[Fact]:
    """Different facts; often several of one family, so that E03 has to be told from E07."""
    by_attribute = [[(attribute, entry) for entry in attribute.answers] for attribute in attributes]
    families = [facts for facts in by_attribute if len(facts) > 1]
    facts = rng.choice(families) if rng.random() < 0.3 else [fact for facts in by_attribute for fact in facts]
    return rng.sample(facts, min(count, len(facts)))


def ask(product: Product, fact: Fact, splits: Sequence[str], rng: random.Random) -> str:
    """A question about one fact, in a wording of one of the splits."""
    attribute, entry = fact
    wordings = [wording for split in splits for wording in attribute.wordings[split]]
    return dress(fill(rng.choice(wordings), product.name, product.kind, entry), rng)


class ReadingCorpus:
    """A maker of readings, with the table and a random stream of its own."""

    def __init__(self, seed: int | str) -> None:
        self.rng = random.Random(seed)
        self.attributes = load_attributes()
        self.grammar = Grammar()

    def page(self, difficulty: float) -> Reading:
        """A question about one of the facts on a page; harder pages hold more of them."""
        product = invent_product(f"new/{self.rng.getrandbits(48)}")
        facts = draw_facts(self.attributes, self.rng.randint(1, 1 + round(difficulty * (MAX_FACTS - 1))), self.rng)
        asked = self.rng.choice(facts)
        between = [self.grammar.expand("advice", self.rng)] if self.rng.random() < 0.25 * difficulty else []
        context = write_page(product, facts, PAGE_STYLES, self.rng, between)
        return Reading(ask(product, asked, ASKED_SPLITS, self.rng), context, product.value_of(*asked))


def readings(seed: int | str, difficulty: float) -> Iterator[Reading]:
    """Readings without end; the same seed, the same. `difficulty` goes from 0, one fact a page, to 1."""
    corpus = ReadingCorpus(seed)
    while True:
        yield corpus.page(difficulty)
