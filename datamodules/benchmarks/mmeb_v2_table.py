"""The 78 tasks of MMEB-V2 as data: mmeb_v2_tasks.csv beside this file, in the order of the official report.

Its strings belong to the protocol and must stay letter for letter, spaces at their ends included.

Source: the official code (TIGER-AI-Lab/VLM2Vec) and the hub pages of the data sets.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

#: Report keys of the page sets as they are since 2026-01; the plain names stand for the broken data.
FIXED = {"ViDoSeek-page": "ViDoSeek-page-fixed", "MMLongBench-page": "MMLongBench-page-fixed"}

#: Classes that count as candidates also if no row has them. Order says nothing.
CLASSES = {
    "Breakfast": "pancake cereal sandwich scrambledegg friedegg coffee milk tea juice salad",
    "HMDB51": """brush_hair cartwheel catch chew clap climb climb_stairs dive draw_sword dribble drink eat
        fall_floor fencing flic_flac golf handstand hit hug jump kick kick_ball kiss laugh pick pour
        pullup punch push pushup ride_bike ride_horse run shake_hands shoot_ball shoot_bow shoot_gun
        sit situp smile smoke somersault stand swing_baseball sword sword_exercise talk throw turn
        walk wave""",
    "UCF101": """ApplyEyeMakeup ApplyLipstick Archery BabyCrawling BalanceBeam BandMarching BaseballPitch
        Basketball BasketballDunk BenchPress Biking Billiards BlowDryHair BlowingCandles
        BodyWeightSquats Bowling BoxingPunchingBag BoxingSpeedBag BreastStroke BrushingTeeth
        CleanAndJerk CliffDiving CricketBowling CricketShot CuttingInKitchen Diving Drumming Fencing
        FieldHockeyPenalty FloorGymnastics FrisbeeCatch FrontCrawl GolfSwing Haircut HammerThrow
        Hammering HandstandPushups HandstandWalking HeadMassage HighJump HorseRace HorseRiding
        HulaHoop IceDancing JavelinThrow JugglingBalls JumpRope JumpingJack Kayaking Knitting
        LongJump Lunges MilitaryParade Mixing MoppingFloor Nunchucks ParallelBars PizzaTossing
        PlayingCello PlayingDaf PlayingDhol PlayingFlute PlayingGuitar PlayingPiano PlayingSitar
        PlayingTabla PlayingViolin PoleVault PommelHorse PullUps Punch PushUps Rafting
        RockClimbingIndoor RopeClimbing Rowing SalsaSpin ShavingBeard Shotput SkateBoarding Skiing
        Skijet SkyDiving SoccerJuggling SoccerPenalty StillRings SumoWrestling Surfing Swing
        TableTennisShot TaiChi TennisSwing ThrowDiscus TrampolineJumping Typing UnevenBars
        VolleyballSpiking WalkingWithDog WallPushups WritingOnBoard YoYo""",
}


@dataclass(frozen=True)
class MMEBTask:
    """A row of the table."""

    group: str  # such as "I-CLS"
    modality: str  # "image", "video" or "visdoc"
    name: str
    parser: str  # which rules its rows follow
    hub: str  # name of the data set on the Hugging Face hub
    subset: str  # configuration on the hub, "" if there is one only
    split: str
    annotations: str  # file or folder
    folder: str  # of the pictures, frames or pages
    pool: str  # "local": the row's own candidates; "global": all of the task
    pool_size: str  # official number of candidates, "corpus" or a range
    queries: int  # official number
    metric: str
    query_instruction: str  # MomentSeeker: of text, picture and clip, divided by "|"
    target_instruction: str

    @property
    def repository(self) -> str:
        """The last part of the hub name."""
        return self.hub.rpartition("/")[2]


@lru_cache(maxsize=1)
def mmeb_v2_table() -> tuple[MMEBTask, ...]:
    """Return the tasks in the order of the official report."""
    text = files("rime_pl.datamodules.benchmarks").joinpath("mmeb_v2_tasks.csv").read_text("utf-8")
    rows = csv.DictReader(text.splitlines())
    return tuple(MMEBTask(**{**row, "queries": int(row["queries"])}) for row in rows)  # type: ignore[arg-type]


def counted(task: MMEBTask, queries: int, candidates: int | None = None) -> list[str]:
    """Return what differs from the official counts, in words.

    Args:
        task: The task.
        queries: Number of queries read.
        candidates: Number of candidates read, if the official number is known.
    """
    notes = []
    if queries != task.queries:
        notes.append(f"{queries:,} queries were read, but officially there are {task.queries:,}")
    if candidates is not None and task.pool_size.isdigit() and candidates != int(task.pool_size):
        notes.append(f"{candidates:,} candidates were read, but officially there are {int(task.pool_size):,}")
    return notes
