"""The demo's generators, tokenizer and configs; what they promise about held-out wordings."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxft.demo import BASE, corpus
from jaxft.demo.__main__ import MAX_NEW_TOKENS, QUESTIONS, results_table
from jaxft.demo.cases import (
    HELD_OUT_CARRIERS,
    TRAIN_CARRIERS,
    ask,
    held_out_cases,
    messages,
    sentence,
    train_cases,
    write_cases,
)
from jaxft.demo.complaints import DEPARTMENTS, NAMES, speak
from jaxft.demo.data import HELD_OUT_CASES, TRAIN_CASES, write_task
from jaxft.demo.make_base import write_skeleton
from jaxft.demo.runs import load_run
from jaxft.demo.tokenizer import PADDING, SPECIAL_TOKENS, VOCABULARY, train_tokenizer
from jaxft.errors import ConfigError
from jaxft.programs.answers import Answers
from jaxft.programs.evaluation import Evaluation
from jaxft.programs.held_out import HeldOut, UnitSums
from jaxft.workdir.source import Source

# Words that say nothing about a department: all that training and held-out cases may share.
FUNCTION_WORDS = set(
    """
    a all am and are at before can day department do every feel for go has have help i in is me
    my need not on out since something than the there this to too when which worse
    """.split()
)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


@pytest.fixture(scope="module")
def train() -> list[tuple[str, str]]:
    return train_cases(TRAIN_CASES)


@pytest.fixture(scope="module")
def held_out() -> list[tuple[str, str]]:
    return held_out_cases(HELD_OUT_CASES)


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("skeleton")
    write_skeleton(folder)
    return folder


def test_held_out_cases_share_only_function_words_with_training(train, held_out):
    shared = set.union(*(_words(text) for text, _ in train)) & set.union(
        *(_words(text) for text, _ in held_out)
    )
    assert shared <= FUNCTION_WORDS


def test_no_held_out_wording_or_carrier_occurs_in_a_training_case(train):
    texts = "\n".join(text.lower() for text, _ in train)
    for department in DEPARTMENTS:
        for wording in department.held_out:
            assert speak(wording, "I").lower() not in texts
    for carrier in HELD_OUT_CARRIERS:
        for part in filter(str.strip, carrier.split("{x}")):
            if _words(part):
                assert part.lower() not in texts


def test_every_training_wording_and_carrier_is_used(train):
    texts = [text.lower() for text, _ in train]
    for department in DEPARTMENTS:
        for wording in department.train:
            assert any(speak(wording, "I").lower() in text for text in texts)
    for carrier in TRAIN_CARRIERS:
        pattern = re.escape(ask(carrier)).replace(r"\{", "{").replace(r"\}", "}")
        pattern = re.sub(r"{\w+}", ".+", pattern).lower()
        assert any(re.fullmatch(pattern, text) for text in texts)


def test_cases_are_distinct_and_departments_balanced(train, held_out):
    for cases, count in ((train, TRAIN_CASES), (held_out, HELD_OUT_CASES)):
        assert len({text for text, _ in cases}) == len(cases) == count
        sizes = Counter(label for _, label in cases)
        assert set(sizes) == set(NAMES)
        assert max(sizes.values()) - min(sizes.values()) <= 1


def test_no_wording_belongs_to_two_departments():
    owners = defaultdict(set)
    for department in DEPARTMENTS:
        for wording in department.wordings:
            owners[wording].add(department.name)
    assert all(len(names) == 1 for names in owners.values())


def test_the_questions_of_the_demo_are_not_training_data(train):
    texts = {text for text, _ in train}
    contents = [wording for d in DEPARTMENTS for wording in d.train]
    for question in QUESTIONS:
        assert question not in texts
        assert not any(speak(wording, "I").lower() in question.lower() for wording in contents)


def test_generators_repeat_themselves_and_seeds_differ():
    assert train_cases(50, seed=3) == train_cases(50, seed=3) != train_cases(50, seed=4)
    once, twice, other = (list(corpus.documents(50, seed=seed)) for seed in (3, 3, 4))
    assert once == twice != other


def test_generated_text_is_the_same_on_every_machine():
    # The base model and the demo's figures belong to exactly this text.
    text = "\n".join([*corpus.documents(1000, seed=0), *corpus.retention_documents(100)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "5b9ee23b81972b91"
    cases = json.dumps([train_cases(TRAIN_CASES), held_out_cases(HELD_OUT_CASES)])
    assert hashlib.sha256(cases.encode()).hexdigest()[:16] == "e4f582b28b798432"


@pytest.mark.slow(seconds=2)
def test_corpus_uses_all_wordings_and_its_prose_never_says_who_treats_them():
    documents = [text.lower() for text in corpus.documents(20_000, seed=7)]
    together = "\n".join(documents)
    clauses = []
    for department in DEPARTMENTS:
        for wording in department.wordings:
            forms = [speak(wording, p).lower() for p in ("I", "you", *department.persons)]
            assert all(form in together for form in forms), wording
            clauses += forms
    names = [name.lower() for name in NAMES]
    named = [t for t in documents if "<|" not in t and any(name in t for name in names)]
    assert named
    assert not any(clause in text for text in named for clause in clauses)


@pytest.mark.slow(seconds=2)
def test_departments_that_chats_name_say_nothing_about_the_complaint():
    owner = {speak(w, "I").lower(): d.name for d in DEPARTMENTS for w in d.wordings}
    right, answers = Counter(), Counter()
    for text in corpus.documents(20_000, seed=corpus.TRAIN_SEED):
        for question, answer in re.findall(r"<.user.>([^<]*)<.end.><.assistant.>([^<]*)", text):
            clause = max((c for c in owner if c in question.lower()), key=len, default=None)
            if answer in NAMES and clause:
                answers[answer] += 1
                right[answer] += owner[clause] == answer
    total = answers.total()
    assert total > 2500
    # Each answer is right as often as any other department would be: within 4 standard deviations.
    share = 1 / len(NAMES)
    for name, count in answers.items():
        assert abs(right[name] - count * share) < 4 * (count * share * (1 - share)) ** 0.5


@pytest.mark.slow(seconds=2)
def test_no_held_out_case_stands_in_the_prose(held_out):
    prose = "\n".join(corpus.documents(20_000, seed=corpus.TRAIN_SEED))
    assert not [text for text, _ in held_out if text in prose]


@pytest.mark.slow(seconds=2)
def test_retention_documents_are_new_and_outside_the_task(held_out):
    retention = list(corpus.retention_documents(400))
    seen = set(corpus.documents(20_000, seed=corpus.TRAIN_SEED))
    assert not seen & set(retention)
    assert not any(name in text for text in retention for name in NAMES)
    assert not any("<|" in text for text in retention)


@pytest.mark.parametrize(
    ("person", "expected"),
    [
        ("I", "I cough when I pass my door and it shows me that I am ill"),
        ("you", "you cough when you pass your door and it shows you that you are ill"),
        ("she", "she coughs when she passes her door and it shows her that she is ill"),
        ("he", "he coughs when he passes his door and it shows him that he is ill"),
    ],
)
def test_clauses_agree_with_the_person(person, expected):
    clause = "{I} {cough} when {I} {pass} {my} door and it shows {me} that {I} {am} ill"
    assert speak(clause, person) == expected


def test_sentences_begin_with_capitals():
    assert sentence("May I ask? {x}.", "it hurts") == "May I ask? It hurts."
    assert sentence("{x}, I think.", "it hurts") == "It hurts, I think."
    assert sentence("Oh dear. {x}: why?", "it hurts") == "Oh dear. It hurts: why?"


def test_case_files_hold_chats(tmp_path):
    path = write_cases(tmp_path / "cases.jsonl", [("It hurts — here.", "Dentistry")])
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [
        {"messages": messages("It hurts — here.", "Dentistry")}
    ]


def test_documents_are_single_paragraphs(tmp_path):
    texts = list(corpus.documents(500, seed=9))
    path = corpus.write_documents(tmp_path / "text.txt", iter(texts))
    assert path.read_text("utf-8").strip().split("\n\n") == texts


@pytest.mark.slow(seconds=2)
def test_tokenizer_training_repeats_itself():
    texts = list(corpus.documents(3000, seed=0))
    first, second = (train_tokenizer(iter(texts), 700).to_str() for _ in range(2))
    assert first == second


@pytest.mark.slow(seconds=23)
def test_package_holds_the_tokenizer_and_configs_that_make_base_writes(skeleton):
    for path in skeleton.iterdir():
        assert (BASE / path.name).read_bytes() == path.read_bytes(), path.name


def test_tokenizer_survives_reloading_and_decodes_what_it_encodes(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == VOCABULARY
    assert again.chat_template == tokenizer.chat_template
    for text in ("My skin itches.", "Grüße 😀\n\ttab  two spaces", *QUESTIONS):
        ids = tokenizer(text).input_ids
        assert again(text).input_ids == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(6))
    assert tokenizer.pad_token == PADDING


def test_chat_template_writes_turns_and_opens_the_answer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    chat = [{"role": "system", "content": "Be brief."}, *messages(" It hurts. ", "Dentistry")]
    full = tokenizer.apply_chat_template(chat, tokenize=False)
    prompt = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert full == (
        "<|system|>Be brief.<|end|><|user|>It hurts.<|end|><|assistant|>Dentistry<|end|>"
    )
    assert full.startswith(prompt)
    assert prompt.endswith("<|assistant|>")
    with pytest.raises(Exception, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_corpus_chats_are_written_as_the_chat_template_writes_them():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    chats = [text for text in corpus.documents(200, seed=3) if text.startswith("<|")]
    assert chats
    for text in chats:
        turns = re.findall(r"<\|(\w+)\|>(.*?)<\|end\|>", text)
        chat = [{"role": role, "content": content} for role, content in turns]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == text


def test_labels_fit_into_the_longest_answer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    longest = max(len(tokenizer(name).input_ids) for name in NAMES)
    assert longest + 1 <= MAX_NEW_TOKENS
    assert longest + 1 <= load_run("demo").eval.max_new_tokens


def test_base_model_is_under_eight_megabytes_and_has_one_to_four_million_parameters():
    from safetensors import safe_open

    assert sum(file.stat().st_size for file in BASE.iterdir()) < 8e6
    with safe_open(BASE / "model.safetensors", "np") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    parameters = sum(a * (b[0] if b else 1) for a, *b in sizes)
    assert 1e6 <= parameters <= 4e6


@pytest.mark.parametrize("name", ["demo", "demo_base"])
def test_configs_are_valid(name):
    load_run(name).validate()


def test_outside_a_checkout_the_demo_says_where_to_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="root of a checkout"):
        load_run("demo")


def test_task_files_are_where_the_config_expects_them(tmp_path, monkeypatch):
    config = load_run("demo")
    monkeypatch.chdir(tmp_path)
    write_task(Path("runs/demo/data"))
    for path in (config.data.train, config.data.validation, config.eval.retention):
        assert Path(path).is_file()


def test_results_show_what_was_measured():
    def results(right, loss):
        rows = UnitSums(np.full(12, loss), np.ones(12), bytes=np.ones(12))
        outcomes = np.arange(360) < right
        answers = Answers("label_accuracy", [], [], [], outcomes, len(NAMES), 360)
        retention = UnitSums(np.full(12, loss / 2), np.ones(12), bytes=np.ones(12))
        source, held_out = Source(Path()), HeldOut([], [], np.array([]))
        return {
            "validation": Evaluation(rows, answers, source, held_out),
            "retention": Evaluation(retention, None, source, held_out),
        }

    console = Console(width=120)
    with console.capture() as capture:
        console.print(results_table(results(30, 4.0), results(350, 0.5)))
    text = capture.get()
    expected = ["8.3% [5.9%, 11.6%]", "97.2% [95.0%, 98.5%]", "4.000", "2.000", "0.500", "0.250"]
    for figure in expected:
        assert figure in text


# Prints, before and after, the interval of the accuracy and the loss of what was known.
EVALUATE = """
import json, jaxft
from jaxft.demo.runs import load_run
config = load_run("demo")
for path in ("", "runs/demo/model"):
    results = jaxft.evaluate(config, path)
    accuracy = results["validation"].answers.accuracy
    loss = results["retention"].sums.loss.value
    print(json.dumps([accuracy.low, accuracy.value, accuracy.high, loss]))
"""


@pytest.mark.slow(seconds=90)
def test_the_demo_learns_the_task_and_keeps_what_the_model_knew(tmp_path):
    """In processes of their own: much is computed, which the tests' own settings slow down."""
    root = Path(__file__).parents[1]
    (tmp_path / "configs").symlink_to(root / "configs")
    environment = os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": ""}

    def lines_of(*arguments: str) -> list[str]:
        command = [sys.executable, *arguments]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        return result.stdout.splitlines()

    shown = "\n".join(lines_of("-m", "jaxft.demo"))
    assert all(label in shown for label in ("Orthopaedics", "Cardiology", "Dermatology"))
    before, after = (json.loads(line) for line in lines_of("-c", EVALUATE) if line.startswith("["))
    assert before[0] < 1 / len(NAMES) < before[2]
    assert after[1] >= 0.95
    assert after[3] < before[3] + 0.05
