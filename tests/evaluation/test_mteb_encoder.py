"""mteb's own offline check, and a local task of pictures whose score equals that of our ranking."""

from pathlib import Path
from typing import Any

import mteb
import pytest
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from rime_pl.backbone.mllm import Backbone
from rime_pl.errors import RimeError
from rime_pl.evaluation.mteb_encoder import RimeEncoder
from rime_pl.inference.retriever import Retriever
from rime_pl.media import open_picture
from rime_pl.metrics.ranking import graded_scores, rank_graded
from tests.evaluation.made_tasks import pictures, texts


@pytest.fixture
def model(shared_backbone: Backbone) -> Retriever:
    return Retriever(shared_backbone, name="micro")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["discriminative", "generative"])
def test_the_offline_check_of_mteb_passes(model: Retriever, mode: Any) -> None:
    told = mteb.mock_run(RimeEncoder(model, query_mode=mode))
    assert told.all_passed, told.to_markdown()
    passed = [name for name, status in told.items() if isinstance(status, mteb.TaskResult)]
    assert len(passed) > 20, told.to_markdown()


class LocalTask(AbsTaskRetrieval):
    """Texts that ask for pictures."""

    metadata = TaskMetadata(
        name="LocalPictures",
        description="Texts that ask for pictures.",
        reference=None,
        dataset={"path": "local", "revision": "1"},
        type="Any2AnyRetrieval",
        category="t2i",
        modalities=["text", "image"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
        prompt={"query": "Find it."},
    )

    def load_data(self, **kwargs: Any) -> None:
        self.data_loaded = True


@pytest.mark.parametrize("modes", [("discriminative", None), ("generative", "discriminative")])
def test_a_local_task_has_the_score_of_our_ranking(model: Retriever, tmp_path: Path, modes: Any) -> None:
    queries, candidates = texts(8), pictures(tmp_path, 10)
    asked = [{"id": f"q{n}", "text": item.text} for n, item in enumerate(queries)]
    shown = [{"id": f"c{n}", "image": open_picture(item.media[0])} for n, item in enumerate(candidates)]
    labels = [{n: 1.0, n + 1: 2.0} for n in range(8)]
    task = LocalTask()
    task.dataset = {
        "default": {
            "test": {
                "queries": Dataset.from_list(asked),
                "corpus": Dataset.from_list(shown),
                "relevant_docs": {
                    f"q{n}": {f"c{place}": int(grade) for place, grade in right.items()}
                    for n, right in enumerate(labels)
                },
                "top_ranked": None,
            }
        }
    }
    query_mode, target_mode = modes
    encoder = RimeEncoder(model, query_mode=query_mode, target_mode=target_mode)
    result = mteb.evaluate(encoder, [task], cache=None, show_progress_bar=False)[0].scores["test"][0]
    ours = graded_scores(
        rank_graded(
            model.encode(queries, query_mode), model.encode(candidates, target_mode or query_mode), labels
        )
    )
    for theirs, name in (("ndcg_at_10", "ndcg_linear@10"), ("recall_at_5", "recall@5")):
        assert result[theirs] == pytest.approx(float(ours[name].mean()), abs=1e-4)


def test_what_it_cannot_read_is_refused(model: Retriever) -> None:
    with pytest.raises(RimeError, match="A mode must be 'discriminative' or 'generative', but is 'both'"):
        RimeEncoder(model, query_mode="both")  # type: ignore[arg-type]
    encoder = RimeEncoder(model)
    given = {"task_metadata": LocalTask.metadata, "hf_split": "test", "hf_subset": "default"}
    with pytest.raises(RimeError, match="has a column 'audio'"):
        encoder.encode([{"text": ["a"], "audio": [b""]}], **given)
    vectors = encoder.encode([{"text": ["a ring", ""]}, {"text": ["a star"]}], **given)
    assert vectors.shape == (3, model.dimension)
