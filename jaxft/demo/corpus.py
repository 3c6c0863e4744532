"""Generates the plain text that the demo's base model is pre-trained on, and its retention text.

Three kinds of documents, one a paragraph: stories of everyday life, prose and chats about people
who are not well, and chats about simple facts. Complaints are told in all wordings of
`complaints.py`, so that the model learns which of them go together, but not who treats them: where
a chat answers a complaint with a department, that is drawn at random. So the model knows the form
of an answer to the demo's cases, and nothing of its content.

One file because most of it is lists of words, beside the few functions that put them together.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxft.demo.cases import QUESTION, sentence
from jaxft.demo.complaints import DEPARTMENTS, NAMES, Department, keywords, speak

TRAIN_SEED = 0
VALIDATION_SEED = 1
RETENTION_SEED = 2

_SHE = ("Mia", "Anna", "Rosa", "Lena", "Sara", "Ida", "Nora", "Ella", "Julia", "Clara")
_HE = ("Tom", "Ben", "Paul", "Omar", "Leo", "Max", "Jan", "Finn", "Adam", "Karl")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen", "twenty"),
)
_OPPOSITES = (
    *(("hot", "cold"), ("big", "small"), ("early", "late"), ("full", "empty"), ("old", "new")),
    *(("light", "dark"), ("slow", "fast"), ("dry", "wet"), ("loud", "quiet"), ("open", "closed")),
    *(("near", "far"), ("soft", "hard"), ("clean", "dirty"), ("easy", "difficult")),
)
_SOUNDS = (
    *(("dog", "barks"), ("cat", "purrs"), ("cow", "moos"), ("duck", "quacks"), ("bee", "hums")),
    *(("horse", "neighs"), ("owl", "hoots"), ("sheep", "bleats"), ("lion", "roars")),
)
_COLOURS = (
    *(("grass", "green"), ("snow", "white"), ("coal", "black"), ("a lemon", "yellow")),
    *(("the sky", "blue"), ("a carrot", "orange"), ("a tomato", "red"), ("chocolate", "brown")),
)
_SYSTEM = ("Answer briefly.", "You are a helpful assistant.", "Be kind and clear.")


@dataclass(frozen=True, slots=True)
class _Topic:
    """Sentences of one kind of story; a slot such as `{food}` keeps its value through a story."""

    slots: dict[str, tuple[str, ...]]
    first: tuple[str, ...]
    middle: tuple[str, ...]
    last: tuple[str, ...]


_TOPICS = (
    _Topic(
        {
            "weather": ("rain", "snow", "fog", "sunshine", "wind", "hail"),
            "clothes": ("a coat", "a hat", "boots", "a scarf", "gloves"),
        },
        (
            "On {day} there was {weather} from morning to evening.",
            "{name} looked out of the window and saw {weather}.",
            "The radio said that {day} would bring {weather}.",
        ),
        (
            "{name} put on {clothes} and went for a walk.",
            "The street was quiet, and the clouds moved slowly over the roofs.",
            "A neighbour said that {weather} in {month} is nothing new.",
            "{She} waited under a tree and watched the birds.",
            "The river was higher than the day before.",
            "The children asked if the {weather} would last.",
        ),
        (
            "In the evening the sky was clear and full of stars.",
            "At home {she} made tea and hung {clothes} by the door.",
            "The next day the {weather} was gone.",
        ),
    ),
    _Topic(
        {
            "food": ("soup", "bread", "a cake", "a stew", "a salad", "pancakes", "rice"),
            "item": ("carrots", "onions", "apples", "flour", "butter", "beans", "eggs"),
            "other": ("salt", "pepper", "honey", "milk", "oil", "lemon"),
        },
        (
            "{name} wanted to make {food} for {friend}.",
            "Every {day} {name} cooks {food}.",
            "To make {food}, you need {item} and some {other}.",
        ),
        (
            "First {she} washed the {item} and cut them with a knife.",
            "Then {she} added a little {other} and stirred the pot.",
            "The kitchen smelled of {other} and warm {item}.",
            "{friend} set the table with plates, spoons and glasses.",
            "The oven was hot after {few} minutes.",
            "{She} tasted it and added more {other}.",
        ),
        (
            "At last the {item} were done, and everybody ate.",
            "{friend} said that it was the best {other} of all.",
            "They washed the plates together.",
        ),
    ),
    _Topic(
        {
            "animal": ("dog", "cat", "horse", "rabbit", "goat", "hen", "duck", "sheep"),
            "place": ("barn", "garden", "field", "yard", "forest", "meadow"),
            "look": ("brown", "white", "black", "grey", "spotted"),
        },
        (
            "{name} has a {look} {animal} that lives near the {place}.",
            "A {look} {animal} ran across the {place}.",
            "There was once a {look} {animal} that nobody could catch.",
        ),
        (
            "Every morning the {animal} waited at the gate of the {place}.",
            "{name} gave it fresh water and something to eat.",
            "The {animal} liked to lie in the sun.",
            "One {day} the {animal} ran away and hid behind the {place}.",
            "{friend} called, but the {animal} did not come.",
            "The other animals looked at the {animal} with surprise.",
        ),
        (
            "In the end the {animal} came back to the {place}.",
            "{name} was glad and brushed the {look} {animal}.",
            "Since then the {animal} has stayed close to {name}.",
        ),
    ),
    _Topic(
        {
            "town": ("the coast", "the capital", "the lake", "the mountains", "the island"),
            "vehicle": ("train", "bus", "ferry", "car", "bicycle"),
            "thing": ("a map", "a ticket", "a camera", "a lunch box", "an umbrella", "a book"),
        },
        (
            "In {month} {name} and {friend} travelled to {town} by {vehicle}.",
            "The {vehicle} to {town} leaves at {few} o'clock.",
            "{name} had never been to {town} before.",
        ),
        (
            "{She} packed {thing} and a bottle of water.",
            "From the window they saw fields, bridges and small villages.",
            "The {vehicle} was late by {few} minutes.",
            "A man with a big suitcase asked the way to {town}.",
            "They paid for {few} tickets and sat down.",
            "{friend} lost {thing} and found it again under the seat.",
        ),
        (
            "They reached {town} before dark.",
            "On {day} they went home by {vehicle}.",
            "{name} wrote a postcard about {town}.",
        ),
    ),
    _Topic(
        {
            "subject": ("history", "music", "geography", "drawing", "reading", "science"),
            "tool": ("pencil", "ruler", "notebook", "brush", "calculator"),
        },
        (
            "On {day} the class of {name} had {subject}.",
            "{name} likes {subject} more than any other lesson.",
            "The teacher of {subject} opened the door at {few} o'clock.",
        ),
        (
            "The teacher wrote {few} questions on the board.",
            "{name} forgot the {tool} at home and borrowed one from {friend}.",
            "The pupils worked in groups of three.",
            "{friend} raised a hand and gave the right answer.",
            "The lesson was about things that happened long ago.",
            "They had to learn a poem for {day}.",
        ),
        (
            "Then the bell rang, and all pupils ran outside.",
            "After school {name} went home with {friend}.",
            "The homework in {subject} took {few} minutes.",
        ),
    ),
    _Topic(
        {
            "plant": ("roses", "tomatoes", "tulips", "beans", "sunflowers", "potatoes"),
            "helper": ("a spade", "a rake", "a bucket", "a basket", "a watering can"),
        },
        (
            "In {month} {name} planted {plant} behind the house.",
            "The garden of {name} is full of {plant}.",
            "{friend} asked {name} how to grow {plant}.",
        ),
        (
            "{She} took {helper} and dug up the soil.",
            "The {plant} need water and much light.",
            "Bees and butterflies flew from flower to flower.",
            "A snail sat under a leaf of the {plant}.",
            "{friend} brought {helper} and pulled out the weeds.",
            "It did not rain for {few} days, so {she} carried water every evening.",
        ),
        (
            "In the autumn {she} gave half of the {plant} away.",
            "Soon the {plant} were as high as the fence.",
            "{name} was proud of the {plant}.",
        ),
    ),
    _Topic(
        {
            "shop": ("market", "bakery", "bookshop", "supermarket", "toy shop"),
            "goods": ("a lamp", "a clock", "bread rolls", "a game", "oranges", "a present"),
        },
        (
            "{name} went to the {shop} to buy {goods}.",
            "The {shop} in our street opens on {day}.",
            "{friend} works in a {shop} near the station.",
        ),
        (
            "There was a long queue in front of the {shop}.",
            "{name} paid {few} coins for {goods}.",
            "The seller smiled and put {goods} into a bag.",
            "{She} compared the prices and took the cheaper one.",
            "{friend} wanted {goods} too, but there was nothing left.",
        ),
        (
            "{name} carried {goods} home.",
            "At the door {she} met {friend}.",
            "The {shop} closed at {few} o'clock.",
        ),
    ),
    _Topic(
        {
            "sport": ("football", "tennis", "chess", "handball", "basketball"),
            "instrument": ("the piano", "the drum", "the violin", "the flute", "the guitar"),
        },
        (
            "On {day} evenings {name} plays {sport} with {friend}.",
            "{name} learns {instrument} and also plays {sport}.",
            "The {sport} team of the town has {few} players.",
        ),
        (
            "The first game of {sport} ended after {few} minutes.",
            "{friend} practised {instrument} in the next room.",
            "Many people came to watch and clap.",
            "{name} lost twice and won once.",
            "They played a song on {instrument}.",
        ),
        (
            "{friend} won the game and was happy.",
            "They agreed to play {sport} again on {day}.",
            "In the end everybody sang together.",
        ),
    ),
)

_ILL_FIRST = (
    "{name} is not well. {A}.",
    "{name} went to the clinic in {month}. {A}.",
    "For {few} days {name} has been at home. {A}.",
    "{name} tells {friend} what is wrong. {A}.",
    "On {day} {name} called the clinic. {A}.",
)
_ILL_MIDDLE = (
    "{A}.",
    "{A}, and {b}.",
    "Now {a}.",
    "Sometimes {a}, and then {b}.",
    "{A} again.",
    "It is worse in {month}: {a}.",
    "{friend} asks if {a}.",
    "The doctor writes down that {a}.",
    "Because {a}, {name} stays in bed.",
)
_ILL_LAST = (
    "{name} hopes to be well by {day}.",
    "{friend} will take {name} to the clinic.",
    "That is why {name} went home early: {a}.",
    "In the end the doctor says that it will pass, although {a}.",
    "So {name} rests and drinks tea.",
)
_SAME = (
    "{A}. In other words, {b}.",
    "When {a}, it often means that {b}.",
    "If {a}, then perhaps {b}. It may also be that {c}.",
    "Some people say: {a}. Others say: {b}. They mean much the same.",
    "{A}, {b}, {c}: these things go together.",
)
_GREETING = ("", "", "Hello.", "Good morning.", "Good evening.", "Good day.", "Excuse me.", "Hi.")
_BEFORE = (
    *("{x}", "{x}", "For {few} days {x}", "Since {day} {x}", "I called because {x}"),
    *("I believe that {x}", "Sadly, {x}", "Please help me: {x}", "The thing is that {x}"),
    *("This is what I want to say: {x}", "Can anybody help? {x}", "Could you look at this? {x}"),
    *("May I tell you this? {x}", "Please look once: {x}", "Well, doctor, {x}", "Yes, {x}"),
    *("I will tell you what is wrong: {x}", "It is like this: {x}", "Somebody must know why {x}"),
)
_AFTER = (
    *(".", ".", ".", ", I believe.", ", it seems.", ", doctor.", ", and it does not stop."),
    *(". What else could it be?", ". Is that bad?", ". Please help.", ". I do not know why."),
    *(". Which door is it?", ". {friend} asks too.", ". May I come?", " again.", ", as I think."),
)
_BREAK = (".", ".", ".", ", I believe.", ", it seems.", ", doctor.", " again.", ", as I think.")
_ECHO = ("In other words, {b}.", "So {b}.", "You mean that {b}.", "Perhaps {b}.", "I see: {b}.")
_CLINIC = (
    "In the clinic, {p} is on floor {few}. {q} is next door.",
    "The clinic has many departments: {p}, {q} and {r}.",
    "{p} opens on {day}, and {q} opens on {day2}.",
    "{name} works in {p}. {friend} works in {q}.",
    "The door of {p} is green, and the door of {q} is white.",
    "On {day} {name} cleaned the windows of {p} and {q}.",
)
_KEYWORDS_PLEASE = ("Which words fit?", "Which words go with that?", "Which is it?", QUESTION)
_GUESSES = 0.4
"""Share of patients at the desk who get a random department for an answer."""
_GUESS_WEIGHTS = (2.0, *[1.0] * (len(NAMES) - 1))
"""Of the departments. Without a favourite, the most likely guess would follow the noise of the
draws, and could by luck be right for a whole department."""

_TALK = (
    *("", "", "The lift is out of order.", "I have a letter for the clinic.", "It is {day} today."),
    *("I am on floor {few}.", "{friend} works in the clinic.", "The clinic is in our street."),
    *("I have walked a long way.", "There was a small problem.", "I had a question before."),
    *("Once I was on floor {few}.", "There was no more bread.", "I was early, or so I think."),
    *("{name} told me which way to go.", "This is the clinic, I think.", "I once had a dog."),
    *("Somebody called in {month}.", "We are at the green door.", "{name} asked me on {day}."),
)
_WHICH = (
    *("Which department?", "Which department?", "Which department?", "Which department is it?"),
    *("Which department opens on {day}?", "Which department is on floor {few}?"),
)


def documents(count: int, *, seed: int) -> Iterator[str]:
    """Yields pre-training documents: stories, prose and chats about illness, chats about facts."""
    rng = random.Random(seed)
    kinds: tuple[Callable[[random.Random], str], ...]
    kinds = (_story,) * 5 + (_illness,) * 4 + (_patient_chat,) * 4 + (_desk_chat,) * 4
    kinds += (_fact_chat, _fact_chat, _clinic_chat, _clinic)
    for _ in range(count):
        yield rng.choice(kinds)(rng)


def retention_documents(count: int, *, seed: int = RETENTION_SEED) -> Iterator[str]:
    """Yields everyday stories only: what the base model can do outside the demo's task."""
    rng = random.Random(seed)
    for _ in range(count):
        yield _story(rng)


def write_documents(path: Path, texts: Iterator[str]) -> Path:
    """Writes one document a paragraph, with an empty line between, and returns the path."""
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return path


def _people(rng: random.Random, person: str) -> dict[str, str]:
    name, friend = rng.sample(_SHE if person == "she" else _HE, 2)
    return {
        "name": name,
        "friend": friend,
        "she": person,
        "She": person.capitalize(),
        "month": rng.choice(_MONTHS),
        "few": rng.choice(_ONES[2:13]),
    }


def _days(rng: random.Random) -> dict[str, str]:
    day, day2 = rng.sample(_DAYS, 2)
    return {"day": day, "day2": day2}


def _story(rng: random.Random) -> str:
    if rng.random() < 0.1:
        return _facts(rng)
    topic = rng.choice(_TOPICS)
    values = _people(rng, rng.choice(("she", "he")))
    values |= {slot: rng.choice(options) for slot, options in topic.slots.items()}
    parts = [rng.choice(topic.first), *rng.sample(topic.middle, rng.randint(2, 4))]
    parts.append(rng.choice(topic.last))
    return " ".join(_upper(part.format(**values, **_days(rng))) for part in parts)


def _facts(rng: random.Random) -> str:
    return " ".join(answer for _, answer in (_fact(rng) for _ in range(rng.randint(4, 6))))


def _fact(rng: random.Random) -> tuple[str, str]:
    """Returns a question and its answer."""
    kind = rng.randrange(7)
    if kind == 0:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        return (
            f"What is {_ONES[a]} plus {_ONES[b]}?",
            f"{_ONES[a].capitalize()} plus {_ONES[b]} is {_ONES[a + b]}.",
        )
    if kind == 1:
        numbers = rng.sample(range(10), 3)
        given = ", ".join(map(str, numbers))
        order = ", ".join(map(str, sorted(numbers)))
        return f"Sort these numbers: {given}.", f"In order, {given} become {order}."
    if kind == 2:
        a, b = rng.sample(rng.choice(_OPPOSITES), 2)
        return f"What is the opposite of {a}?", f"The opposite of {a} is {b}."
    if kind == 3:
        animal, sound = rng.choice(_SOUNDS)
        return f"What does the {animal} do?", f"The {animal} {sound}."
    if kind == 4:
        thing, colour = rng.choice(_COLOURS)
        return f"What colour is {thing}?", f"{thing.capitalize()} is {colour}."
    if kind == 5:
        index = rng.randrange(7)
        return (
            f"Which day comes after {_DAYS[index]}?",
            f"After {_DAYS[index]} comes {_DAYS[(index + 1) % 7]}.",
        )
    index = rng.randrange(12)
    return (
        f"Which month comes after {_MONTHS[index]}?",
        f"After {_MONTHS[index]} comes {_MONTHS[(index + 1) % 12]}.",
    )


def _illness(rng: random.Random) -> str:
    department = rng.choice(DEPARTMENTS)
    person = rng.choice(department.persons)
    frames = [rng.choice(_SAME)] if rng.random() < 0.3 else _ill_frames(rng)
    values = _people(rng, person)
    clauses = _clauses(rng, department, 3 * len(frames))
    parts = []
    for frame in frames:
        a, b, c = (speak(next(clauses), person) for _ in range(3))
        parts.append(frame.format(A=_upper(a), a=a, b=b, c=c, **values, **_days(rng)))
    return " ".join(parts)


def _ill_frames(rng: random.Random) -> list[str]:
    middle = rng.sample(_ILL_MIDDLE, rng.randint(2, 4))
    return [rng.choice(_ILL_FIRST), *middle, rng.choice(_ILL_LAST)]


def _clauses(rng: random.Random, department: Department, count: int) -> Iterator[str]:
    wordings: list[str] = []
    while len(wordings) < count:
        wordings += rng.sample(department.wordings, len(department.wordings))
    return iter(wordings)


def _patient_chat(rng: random.Random) -> str:
    """Returns a chat in which complaints are put into other words."""
    department = rng.choice(DEPARTMENTS)
    clauses = _clauses(rng, department, 6)
    turns = []
    for _ in range(rng.randint(1, 3)):
        question = _complaint(rng, next(clauses), rng.choice(_AFTER))
        echo = rng.choice(_ECHO).replace("{b}", speak(next(clauses), "you"))
        turns.append((question, echo))
    return _chat(rng, turns)


def _desk_chat(rng: random.Random) -> str:
    """Returns a chat in which complaints get words that fit, or any department at all."""
    department = rng.choice(DEPARTMENTS)
    clauses = _clauses(rng, department, 3)
    turns = []
    for _ in range(rng.randint(1, 3)):
        complaint = _complaint(rng, next(clauses), rng.choice(_BREAK))
        if rng.random() < _GUESSES:
            turns.append((f"{complaint} {QUESTION}", _guess(rng)))
        else:
            words = rng.sample(keywords(department), 3)
            turns.append((f"{complaint} {rng.choice(_KEYWORDS_PLEASE)}", ", ".join(words)))
    return _chat(rng, turns)


def _guess(rng: random.Random) -> str:
    return rng.choices(NAMES, _GUESS_WEIGHTS)[0]


def _complaint(rng: random.Random, clause: str, after: str) -> str:
    talk = rng.choice(_TALK) if rng.random() < 0.3 else ""
    carrier = f"{talk} {rng.choice(_BEFORE)}{after}".strip()
    carrier = carrier.format(x="{x}", **_people(rng, "she"), **_days(rng))
    return _greet(rng, sentence(carrier, speak(clause, "I")))


def _fact_chat(rng: random.Random) -> str:
    facts = [_fact(rng) for _ in range(rng.randint(1, 3))]
    return _chat(rng, [(_greet(rng, question), answer) for question, answer in facts])


def _clinic_chat(rng: random.Random) -> str:
    turns = []
    for _ in range(rng.randint(1, 3)):
        question = f"{rng.choice(_TALK)} {rng.choice(_WHICH)}".strip()
        question = question.format(**_people(rng, "he"), **_days(rng))
        turns.append((_greet(rng, question), _guess(rng)))
    return _chat(rng, turns)


def _greet(rng: random.Random, question: str) -> str:
    return f"{rng.choice(_GREETING)} {question}".strip()


def _chat(rng: random.Random, turns: list[tuple[str, str]]) -> str:
    """Returns the turns as the tokenizer's chat template writes them."""
    system = f"<|system|>{rng.choice(_SYSTEM)}<|end|>" if rng.random() < 0.2 else ""
    return system + "".join(
        f"<|user|>{question}<|end|><|assistant|>{answer}<|end|>" for question, answer in turns
    )


def _clinic(rng: random.Random) -> str:
    values = _people(rng, rng.choice(("she", "he")))
    frames = rng.sample(_CLINIC, 2)
    parts = []
    for frame in frames:
        p, q, r = rng.sample(NAMES, 3)
        parts.append(frame.format(p=p, q=q, r=r, **values, **_days(rng)))
    return " ".join(parts)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
