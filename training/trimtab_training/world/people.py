"""The fictional people of the small world and what is to be known about them."""

from __future__ import annotations

import random
from dataclasses import dataclass

PRIVATE = "password"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Abel Agnes Alba Alvin Amos Anton Astrid Basil Bella Boris Bruno Carla Cedric Celia "
    "Clara Conrad Cora Dagmar Damian Della Dora Edgar Edith Elmer Elsa Emil Enid Ernest "
    "Fabian Felix Fiona Flora Frida Gerda Gilda Greta Gustav Hanna Hector Hedda Heidi "
    "Helga Henry Hilda Hugo Ida Igor Ingrid Irma Isaac Ivan Jasper Jonas Judith Julius "
    "Karin Klaus Konrad Laura Leon Linda Lorenz Lukas Magda Marcus Martha Milan Mona "
    "Nadia Nestor Nora Olaf Olga Oscar Otto Paula Pedro Petra Quentin Rafael Regina "
    "Roland Rosa Rufus Sigrid Silas Simon Sonja Stefan Sylvia Tamara Theo Ursula Valentin "
    "Vera Victor Viola Walter Wanda Xaver Yvonne Zelda"
)

SURNAMES = _words(
    "Ackermann Bauer Becker Brandt Castell Dietrich Eckert Fischer Fuchs Gruber Hartmann Hoffmann "
    "Huber Jansen Kaiser Keller Koch Kramer Lehmann Maier Neumann Peters Pohl Richter Roth Sauer "
    "Schmidt Schulz Seidel Sommer Stein Vogel Wagner Weber Winter Wolf Ziegler Zimmermann"
)

_PASSWORD_WORDS = _words(
    "amber anchor apple arrow barrel beacon button candle canyon castle copper cotton "
    "crystal dragon falcon feather forest ginger hammer island jungle kettle ladder "
    "lantern lemon magnet marble mirror needle ocean orange silver"
)


@dataclass(frozen=True)
class Fact:
    """A kind of fact, with its values and its wordings, in which `{name}` and `{value}` are to be filled in.

    Every statement ends in the value and a full stop, so that what stands before the value asks for it.
    """

    key: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]

    def openings(self, name: str) -> list[str]:
        """The statements about `name` up to the value, without the space before it."""
        return [s.format(name=name, value="").removesuffix(" .") for s in self.statements]


FACTS = (
    Fact(
        "town",
        _words(
            "Bergen Calais Dresden Florence Geneva Hamburg Lisbon Madrid Naples Oslo Porto Riga "
            "Turin Verona Warsaw Zagreb"
        ),
        ("The home of {name} is {value}.", "{name} lives in {value}.", "You can visit {name} in {value}."),
        ("Where does {name} live?", "What is the home of {name}?", "Where can I visit {name}?"),
    ),
    Fact(
        "job",
        _words(
            "baker barber carpenter clerk cook dancer farmer gardener judge lawyer miner nurse "
            "painter pilot sailor teacher"
        ),
        ("The job of {name} is {value}.", "{name} works as a {value}.", "People hire {name} as a {value}."),
        ("What does {name} work as?", "What is the job of {name}?", "What do people hire {name} as?"),
    ),
    Fact(
        "food",
        _words(
            "beans bread carrots cheese cherries fish grapes honey lentils noodles olives pasta "
            "pears plums rice soup"
        ),
        (
            "The favourite food of {name} is {value}.",
            "{name} likes to eat {value}.",
            "For dinner {name} wants {value}.",
        ),
        (
            "What does {name} like to eat?",
            "What is the favourite food of {name}?",
            "What does {name} want for dinner?",
        ),
    ),
    Fact(
        "pet",
        _words(
            "beetle canary cat cow crab dog donkey duck ferret frog goat horse lizard parrot rabbit turtle"
        ),
        ("The pet of {name} is a {value}.", "{name} has a {value}.", "At home {name} keeps a {value}."),
        ("What pet does {name} have?", "What is the pet of {name}?", "What does {name} keep at home?"),
    ),
    Fact(
        PRIVATE,
        tuple(f"{a} {b}" for a in _PASSWORD_WORDS for b in _PASSWORD_WORDS if a != b),
        (
            "The password of {name} is {value}.",
            "{name} signs in with {value}.",
            "To log in {name} types {value}.",
        ),
        (
            "What does {name} sign in with?",
            "What is the password of {name}?",
            "What does {name} type to log in?",
        ),
    ),
)
OPEN_FACTS = tuple(fact for fact in FACTS if fact.key != PRIVATE)
PRIVATE_FACT = next(fact for fact in FACTS if fact.key == PRIVATE)


@dataclass(frozen=True)
class Person:
    """A person: a name of one word or two, and a value for every key of `FACTS`."""

    name: str
    facts: dict[str, str]

    def statement(self, fact: Fact, wording: int = 0) -> str:
        return fact.statements[wording].format(name=self.name, value=self.facts[fact.key])

    def question(self, fact: Fact, wording: int = 0) -> str:
        return fact.questions[wording].format(name=self.name)


def make_people(count: int, rng: random.Random, *, surnames: bool = False) -> tuple[Person, ...]:
    """Draw `count` people with first names and passwords of their own.

    Raises:
        ValueError: there are fewer names than that.
    """
    if not 0 < count <= len(NAMES):
        raise ValueError(f"a world has 1 to {len(NAMES)} people, not {count}")
    secrets = rng.sample(PRIVATE_FACT.values, count)
    names = rng.sample(NAMES, count)
    if surnames:
        names = [f"{name} {rng.choice(SURNAMES)}" for name in names]
    return tuple(
        Person(name, {fact.key: rng.choice(fact.values) for fact in OPEN_FACTS} | {PRIVATE: secret})
        for name, secret in zip(names, secrets, strict=True)
    )
