"""The keys and values of facts: codes, numbers, words, names, dates, uuids.

Every kind is a function of a random generator and of `held_out`. Held-out keys and words occur in
evaluation only: a hash of the string decides (see `is_reserved`). Numbers, dates and uuids are so
many that none has to be reserved.
"""

import functools
import re
import string
import zlib
from collections.abc import Callable, Sequence
from random import Random

from hsa_mini.data.tokenizer import load_ranks
from hsa_mini.tasks.sentences import LETTERS, is_held_out

ADJECTIVES = """
able amber ancient arctic autumn basic bitter blue bold brave brief bright broad bronze calm careful
casual central clean clever cloudy cobalt cold common cosmic crimson crisp curious daily damp dark
deep distant double dusty eager early easy eastern elegant empty exact fair famous fancy fast fierce
final firm flat formal fragile frank fresh frosty full gentle giant glad golden grand grateful great
green grim happy hardy heavy hidden hollow honest humble icy idle inner ivory jolly keen kind large
late lazy light little lively local lonely loud lucky lunar magic major mellow mild misty modern
muddy narrow native neat noble northern odd orange pale patient plain polite precious pretty prime
proud pure purple quick quiet rapid rare ready remote rich rigid rough round royal rusty sacred
sandy scarlet secret shallow sharp shiny short silent silver simple single slender slow small smart
smooth snowy soft solar solid southern spare spicy stable steady steep stormy strange strong sudden
sunny sweet swift tall tame tender thick thin tidy tiny tired tropical useful velvet violet warm
weary western white wide wild windy winter wise wooden yellow young
""".split()
NOUNS = """
anchor apple arch arrow badge bakery balcony banana barrel basin basket battery beach beacon bell
bicycle blanket blossom boat bottle bridge bucket button cabin cable camera canal candle canyon
carpet castle cellar chair chapel cherry circle clock cloud coffee comet copper coral cottage
cradle crystal curtain daisy desert diamond dolphin dragon drum eagle engine falcon feather fence
field flame forest fountain garden ginger glacier glove granite guitar hammer harbor harvest helmet
hill horizon island jacket jewel jungle kettle kitchen ladder lagoon lantern lemon library lizard
magnet mango maple marble market meadow mirror monkey moon mountain museum needle nest notebook oak
ocean olive orchard otter owl oyster palace panda paper parrot pebble pencil pepper piano pigeon
pillow planet plum pocket pond prairie puzzle rabbit radio raven ribbon river rocket rope saddle
sailor salmon sapphire shadow shell shepherd shield spider spoon squirrel statue stone storm
sparrow station summit swan table temple thunder ticket tiger timber tower train trumpet tulip
tunnel turtle umbrella valley village violin volcano wagon walnut watch water whale wheel window
wolf zebra
""".split()
FIRST_NAMES = """
Ada Alan Alice Amir Anna Arthur Bela Boris Carla Carlos Clara Daniel Diego Elena Elias Emma Farah
Felix Frida George Grace Hana Hugo Ines Ivan Jana Jonas Julia Karim Karl Laura Leo Lena Lucas Maria
Marco Maya Milan Mina Nadia Nils Nora Omar Oscar Paula Peter Priya Rosa Ruth Samir Sara Simon Sofia
Tara Theo Tomas Vera Viktor Wanda Yara Yusuf Zoe
""".split()
LAST_NAMES = """
Abbott Adler Bauer Becker Brandt Castro Chen Costa Cruz Dalton Doyle Dubois Ellis Faber Farrell
Fischer Flores Garcia Grant Haas Hansen Harper Hoffman Ito Jansen Keller Khan Klein Kovac Kumar
Lang Larsen Lopez Marin Mercer Meyer Morales Novak Ortiz Park Patel Perez Petrov Quinn Rossi Santos
Sato Schmidt Silva Singh Stone Suzuki Tanaka Torres Vargas Vogel Wagner Walsh Weber Young
""".split()
CITIES = """
Athens Berlin Boston Bristol Cairo Chicago Dakar Delhi Denver Dublin Geneva Hamburg Havana Helsinki
Istanbul Jakarta Kyoto Lagos Lima Lisbon London Lyon Madrid Manila Milan Montreal Moscow Mumbai
Nairobi Naples Oslo Paris Porto Prague Quito Riga Rome Seoul Seville Sydney Tokyo Toronto Turin
Vienna Warsaw Zurich
""".split()


def is_reserved(word: str) -> bool:
    """Whether a word, name or town is for evaluation only; a quarter of them is."""
    return zlib.crc32(word.encode()) % 4 == 0


@functools.cache
def _part(words: tuple[str, ...], held_out: bool) -> list[str]:
    return [word for word in words if is_reserved(word) == held_out]


def split(words: Sequence[str], held_out: bool) -> list[str]:
    """The words that are for evaluation only, or the others."""
    return _part(tuple(words), held_out)


def _pick(rng: Random, words: Sequence[str], held_out: bool) -> str:
    return rng.choice(split(words, held_out))


@functools.cache
def vocabulary() -> list[str]:
    """The lower-case words that are one token, with the space in front: about a thousand."""
    tokens = (token.decode(errors="ignore") for token in load_ranks())
    return [token[1:] for token in tokens if re.fullmatch(r" [a-z]{2,}", token)]


@functools.cache
def pieces() -> list[str]:
    """Lower-case tokens of 2 to 4 letters, from which new words are made."""
    tokens = (token.decode(errors="ignore") for token in load_ranks())
    return [token for token in tokens if re.fullmatch(r"[a-z]{2,4}", token)]


def _letters(rng: Random, alphabet: str, count: int) -> str:
    return "".join(rng.choices(alphabet, k=count))


def _until(draw: Callable[[], str], held_out: bool) -> str:
    """The first string drawn that is held out, or is not."""
    while is_held_out(text := draw()) != held_out:
        pass
    return text


def code(rng: Random, held_out: bool) -> str:
    """Four capital consonants, the keys of the first tasks."""
    return _until(lambda: _letters(rng, LETTERS, 4), held_out)


def long_code(rng: Random, held_out: bool) -> str:
    """Three to eight capital letters."""
    letters = string.ascii_uppercase
    return _until(lambda: _letters(rng, letters, rng.choice((3, 5, 5, 6, 7, 8))), held_out)


def mixed_code(rng: Random, held_out: bool) -> str:
    """Capital letters and digits, as K7-29B or XR_4410."""

    def draw() -> str:
        head = _letters(rng, string.ascii_uppercase, rng.randint(1, 3))
        tail = _letters(
            rng, rng.choice((string.digits, LETTERS + string.digits)), rng.randint(2, 5)
        )
        return f"{head}{rng.choice(('-', '_', '', '/', '.'))}{tail}"

    return _until(draw, held_out)


def digits(rng: Random, count: int) -> str:
    return f"{rng.randrange(10**count):0{count}d}"


def number(rng: Random, held_out: bool) -> str:
    """A number of 3 to 20 digits; those of 6 and 7 are the most frequent."""
    return digits(rng, rng.choice((6, 6, 6, 7, 7, 7, 10, *range(3, 21))))


def short_number(rng: Random, held_out: bool) -> str:
    """A number of 4 to 8 digits, as a key."""
    return _until(lambda: digits(rng, rng.randint(4, 8)), held_out)


def word(rng: Random, held_out: bool) -> str:
    return _pick(rng, NOUNS, held_out)


def words(rng: Random, held_out: bool) -> str:
    """Two or three words."""
    few = [_pick(rng, ADJECTIVES, held_out) for _ in range(rng.choice((1, 1, 2)))]
    return " ".join((*few, word(rng, held_out)))


def hyphenated(rng: Random, held_out: bool) -> str:
    """An adjective and a noun, as RULER's keys."""
    return f"{_pick(rng, ADJECTIVES, held_out)}-{word(rng, held_out)}"


def new_word(rng: Random, held_out: bool) -> str:
    """Two to four tokens that make a word which no language has."""
    return _until(lambda: "".join(rng.choices(pieces(), k=rng.choice((2, 2, 3, 4)))), held_out)


def snake(rng: Random, held_out: bool) -> str:
    """A name as in code, with an underscore."""
    return f"{new_word(rng, held_out)}_{rng.choice(vocabulary())}"


def phrase(rng: Random, held_out: bool) -> str:
    """Two to six frequent words in any order."""
    return " ".join(rng.choices(vocabulary(), k=rng.randint(2, 6)))


def person(rng: Random, held_out: bool) -> str:
    return f"{_pick(rng, FIRST_NAMES, held_out)} {_pick(rng, LAST_NAMES, held_out)}"


def city(rng: Random, held_out: bool) -> str:
    return _pick(rng, CITIES, held_out)


def date(rng: Random, held_out: bool) -> str:
    year = rng.randint(1800, 2099)
    month = rng.randint(1, 12)
    day = rng.randint(1, 28)
    return f"{year}-{month:02d}-{day:02d}" if rng.random() < 0.7 else f"{day}.{month}.{year}"


def amount(rng: Random, held_out: bool) -> str:
    whole = rng.randrange(10 ** rng.randint(1, 5))
    return rng.choice((f"{whole}.{rng.randrange(100):02d}", f"${whole}", f"{whole}%", f"-{whole}"))


def uuid(rng: Random, held_out: bool) -> str:
    text = _letters(rng, "0123456789abcdef", 32)
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


Kind = Callable[[Random, bool], str]
# Each kind with its weight.
KEYS: dict[Kind, float] = {
    code: 6, long_code: 2, mixed_code: 2, hyphenated: 4, new_word: 3, person: 2, short_number: 1.5,
    words: 1.5, snake: 1, uuid: 1, phrase: 0.5,
}  # fmt: skip
VALUES: dict[Kind, float] = {
    number: 10, words: 2.5, word: 1.5, hyphenated: 1, new_word: 2, phrase: 1.5, code: 1.5,
    long_code: 1, mixed_code: 1, person: 1, city: 0.5, date: 1, amount: 1, uuid: 1.2,
}  # fmt: skip
# Values of these kinds are recognised by their characters, wherever they stand in a sentence.
OF_DIGITS = (number, date, uuid)


def draw_kind(rng: Random, kinds: dict[Kind, float]) -> Kind:
    return rng.choices(list(kinds), list(kinds.values()))[0]


def distinct(rng: Random, kind: Kind, count: int, held_out: bool, taken: set[str]) -> list[str]:
    """`count` different strings of a kind, none of them in `taken`, to which they are added.

    Fewer if the kind has no more.
    """
    found: list[str] = []
    for _ in range(4 * count + 100):
        if len(found) == count:
            break
        text = kind(rng, held_out)
        if text not in taken:
            taken.add(text)
            found.append(text)
    return found
