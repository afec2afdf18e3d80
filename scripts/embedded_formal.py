"""Arithmetic and code-like documents: every result in them is right, so it can be learnt and not only guessed."""

from __future__ import annotations

import json
from random import Random

from embedded_world import World, pick

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int) -> str:
    """Return a number from 0 to 999 in English words."""
    if number >= 100:
        rest = f" and {in_words(number % 100)}" if number % 100 else ""
        return f"{ONES[number // 100]} hundred{rest}"
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")


def _sum(rng: Random) -> str:
    a, b = rng.randrange(1, 100), rng.randrange(1, 100)
    form = rng.randrange(8)
    if form == 0:
        return f"{max(a, b)} - {min(a, b)} = {max(a, b) - min(a, b)}"
    if form == 1:
        return f"{a % 12 + 1} * {b % 12 + 1} = {(a % 12 + 1) * (b % 12 + 1)}"
    if form == 2:
        return f"{in_words(a)} plus {in_words(b)} is {in_words(a + b)}"
    if form == 3:
        return f"{a} {'<' if a < b else '>' if a > b else '='} {b}"
    if form == 4:
        divisor = b % 9 + 2
        return f"{a} / {divisor} = {a // divisor} rest {a % divisor}"
    if form == 5:
        c = rng.randrange(1, 20)
        return f"{a} + {b} + {c} = {a + b} + {c} = {a + b + c}"
    return f"{a} + {b} = {a + b}"


def sums(rng: Random, world: World) -> str:
    """A column of sums."""
    return "\n".join(_sum(rng) for _ in range(rng.randrange(2, 26)))


def sequence(rng: Random, world: World) -> str:
    """Sequences: counting up and down, doubling, alternation, sorted lists, reversed words."""
    lines = []
    for _ in range(rng.randrange(1, 7)):
        start, step, length = rng.randrange(1, 60), rng.randrange(1, 13), rng.randrange(4, 10)
        form = rng.randrange(5)
        if form == 0:
            lines.append("count by " + f"{step}: " + " ".join(str(start + step * i) for i in range(length)))
        elif form == 1:
            high = start + step * length
            lines.append(f"down by {step}: " + " ".join(str(high - step * i) for i in range(length)))
        elif form == 2:
            lines.append("double: " + " ".join(str((start % 9 + 1) << i) for i in range(length)))
        elif form == 3:
            numbers = [rng.randrange(100) for _ in range(length)]
            lines.append(f"sort: {' '.join(map(str, numbers))} -> {' '.join(map(str, sorted(numbers)))}")
        else:
            words = [pick(rng, world.identifiers) for _ in range(length // 2 + 1)]
            lines.append(f"reverse: {' '.join(words)} -> {' '.join(reversed(words))}")
    return "\n".join(lines)


def problem(rng: Random, world: World) -> str:
    """Word problems, solved step by step."""
    solved = []
    for _ in range(rng.randrange(1, 5)):
        person, noun = pick(rng, world.people), pick(rng, world.nouns)
        he, a, b = ("She" if person.she else "He"), rng.randrange(3, 60), rng.randrange(2, 40)
        c = rng.randrange(1, a + b)
        text = f"Question: {person.name} has {a} {noun.many}. {he} "
        if rng.random() < 0.5:
            text += f"buys {b} more and sells {c}. How many {noun.many} are left?\n"
            text += f"Answer: {a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}. The answer is {a + b - c}."
        else:
            each = b % 9 + 2
            text += f"sells them for {each} crowns each. How many crowns is that?\n"
            text += f"Answer: {a} * {each} = {a * each}. The answer is {a * each}."
        solved.append(text)
    return "\n\n".join(solved)


def _function(rng: Random, world: World) -> str:
    name, x, y = (rng.choice(world.identifiers) for _ in range(3))
    if x == y:
        y += "2"
    k, a, b = rng.randrange(2, 10), rng.randrange(1, 30), rng.randrange(1, 30)
    form = rng.randrange(5)
    if form == 0:
        body, result = f"    return {x} + {y}", a + b
    elif form == 1:
        body, result = f"    {x} = {x} + {k}\n    return {x} - {y}", a + k - b
    elif form == 2:
        body, result = f"    if {x} > {y}:\n        return {x}\n    return {y} + {k}", a if a > b else b + k
    elif form == 3:
        body, result = f"    return max({x}, {y}) * {k}", max(a, b) * k
    else:
        body = f"    for _ in range({k % 4 + 1}):\n        {x} += {y}\n    return {x}"
        result = a + (k % 4 + 1) * b
    return f"def {name}({x}, {y}):\n{body}\n\nassert {name}({a}, {b}) == {result}"


def _loop(rng: Random, world: World) -> str:
    name, count, step = rng.choice(world.identifiers), rng.randrange(3, 7), rng.randrange(1, 10)
    total, out = 0, []
    for i in range(count):
        total += i * step
        out.append(f"# {i} {total}")
    code = f"{name} = 0\nfor i in range({count}):\n    {name} += i * {step}\n    print(i, {name})\n"
    return code + "\n".join(out)


def _assignments(rng: Random, world: World) -> str:
    values: dict[str, int] = {}
    lines = []
    for _ in range(rng.randrange(3, 10)):
        name = rng.choice(world.identifiers)
        if values and rng.random() < 0.5:
            other = rng.choice(sorted(values))
            added = rng.randrange(1, 10)
            values[name] = values[other] + added
            lines.append(f"{name} = {other} + {added}")
        else:
            values[name] = rng.randrange(50)
            lines.append(f"{name} = {values[name]}")
    shown = rng.choice(sorted(values))
    return "\n".join([*lines, f"print({shown})  # {values[shown]}"])


def _class(rng: Random, world: World) -> str:
    noun = pick(rng, world.nouns)
    fields = {"kind": noun.kind, "colour": noun.colour, "material": noun.material}
    body = "".join(f'    {key} = "{value}"\n' for key, value in fields.items() if rng.random() < 0.8)
    title = noun.one.capitalize()
    call = f"\n\n{noun.one} = {title}()\nassert {noun.one}.price == {noun.price}" if rng.random() < 0.5 else ""
    return f"class {title}(Thing):\n{body}    price = {noun.price}{call}"


def code(rng: Random, world: World) -> str:
    """Functions with a true assertion, loops with their output, variables to follow, classes of known things."""
    makers = (_function, _loop, _assignments, _class)
    return "\n\n".join(rng.choice(makers)(rng, world) for _ in range(rng.randrange(1, 6)))


def records(rng: Random, world: World) -> str:
    """The facts about people or things as JSON lines or as a table."""
    rows: list[dict[str, str | int]] = []
    of_people = rng.random() < 0.5
    for _ in range(rng.randrange(1, 8)):
        if of_people:
            person = pick(rng, world.people)
            rows.append({"name": person.name, "trade": person.trade, "town": world.towns[person.town].name})
            rows[-1]["age"] = person.age
        else:
            noun = pick(rng, world.nouns)
            rows.append({"name": noun.one, "kind": noun.kind, "material": noun.material, "price": noun.price})
    if rng.random() < 0.5:
        return "\n".join(json.dumps(row) for row in rows)
    return "\n".join(" | ".join(str(cell) for cell in row) for row in [list(rows[0]), *(row.values() for row in rows)])
