"""The invented world behind the embedded text: words with their inflections, people, towns and the facts about them.

Everything follows from one seed. Facts are fixed for all documents, so a model that reads enough of them can know them;
that is what fills its weights and makes it feel compression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")

ONSETS = "b br c ch d dr f fl g gl gr h j k kl l m n p pl qu r s sh sk st t tr v w z th".split()  # noqa: SIM905
VOWELS = "a e i o u ai ea oo ou".split()  # noqa: SIM905
CODAS = "b ck d g l lm ll m n nd nt p r rd rn sk st t th v x".split()  # noqa: SIM905
KINDS = ("tool", "plant", "dish", "beast", "garment", "vessel", "stone", "instrument")
COLOURS = ["red", "blue", "green", "grey", "white", "black", "yellow", "brown", "purple", "golden", "silver", "pink"]
MATERIALS = ["oak", "iron", "wool", "clay", "copper", "glass", "bone", "reed", "silk", "tin", "leather", "wax"]
REGIONS = ("the north", "the south", "the east", "the west", "the high valley", "the coast", "the marsh", "the islands")


@dataclass(frozen=True)
class Noun:
    one: str
    many: str
    kind: str
    colour: str
    material: str
    adjectives: tuple[str, ...]
    price: int


@dataclass(frozen=True)
class Verb:
    base: str
    third: str
    past: str
    participle: str
    gerund: str
    objects: str  # the kind of noun it takes
    favourites: tuple[int, ...]  # the nouns of that kind it takes most often
    manner: str  # the adverb that goes with it


@dataclass(frozen=True)
class Town:
    name: str
    river: str
    region: str
    product: int  # index of a noun
    people: int
    rival: int


@dataclass(frozen=True)
class Person:
    name: str
    she: bool
    town: int
    trade: str
    dish: int
    pet: int
    pet_name: str
    owns: int
    age: int
    friend: int
    hair: str


@dataclass(frozen=True)
class World:
    nouns: tuple[Noun, ...]
    by_kind: dict[str, tuple[int, ...]]
    verbs: tuple[Verb, ...]
    towns: tuple[Town, ...]
    people: tuple[Person, ...]
    trades: tuple[str, ...]
    identifiers: tuple[str, ...]


def pick(rng: Random, items: Sequence[T]) -> T:
    """Return an item, the earlier ones more often (density falls as one over the square root of the rank)."""
    u = rng.random()
    return items[int(u * u * len(items))]


def _word(rng: Random, used: set[str], syllables: int) -> str:
    while True:
        parts = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)]
        word = "".join(parts) + rng.choice(CODAS)
        if word not in used and 3 <= len(word) <= 9:
            used.add(word)
            return word


def _plural(rng: Random, word: str) -> str:
    if rng.random() < 0.12:
        return word + "en"
    return word + ("es" if word.endswith(("x", "s", "ch", "sh")) else "s")


def _verb(rng: Random, used: set[str], manners: Sequence[str], by_kind: dict[str, tuple[int, ...]]) -> Verb:
    base = _word(rng, used, 1 + (rng.random() < 0.5))
    third = base + ("es" if base.endswith(("x", "s", "ch", "sh")) else "s")
    past = participle = base + "ed"
    if rng.random() < 0.25:  # a strong verb: ends in "ew" and "own"
        past, participle = base + "ew", base + "own"
    kind = rng.choice(KINDS)
    favourites = tuple(rng.choice(by_kind[kind]) for _ in range(3))
    return Verb(base, third, past, participle, base + "ing", kind, favourites, rng.choice(manners))


def make_world(seed: int, nouns: int = 480, verbs: int = 160, towns: int = 80, people: int = 320) -> World:
    """Build the world of ``seed``; the counts set how much there is to know."""
    rng = Random(f"{seed}/world")
    used: set[str] = set()
    adjectives = [_word(rng, used, 1 + (rng.random() < 0.6)) + rng.choice(("y", "ish", "al", "")) for _ in range(120)]
    manners = [_word(rng, used, 1) + "ly" for _ in range(40)]
    trades = [_word(rng, used, 1) + rng.choice(("er", "smith", "wright", "ist")) for _ in range(48)]
    noun_list = []
    for index in range(nouns):
        one = _word(rng, used, 1 + (rng.random() < 0.6))
        of_noun = tuple(rng.choice(adjectives) for _ in range(4))
        facts = (KINDS[index % len(KINDS)], rng.choice(COLOURS), rng.choice(MATERIALS), of_noun)
        noun_list.append(Noun(one, _plural(rng, one), *facts, rng.randrange(2, 60)))
    by_kind = {kind: tuple(i for i, noun in enumerate(noun_list) if noun.kind == kind) for kind in KINDS}
    town_list = [
        Town(
            _word(rng, used, 2).capitalize(),
            _word(rng, used, 1).capitalize(),
            rng.choice(REGIONS),
            rng.randrange(nouns),
            rng.randrange(3, 99) * 100,
            (index + rng.randrange(1, towns)) % towns,
        )
        for index in range(towns)
    ]
    people_list = [
        Person(
            _word(rng, used, 1 + (rng.random() < 0.7)).capitalize(),
            rng.random() < 0.5,
            rng.randrange(towns),
            rng.choice(trades),
            rng.choice(by_kind["dish"]),
            rng.choice(by_kind["beast"]),
            _word(rng, used, 1).capitalize(),
            rng.choice(by_kind["tool"] + by_kind["garment"] + by_kind["instrument"]),
            rng.randrange(16, 90),
            (index + rng.randrange(1, people)) % people,
            rng.choice(COLOURS),
        )
        for index in range(people)
    ]
    return World(
        tuple(noun_list),
        by_kind,
        tuple(_verb(rng, used, manners, by_kind) for _ in range(verbs)),
        tuple(town_list),
        tuple(people_list),
        tuple(trades),
        tuple(_word(rng, used, 1) for _ in range(90)),
    )
