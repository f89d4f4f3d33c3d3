"""The words of the task: names of tables and columns, and text values, each word in exactly one split.

Real words come in topics and a topic belongs to one split. Pseudo-words are made of syllables, of letter
triples of real training words, or of letters at random, and a hash of the word says to which split it
belongs. So the training pool is far too large to be learnt by heart and a model has to copy names from
its prompt.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from functools import cache
from string import ascii_lowercase
from typing import Literal

Split = Literal["train", "valid", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "valid", "heldout")


@dataclass(frozen=True)
class Topic:
    """The vocabulary of one subject area."""

    tables: tuple[str, ...]
    texts: tuple[str, ...]
    numbers: tuple[str, ...]
    values: tuple[str, ...]


def _topic(tables: str, texts: str, numbers: str, values: str) -> Topic:
    return Topic(tuple(tables.split()), tuple(texts.split()), tuple(numbers.split()), tuple(values.split()))


_TRAIN = (
    _topic(
        "customer purchase product supplier shipment",
        "name email city category brand",
        "price quantity discount weight stock",
        "paris london berlin tokyo books toys sony premium standard",
    ),
    _topic(
        "student course teacher enrolment classroom",
        "surname subject level nickname building",
        "grade credits age salary capacity",
        "physics history biology latin maths smith jones honours",
    ),
    _topic(
        "flight airport airline passenger pilot",
        "origin destination country carrier status",
        "distance duration seats altitude fare",
        "delayed boarding madrid oslo dublin lufthansa cancelled",
    ),
    _topic(
        "doctor patient hospital visit treatment",
        "diagnosis speciality ward insurer blood",
        "dose cost beds height temperature",
        "asthma surgery flu cardiology allergy fever chronic",
    ),
    _topic(
        "singer album concert stadium song",
        "genre title label venue language",
        "sales minutes tickets rating attendance",
        "rock jazz blues opera folk english french velvet",
    ),
    _topic(
        "employee department project office manager",
        "role team location contract skill",
        "wage budget hours bonus floor",
        "engineer analyst remote permanent sales finance junior senior",
    ),
    _topic(
        "player club match league coach",
        "position nation colour sponsor season",
        "goals points wins losses assists",
        "striker keeper defender brazil italy spain red blue",
    ),
    _topic(
        "book author library publisher loan",
        "isbn format shelf edition topic",
        "pages copies year chapters fee",
        "novel poetry hardcover paperback penguin drama essay",
    ),
    _topic(
        "restaurant dish chef menu reservation",
        "cuisine district flavour course_type service",
        "calories stars tables portion tip",
        "italian thai mexican spicy sweet dessert starter vegan",
    ),
    _topic(
        "river lake mountain region island",
        "climate continent soil province basin",
        "length depth area elevation population",
        "tropical arid polar asia europe africa granite",
    ),
    _topic(
        "account branch card transfer customer_group",
        "currency iban holder purpose bank",
        "balance amount interest rate overdraft",
        "euro dollar savings rent payroll gold silver visa",
    ),
    _topic(
        "car dealer engine garage repair",
        "model maker fuel gearbox plate",
        "power mileage doors torque emission",
        "diesel petrol electric manual automatic ford toyota",
    ),
    _topic(
        "movie director actor studio award",
        "plot screenplay theme audience region_code",
        "revenue votes runtime screens sequel",
        "comedy thriller horror pixar oscar winner family",
    ),
    _topic(
        "museum painting artist exhibition gallery",
        "style medium period donor room",
        "width visitors worth century frames",
        "cubism baroque oil marble picasso monet modern",
    ),
    _topic(
        "farm crop field tractor harvest",
        "variety fertiliser farmer irrigation market",
        "yield hectares rainfall moisture acreage",
        "wheat maize barley organic drip potato spring",
    ),
    _topic(
        "server cluster process user session",
        "host protocol system owner zone",
        "memory cores latency uptime port",
        "linux idle active staging production http alice",
    ),
    _topic(
        "hotel guest suite booking staff",
        "view bedding chain meal agency",
        "nights sleeps deposit deposit_rate surcharge",
        "ocean garden deluxe breakfast hilton summer",
    ),
    _topic(
        "planet star telescope comet galaxy",
        "constellation shape observer spectrum orbit",
        "mass radius brightness moons velocity",
        "orion spiral elliptical hubble kepler dwarf giant",
    ),
    _topic(
        "train station platform route ticket",
        "operator gauge terminal signal track",
        "speed wagons stops delay fares",
        "express local freight night central north south",
    ),
    _topic(
        "animal zoo cage keeper species",
        "diet habitat sex family_name origin_place",
        "lifespan litter teeth legs weight_kg",
        "carnivore herbivore forest desert male female lion",
    ),
)
_VALID = (
    _topic(
        "ship harbour captain cargo",
        "flag dock hull anchor",
        "tonnage draught crew knots",
        "panama tanker ferry trawler steel greek",
    ),
    _topic(
        "recipe ingredient kitchen cook",
        "garnish texture utensil taste",
        "grams servings sugar boiling",
        "baked grilled salty bitter steamed raw",
    ),
)
_HELDOUT = (
    _topic(
        "vineyard wine grower bottle",
        "grape aroma appellation cork",
        "acidity tannin vintage barrels",
        "merlot rioja bordeaux fruity oaky dry",
    ),
    _topic(
        "castle knight tournament banner",
        "heraldry realm squire armour",
        "moat towers lances valour",
        "crest azure siege joust bronze oaken",
    ),
    _topic(
        "satellite rocket mission launchpad",
        "payload hangar booster propellant",
        "thrust apogee stages ignition",
        "falcon ariane hydrazine lunar geosync aborted",
    ),
    _topic(
        "drug trial laboratory compound",
        "molecule placebo reagent enzyme",
        "dosage toxicity purity halflife",
        "ibuprofen statin phase inhibitor oral topical",
    ),
    _topic(
        "bridge tunnel contractor inspection",
        "material girder surveyor permit",
        "span clearance lanes corrosion",
        "concrete timber suspension cantilever urgent overdue",
    ),
)

_TOPICS: dict[Split, tuple[Topic, ...]] = {"train": _TRAIN, "valid": _VALID, "heldout": _HELDOUT}

_ONSETS = (*"bcdfghklmnprstvz", "br", "dr", "st", "tr")
_VOWELS = ["a", "e", "i", "o", "u"]
_CODAS = ("", "", "n", "r", "l", "s")

# SQLite's keywords, and the words that the questions themselves are made of: no name or made-up value is one.
_KEYWORDS = (
    "abort action add after all alter always analyze and as asc attach autoincrement avg before begin "
    "between by cascade case cast check collate column commit conflict constraint count create cross "
    "current database default deferrable deferred delete desc detach distinct do drop each else end "
    "escape except exclude exclusive exists explain fail filter first following for foreign from full "
    "generated glob group groups having if ignore immediate in index indexed initially inner insert "
    "instead intersect into is isnull join key last left like limit match materialized max min "
    "natural no not nothing notnull null nulls of offset on or order others outer over partition plan "
    "pragma preceding primary query raise range real recursive references regexp reindex release "
    "rename replace restrict returning right rollback row rows savepoint select set sum table temp "
    "temporary text then ties to transaction trigger unbounded union unique update using vacuum "
    "values view virtual when where window with without "
)
_QUESTION_WORDS = (
    "above along also any ascending at average begins below both compute contains count descending "
    "different differs distinct either ends equals every exceeds fewer find from give greater has "
    "high highest how includes its joined keeping known largest least less lies list low lower lowest "
    "many maximum mean minimum missing more most none number only ordered per present question ranges "
    "record recorded result rowid show smallest some sorted starts than that the together total under "
    "unknown what which whose "
)
RESERVED = frozenset(f"{_KEYWORDS}{_QUESTION_WORDS}".split())


def words_of(topic: Topic) -> frozenset[str]:
    """All the single words of a topic; compound names count with each of their parts."""
    names = (*topic.tables, *topic.texts, *topic.numbers, *topic.values)
    return frozenset(part for name in names for part in name.split("_"))


@cache
def real_words(split: Split) -> frozenset[str]:
    """The real words that may occur in a split; a word that a held-out topic uses is taken from training."""
    own = frozenset().union(*(words_of(topic) for topic in _TOPICS[split]))
    if split == "heldout":
        return own
    taken = real_words("heldout") if split == "valid" else real_words("heldout") | real_words("valid")
    return own - taken


@cache
def topics(split: Split) -> tuple[Topic, ...]:
    """The topics of a split, without the words that another split holds."""
    allowed = real_words(split)

    def keep(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(n for n in names if set(n.split("_")) <= allowed and n not in RESERVED)

    return tuple(Topic(keep(t.tables), keep(t.texts), keep(t.numbers), keep(t.values)) for t in _TOPICS[split])


def pseudo_split(word: str) -> Split:
    """The split a pseudo-word belongs to: one in twenty is held out, one in twenty is for validation."""
    bucket = zlib.crc32(word.encode()) % 20
    return "heldout" if bucket == 0 else "valid" if bucket == 1 else "train"


@cache
def _all_real_words() -> frozenset[str]:
    return frozenset().union(*(words_of(t) for group in _TOPICS.values() for t in group))


@cache
def _next_letters() -> dict[str, tuple[str, ...]]:
    """For every two letters of a real training word the letters that follow them; "$" ends a word."""
    following: dict[str, list[str]] = {}
    for word in sorted(real_words("train")):
        marked = f"^^{word}$"
        for i in range(len(word) + 1):
            following.setdefault(marked[i : i + 2], []).append(marked[i + 2])
    return {pair: tuple(letters) for pair, letters in following.items()}


def _syllables(rng: random.Random) -> str:
    count = rng.choice((2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(count)) + rng.choice(_CODAS)


def _english_like(rng: random.Random) -> str:
    word = "^^"
    while not word.endswith("$") and len(word) < 12:
        word += rng.choice(_next_letters()[word[-2:]])
    return word.strip("^$")


def _letters(rng: random.Random) -> str:
    return "".join(rng.choice(ascii_lowercase) for _ in range(rng.randint(4, 6)))


def pseudo_word(rng: random.Random, split: Split) -> str:
    """A made-up word that is no real word of any split."""
    while True:
        (make,) = rng.choices((_syllables, _english_like, _letters), (40, 50, 10))
        word = make(rng)
        taken = word in RESERVED or word in _all_real_words() or len(word) < 4
        if pseudo_split(word) == split and not taken:
            return word
