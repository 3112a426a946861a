"""Word lists for `slots`: how English texts state the attribute values of E2E NLG (Novikova et al. 2017).

Each attribute has levels, and each level two regular expressions over normalised text (lower case, no accents, plain
quotes and hyphens, restaurant names masked):

    accepts   a match realises the level; lenient, as the human references are
    states    a match claims the level, even where the meaning representation does not have it; strict, so that "a good
              place" is not a claim about the customer rating

The data's verbal and numeric values share a level ("cheap" and "less than £20", "average" and "3 out of 5"): the human
authors use them interchangeably.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# --------------------------------------------------------------------------------------------- building blocks

_PRICE = r"(?:pric\w*|costs?|costing)"
_RATING = r"(?:rate[ds]?|rating|ratings|reviews?|reviewed|ranked|ranking|scores?|scored|satisfaction|feedback)"
_LEVEL = r"(?:high\w*|low\w*|averag\w*|moderat\w*|medium|mid|good|poor\w*|bad\w*|cheap\w*)"
_SKIP = rf"(?:(?!{_PRICE}\b|{_RATING}\b|{_LEVEL}\b|and\b|but\b|with\b)[\w']+[\s-]+)"
_NOT = r"(?:not|none?|no(?!\s+(?:more|less))|never|isnt|arent|doesnt|dont|\w+n't)"
_WHO = r"(?:famil(?:y|ies)|kids?|child(?:ren)?s?|young(?:er|sters?)?)"
# neither "below average" nor the mean in "its average customer rating is 5 out of 5"
_AVERAGE = (
    r"(?<!below )(?<!above )(?<!than "
    r")average(?![\s-]+(?:customer[\s-]+)?rating\b[\w\s']{0,20}?\b(?:[1-5]|one|two|three|four|five)\b)"
)

# "north of the city centre" does not claim the centre
_NOT_OF = "".join(
    rf"(?<!{side} {of})"
    for side in ("north", "south", "east", "west", "outside")
    for of in ("", "the ", "of ", "of the ")
)


def _about(words: str, noun: str, other: str) -> str:
    """Match a level word about a noun: "high [customer] rating", "rating is [very] high"; not "rating, high price"."""
    return rf"\b(?:{words})[\s-]+(?!the\b){_SKIP}{{0,2}}{noun}\b|\b{noun}[\s:-]+{_SKIP}{{0,3}}(?:{words})\b(?![\s-]+(?:customer\w*[\s-]+)?{other}\b)"


def _price(words: str) -> str:
    return _about(words, _PRICE, _RATING)


def _rating(words: str) -> str:
    return _about(words, _RATING, _PRICE)


def _stars(number: str) -> str:
    """Match `number` out of five: "3 out of 5", "three-star", "3/5", "rated 3"; not the 5 of "3 out of 5 stars"."""
    alone = (
        r"(?<!t of )(?<!one of )(?<!ree of )(?<!ive of )(?<!out if )(?<!ur of )(?<!\d of )(?<!of-)(?<!out )(?<!/ "
        rf")(?<![\w/£.])(?:{number})"
    )
    return (
        rf"\b(?:{number})[\s-]*(?:(?:out|put|our)[\s-]*(?:of|if)?|of|/)[\s-]*(?:a[\s-]+)?(?:possible[\s-]+)?(?:5|five)"
        rf"|{alone}[\s-]*(?:\*|stars?\b)"
        rf"|{alone}[\s-]+(?:customer[\s-]+)?rat(?:ed|ing|ings)\b"
        rf"|\brat(?:ed|ing|es?|ings)[\s:]+(?:(?:is|of|at|as|it|them|a|an|are)[\s]+){{0,2}}(?:{number})\b(?![\s-]*(?:out|of|stars?|/|\*))"
    )


# --------------------------------------------------------------------------------------------- words


@dataclass(frozen=True)
class Level:
    """The two expressions of an attribute's level. Without `states`, no text claims the level."""

    accepts: re.Pattern[str]
    states: re.Pattern[str] | None


def _level(states: str, accepts: str = "") -> Level:
    """Build a level. What states it also realises it; `accepts` are looser words that only realise it."""
    parts = [part for part in (states, accepts) if part]
    return Level(re.compile("|".join(parts)), re.compile(states) if states else None)


LEVELS: dict[str, dict[str, Level]] = {
    "eatType": {
        "pub": _level(
            r"\bpubs?\b(?!\s+(?:food|fare|grub|style))", r"\bpub\b|\bbar\b|\btavern\b|\binn\b|\bale\s?house\b|\bpint\b"
        ),
        "coffee shop": _level(r"\bcoff?ee?[\s-]*(?:shop|house|bar)", r"\bcoff?ee?\b|\bcafes?\b|\bcafeteria\b"),
        # no `states`: "restaurant" is also the authors' word for any place to eat
        "restaurant": _level(
            "",
            r"\brest[au]+rants?\b|\beater(?:y|ies)\b|\bdiner\b|\bbistro\b|\bdin(?:e|ing)\b|\bplace to eat\b|\beating\b",
        ),
    },
    "food": {
        "English": _level(
            r"\benglish\b|\bbritish\b(?! pounds?)",
            r"\bbreakfasts?\b|\bfish (?:and|&) chips\b|\broasts?\b|\btraditional\b",
        ),
        "French": _level(r"\bfrench\b", r"\bwines?\b|\bcheeses?\b|\bcroissants?\b"),
        "Italian": _level(r"\bitalian\b", r"\bpastas?\b|\bpizzas?\b|\bspaghetti\b"),
        "Japanese": _level(r"\bjapanese\b|\bsushi\b", r"\bramen\b"),
        "Chinese": _level(r"\bchinese\b", r"\bnoodles?\b|\bdim sum\b"),
        "Indian": _level(r"\bindian\b", r"\bcurry\b|\bcurries\b"),
        "Fast food": _level(
            r"\bfast[\s-]*foods?\b",
            r"\b(?:ham|cheese)?burgers?\b|\bfries\b|\btake[\s-]?(?:away|out)s?\b|\bquick\b|\bfast\b|\bjunk food\b",
        ),
    },
    "priceRange": {
        "low": _level(
            r"(?<!not )\bcheap(?:er|ly|est)?\b|\binexpensive\w*\b|\blow[\s-]*cost|\bnot expensive\b"
            r"|\b(?:less|lower|cheaper)[\s-]+tha[nt][\s£$€el-]*(?:20|twenty)\b|\b(?:under|below|up to|at "
            r"most|within)[\s£$€el-]*(?:20|twenty)\b(?![\s£-]*(?:25|-))"
            rf"|{_price('low(?:er|est|ly)?')}",
            r"\baffordabl[ey]\b|\breasonabl[ey]\b|\bbudgets?\b|\beconomical\w*\b|\bbargain\b|\bgood value\b|\blow "
            r"end\b|\bgreat prices?\b"
            r"|(?:20|twenty) (?:or|and) "
            rf"(?:less|under|below)|{_price('below average|good|fair|great|small|competitive')}",
        ),
        "mid": _level(
            r"(?:20|twenty)[\s£$€el]*(?:pounds?|euros?)?[\s-]*(?:-|to|and|through)[\s£$€el-]*(?:25|twenty[\s-]*five)"
            rf"|\bmoderat(?:e|ely)[\s-]+(?:pric|cost)\w*|{_price('moderat(?:e|ely|ing)|medium|mid|mid-?range|middle|midrange|(?<!below )(?<!above )(?<!than[ -])averaged?')}",
            r"\bmoderate(?:ly)?\b|\bmid(?:dle)?[\s-]*(?:rang\w+|pric\w+|level)\b|\breasonabl[ey]\b|\bnot (?:too |very "
            r"|that )?expensive\b|\baffordabl[ey]\b"
            rf"|{_price('fair(?:ly)?|reasonabl[ey]|decent|modest(?:ly)?|mediocre|ok(?:ay)?|normal')}",
        ),
        "high": _level(
            r"(?<!not )(?<!less )(?<!too )(?<!moderately )\b(?:expensive|pricey|pricy|costly)\b"
            r"|\b(?:more|higher|greater)[\s-]+tha[nt][\s£$€el-]*(?:30|thirty)\b|\b(?:over|above|upwards? "
            r"of|exceed\w*)[\s£$€el-]*(?:30|thirty)\b"
            rf"|{_price('high(?:er|ly|est)?|high-?end')}",
            r"\bhigh[\s-]*end\b|\bup[\s-]?(?:market|scale)\b|\bluxur\w+\b|\b30[\s£]*(?:\+|plus|and "
            r"(?:up|over|above)|or (?:more|over|above))"
            r"|\bexpensive\b|\b(?:start\w*|from|minimum|at "
            r"least)[\s\w]{0,12}£?30\b|\b30[\s£]*minimum\b|\bpremium\b|\bfancy\b"
            rf"|{_price('above[ -]average|higher[ -]than[ -]average')}",
        ),
    },
    "customer rating": {
        "low": _level(
            rf"{_stars('1|one')}|{_rating('low(?:er|est|ly)?|poor(?:ly)?|bad(?:ly)?|below average|terrible|awful')}",
            r"\bpoor(?:ly)?\b|\bbad(?:ly)?\b|\bunpopular\b|\bterribl[ey]\b|\bawful\b|\bnot (?:well|highly|very "
            r"well|so)[\s-]+(?:rated|reviewed|liked|recommended|regarded)\b"
            r"|\blow[\s-]+(?:customer|quality|standards?|star)\w*|\bcustomers? \w+ it "
            r"low\b|\bworst\b|\bdisappoint\w+\b|\blow in\b",
        ),
        "mid": _level(
            rf"{_stars('3|three')}|{_rating(_AVERAGE + '|averagely|mediocre|ok(?:ay)?|so-so')}",
            r"(?<!below )(?<!above )\baverage\b|\bdecent(?:ly)?\b|\bmediocre\b|\bok(?:ay)?\b|\bmiddling\b"
            rf"|{_rating('fair(?:ly)?|moderate(?:ly)?|medium|mid|middle|decent(?:ly)?|reasonable|satisfactory|good')}",
        ),
        "high": _level(
            rf"{_stars('5|five')}|(?<!not "
            rf")\b(?:highly|top|well)[\s-]+(?:rated|reviewed)\b|{_rating('(?<!not )high(?:er|est|ly)?|excellent|perfect|outstanding')}",
            r"\bexcellent\w*\b|\bgreat\b|\bperfect\b|\boutstanding\b|\bfantastic\b|\b(?:highly|well)[\s-]+(?:\w+[\s-]+)?(?:recommended|regarded|liked|rated|praised)\b"
            r"|\bpopular\b|\brave\b|\bbest\b|\btop\b|\bhigh[\s-]+(?:customer|quality|star|standard)\w*|\bexceptional\w*\b|\bacclaimed\b|\bloved?\b|\bwonderful\b|\bsuperb\b"
            rf"|{_rating('good|well|great|positive|fantastic|exceptional|amazing|wonderful|superb|top|full|maximum|best')}",
        ),
        # not a value in the data, so wrong for every row
        "between": _level(_stars("2|two|4|four")),
    },
    "area": {
        "riverside": _level(
            r"\briver[\s-]*(?:side|bank|front)?s?\b|\bwater[\s-]*(?:side|front)\b",
            r"\bthames\b|\bthe cam\b|\bwater\b|\briver\w*\b",
        ),
        "city centre": _level(
            rf"{_NOT_OF}\b(?:city|town)(?:'s)?[\s-]*(?:cent(?:re|er)s?|cent[er]+)\b|\bcent(?:re|er|ral)[\w\s]{{0,12}}?\b(?:city|town)\b|\bdown\s?town\b",
            r"\bcity\b|\bcent(?:re|er|rally|ral)\b|\bheart of\b|\btown\b",
        ),
    },
}

# The data's values and the level each stands for; values not named here are their own level.
LEVEL_OF = {
    "priceRange": {
        "cheap": "low",
        "less than £20": "low",
        "moderate": "mid",
        "£20-25": "mid",
        "high": "high",
        "more than £30": "high",
    },
    "customer rating": {
        "1 out of 5": "low",
        "low": "low",
        "3 out of 5": "mid",
        "average": "mid",
        "5 out of 5": "high",
        "high": "high",
    },
}

# --------------------------------------------------------------------------------------------- families

_FILL = r"(?:[\s'-]+(?!but\b|however\b|yet\b|although\b|though\b|while\b|and\s+(?:it|is|has)\b)[\w']+){0,6}?[\s'-]+"
_WELCOME = r"(?:allow|permit|welcom|friend|recommend|suit|accept|appropriat|cater|ideal)\w*"
NOT_FOR_FAMILIES = re.compile(
    rf"\b{_NOT}{_FILL}{_WHO}\b(?:[\s-]*(?:and|or|/)?[\s-]*{_WHO}\b)?(?:[\s-]*(?:friend\w*|orient\w*|{_WELCOME}))?"
    rf"|\b{_WHO}\b(?:[\s-]+[\w']+){{0,3}}?[\s-]+{_NOT}(?:[\s-]+[\w']+){{0,2}}?[\s-]+(?:{_WELCOME})"
    rf"|\b{_WHO}\b(?:[\s-]+[\w']+){{0,3}}?[\s-]+(?:prohibited|banned|forbidden|excluded)\b"
    rf"|\b{_WHO}[\s-]*(?:un\w+|free|less)\b|\b{_WHO}[\s-]+friendly:?\s+no\b|\bun(?:suitable|friendly|welcoming)\b[\w\s]{{0,14}}?\b{_WHO}\b"
    rf"|\badults?\b|\bmature\b|\bgrown[\s-]*ups?\b|\b(?:leave|avoid|without|prohibit\w*|exclud\w*|ban\w*)\b[\w\s]{{0,16}}?\b{_WHO}\b"
)
FOR_FAMILIES = re.compile(
    rf"\b{_WHO}(?:'s|s'|s)?[\s,/-]*(?:(?:and|or)[\s-]*{_WHO}[\s-]*)?(?:and[\s-]*)?(?:friend\w*|frienl\w*|orient\w*|welcom\w*|based|style|environment|atmosphere|venue|place|"
    r"restaurant|pub|coffee|establishment|run|meals?|dining|outings?|services?)\b"
    rf"|\bfriendly\b[\w\s]{{0,20}}?\b{_WHO}\b"
    r"|\b(?:whole|entire|all "
    rf"the|any|every|your|the|with|for|including|bring|brings|take|all|serves?|caters?|suits?)\b[\w\s]{{0,16}}?\b{_WHO}\b"
    rf"|\b{_WHO}\b[\w\s]{{0,16}}?\b(?:{_WELCOME}|love|enjoy\w*)|\b{_WELCOME}\b[\w\s]{{0,16}}?\b{_WHO}\b|\ball "
    r"ages\b|\b(?:families|kids|children|family)\b"
)

# --------------------------------------------------------------------------------------------- names

# Every value of `name` and `near` in E2E's training, development and test sets.
# fmt: off
NAMES = (
    "Alimentum", "All Bar One", "Aromi", "Avalon", "Bibimbap House", "Blue Spice", "Browns Cambridge", "Burger King", "Café Adriatic",
    "Café Brazil", "Café Rouge", "Café Sicilia", "Clare Hall", "Clowns", "Cocum", "Cotto", "Crowne Plaza Hotel", "Express by Holiday Inn",
    "Fitzbillies", "Giraffe", "Green Man", "Loch Fyne", "Midsummer House", "Rainbow Vegetarian Café", "Raja Indian Cuisine", "Ranch",
    "Strada", "Taste of Cambridge", "The Bakers", "The Cambridge Blue", "The Cricketers", "The Dumpling Tree", "The Eagle",
    "The Golden Curry", "The Golden Palace", "The Mill", "The Olive Grove", "The Phoenix", "The Plough", "The Portland Arms",
    "The Punter", "The Rice Boat", "The Six Bells", "The Sorrento", "The Twenty Two", "The Vaults", "The Waterman", "The Wrestlers",
    "Travellers Rest Beefeater", "Wildwood", "Yippee Noodle Bar", "Zizzi",
)
# fmt: on
