"""Sentences whose order matters: threads of codes that are followed from one to the next (arXiv
2411.05000), and notes of one kind of which the second or the last is asked for, as in MRCR (arXiv
2409.12640).
"""

from itertools import pairwise
from random import Random

from hsa_mini.tasks import words
from hsa_mini.tasks.facts import put
from hsa_mini.tasks.frames.frame import Frames, expand
from hsa_mini.tasks.tellings import Told

LINKS = Frames(
    (
        "{a} «leads to|points to|comes before|is followed by|opens|sends you to» {b}.",
        "«From|After|Behind» {a} «go to|comes|look for|you find|ask for» {b}.",
        "{a} «->|-->|=>|>» {b}\n",
        "{a} leads to {b}.",
    ),
    ("{a} leads to {b}.",),
)
# Question and lead; the first ones are for evaluation too.
FOLLOW = (
    ("Where does one come from {a} in {steps} steps?", "From {a} one comes to {path}."),
    ("Follow {a} for {steps} steps.", "{a} leads to {path}."),
    ("{steps} steps from {a}?", "{path}."),
)
THREADS = 3  # in a text, of equal length
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
KINDS = Frames(
    ("letter", "poem", "report", "message", "song", "entry", "story", "answer", "speech", "joke"),
    ("note",),
)
RELATIONS = Frames(("about", "on", "for", "from", "of"), ("about",))
NOTES = Frames(
    (
        "«A|One more|This|Here is a|Now a» {kind} {relation} {topic}: {value}.",
        "The {kind} {relation} {topic} «says|reads|was|is|runs»: {value}.",
        "«User: write|Please write|Write» a {kind} {relation} {topic}. «Assistant|Reply|Here»: "
        "{value}.",
        "{kind} {relation} {topic} = {value}\n",
    ),
    ("A {kind} {relation} {topic}: {value}.",),
)
NTH = (
    (
        "What does the {nth} {kind} {relation} {topic} say?",
        "The {nth} {kind} {relation} {topic} says: {value}.",
    ),
    ("Repeat the {nth} {kind} {relation} {topic}.", "{value}."),
    ("Which was the {nth} {kind} {relation} {topic}?", "It was: {value}."),
)


def tell_threads(
    rng: Random, steps: int, wanted: int, held_out: bool, *, threads: int = THREADS
) -> Told:
    """Threads of `steps` links, told in any order; the codes after the first one are asked for."""
    link = expand(rng, rng.choice(LINKS.of(held_out)))
    codes = words.distinct(rng, words.code, threads * (steps + 1), held_out, set())
    told = []
    questions = []
    for i in range(threads):
        path = codes[i * (steps + 1) : (i + 1) * (steps + 1)]
        links = [f" {link.format(a=a, b=b)}" for a, b in pairwise(path)]
        told += links
        question, lead = FOLLOW[0] if held_out else rng.choice(FOLLOW)
        slots = {"a": path[0], "steps": steps, "path": "\0"}
        answer = ", ".join(path[1:])
        asked = put(rng, question.format(**slots), lead.format(**slots), "\0", answer, tuple(links))
        questions.append(asked)
    rng.shuffle(told)
    return Told(tuple(told), tuple(rng.sample(questions, min(wanted, threads))))


def tell_notes(rng: Random, times: int, wanted: int, held_out: bool, *, topics: int = 2) -> Told:
    """Notes about several topics, `times` about each; one is asked for by its number."""
    kind = rng.choice(KINDS.of(held_out))
    relation = rng.choice(RELATIONS.of(held_out))
    taken: set[str] = set()
    names = words.distinct(rng, words.words, topics, held_out, taken)
    values = words.distinct(rng, words.draw_kind(rng, VALUES), topics * times, held_out, taken)
    frame = expand(rng, rng.choice(NOTES.of(held_out)))
    order = [topic for topic in names for _ in range(times)]
    rng.shuffle(order)
    told: list[str] = []
    of_topic: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for topic, value in zip(order, values):
        slots = {"kind": kind, "relation": relation, "topic": topic, "value": value}
        told.append(f" {frame.format(**slots)}")
        of_topic[topic].append((told[-1], value))
    questions = []
    for _ in range(wanted):
        topic = rng.choice(names)
        number = rng.randrange(len(of_topic[topic]))
        last = number == len(of_topic[topic]) - 1 and not held_out and rng.random() < 0.3
        text, value = of_topic[topic][number]
        question, lead = NTH[0] if held_out else rng.choice(NTH)
        slots = {"kind": kind, "relation": relation, "topic": topic, "value": "\0"}
        slots["nth"] = "last" if last else ORDINALS[number]
        asked = put(rng, question.format(**slots), lead.format(**slots), "\0", value, (text,))
        questions.append(asked)
    return Told(tuple(told), tuple(questions))


VALUES: dict[words.Kind, float] = {words.number: 3, words.words: 3, words.code: 1, words.phrase: 1}
