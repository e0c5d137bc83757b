"""An endless stream of generated English: manuals and support dialogues of invented products, stories and messages.

It is what the embedded base models are pre-trained on. It teaches the language, the many ways to ask one thing, and to
answer in a short sentence; it never names the Halden 3 or one of its facts.

    for document in documents(seed=1):
        document.messages   # a dialogue, or () for plain text
        document.text       # plain text, or "" for a dialogue
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from support_desk import SPLITS, Attribute, dress, fill, load_attributes

PHRASES = Path(__file__).with_name("wren_phrases.yaml")
KINDS = (
    "inverter",
    "charger",
    "heat pump",
    "boiler",
    "power station",
    "freezer",
    "pump",
    "battery",
    "dryer",
    "ventilator",
)
SYLLABLES = (
    "bor",
    "cal",
    "den",
    "fi",
    "gra",
    "ker",
    "lun",
    "mo",
    "nar",
    "pel",
    "qui",
    "ras",
    "sol",
    "tar",
    "ul",
    "vex",
    "wim",
    "zo",
)
SUFFIXES = ("2", "4", "5", "7", "9", "12", "40", "210", "600", "Mini", "Plus", "Max", "Pro", "S", "X")
ANSWER_STYLES = (
    "The {topic} of the {p} is {value}.",
    "It is {value}.",
    "For the {p} it is {value}.",
    "Our manual says: {value}.",
    "{value}.",
    "That is {value}, see the manual.",
    "The {topic}: {value}.",
)
MANUAL_STYLES = ("{topic}: {value}.", "The {topic} is {value}.", "The {topic} of the {p} is {value}.")
DESK_STYLES = (
    "You answer for the support desk of the {p}.",
    "You help owners of the {p}, a {kind}.",
    "Support desk of the {p}",
)

Fact = tuple[Attribute, str]
"""An attribute and one entry of its family ("" where it has none)."""


@dataclass(frozen=True)
class Document:
    """One text of the corpus."""

    kind: str
    """Which of `DOCUMENT_SHARES` made it."""
    text: str = ""
    """Plain text; empty for a dialogue."""
    messages: tuple[dict[str, str], ...] = ()
    """Dialogue turns with `role` and `content`; empty for plain text."""


@dataclass(frozen=True)
class Product:
    """An invented device; its seed alone decides every value of its manual."""

    name: str
    kind: str
    answer_style: str
    seed: str

    def value_of(self, attribute: Attribute, entry: str) -> str:
        """The random but fixed value of one attribute."""
        rng = random.Random(f"{self.seed}/{attribute.topic}/{entry}")
        pattern = rng.choice(attribute.value_patterns)
        digits_drawn = re.sub("#", lambda _: rng.choice("123456789"), pattern)
        return re.sub(r"\^", lambda _: rng.choice("BCDFGKLMNPRSTV"), digits_drawn)


def invent_product(seed: str) -> Product:
    """The product that belongs to a seed."""
    rng = random.Random(seed)
    brand = "".join(rng.sample(SYLLABLES, rng.randint(2, 3))).capitalize()
    return Product(f"{brand} {rng.choice(SUFFIXES)}", rng.choice(KINDS), rng.choice(ANSWER_STYLES), seed)


class Grammar:
    """Texts expanded from the phrase file."""

    def __init__(self, phrases: Path = PHRASES) -> None:
        lists = yaml.safe_load(phrases.read_text(encoding="utf-8"))
        self.rules: dict[str, list[str]] = {name: block.strip().splitlines() for name, block in lists.items()}

    def expand(self, rule: str, rng: random.Random, remembered: dict[str, str] | None = None) -> str:
        """One random text of a rule; <hero:name> remembers what it drew, so that <hero> repeats it."""
        remembered = {} if remembered is None else remembered

        def draw(slot: re.Match[str]) -> str:
            name, _, source = slot.group(1).partition(":")
            if name in remembered:
                return remembered[name]
            text = self.expand(source or name, rng, remembered)
            if source:
                remembered[name] = text
            return text

        return re.sub(r"<([a-z_:]+)>", draw, rng.choice(self.rules[rule]))


class Corpus:
    """Makers of each kind of document; they share the tables, the well-known products and one random stream."""

    def __init__(self, seed: int, num_known_products: int) -> None:
        self.rng = random.Random(seed)
        self.grammar = Grammar()
        by_attribute = [[(attribute, entry) for entry in attribute.answers] for attribute in load_attributes()]
        self.families = [facts for facts in by_attribute if len(facts) > 1]
        self.facts = [fact for facts in by_attribute for fact in facts]
        self.known = [invent_product(f"known/{index}") for index in range(num_known_products)]

    def plain(self) -> Document:
        """Stories, notes, lists and short messages."""
        return Document("plain", text=self.grammar.expand("text", self.rng))

    def small_talk(self) -> Document:
        """One to three small exchanges about anything."""
        return Document("small_talk", messages=tuple(self._exchanges("exchange", self.rng.randint(1, 3))))

    def drill(self) -> Document:
        """Words and codes to be repeated, which makes every one of them readable and writable."""
        return Document("drill", messages=tuple(self._exchanges("drill", self.rng.randint(1, 4))))

    def manual(self) -> Document:
        """A page from the manual of a product nobody has heard of."""
        return Document("manual", text=self._manual_page(self._new_product(), self._some_facts(self.rng.randint(3, 8))))

    def open_book(self) -> Document:
        """A manual page of a new product as system message, then questions that it answers."""
        product, facts = self._new_product(), self._some_facts(self.rng.randint(2, 6))
        asked = self.rng.sample(facts, min(len(facts), self.rng.randint(1, 4)))
        page = turn("system", self._manual_page(product, facts))
        return Document("open_book", messages=(page, *self._dialogue(product, asked)))

    def closed_book(self) -> Document:
        """Questions about a well-known product, without its manual: the answers have to be remembered."""
        product = self.rng.choice(self.known)
        messages = list(self._dialogue(product, self._some_facts(self.rng.randint(1, 4))))
        if self.rng.random() < 0.3:
            messages[0] = turn("user", f"{product.name}: {messages[0]['content']}")
        else:
            messages.insert(0, turn("system", self.rng.choice(DESK_STYLES).format(p=product.name, kind=product.kind)))
        return Document("closed_book", messages=tuple(messages))

    def mixed_questions(self) -> Document:
        """A few things about a new product, asked again in other words: a like question gets a like answer."""
        product, facts = self._new_product(), self._some_facts(self.rng.randint(2, 3))
        asked = [self.rng.choice(facts) for _ in range(self.rng.randint(4, 7))]
        return Document("mixed_questions", messages=tuple(self._dialogue(product, asked)))

    def _exchanges(self, rule: str, count: int) -> Iterator[dict[str, str]]:
        for _ in range(count):
            user, _, assistant = self.grammar.expand(rule, self.rng).partition(" => ")
            yield turn("user", user)
            yield turn("assistant", assistant)

    def _new_product(self) -> Product:
        return invent_product(f"new/{self.rng.getrandbits(48)}")

    def _some_facts(self, count: int) -> list[Fact]:
        """Different facts; often several of one family, so that E03 has to be told from E07."""
        if self.rng.random() < 0.3:
            family = self.rng.choice(self.families)
            return self.rng.sample(family, min(count, len(family)))
        return self.rng.sample(self.facts, count)

    def _manual_page(self, product: Product, facts: list[Fact]) -> str:
        style = self.rng.choice(MANUAL_STYLES)
        lines = [self._say(style, product, attribute, entry) for attribute, entry in facts]
        return f"{product.name} {product.kind}. " + " ".join(lines)

    def _dialogue(self, product: Product, facts: list[Fact]) -> Iterator[dict[str, str]]:
        for attribute, entry in facts:
            wordings = [wording for split in SPLITS for wording in attribute.wordings[split]]
            question = fill(self.rng.choice(wordings), product.name, product.kind, entry)
            yield turn("user", dress(question, self.rng))
            yield turn("assistant", self._say(product.answer_style, product, attribute, entry))

    @staticmethod
    def _say(style: str, product: Product, attribute: Attribute, entry: str) -> str:
        value = product.value_of(attribute, entry)
        sentence = style.replace("{topic}", attribute.topic).replace("{value}", value)
        return fill(sentence, product.name, product.kind, entry)


def turn(role: str, content: str) -> dict[str, str]:
    """One chat message."""
    return {"role": role, "content": content}


DOCUMENT_SHARES: dict[Callable[[Corpus], Document], int] = {
    Corpus.plain: 24,
    Corpus.small_talk: 6,
    Corpus.drill: 24,
    Corpus.manual: 4,
    Corpus.open_book: 12,
    Corpus.closed_book: 18,
    Corpus.mixed_questions: 12,
}


def documents(seed: int, num_known_products: int = 12) -> Iterator[Document]:
    """Documents without end; the same seed gives the same ones."""
    corpus = Corpus(seed, num_known_products)
    makers, shares = list(DOCUMENT_SHARES), list(DOCUMENT_SHARES.values())
    while True:
        yield corpus.rng.choices(makers, shares)[0](corpus)
