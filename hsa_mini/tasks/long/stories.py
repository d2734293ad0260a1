"""Stories of people who move and carry things, with the facts of bAbI's first three tasks (arXiv
1502.05698), which BABILong (arXiv 2406.10149) scatters in long texts; words and code are our own.

    qa1    Where is Ada?                            one fact: her last move
    qa2    Where is the lamp?                       two facts: who took it or put it down, and where
    qa3    Where was the lamp before the garden?    three facts: where it was taken, and carried to
"""

from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from hsa_mini.tasks.facts import put
from hsa_mini.tasks.frames.frame import Frames, expand
from hsa_mini.tasks.sentences import Question
from hsa_mini.tasks.tellings import Told
from hsa_mini.tasks.words import FIRST_NAMES, split

PLACES = """
attic balcony barn basement bathroom bedroom cabin cafe cellar chapel classroom corridor courtyard
farm forge garage garden greenhouse gym hall harbor hospital hotel kitchen laboratory library lobby
market mill museum nursery office orchard palace pantry park playground school shop stable station
studio theater tower tunnel warehouse workshop yard
""".split()
THINGS = """
apple ball basket bell book bottle bowl box brush bucket cake candle coin crown cup doll drum flute
fork glove hammer hat jar key kite knife ladder lamp lemon letter map mirror needle pan pencil
plate ring rope sack scarf shovel spoon stone sword towel trumpet umbrella vase violin watch
""".split()

MOVED = Frames(
    (
        "{who} «went|moved|walked|ran|travelled|hurried|returned|came» «to|into» the {place}.",
        "{who} went to the {place}.",
        "«Then|Later|After that|Soon|Now» {who} «went|walked|was seen going|set off» to the "
        "{place}.",
        "{who} is in the {place} now.",
    ),
    ("{who} went to the {place}.", "{who} walked to the {place}.", "{who} moved to the {place}."),
)
TOOK = Frames(
    (
        "{who} «took|picked up|got|grabbed|lifted|found and kept» the {what}«| there».",
        "{who} took the {what}.",
        "The {what} was «taken|picked up» by {who}.",
    ),
    ("{who} took the {what}.", "{who} picked up the {what}.", "{who} got the {what} there."),
)
DROPPED = Frames(
    (
        "{who} «put down|dropped|left|laid down|set down» the {what}«| there».",
        "{who} put down the {what}.",
        "The {what} was «put down|left there|dropped» by {who}.",
    ),
    ("{who} put down the {what}.", "{who} dropped the {what}.", "{who} left the {what} there."),
)
# Question and lead; the first ones are for evaluation too.
ASKED: dict[str, tuple[tuple[str, str], ...]] = {
    "qa1": (
        ("Where is {who}?", "{who} is in the {place}."),
        ("Where is {who}?", "In the {place}."),
        ("In which place is {who} now?", "{who} is in the {place}."),
        ("Where did {who} go last?", "{who} went to the {place}."),
        ("", "{who} is now in the {place}."),
    ),
    "qa2": (
        ("Where is the {what}?", "The {what} is in the {place}."),
        ("Where is the {what}?", "In the {place}."),
        ("Where would you look for the {what}?", "The {what} must be in the {place}."),
        ("", "The {what} is now in the {place}."),
    ),
    "qa3": (
        ("Where was the {what} before the {after}?", "Before, the {what} was in the {place}."),
        ("Where was the {what} before the {after}?", "In the {place}."),
        ("From where did the {what} come to the {after}?", "The {what} came from the {place}."),
    ),
}
PEOPLE = 4
OBJECTS = 3
ROOMS = 6
# The fewest and the most sentences of a story.
LENGTHS = {"qa1": (2, 10), "qa2": (6, 20), "qa3": (10, 40)}


@dataclass
class Story:
    """What has happened so far. moves: of each person, the numbers of the sentences and the places;
    stays: of each thing, those that tell where it was; holders: who has it.
    """

    sentences: list[str] = field(default_factory=list)
    moves: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    stays: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)

    def tell(self, rng: Random, frames: tuple[str, ...], **slots: str) -> int:
        """Add a sentence; returns its number."""
        frame = expand(rng, rng.choice(frames))
        self.sentences.append(f" {frame.format(**slots)}")
        return len(self.sentences) - 1

    def visits(self, what: str) -> list[tuple[int, str]]:
        """Where a thing was, each stay once: the sentence that tells of it first, and the place."""
        stays = self.stays[what]
        return [stays[i] for i in range(len(stays)) if not i or stays[i][1] != stays[i - 1][1]]


def draw_story(rng: Random, kind: str, length: int, held_out: bool) -> Story:
    """A story of `length` sentences. In that of qa1 people only move."""
    people = rng.sample(split(FIRST_NAMES, held_out), PEOPLE)
    places = rng.sample(split(PLACES, held_out), ROOMS)
    things = rng.sample(split(THINGS, held_out), OBJECTS) if kind != "qa1" else []
    story = Story()
    for _ in range(length):
        who = rng.choice(people)
        what = rng.choice(things) if things and who in story.moves else ""  # nobody starts anywhere
        here = story.moves[who][-1][1] if who in story.moves else ""
        last = story.stays[what][-1][1] if what in story.stays else here
        holder = story.holders.get(what)
        slots = {"who": who, "what": what}
        if what and holder == who and rng.random() < 0.4:
            number = story.tell(rng, DROPPED.of(held_out), **slots)
            story.stays[what].append((number, here))
            del story.holders[what]
        elif what and holder is None and last == here:
            number = story.tell(rng, TOOK.of(held_out), **slots)
            story.stays.setdefault(what, []).append((number, here))
            story.holders[what] = who
        else:
            place = rng.choice([place for place in places if place != here])
            number = story.tell(rng, MOVED.of(held_out), who=who, place=place)
            story.moves.setdefault(who, []).append((number, place))
            for carried in (thing for thing, by in story.holders.items() if by == who):
                story.stays[carried].append((number, place))
    return story


def questions(rng: Random, kind: str, story: Story, held_out: bool) -> list[Question]:
    """Every question of a kind that the story answers, in random order.

    The answer is the same wherever the question stands behind its needed sentences.
    """
    found: list[tuple[dict[str, str], list[int]]] = []
    if kind == "qa1":
        for who, moves in story.moves.items():
            number, place = moves[-1]
            found.append(({"who": who, "place": place}, [number]))
    for what, stays in story.stays.items():
        visits = story.visits(what)
        if kind == "qa2":
            numbers = [stays[-1][0], visits[-1][0]]
            found.append(({"what": what, "place": visits[-1][1]}, numbers))
        places = [place for _, place in visits]
        for (first, before), (second, after) in pairwise(visits):
            if kind == "qa3" and places.count(after) == 1:
                slots = {"what": what, "place": before, "after": after}
                found.append((slots, [second, first]))
    rng.shuffle(found)
    asked = []
    for slots, numbers in found:
        question, lead = ASKED[kind][0] if held_out else rng.choice(ASKED[kind])
        text = lead.format(**{**slots, "place": "\0"})
        needed = tuple(story.sentences[number] for number in numbers)
        asked.append(put(rng, question.format(**slots), text, "\0", slots["place"], needed))
    return asked


def tell_story(
    rng: Random, kind: str, wanted: int, held_out: bool, *, most: int | None = None
) -> Told:
    """A story and up to `wanted` questions, at least one. most: sentences, where they suffice."""
    least, greatest = LENGTHS[kind]
    while True:
        length = rng.randint(least, max(min(greatest, most or greatest), least))
        story = draw_story(rng, kind, length, held_out)
        if asked := questions(rng, kind, story, held_out):
            return Told(tuple(story.sentences), tuple(asked[:wanted]))
