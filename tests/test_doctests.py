"""The examples in the docstrings hold. As a test, so that one process imports the stack once."""

import doctest
import importlib
import pkgutil

import pytest

import rime_pl

MODULES = [found.name for found in pkgutil.walk_packages(rime_pl.__path__, "rime_pl.") if not found.ispkg]
#: Must hold an example: the house rule for losses and for what is easier shown than said.
WITH_EXAMPLES = {
    "rime_pl.prompts",
    "rime_pl.backbone.pooling",
    "rime_pl.generation.rewriting",
    "rime_pl.losses.alignment",
    "rime_pl.losses.contrastive",
    "rime_pl.losses.language_modeling",
    "rime_pl.losses.policy_gradient",
    "rime_pl.metrics.derangement",
    "rime_pl.losses.advantages",
    "rime_pl.losses.rewards",
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, capsys.readouterr().out
    assert result.attempted > 0 or name not in WITH_EXAMPLES, f"{name} has lost its example"
