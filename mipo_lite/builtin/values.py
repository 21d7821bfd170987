"""Values for the made-up profiles of the corpus: names, cities, jobs, pets, hobbies and so on.

Most are invented afresh at every call, so that a model trained on them has to read its context
instead of remembering a list; the rest are everyday words, combined freely. Words in `RESERVED`
(those of `eval_contexts.jsonl`) are never produced.

Knows nothing of sentences: `phrasings.py` and `requests.txt` put values into text.
"""

# ruff: noqa: SIM905  (tables read better as words than as quoted lists)

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

Random = random.Random

EVAL_CONTEXTS = Path(__file__).with_name("eval_contexts.jsonl")

ONSETS = (
    "b br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl sm sn sp st "
    "str t th tr v w y z zh"
).split()
VOWELS = "a e i o u a e i o u ai ea ee ei ia ie io oa oo ou ua y".split()
CODAS = "b ck d f g k l ll m n nd ng nn nt p r rd rk rn s sh ss st t th v x z".split()
NAME_ENDINGS = "a ia o us el in en a e y ina ette ard is an on or ra ley".split()
WORD_ENDINGS = (
    "ing er ist ian ies es y o e is ini elli ette ade ine ard ant en in or ery le ie a i ler ger"
).split()
CITY_ENDINGS = (
    "ton burg ville ford mouth dal stad haven field wick by port ness holm grad ora ia minster "
    "bridge well more berg vik"
).split()

REAL_NAMES = (
    "Aisha Amir Ana Anna Ben Carlos Chen Clara Daniel David Elena Emma Eva Fatima Felix Grace Hana "
    "Hugo Ibrahim Ines Ivan Jack James Jana John Jonas Julia Kai Karim Kate Kenji Lara Laura Leo "
    "Lily Linh Lucas Lucy Maria Mark Marta Mary Max Maya Mei Mia Mina Nadia Nina Noah Nora Olga "
    "Oscar Paul Pedro Peter Priya Rosa Sam Sara Simon Sofia Tara Tom Uma Vera Victor Yusuf Zoe"
).split()
REAL_CITIES = (
    "Amsterdam Athens Berlin Boston Cairo Chicago Denver Dublin Geneva Glasgow Hamburg Helsinki "
    "Kyoto Lagos Leeds Lima Lisbon London Lyon Madrid Milan Mumbai Munich Nairobi Oslo Paris Porto "
    "Prague Rome Seoul Seville Sydney Tokyo Toronto Vienna Warsaw York Zurich"
).split()
REAL_PETS = (
    "Bella Biscuit Buddy Charlie Coco Cookie Daisy Duke Felix Ginger Gus Lucky Luna Max Milo Misty "
    "Molly Nala Oreo Pepper Poppy Rex Rocky Rosie Rusty Shadow Simba Smokey Teddy Tiger Toby Ziggy"
).split()

ANIMALS = (
    "dog dog dog dog cat cat cat cat rabbit parrot hamster tortoise horse goldfish hen ferret pony "
    "puppy kitten canary goat lizard duck turtle snake greyhound terrier beagle poodle donkey mouse"
).split()

JOB_WHOLE = (
    "nurse|teacher|baker|plumber|carpenter|librarian|dentist|farmer|pilot|gardener|chef|lawyer|"
    "tailor|painter|waiter|postman|midwife|translator|accountant|vet|florist|electrician|"
    "photographer|mechanic|pharmacist|editor|architect|cleaner|data analyst|bus driver|"
    "software developer|shop assistant|tour guide|primary school teacher|night nurse|firefighter|"
    "social worker|graphic designer|project manager|retired engineer|student of biology"
).split("|")
JOB_FIRST = (
    "glass wood paper boat bridge clock shoe piano garden stone leather train ferry hotel museum "
    "radio cheese wine tea bread coffee fish sheep forest water wind solar road city school farm "
    "theatre film sound light metal carpet basket silver cotton wool book map bell engine harbour "
    "airport hospital kitchen market ship cloud game robot toy rope tile roof window bicycle lens "
    "chocolate honey flower tree seed bird whale horse dog star ice snow river coast cave"
).split()
JOB_LAST = (
    "maker blower painter builder driver keeper inspector engineer designer planner seller trader "
    "restorer repairer tuner cutter carver cleaner teacher guide curator technician researcher "
    "manager trainer programmer surveyor binder weaver farmer scientist photographer dealer buyer "
    "taster mechanic operator supervisor breeder porter broker writer critic fitter"
).split()

HOBBY_WHOLE = (
    "painting|chess|cycling|swimming|knitting|gardening|running|hiking|baking|reading|fishing|"
    "dancing|yoga|climbing|pottery|sailing|photography|rowing|singing|sewing|surfing|skiing|"
    "birdwatching|crosswords|drawing|karate|table tennis|playing the piano|playing the violin|"
    "playing guitar|board games|model trains|astronomy|calligraphy|origami|woodworking|"
    "collecting stamps|judo|badminton|volunteering|geocaching|boxing|archery|juggling"
).split("|")
HOBBY_FIRST = (
    "trail ice river rock mountain forest street bird kite stone glass wood paper clay night beach "
    "cave boat wild open garden model map radio poem puppet candle soap bread cheese butterfly "
    "beetle moss shell fern coin stamp button comic vinyl clock drum flute harp choir folk salsa "
    "tango swing sword bow card puzzle robot drone rocket star cloud storm snow dune lake"
).split()
HOBBY_LAST = (
    "running skating swimming climbing walking painting watching flying carving collecting making "
    "reading writing singing dancing building baking folding hunting racing sailing photography "
    "sketching fishing riding jumping juggling throwing weaving printing growing spotting surfing"
).split()

DRINK_WHOLE = (
    "tea|coffee|black coffee|green tea|lemonade|water|hot chocolate|apple juice|mint tea|cider|"
    "ginger ale|espresso|cocoa|iced tea|oat milk latte|cappuccino|tomato juice|sparkling water|"
    "kombucha|milk|flat white|rooibos|chai|ginger beer"
).split("|")
FLAVOURS = (
    "grape lemon mint ginger apple pear cherry plum rose honey almond vanilla orange peach melon "
    "mango banana lime berry fig date oat rice barley chestnut pumpkin carrot beet nettle elder "
    "maple cinnamon pepper jasmine lavender hibiscus walnut hazel coconut quince apricot currant "
    "sage thyme basil fennel cocoa caramel"
).split()
DRINK_LAST = (
    "tea|juice|soda|lemonade|milk|coffee|cider|water|smoothie|cordial|syrup|shake|latte|punch|"
    "cocoa|tonic"
).split("|")

FOOD_WHOLE = (
    "pizza|sushi|lasagne|curry|pancakes|tacos|ramen|paella|dumplings|risotto|falafel|couscous|"
    "noodles|pierogi|gnocchi|hummus|fish and chips|fried rice|tomato soup|roast potatoes|pad thai|"
    "apple pie|mushroom stew|spaghetti|bean chili|waffles|kimchi|biryani|borscht|goulash"
).split("|")
FOOD_FIRST = (
    "tomato onion mushroom lentil bean pea potato carrot pumpkin spinach cabbage leek garlic corn "
    "rice noodle barley chicken fish shrimp egg cheese tofu nut apple pear plum cherry lemon "
    "pepper beet celery chickpea olive herb cream butter oat coconut peanut mustard radish "
    "turnip okra"
).split()
FOOD_LAST = (
    "soup stew pie curry salad pancakes dumplings noodles bread rolls pasta rice casserole tart "
    "omelette burgers wraps fritters cakes pudding chowder risotto skewers gratin toast"
).split()
FOOD_STUFF = (
    "meat|pork|beef|fish|milk|eggs|nuts|peanuts|wheat|gluten|sugar|soy|shellfish|dairy|onions|"
    "garlic|butter|cheese|salt|mushrooms|tomatoes|sesame|corn|honey|lamb|celery|mustard"
).split("|")
DIET_WHOLE = (
    "vegetarian|vegan|pescatarian|kosher|halal|gluten free|dairy free|low salt|low carb|"
    "lactose free|sugar free|paleo|plant based|raw food|keto|mediterranean"
).split("|")

COLOURS = (
    "red|blue|green|yellow|purple|orange|pink|teal|turquoise|black|white|grey|brown|navy|gold|"
    "silver|maroon|violet|crimson|beige|indigo|ochre|lilac|scarlet|amber|ivory"
).split("|")
COLOUR_FIRST = "dark light pale deep bright soft dusty warm moss sky sea brick".split()
MUSIC_WHOLE = (
    "jazz|rock|opera|techno|blues|reggae|folk|punk|soul|metal|classical|country|hip hop|disco|"
    "bossa nova|fado|gospel|ska|flamenco|ambient|funk|swing|salsa|bluegrass|k-pop|baroque"
).split("|")
MUSIC_FIRST = (
    "slow old loud desert space sea northern dream brass string piano street night".split()
)
MUSIC_LAST = "jazz rock pop folk blues techno soul metal punk waltz drums choir swing disco".split()
LANGUAGES = (
    "Spanish|French|German|Italian|Japanese|Korean|Arabic|Dutch|Swedish|Polish|Greek|Turkish|"
    "Portuguese|Russian|Finnish|Welsh|Swahili|Hindi|Czech|Danish|Norwegian|Irish|Hebrew|Thai"
).split("|")
BOOK_FIRST = (
    "Silent Last Blue Hidden Broken Golden Lost Winter Paper Glass Long Red Little Stone Burning "
    "Empty Second Secret Quiet Iron Wild Crooked Salt Dark Green Seventh"
).split()
BOOK_LAST = (
    "River House Garden Letter Road Island Tower Door Winter Crown Sea Mountain Train Clock Forest "
    "Bridge Lantern Harbour Field King Sister Mirror Window Map Storm Orchard"
).split()
TONES = (
    "short|formal|cheerful|simple|funny|warm|plain|polite|calm|friendly|direct|playful|serious|"
    "brief|gentle|honest|witty|clear|kind|dry"
).split("|")
FAMILY = (
    "wife husband partner son daughter brother sister mother father grandmother grandfather cousin "
    "aunt uncle niece nephew flatmate girlfriend boyfriend twin"
).split()
THINGS = (
    "bike|car|boat|school|team|club|doctor|dentist|boss|neighbour|street|village|band|choir|shop|"
    "company|café|gym|teacher|best friend|bank|ship|plant|robot|laptop|cottage|university|church|"
    "landlord|coach|hairdresser|library|bakery|park|train station|football team|hero|nickname|"
    "surname|middle name|project|blog|tent|guitar|favourite game|favourite film|favourite series|"
    "favourite flower|favourite tree|favourite band|favourite app|favourite shop|favourite beach|"
    "favourite singer|favourite fruit|favourite sport|favourite author|password hint|hometown"
).split("|")


@cache
def reserved() -> frozenset[str]:
    """Lower-case words of the evaluation contexts' facts, never invented by this module."""
    words: set[str] = set()
    if EVAL_CONTEXTS.exists():
        for line in EVAL_CONTEXTS.read_text(encoding="utf-8").splitlines():
            for accepted in json.loads(line)["facts"].values():
                for value in [accepted] if isinstance(accepted, str) else accepted:
                    words.update(value.lower().split())
    return frozenset(words)


def invented(rng: Random, low: int = 1, high: int = 3, endings: list[str] | None = None) -> str:
    """A made-up lower-case word: syllables, or now and then plain random letters."""
    while True:
        if rng.random() < 0.2:
            word = "".join(rng.choices("abcdefghijklmnoprstuvwyz", k=rng.randint(3, 8)))
        else:
            word = ""
            for _ in range(rng.randint(low, high)):
                word += rng.choice(ONSETS) if word or rng.random() < 0.85 else ""
                word += rng.choice(VOWELS)
                word += rng.choice(CODAS) if rng.random() < 0.45 else ""
        if endings and rng.random() < 0.6:
            word += rng.choice(endings)
        if 2 < len(word) < 13 and word not in reserved():
            return word


def _maybe(share: float, rng: Random, real: Callable[[], str], made: Callable[[], str]) -> str:
    return made() if rng.random() < share else real()


def _proper(rng: Random, real: list[str], endings: list[str]) -> str:
    return _maybe(
        0.85, rng, lambda: rng.choice(real), lambda: invented(rng, 1, 2, endings).capitalize()
    )


def _compound(rng: Random, whole: list[str], first: list[str], last: list[str]) -> str:
    """An everyday value, a free combination, or one with made-up words in it."""
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(whole)
    if kind < 0.4:
        return f"{rng.choice(first)} {rng.choice(last)}"
    if kind < 0.6:
        return f"{invented(rng)} {rng.choice(last)}"
    if kind < 0.75:
        return f"{rng.choice(first)} {invented(rng, endings=WORD_ENDINGS)}"
    if kind < 0.9:
        return f"{invented(rng)} {invented(rng, endings=WORD_ENDINGS)}"
    return invented(rng, 2, 3)


def name(rng: Random) -> str:
    first = _proper(rng, REAL_NAMES, NAME_ENDINGS)
    return f"{first} {_proper(rng, REAL_NAMES, NAME_ENDINGS)}" if rng.random() < 0.08 else first


def city(rng: Random) -> str:
    town = _proper(rng, REAL_CITIES, CITY_ENDINGS)
    kind = rng.random()
    if kind < 0.04:
        return f"{rng.choice(['Port', 'New', 'Saint', 'North', 'Upper', 'Old', 'San'])} {town}"
    return town


def pet(rng: Random) -> str:
    return _proper(rng, REAL_PETS, NAME_ENDINGS)


def animal(rng: Random) -> str:
    return rng.choice(ANIMALS) if rng.random() < 0.93 else invented(rng)


def job(rng: Random) -> str:
    return _compound(rng, JOB_WHOLE, JOB_FIRST, JOB_LAST)


def hobby(rng: Random) -> str:
    return _compound(rng, HOBBY_WHOLE, HOBBY_FIRST, HOBBY_LAST)


def drink(rng: Random) -> str:
    return _compound(rng, DRINK_WHOLE, FLAVOURS, DRINK_LAST)


def food(rng: Random) -> str:
    return _compound(rng, FOOD_WHOLE, FOOD_FIRST, FOOD_LAST)


def diet(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(DIET_WHOLE)
    stuff = rng.choice(FOOD_STUFF) if rng.random() < 0.7 else invented(rng)
    return f"no {stuff}" if kind < 0.75 else f"{stuff} free"


def color(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(COLOURS)
    if kind < 0.6:
        return f"{rng.choice(COLOUR_FIRST)} {rng.choice(COLOURS)}"
    return f"{invented(rng)} {rng.choice(COLOURS)}" if kind < 0.75 else invented(rng)


def music(rng: Random) -> str:
    return _compound(rng, MUSIC_WHOLE, MUSIC_FIRST, MUSIC_LAST)


def book(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return f"The {rng.choice(BOOK_FIRST)} {rng.choice(BOOK_LAST)}"
    if kind < 0.75:
        return f"The {invented(rng).capitalize()} {rng.choice(BOOK_LAST)}"
    return invented(rng, 2, 3).capitalize()


def language(rng: Random) -> str:
    return _maybe(
        0.25, rng, lambda: rng.choice(LANGUAGES), lambda: invented(rng, 1, 2, ["ish", "ese", "ic"])
    ).capitalize()


def tone(rng: Random) -> str:
    return rng.choice(TONES) if rng.random() < 0.85 else invented(rng)


def family(rng: Random) -> str:
    """The name of a relative; who it is comes from `relative`."""
    return _proper(rng, REAL_NAMES, NAME_ENDINGS)


def relative(rng: Random) -> str:
    return rng.choice(FAMILY)


def thing(rng: Random) -> str:
    """The value of a topic that only the profile names (`my boat is called ...`)."""
    kind = rng.random()
    if kind < 0.6:
        return invented(rng, 1, 3).capitalize()
    if kind < 0.85:
        return invented(rng, 1, 3)
    return str(rng.randint(2, 9999))


TOPICS: dict[str, Callable[[Random], str]] = {
    "name": name,
    "city": city,
    "job": job,
    "diet": diet,
    "pet": pet,
    "hobby": hobby,
    "drink": drink,
    "food": food,
    "color": color,
    "music": music,
    "book": book,
    "language": language,
    "family": family,
    "tone": tone,
}


def table_words() -> set[str]:
    """Every lower-case word of the fixed value tables above (not the invented ones)."""
    parts = ("ONSETS", "VOWELS", "CODAS", "WORD_ENDINGS")
    words: set[str] = set()
    for key, value in globals().items():
        if key.isupper() and isinstance(value, list) and key not in parts:
            for entry in value:
                words.update(entry.lower().split())
    return words
