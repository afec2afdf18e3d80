"""Stories, dialogues, entries and letters: agreement, tense, pronouns, facts, and things to be kept in mind."""

from __future__ import annotations

from random import Random

from embedded_world import Noun, Person, Verb, World, pick

TENSES = ("past", "past", "present", "future")
TIMES = {
    "past": ("yesterday", "last night", "one morning", "long ago", "in the spring"),
    "present": ("today", "every morning", "at this hour", "in the winter", "again"),
    "future": ("tomorrow", "next week", "soon", "in the autumn", "one day"),
}
PLACES = ("the market", "the bridge", "the mill", "the harbour", "the school", "the tower", "the garden", "the inn")
MOODS = ("glad", "tired", "angry", "proud", "afraid", "calm", "curious", "lonely")
REASONS = ("was raining", "was late", "was too cold", "was a feast day", "was so quiet", "was market day")
OBJECTIVE = {"she": "her", "he": "him", "I": "me"}
NUMBER_WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def subject(person: Person) -> str:
    return "she" if person.she else "he"


def possessive(person: Person) -> str:
    return "her" if person.she else "his"


def conjugate(verb: Verb, tense: str, plural: bool = False, negated: bool = False) -> str:
    """Return the verb phrase, e.g. "did not flan", "will flan", "flans"."""
    if tense == "future":
        return f"will {'not ' if negated else ''}{verb.base}"
    if negated:
        auxiliary = "did" if tense == "past" else ("do" if plural else "does")
        return f"{auxiliary} not {verb.base}"
    return verb.past if tense == "past" else (verb.base if plural else verb.third)


def be(tense: str, plural: bool = False) -> str:
    if tense == "future":
        return "will be"
    return {("past", False): "was", ("past", True): "were", ("present", False): "is", ("present", True): "are"}[
        (tense, plural)
    ]


def noun_phrase(rng: Random, noun: Noun) -> tuple[str, bool]:
    """Return a phrase with this noun and whether it is plural."""
    adjective = pick(rng, noun.adjectives)
    form = rng.randrange(6)
    if form == 0:
        return f"the {noun.one}", False
    if form == 1:
        return f"{article(adjective)} {noun.one}", False
    if form == 2:
        return f"the {noun.colour} {noun.one}", False
    if form == 3:
        return f"{rng.choice(NUMBER_WORDS)} {adjective} {noun.many}", True
    if form == 4:
        return f"the {noun.many}", True
    return f"{article(noun.one)} of {noun.material}", False


def object_of(rng: Random, world: World, verb: Verb) -> Noun:
    return world.nouns[rng.choice(verb.favourites) if rng.random() < 0.5 else pick(rng, world.by_kind[verb.objects])]


def clause(rng: Random, world: World, who: str, tense: str, plural: bool = False) -> str:
    """Return ``who`` doing something in ``tense``, in the active or the passive voice."""
    verb = pick(rng, world.verbs)
    phrase, many = noun_phrase(rng, object_of(rng, world, verb))
    form = rng.randrange(7)
    if form == 0:
        return f"{phrase} {be(tense, many)} {verb.participle} by {OBJECTIVE.get(who, who)}"
    if form == 1:
        return f"{who} {conjugate(verb, tense, plural, negated=True)} {phrase}"
    if form == 2:
        return f"{who} {verb.manner} {conjugate(verb, tense, plural)} {phrase}"
    if form == 3:
        return f"{who} {be(tense, plural)} {verb.gerund} {phrase}"
    if form == 4:
        return f"{who} {conjugate(verb, tense, plural)} {phrase} at {rng.choice(PLACES)}"
    return f"{who} {conjugate(verb, tense, plural)} {phrase}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def fact(rng: Random, world: World, index: int, name: str) -> str:
    """Return a sentence with one lasting fact about a person, called ``name`` in it ("she" or a name)."""
    person = world.people[index]
    town = world.towns[person.town]
    own = possessive(person)
    kept = world.nouns[person.owns]
    forms = (
        f"{name} lived in {town.name}, by the river {town.river}",
        f"{name} was {article(person.trade)} of {person.age} years",
        f"{name} kept {article(world.nouns[person.pet].one)} called {person.pet_name}",
        f"{name} liked to eat {world.nouns[person.dish].many}",
        f"{name} had {person.hair} hair and {article(kept.colour)} {kept.one}",
        f"{own} friend {world.people[person.friend].name} lived in {world.towns[world.people[person.friend].town].name}"
        if name in ("she", "he")
        else f"{name} had a friend, {world.people[person.friend].name} the {world.people[person.friend].trade}",
    )
    return capital(rng.choice(forms)) + "."


def _story_step(rng: Random, world: World, cast: list[int], has: dict[int, int], at: dict[int, str]) -> str:
    who = rng.choice(cast)
    person, other = world.people[who], world.people[rng.choice([i for i in cast if i != who])]
    form = rng.randrange(9)
    if form == 0:
        return fact(rng, world, who, person.name) + (
            " " + fact(rng, world, who, subject(person)) if rng.random() < 0.5 else ""
        )
    if form == 1:
        at[who] = rng.choice(PLACES)
        return f"{person.name} went to {at[who]}."
    if form == 2 and who in has:
        receiver = next(i for i in cast if i != who)
        thing = world.nouns[has.pop(who)]
        has[receiver] = world.nouns.index(thing)
        return f"Then {person.name} gave the {thing.one} to {world.people[receiver].name}."
    if form in (2, 3):
        has[who] = rng.randrange(len(world.nouns))
        thing = world.nouns[has[who]]
        return f"{person.name} found {article(thing.adjectives[0])} {thing.one}, and {subject(person)} took it."
    if form == 4:
        thing, verb = pick(rng, world.nouns), pick(rng, world.verbs)
        return f'"I {conjugate(verb, "past", True)} the {thing.one}," said {person.name} to {other.name}.'
    if form == 5:
        mood = rng.choice(MOODS)
        return f"{person.name} was {mood} because {clause(rng, world, other.name, 'past')}."
    if form == 6:
        return f"While it {rng.choice(REASONS)}, {clause(rng, world, person.name, 'past')}."
    if form == 7:
        pair = f"{person.name} and {other.name}"
        return capital(clause(rng, world, pair, "past", plural=True)) + "."
    second = clause(rng, world, subject(person), "past")
    return (
        f"{capital(clause(rng, world, person.name, 'past'))}, {rng.choice(('but', 'and', 'so', 'and then'))} {second}."
    )


def story(rng: Random, world: World) -> str:
    """A story whose last sentences depend on who took what and went where."""
    cast: list[int] = []
    while len(cast) < 2 + (rng.random() < 0.4):
        index = pick(rng, range(len(world.people)))
        if index not in cast:
            cast.append(index)
    has: dict[int, int] = {}
    at: dict[int, str] = {}
    opening = world.people[cast[0]]
    lines = [f"{rng.choice(('Once', 'One day', 'In those days', 'Long ago'))} there was {article(opening.trade)} named"]
    lines[0] += f" {opening.name}. {fact(rng, world, cast[0], subject(opening))}"
    for _ in range(rng.randrange(2, 5 + rng.randrange(22))):
        lines.append(_story_step(rng, world, cast, has, at))
        if rng.random() < 0.12:
            lines[-1] += "\n\n"
    ending = [f"{world.people[who].name} was still at {place}." for who, place in at.items()]
    ending += [f"{world.people[who].name} still had the {world.nouns[thing].one}." for who, thing in has.items()]
    return " ".join([*lines, "In the end,", *ending] if ending else lines).replace("\n\n ", "\n\n")


def essay(rng: Random, world: World) -> str:
    """Loose sentences in one tense: relative clauses, conditions, comparisons, questions."""
    tense = rng.choice(TENSES)
    sentences = []
    for _ in range(rng.randrange(1, 12)):
        noun = pick(rng, world.nouns)
        person = pick(rng, world.people)
        form = rng.randrange(6)
        if form == 0:
            verb = pick(rng, world.verbs)
            text = (
                f"the {noun.one} that {person.name} {conjugate(verb, tense)} {be(tense)} {rng.choice(noun.adjectives)}"
            )
        elif form == 1:
            text = f"{rng.choice(TIMES[tense])}, {clause(rng, world, person.name, tense)}"
        elif form == 2:
            text = f"if {clause(rng, world, person.name, 'present')}, {clause(rng, world, subject(person), 'future')}"
        elif form == 3:
            other = pick(rng, world.nouns)
            more = "dearer" if noun.price > other.price else "cheaper" if noun.price < other.price else "no dearer"
            text = f"{article(noun.one)} costs {noun.price} crowns and is {more} than {article(other.one)}, "
            text += f"at {other.price}"
        elif form == 4:
            verb = pick(rng, world.verbs)
            done = {"past": "did", "present": "do", "future": "will"}[tense]
            text = f"why {done} the {noun.many} never {verb.base} {noun_phrase(rng, object_of(rng, world, verb))[0]}?"
        else:
            text = clause(rng, world, f"the {noun.many}", tense, plural=True)
        sentences.append(capital(text) + ("" if text.endswith("?") else "."))
    return " ".join(sentences)


def entry(rng: Random, world: World) -> str:
    """An encyclopedia's entry: everything is a fact."""
    form = rng.randrange(3)
    if form == 0:
        town = pick(rng, world.towns)
        product, rival = world.nouns[town.product], world.towns[town.rival]
        born = [person.name for person in world.people if world.towns[person.town] is town][:3]
        text = f"{town.name} is a town of {town.people} people in {town.region}, on the river {town.river}. "
        text += f"It is known for its {product.many}, which are made of {product.material}. "
        text += f"Its old rival is {rival.name}, in {rival.region}."
        return text + (f" Among those who live there: {', '.join(born)}." if born else "")
    if form == 1:
        noun = pick(rng, world.nouns)
        makers = [town.name for town in world.towns if world.nouns[town.product] is noun]
        text = (
            f"{capital(noun.one)} (plural {noun.many}): {article(noun.kind)}, {noun.colour}, made of {noun.material}; "
        )
        text += f"{noun.adjectives[0]} and {noun.adjectives[1]}. It costs {noun.price} crowns."
        return text + (f" The best come from {' and '.join(makers)}." if makers else "")
    index = pick(rng, range(len(world.people)))
    person = world.people[index]
    sentences = [fact(rng, world, index, person.name if i == 0 else subject(person)) for i in range(4)]
    return f"{person.name}, {person.trade} ({person.age}). " + " ".join(dict.fromkeys(sentences))


def _exchange(rng: Random, world: World, index: int) -> tuple[str, str]:
    person = world.people[index]
    town = world.towns[person.town]
    noun = pick(rng, world.nouns)
    count = rng.randrange(2, 10)
    bought = f"{count} {noun.many} at {noun.price} crowns each"
    verb = pick(rng, world.verbs)
    done = noun_phrase(rng, object_of(rng, world, verb))[0]
    options = (
        (f"Where does {person.name} live?", f"In {town.name}, by the {town.river}."),
        (f"What is {person.name}'s trade?", f"{capital(subject(person))} is {article(person.trade)}."),
        (f"Who is {person.name}'s friend?", f"That is {world.people[person.friend].name}."),
        (f"How old is {person.name}?", f"{capital(subject(person))} is {person.age}."),
        (f"What is the name of {possessive(person)} {world.nouns[person.pet].one}?", f"{person.pet_name}."),
        (f"What colour is {article(noun.one)}?", f"{capital(noun.colour)}, and it is made of {noun.material}."),
        (f"What is the plural of {noun.one}?", f"It is {noun.many}."),
        (f"I want {bought}.", f"That makes {count * noun.price} crowns, please."),
        (f"Did {person.name} {verb.base} {done}?", f"Yes, {subject(person)} {verb.past} {done} {verb.manner}."),
        (f"Has {person.name} {verb.participle} {done}?", f"No, {subject(person)} never {verb.third} {done}."),
        (f"What is {town.name} known for?", f"For its {world.nouns[town.product].many}."),
    )
    return rng.choice(options)


def dialogue(rng: Random, world: World) -> str:
    """Two people ask and answer; the answers follow from the facts."""
    first, second = pick(rng, world.people).name, pick(rng, world.people).name
    talk = [f"{first}: Good {rng.choice(('morning', 'evening', 'day'))}, {second}!", f"{second}: Welcome, {first}."]
    index = pick(rng, range(len(world.people)))
    for _ in range(rng.randrange(1, 3 + rng.randrange(9))):
        if rng.random() < 0.3:
            index = pick(rng, range(len(world.people)))
        question, answer = _exchange(rng, world, index)
        asker, answerer = (first, second) if rng.random() < 0.75 else (second, first)
        talk += [f"{asker}: {question}", f"{answerer}: {answer}"]
    if rng.random() < 0.6:
        talk.append(f"{first}: Thank you, {second}. Goodbye!")
    return "\n".join(talk)


def letter(rng: Random, world: World) -> str:
    """A letter from one person to a friend, with a shopping list that is read back in order."""
    sender = pick(rng, world.people)
    friend = world.people[sender.friend]
    things = [pick(rng, world.nouns) for _ in range(rng.randrange(2, 6))]
    body = [capital(clause(rng, world, "I", rng.choice(("past", "future")), plural=True)) + "." for _ in range(3)]
    text = f"Dear {friend.name},\n\n{' '.join(body[: rng.randrange(1, 4)])} Please bring me:\n"
    text += "".join(f"- {noun.one} ({noun.colour}), {noun.price} crowns\n" for noun in things)
    text += f"So: {', '.join(noun.one for noun in things)}; {sum(noun.price for noun in things)} crowns in all.\n\n"
    return text + f"Yours,\n{sender.name}, {world.towns[sender.town].name}"
