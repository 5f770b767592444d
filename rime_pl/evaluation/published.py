"""Scores that others have published, each with its source, for a row beside ours.

Called by results.py. Values are fractions. Different versions of the data are named: their numbers cannot be
compared with each other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRow:
    """What a source tells of a model."""

    model: str
    source: str
    note: str  # in which way its numbers differ from ours
    values: dict[str, float]  # keys of the columns of results.py


#: Benchmark -> rows. MRMR has none: which mean its overall number is has not been confirmed.
PUBLISHED: dict[str, tuple[PublishedRow, ...]] = {
    "mmeb-v2": (
        PublishedRow(
            "Qwen3-VL-Embedding-8B",
            "arXiv 2601.04720 and its report for the leaderboard",
            "its own protocol: up to 64 frames, larger pictures",
            {"image": 0.8012, "video": 0.6715, "visdoc": 0.8236, "overall": 0.7782},
        ),
        PublishedRow(
            "VLM2Vec-V2.0-2B",
            "leaderboard of MMEB-V2, scores of release 2.0.0",
            "broken page sets, MomentSeeker with 1,800 queries",
            {
                **{"image": 0.6485, "video": 0.3458, "visdoc": 0.6536, "overall": 0.5802},
                **{"I-CLS": 0.629, "I-QA": 0.563, "I-RET": 0.695, "I-GD": 0.773},
                **{"V-CLS": 0.393, "V-QA": 0.343, "V-RET": 0.288, "V-MRET": 0.368},
                **{"D-VDRv1": 0.755, "D-VDRv2": 0.449, "D-VR": 0.794, "D-OOD": 0.394},
            },
        ),
    ),
    "mrmr": (),
    "uvrb": (
        PublishedRow(
            "GVE-7B",
            "arXiv 2510.27571",
            "",
            {
                **{"A-AVG": 0.600, "D-AVG": 0.573, "TXT": 0.657, "CMP": 0.312, "VIS": 0.657, "CG": 0.587},
                **{"FG": 0.570, "LC": 0.814, "S": 0.821, "T": 0.469, "PR": 0.419},
            },
        ),
    ),
}
