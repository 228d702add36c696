from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from files import write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.embedded_more import MORE_TASKS
from benchmarks.suites import CONFIGS, Suite, load_suite
from merge_algorithms.errors import UserError
from trainers.data import TaskData
from trainers.metrics import LanguageMetrics, make_metrics
from trainers.settings import AdapterSettings, HeadSettings, RowSettings, TrainSettings

EMBEDDED = ["stsb", "trec", "movie", "tweets", "sms", "bbc", "medsubject", "privacy"]
GLUE = ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"]
QA = ["math", "medicine", "finance"]


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")


def data_of(suite: Suite, task: str) -> TaskData:
    data = TaskData(suite.tasks[task], tokenizer(), suite.train, suite.rows)
    data.setup()
    return data


def write_suite(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(*arguments: Any, **more: Any) -> str:
    with pytest.raises(UserError) as error:
        load_suite(*arguments, **more)
    return str(error.value)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("[!_]*.yaml")))
def test_every_suite_loads_with_every_preset(name: str, tmp_path: Path) -> None:
    expected = {"embedded": EMBEDDED, "qa": QA, "qa-gpt2-small": QA}
    expected["embedded-16"] = [*EMBEDDED, *MORE_TASKS]
    expected["qa-files"] = [f"qa_{domain}" for domain in QA]
    for preset in ("smoke", "quick", "full", None):
        suite = load_suite(name, preset, str(tmp_path) if name == "qa-files" else None)
        assert suite.name == name
        assert list(suite.tasks) == expected.get(name, GLUE)
        assert suite.rows.train is not None
        for task in suite.tasks.values():
            if task.kind == "causal_lm":
                assert LanguageMetrics(task.metrics).scores().keys() == set(task.metrics)
                continue
            assert all(0 < value <= 1 for value in suite.coefficients)
            metrics = make_metrics(task, len(task.labels or "ab"))
            assert metrics.names[0] == task.headline


def test_the_embedded_suite_names_its_data_without_fetching_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched: list[str] = []

    def fetch(name: str) -> Path:
        fetched.append(name)
        return tmp_path

    monkeypatch.setattr("benchmarks.assets.pull", fetch)
    rows = [{"text": f"{i} a", "label": ("ham", "spam")[i % 2]} for i in range(40)]
    write_rows(tmp_path / "sms" / "train.jsonl", rows)
    write_rows(tmp_path / "sms" / "test.jsonl", rows)
    suite = load_suite("embedded")
    assert suite.model == "minilm"
    assert not fetched
    data = data_of(suite, "sms")
    assert data.labels[1] == "spam"
    assert set(fetched) == {"embedded-tasks"}
    assert suite.tasks["stsb"].splits["validation"] == "validation"
    assert suite.tasks["privacy"].group == "question"


PAPER = {
    "glue-roberta-large": (
        "FacebookAI/roberta-large",
        ["query", "value"],
        HeadSettings(pooling="cls", hidden=True, dropout=0.1),
        10,
    ),
    "glue-t5-large": (
        "google-t5/t5-large",
        ["q", "v"],
        HeadSettings(pooling="last", hidden=True),
        10,
    ),
    "glue-llama-3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        ["q_proj", "v_proj"],
        HeadSettings(pooling="last", bias=False),
        5,
    ),
    "glue-llama-3.2-3b": (
        "meta-llama/Llama-3.2-3B",
        ["q_proj", "v_proj"],
        HeadSettings(pooling="last", bias=False),
        3,
    ),
    "glue-llama-3-8b": (
        "meta-llama/Meta-Llama-3-8B",
        ["q_proj", "v_proj"],
        HeadSettings(pooling="last", bias=False),
        1,
    ),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_suites_have_its_settings(name: str) -> None:
    model, targets, head, epochs = PAPER[name]
    suite = load_suite(name)
    assert (suite.model, suite.preset, suite.head) == (model, "paper", head)
    assert list(suite.tasks) == GLUE
    assert suite.adapter == AdapterSettings(rank=8, alpha=16, targets=targets)
    assert suite.train == TrainSettings(
        epochs=epochs,
        batch_size=64,
        learning_rate=4e-4,
        head_learning_rate=4e-4,
        warmup=0.06,
        schedule="linear",
        max_length=128,
        backbone_dropout=True,
    )
    assert suite.rows == RowSettings(train=105000, validation=15000, test=15000, covariance=100)
    smoke = load_suite(name, "smoke")
    assert (smoke.train.epochs, smoke.rows.train, smoke.train.learning_rate) == (1, 64, 4e-4)


def test_glue_reads_files_laid_out_like_the_hub(tmp_path: Path) -> None:
    suite = load_suite("glue", "smoke", data_dir=str(tmp_path))
    for name, task in suite.tasks.items():
        classes = len(task.labels) if task.labels else 0
        rows = [
            {
                **{column: f"{column} {i}" for column in task.text},
                "label": i % classes if classes else i / 40,
                "idx": i,
            }
            for i in range(200)
        ]
        write_rows(tmp_path / name / "train.jsonl", rows)
        write_rows(tmp_path / name / "validation.jsonl", rows[:50])
        data = data_of(suite, name)
        assert data.num_labels == (classes or 1)
        assert [len(data.rows(p)) for p in ("train", "validation", "test")] == [64, 16, 32]
        assert {row.texts for row in data.rows("test")} <= {
            tuple(row[column] for column in task.text) for row in rows[:50]
        }


def test_mnli_is_reported_on_matched_validation_of_the_hub() -> None:
    hub = load_suite("glue").tasks["mnli"].data["hub"]
    assert hub["splits"]["validation"] == "validation_matched"


def test_tasks_can_be_chosen() -> None:
    assert list(load_suite("glue", tasks=["rte", "cola"]).tasks) == ["cola", "rte"]


OWN = """
description: What customers want
model: ./model
seeds: [3]
train: {epochs: 7, learning_rate: 4e-4}
tasks:
  intents:
    text: [utterance]
    data: {files: {train: rows/train.csv, test: rows/test.csv}}
  mood:
    text: [a, b]
    label: score
    kind: regression
    data: {dir: mood}
"""


def test_a_suite_of_ones_own_over_local_files(tmp_path: Path) -> None:
    path = write_suite(tmp_path / "mine.yaml", OWN)
    lines = [f"say {i},intent {i % 150}" for i in range(3000)]
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        text = "\n".join(["utterance,label", *lines])
        (tmp_path / "rows" / f"{split}.csv").write_text(text, encoding="utf-8")
        scores = [{"a": f"{i}", "b": "x", "score": i / 2} for i in range(30)]
        write_rows(tmp_path / "mood" / f"{split}.jsonl", scores)
    suite = load_suite(path)
    assert (suite.name, suite.seeds, suite.preset) == ("mine", [3], "quick")
    assert suite.model == str(tmp_path / "model")
    assert (suite.train.epochs, suite.train.learning_rate) == (7, 4e-4)
    assert suite.rows.train == load_suite("embedded", "quick").rows.train
    assert data_of(suite, "intents").num_labels == 150
    assert data_of(suite, "mood").labels == ()
    (tmp_path / "models" / "bert").mkdir(parents=True)
    path = write_suite(tmp_path / "mine.yaml", OWN.replace("./model", "models/bert"))
    assert load_suite(path).model == str(tmp_path / "models" / "bert")
    (tmp_path / "models" / "bert").rmdir()
    assert load_suite(path).model == "models/bert", "on the Hub"
    path = write_suite(tmp_path / "mine.yaml", OWN.replace("./model", "models/llama.gguf"))
    assert load_suite(path).model == str(tmp_path / "models" / "llama.gguf")


def test_a_suite_extends_another_file_key_by_key(tmp_path: Path) -> None:
    write_suite(tmp_path / "base" / "a.yaml", OWN + "presets: {tiny: {rows: {train: 5}}}\n")
    child = """
extends: base/a.yaml
default_preset: tiny
train: {batch_size: 3}
presets: {tiny: {rows: {test: 6}, coefficients: [0.5]}}
tasks:
  mood: {data: {hub: {path: org/mood}}}
"""
    suite = load_suite(write_suite(tmp_path / "b.yaml", child))
    assert (suite.name, suite.preset) == ("b", "tiny")
    assert (suite.train.epochs, suite.train.batch_size) == (7, 3)
    assert (suite.rows.train, suite.rows.test, suite.coefficients) == (5, 6, [0.5])
    assert suite.tasks["mood"].data == {"hub": {"path": "org/mood"}}
    files = suite.tasks["intents"].data["files"]
    assert files["train"] == str(tmp_path / "base" / "rows" / "train.csv")
    assert load_suite(str(tmp_path / "b.yaml"), "smoke").rows.train == 64


def test_the_suites_folder_holds_every_task_that_names_none(tmp_path: Path) -> None:
    path = write_suite(tmp_path / "a.yaml", "data: {dir: d}\ntasks: {x: {text: [t]}}\n")
    assert load_suite(path).tasks["x"].data == {"dir": str(tmp_path / "d" / "x")}


TASK = "tasks: {x: {text: [t], data: {dir: d}}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("taks: {}\n", "unknown key 'taks': did you mean 'tasks'"),
        (TASK + "train: {epoch: 3}\n", "unknown key 'train.epoch': did you mean 'epochs'"),
        (TASK + "train: {epochs: many}\n", "'many' at 'train.epochs': expected a whole number"),
        (TASK + "train: {epochs: 2.5}\n", "2.5 at 'train.epochs': expected a whole number"),
        (TASK + "train: {learning_rate: .nan}\n", "'train.learning_rate': expected a finite"),
        (TASK + "train: {schedule: linar}\n", "did you mean 'linear'"),
        (TASK + "adapter: {rslora: 1}\n", "1 at 'adapter.rslora': expected true or false"),
        (TASK + "adapter: {targets: query}\n", "'adapter.targets': expected a list"),
        (TASK + "adapter: 8\n", "8 at 'adapter': expected a mapping"),
        (TASK + "rows: {train: all}\n", "'all' at 'rows.train': expected a whole number"),
        (TASK + "coefficients: [0.1, x]\n", "'x' at 'coefficients[1]': expected a finite number"),
        (TASK + "coefficients: []\n", "needs coefficients"),
        (TASK + "seeds: [1, 1]\n", "needs seeds that are finite and different"),
        (TASK + "samples: 0\n", "samples 0"),
        (TASK + "name: a/b\n", "cannot be called 'a/b'"),
        (TASK + "presets: {quick: {epochs: 3}}\n", "unknown key 'presets.quick.epochs'"),
        (TASK + "default_preset: quik\n", "no preset 'quik': did you mean 'quick'"),
        (TASK + "extends: gluee\n", "did you mean 'glue'"),
        (TASK + "extends: bad.yaml\n", "break the circle"),
        (TASK + "extends: gone.yaml\n", "gone.yaml does not exist"),
        ("tasks: {x: {txt: [t]}}\n", "unknown key 'tasks.x.txt': did you mean 'text'"),
        ("tasks: {x: {data: {dir: d}}}\n", "task 'x' has no text"),
        ("tasks: {x: {text: [t], name: y}}\n", "key 'tasks.x.name'"),
        ("tasks: {x: {text: [t]}}\n", "task 'x' has no single source of data"),
        ("tasks: {x: {text: [t], labels: [no, yes]}}\n", "False at 'tasks.x.labels[0]'"),
        ("tasks: {x: {text: [t], metrics: [mathews], data: {dir: d}}}\n", "'matthews'"),
        ("tasks: {1: {text: [t]}}\n", "1 at 'tasks (a key)': expected text"),
        ("data: {asset: embeded-tasks}\ntasks: {x: {text: [t]}}\n", "'embedded-tasks'"),
        ("data: {folder: d}\ntasks: {x: {text: [t]}}\n", "unknown key 'data.folder'"),
        ("tasks: [x\n", "cannot be read as YAML"),
        (TASK + "tasks: {y: {text: [t]}}\n", "has key 'tasks' a second time in line 2: keep one"),
        ("- x\n", "expected a mapping"),
        ("", "has no tasks"),
    ],
)
def test_a_bad_suite_is_refused_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write_suite(tmp_path / "bad.yaml", text)
    found = refused(path)
    assert found.startswith(path)
    assert message in found


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    assert "unknown suite 'embeded': did you mean 'embedded'" in refused("embeded")
    assert "_base" not in refused("nothing-like-it")
    assert "glue.yaml has no preset 'fulll': did you mean 'full'" in refused("glue", "fulll")
    message = refused("glue", tasks=["rte", "colla"])
    assert "glue.yaml: unknown task 'colla': did you mean 'cola'" in message
    assert "glue.yaml" in refused("glue", tasks=[])
    assert f"{tmp_path / 'x'} is not a directory" in refused("glue", data_dir=str(tmp_path / "x"))
    assert "does not exist" in refused(str(tmp_path / "gone.yaml"))
