"""Writes the demo's files: `python -m jaxft.demo.data` makes those that both configs read."""

from pathlib import Path

from jaxft.demo import corpus
from jaxft.demo.cases import held_out_cases, train_cases, write_cases

TRAIN_CASES = 2000
HELD_OUT_CASES = 360
RETENTION_DOCUMENTS = 400
CORPUS_DOCUMENTS = 75_000
VALIDATION_DOCUMENTS = 1000


def write_task(folder: Path) -> None:
    """Writes train.jsonl, held_out.jsonl and retention.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    write_cases(folder / "train.jsonl", train_cases(TRAIN_CASES))
    write_cases(folder / "held_out.jsonl", held_out_cases(HELD_OUT_CASES))
    retention = corpus.retention_documents(RETENTION_DOCUMENTS)
    corpus.write_documents(folder / "retention.txt", retention)


def write_corpus(folder: Path) -> None:
    """Writes train.txt and validation.txt, on which the base model is trained."""
    folder.mkdir(parents=True, exist_ok=True)
    train = corpus.documents(CORPUS_DOCUMENTS, seed=corpus.TRAIN_SEED)
    corpus.write_documents(folder / "train.txt", train)
    validation = corpus.documents(VALIDATION_DOCUMENTS, seed=corpus.VALIDATION_SEED)
    corpus.write_documents(folder / "validation.txt", validation)


if __name__ == "__main__":
    write_task(Path("runs/demo/data"))
    write_corpus(Path("runs/demo_base/data"))
