"""What `rime rewrite` lets a user set: the endpoint, the filters, the price and the measured gain."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rime_pl.bounds import at_least, greater_than_0
from rime_pl.errors import RimeError
from rime_pl.prompts import PromptConfig
from rime_pl.types import Side

#: Characters of a token, where nobody counts.
CHARACTERS = 4
#: Fields of a request that other settings fill.
_TAKEN = ("model", "messages", "stream", "n", "max_tokens", "max_completion_tokens", "temperature")

#: write: the teacher sees an item. distil: it also sees the item's chain of thought. extract: no teacher, the
#: answer behind the chain of thought is the rewrite.
Way = Literal["write", "distil", "extract"]


@dataclass(frozen=True)
class Teacher:
    """The endpoint, and how it is asked.

    Args:
        model: Name of the model at the endpoint.
        base_url: Address of the endpoint, such as http://localhost:8000/v1 (default: that of OpenAI).
        key_variable: Variable of the environment that holds the API key (default: OPENAI_API_KEY without
            --teacher.base_url, and no key with it).
        concurrency: Largest number of requests at a time.
        requests_per_minute: Largest number of requests in a minute; 0 sets no limit.
        retries: Largest number of repetitions of a request that fails.
        timeout: Seconds until a request counts as hanging.
        max_tokens: Largest number of tokens of an answer, thinking included.
        token_field: Field of the request that holds --teacher.max_tokens.
        temperature: Sampling temperature; null leaves it to the endpoint.
        max_pixels: Largest area of a picture that is sent; a larger one is scaled down to it.
        extra: JSON object with more fields of the request; null for none.
        query_prompt: Text file with a prompt for queries in the place of ours; null for ours.
        target_prompt: Text file with a prompt for targets in the place of ours; null for ours.
        max_failed_share: Largest share of requests that may fail for good before the command stops.
    """

    model: str = ""
    base_url: str | None = None
    key_variable: str | None = None
    concurrency: int = 8
    requests_per_minute: float = 0
    retries: int = 6
    timeout: float = 120
    max_tokens: int = 512
    token_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    temperature: float | None = None
    max_pixels: int = 1_003_520  # 1,280 visual tokens of Qwen2-VL
    extra: str | None = None
    query_prompt: Path | None = None
    target_prompt: Path | None = None
    max_failed_share: float = 0.05

    def __post_init__(self) -> None:
        at_least(1, "teacher", self, "concurrency", "max_tokens")
        at_least(0, "teacher", self, "requests_per_minute", "retries", "temperature", "max_failed_share")
        at_least(64 * 64, "teacher", self, "max_pixels")
        greater_than_0("teacher", self, "timeout")
        if self.base_url is not None and not _is_address(self.base_url):
            raise RimeError(
                "--teacher.base_url must be an address such as http://localhost:8000/v1, but is "
                f"{self.base_url!r}."
            )
        if "@" in urlsplit(self.base_url or "").netloc:
            raise RimeError(
                "--teacher.base_url must not hold a password. Put the key into a variable of the environment "
                "and name it with --teacher.key_variable."
            )
        self.more_fields()

    def more_fields(self) -> dict[str, Any]:
        """Return the fields of ``extra``.

        Raises:
            RimeError: If it is no JSON object, or sets what another setting sets.
        """
        try:
            fields = json.loads(self.extra or "{}")
        except ValueError as error:
            raise RimeError(f"--teacher.extra must be a JSON object, but is not JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise RimeError(f"--teacher.extra must be a JSON object, but is {self.extra!r:.90}.")
        if taken := [name for name in _TAKEN if name in fields]:
            raise RimeError(
                f"--teacher.extra must not hold {taken[0]!r}, because the command itself sets this field."
            )
        return fields

    def prompt_file(self, side: Side) -> Path | None:
        """Return the file with the user's own prompt for a side."""
        return self.query_prompt if side == "query" else self.target_prompt


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # brackets that do not match, or a port that is none
        return False
    return known and url.isprintable() and " " not in url


@dataclass(frozen=True)
class Filters:
    """What a rewrite must be; one that is not is dropped and counted.

    Args:
        min_words: Smallest number of words.
        max_rewrite_tokens: Largest number of tokens, 4 characters each, as the training takes
            (model.backbone.prompt.max_rewrite_tokens).
        max_sentences: Largest number of sentences.
        max_repeats: Largest number of times that the same four words in a row may occur.
        copied_words: Number of words in a row that count as copied from the prompt or the instruction.
    """

    min_words: int = 2
    max_rewrite_tokens: int = PromptConfig.max_rewrite_tokens
    max_sentences: int = 3
    max_repeats: int = 2
    copied_words: int = 8

    def __post_init__(self) -> None:
        at_least(1, "filters", self, "min_words", "max_rewrite_tokens", "max_sentences", "max_repeats")
        at_least(2, "filters", self, "copied_words")


@dataclass(frozen=True)
class Gain:
    """The measured gain: does a rewrite raise the similarity of its pair under a checkpoint?

    Args:
        run: Folder of the run whose checkpoint measures; null measures nothing.
        mode: How an item with a rewrite is embedded: discriminative puts the rewrite behind its text,
            generative needs a run of CMA.
        min_gain: Smallest gain in cosine.
        drop: Whether rewrites below --gain.min_gain are dropped; otherwise they are only counted.
        device: Device of the model, such as cpu or cuda (default: cuda if there is one).
        base: Folder or Hugging Face name of the base model (default: where it was in training).
        batch_size: Largest number of items in a forward.
    """

    run: Path | None = None
    mode: Literal["discriminative", "generative"] = "discriminative"
    min_gain: float = 0.0
    drop: bool = True
    device: str | None = None
    base: str | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        at_least(1, "gain", self, "batch_size")


@dataclass(frozen=True)
class Price:
    """The price of tokens.

    Args:
        input: Price of a million tokens that the teacher reads, in your currency.
        output: Price of a million tokens that the teacher writes.
        limit: Total of this command at which it stops; null sets no limit.
    """

    input: float = 0.0
    output: float = 0.0
    limit: float | None = None

    def __post_init__(self) -> None:
        at_least(0, "price", self, "input", "output", "limit")
        if self.limit is not None and not (self.input or self.output):
            raise RimeError("--price.limit needs --price.input or --price.output, because it counts cost.")

    @property
    def known(self) -> bool:
        """Whether the user has given a price."""
        return bool(self.input or self.output)

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the cost of so many tokens.

        >>> Price(input=2.0, output=8.0).of(1_000_000, 500_000)
        6.0
        """
        return (self.input * prompt_tokens + self.output * completion_tokens) / 1e6
