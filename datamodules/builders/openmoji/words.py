"""Turns the short name of an emoji into English: names, rewrites, captions and requests for a change.

Each fact of a picture (subject, gender, skin tone, group) has other words in the query's rewrite, in the
target's rewrite and in a caption, so that copying words from one to the other does not find the target.
Used by builder.py and pictures.py beside it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
YELLOW = "yellow"  # the colour of an emoji without skin tone
_LETTERS = re.compile("[a-z][a-z ]{2,}")
_TONE = re.compile(r"_(medium-light|medium-dark|light|medium|dark)_skin_tone")

_JOBS = {
    *(
        "artist",
        "astronaut",
        "construction_worker",
        "cook",
        "detective",
        "factory_worker",
        "farmer",
        "firefighter",
    ),
    *("guard", "health_worker", "judge", "mechanic", "office_worker", "pilot", "police_officer", "scientist"),
    *("singer", "student", "teacher", "technologist"),
}
_FANTASY = {"elf", "fairy", "mage", "superhero", "supervillain", "vampire"}
#: Short names that do not follow "<gender>_<activity>": gender, head, details, group.
_SPECIAL: dict[str, tuple[str, str, str, str]] = {
    "man": ("man", "man", "", "portrait"),
    "woman": ("woman", "woman", "", "portrait"),
    "person": ("person", "person", "", "portrait"),
    "boy": ("man", "boy", "", "portrait"),
    "girl": ("woman", "girl", "", "portrait"),
    "child": ("person", "child", "", "portrait"),
    "baby": ("", "baby", "", "portrait"),
    "old_man": ("man", "old man", "", "portrait"),
    "old_woman": ("woman", "old woman", "", "portrait"),
    "older_person": ("person", "old person", "", "portrait"),
    "prince": ("man", "prince", "", "fantasy"),
    "princess": ("woman", "princess", "", "fantasy"),
    "merman": ("man", "merman", "", "fantasy"),
    "mermaid": ("woman", "mermaid", "", "fantasy"),
    "merperson": ("person", "merperson", "", "fantasy"),
    "Santa_Claus": ("man", "Santa Claus", "", "fantasy"),
    "Mrs._Claus": ("woman", "Mrs Claus", "", "fantasy"),
    "Mx_Claus": ("person", "Mx Claus", "", "fantasy"),
    "baby_angel": ("", "baby angel", "", "fantasy"),
    "ninja": ("", "ninja", "", "fantasy"),
    "snowboarder": ("", "snowboarder", "", "activity"),
    "ballet_dancer": ("", "ballet dancer", "", "activity"),
    "horse_racing": ("", "jockey", "riding a race horse", "activity"),
    "breast-feeding": ("woman", "woman", "breast-feeding a baby", "activity"),
    "selfie": ("", "arm", "taking a selfie", "hand"),
    "nail_polish": ("", "hand", "with nail polish", "hand"),
    "hand_with_fingers_splayed": ("", "hand", "with fingers splayed", "hand"),
    "hand_with_index_finger_and_thumb_crossed": ("", "hand", "with index finger and thumb crossed", "hand"),
    "OK_hand": ("", "hand", "making an OK sign", "hand"),
    "call_me_hand": ("", "hand", "making a call-me sign", "hand"),
    "clapping_hands": ("", "pair of clapping hands", "", "hand"),
    "crossed_fingers": ("", "hand", "with crossed fingers", "hand"),
    "folded_hands": ("", "pair of folded hands", "", "hand"),
    "handshake": ("", "handshake", "", "hand"),
    "heart_hands": ("", "pair of hands", "forming a heart", "hand"),
    "open_hands": ("", "pair of open hands", "", "hand"),
    "palms_up_together": ("", "pair of hands", "with palms up together", "hand"),
    "raising_hands": ("", "pair of raised hands", "", "hand"),
    "love-you_gesture": ("", "hand", "making a love-you sign", "hand"),
    "victory_hand": ("", "hand", "making a victory sign", "hand"),
    "vulcan_salute": ("", "hand", "making a vulcan salute", "hand"),
    "sign_of_the_horns": ("", "hand", "making the sign of the horns", "hand"),
    "thumbs_up": ("", "hand", "with the thumb up", "hand"),
    "thumbs_down": ("", "hand", "with the thumb down", "hand"),
    "middle_finger": ("", "hand", "showing the middle finger", "hand"),
    "pinched_fingers": ("", "hand", "with pinched fingers", "hand"),
    "index_pointing_up": ("", "index finger", "pointing up", "hand"),
    "index_pointing_at_the_viewer": ("", "index finger", "pointing at the viewer", "hand"),
    "raised_back_of_hand": ("", "raised back of a hand", "", "hand"),
    "flexed_biceps": ("", "flexed biceps", "", "body part"),
    "ear": ("", "ear", "", "body part"),
    "ear_with_hearing_aid": ("", "ear", "with a hearing aid", "body part"),
    "foot": ("", "foot", "", "body part"),
    "leg": ("", "leg", "", "body part"),
    "nose": ("", "nose", "", "body part"),
    "couple_with_heart": ("", "couple", "with a heart", "couple"),
    "couple_with_heart_man_man": ("man", "couple of two men", "with a heart", "couple"),
    "couple_with_heart_woman_man": ("", "couple of a woman and a man", "with a heart", "couple"),
    "couple_with_heart_woman_woman": ("woman", "couple of two women", "with a heart", "couple"),
    "couple_with_heart_person_person": ("person", "couple of two people", "with a heart", "couple"),
    "kiss_person_person": ("person", "kissing couple of two people", "", "couple"),
    "kiss": ("", "kissing couple", "", "couple"),
    "kiss_man_man": ("man", "kissing couple of two men", "", "couple"),
    "kiss_woman_man": ("", "kissing couple of a woman and a man", "", "couple"),
    "kiss_woman_woman": ("woman", "kissing couple of two women", "", "couple"),
    "men_holding_hands": ("man", "pair of men", "holding hands", "couple"),
    "women_holding_hands": ("woman", "pair of women", "holding hands", "couple"),
    "woman_and_man_holding_hands": ("", "pair of a woman and a man", "holding hands", "couple"),
    "people_holding_hands": ("person", "pair of people", "holding hands", "couple"),
    "men_with_bunny_ears": ("man", "pair of men", "with bunny ears", "couple"),
    "women_with_bunny_ears": ("woman", "pair of women", "with bunny ears", "couple"),
    "people_with_bunny_ears": ("person", "pair of people", "with bunny ears", "couple"),
    "men_wrestling": ("man", "pair of men", "wrestling", "couple"),
    "women_wrestling": ("woman", "pair of women", "wrestling", "couple"),
    "people_wrestling": ("person", "pair of people", "wrestling", "couple"),
}
#: Relatives of another gender among the special names.
_FAMILIES = {
    base: role
    for role, bases in {
        "adult": "man woman person",
        "child": "boy girl child",
        "old": "old_man old_woman older_person",
        "royal": "prince princess",
        "merfolk": "merman mermaid merperson",
        "Claus": "Santa_Claus Mrs._Claus Mx_Claus",
    }.items()
    for base in bases.split()
}
_ACTIVITIES = {
    "feeding_baby": "feeding a baby",
    "bouncing_ball": "bouncing a ball",
    "gesturing_NO": "gesturing no",
    "gesturing_OK": "gesturing OK",
    "getting_haircut": "getting a haircut",
    "getting_massage": "getting a massage",
    "raising_hand": "raising a hand",
    "tipping_hand": "tipping a hand",
    "rowing_boat": "rowing a boat",
    "taking_bath": "taking a bath",
    "in_lotus_position": "in the lotus position",
    "in_manual_wheelchair": "in a manual wheelchair",
    "in_motorized_wheelchair": "in a motorized wheelchair",
    "in_steamy_room": "in a steamy room",
    "in_suit_levitating": "levitating in a suit",
    "in_tuxedo": "in a tuxedo",
    "in_bed": "in bed",
    "wearing_turban": "wearing a turban",
    "with_veil": "with a veil",
    "with_headscarf": "with a headscarf",
    "with_skullcap": "with a skullcap",
    "with_crown": "with a crown",
    "with_white_cane": "with a white cane",
    "bald": "with a bald head",
    "beard": "with a beard",
    "blond_hair": "with blond hair",
    "curly_hair": "with curly hair",
    "red_hair": "with red hair",
    "white_hair": "with white hair",
}
_LOOKS = ("in_tuxedo", "wearing_turban", "with_", "bald", "beard", "blond", "curly", "red_hair", "white_hair")


@dataclass(frozen=True)
class Concept:
    """The content of a picture, in parts."""

    base: str  # short name without skin tone, e.g. "woman_cook"
    head: str  # "woman cook"
    details: str = ""  # "with red hair", "juggling" or ""
    gender: str = ""  # "man", "woman", "person" or "" where there is no gender
    role: str = ""  # the part that stays when the gender changes, e.g. "cook"; "" if there is none
    group: str = ""  # "job", "activity", "hand" ...; "" for objects
    tone: str = ""  # a skin tone, "yellow", or "" for things
    also: tuple[str, ...] = ()  # further names of a thing: "car" for "automobile"

    def with_tone(self, tone: str) -> Concept:
        return replace(self, tone=tone)


def split_tone(short_name: str) -> tuple[str, list[str]]:
    """Return the short name without skin tones, and the tones in their order.

    Example:
        >>> split_tone("woman_dark_skin_tone_bald")
        ('woman_bald', ['dark'])
    """
    return _TONE.sub("", short_name), _TONE.findall(short_name)


def person_concept(base: str) -> Concept:
    """Return the content of an emoji with skin tones, from its short name without the tone.

    Example:
        >>> person_concept("man_red_hair").details
        'with red hair'
    """
    if base in _SPECIAL:
        gender, head, details, group = _SPECIAL[base]
        role = f"{details} {head.split(' of ')[0]}" if group == "couple" else _FAMILIES.get(base, "")
        return Concept(base, head, details, gender, role, group)
    plain = base.removesuffix("_facing_right")
    right = ", facing right" if plain != base else ""
    if plain in _JOBS or plain in _FANTASY:
        group = "job" if plain in _JOBS else "fantasy"
        return Concept(base, f"{_spaced(plain)} of any gender", "", "person", plain, group)
    for adjective in ("deaf", "pregnant"):
        if plain.startswith(f"{adjective}_"):
            gender = plain.removeprefix(f"{adjective}_")
            return Concept(base, f"{adjective} {gender}", "", gender, adjective, "portrait")
    gender, _, what = plain.partition("_")
    if gender in ("man", "woman", "person") and what:
        if what in _JOBS or what in _FANTASY:
            return Concept(
                base, f"{gender} {_spaced(what)}", "", gender, what, "job" if what in _JOBS else "fantasy"
            )
        details = _ACTIVITIES.get(what, _spaced(what)) + right
        group = "appearance" if what.startswith(_LOOKS) else "activity"
        return Concept(base, gender, details, gender, what + right, group)
    if plain.startswith("backhand_index_pointing"):
        return Concept(
            base, "index finger", f"pointing {plain.rsplit('_', 1)[1]}, seen from behind", group="hand"
        )
    return Concept(base, _spaced(plain), group="hand")


def object_concept(name: str, also: tuple[str, ...] = ()) -> Concept:
    """Return the content of a thing; both its name and its further names are already readable."""
    return Concept(name, name, also=also)


def further_names(base: str, short_names: Iterable[str]) -> tuple[str, ...]:
    """Return the short names that are other words than ``base``, readable, without repeats.

    Example:
        >>> further_names("automobile", [":car:", ":red_car:", ":automobile:", "car"])
        ('car', 'red car')
    """
    plain = [re.sub("[:_-]+", " ", name).strip() for name in short_names]
    known = {_spaced(base).lower()}
    return tuple(name for name in dict.fromkeys(plain) if _LETTERS.fullmatch(name) and name not in known)


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _a(words: str) -> str:
    """Return the words with their indefinite article.

    Example:
        >>> _a("old man"), _a("pair of men"), _a("Santa Claus")
        ('an old man', 'a pair of men', 'Santa Claus')
    """
    if words[0].isupper():
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _full(concept: Concept, article: bool = True) -> str:
    """Return head and details: "a woman cook", "a man with red hair", "a pair of men wrestling"."""
    head = _a(concept.head) if article else concept.head
    return f"{head} {concept.details}".strip()


def _upper(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


_ADJECTIVE = {"man": "male", "woman": "female", "person": "of any gender", "": ""}


def names(concept: Concept) -> list[str]:
    """Return names that a person would type or read below the picture, the plainest first."""
    if not concept.group:
        frames = ("{}", "{} emoji", "emoji: {}", "i need {}", "one {} here", "draw: {}")
        return [frame.format(name) for name in (concept.head, *concept.also) for frame in frames]
    tone, details = concept.tone, concept.details
    joint = {"with": " and" + details[4:], "": ""}.get(
        details.split(" ")[0], f" {details}" if details.startswith("in ") else f", {details}"
    )
    return [
        f"{_a(concept.head)} with {tone} skin{joint}",
        f"{_full(concept, article=False)}, {tone} skin tone",
        _a(f"{tone}-skinned {_full(concept, article=False)}"),
    ]


def everyday_queries(concept: Concept) -> list[str]:
    """Return ways to ask for a thing in words that no training text has around its name."""
    return [f"Show me the {concept.head}!", f"{concept.head}, please", f"where is my {concept.head}?"]


def query_rewrites(concept: Concept) -> list[str]:
    """Return rewrites for a query: short sentences with the whole name and the skin tone."""
    if not concept.group:
        return [f"The emoji of {concept.head}.", f"A picture of {concept.head}."]
    full, tone = _full(concept), concept.tone
    return [f"{_upper(full)}, {tone} skin.", f"{_upper(tone)} skin, {full}."]


def target_rewrites(concept: Concept) -> list[str]:
    """Return rewrites for a target: short sentences that name gender and subject apart, in other words."""
    if not concept.group:
        return [f"Drawn here: {concept.head}.", f"This means {concept.head}."]
    subject, tone = _subject(concept), concept.tone
    gender = {"man": "male", "woman": "female", "person": "any gender", "": ""}[concept.gender]
    if not gender:
        return [f"{_upper(tone)} {subject}.", f"Seen: {subject}, {tone}."]
    return [f"{_upper(tone)} {gender}: {subject}.", f"Seen: {subject}, {gender}, {tone}."]


def _subject(concept: Concept) -> str:
    """Return the subject without the gender: "cook", "juggling", "with red hair", "old woman"."""
    if concept.group in ("job", "fantasy") and concept.base not in _SPECIAL:
        return _spaced(concept.role)
    if concept.head in ("man", "woman", "person") and concept.details:
        return concept.details
    return _full(concept, article=False)


def captions(concept: Concept) -> list[str]:
    """Return captions to pre-train the tiny base model, in other words than names and rewrites."""
    if not concept.group:
        plain = [f"a drawing: {concept.head}", f"this is what {concept.head} looks like", concept.head]
        return plain + [f"{name}, or {concept.head}" for name in concept.also]
    full = _full(concept, article=False)
    return [
        f"a drawing: {full} ({concept.tone} complexion)",
        f"{concept.tone} complexion and {full} can be seen",
        f"here we have {full}, complexion {concept.tone}",
        f"{concept.group} / {full} / {concept.tone}",
    ]


def tone_change(tone: str, rng: random.Random) -> str:
    """Return a request for another skin tone."""
    return rng.choice(
        [f"Give it {tone} skin.", f"The same with {tone} skin.", f"Change the skin tone to {tone}."]
    )


def gender_change(target: Concept, rng: random.Random) -> str:
    """Return a request for another gender; ``target`` is the result."""
    if target.group == "couple":
        who = {"man": "two men", "woman": "two women", "person": "two of any gender", "": "a woman and a man"}
        return rng.choice([f"Make them {who[target.gender]}.", f"The same, but {who[target.gender]}."])
    who = {"man": "a man", "woman": "a woman", "person": "a person of any gender"}
    return rng.choice([f"Make it {who[target.gender]}.", f"The same, but as {who[target.gender]}."])


def role_change(target: Concept, rng: random.Random) -> str:
    """Return a request for another job or fantasy role; ``target`` is the result."""
    role = _a(_spaced(target.role))
    return rng.choice(
        [f"Make it {role}.", f"The same one as {role}.", f"Change the role to {_spaced(target.role)}."]
    )
