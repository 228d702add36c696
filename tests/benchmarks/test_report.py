from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks.predictions import Predicted, save_predictions
from benchmarks.report.page import write_report
from benchmarks.report.rows import merge_label
from benchmarks.report.table import results_table
from benchmarks.results import AVERAGE, Results, area_under

MakeResults = Callable[..., Results]
LORA, OSRM = "lora", "osrm"
VOID = {"meta", "wbr", "br"}


class Page(HTMLParser):
    """The text, tables, ids and tags of a page; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name == "aria-labelledby":
                self.labels += (value or "").split()
            if name in ("href", "xlink:href"):
                self.links.append(value or "")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.remove(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def written(results: Results, tmp_path: Path) -> str:
    path = write_report(results, tmp_path)
    assert path == tmp_path / "report.html"
    return path.read_text(encoding="utf-8")


def printed(results: Results, width: int = 80) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(results_table(results))
    return capture.get()


def with_constant_prediction(results: Results, task: str = "stsb") -> Results:
    """The merges' test score of one task becomes undefined."""
    results.scores = [
        dataclasses.replace(row, score=math.nan)
        if row.task == task and row.split == "test" and row.merge != "individual"
        else row
        for row in results.scores
    ]
    results.add_averages()
    return results


@pytest.fixture(scope="module")
def pages(make_results: MakeResults, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The page by number of seeds."""
    return {
        seeds: written(make_results(seeds=tuple(range(seeds))), tmp_path_factory.mktemp("page"))
        for seeds in (1, 3)
    }


# The table on the terminal


def test_table_shows_every_number(make_results: MakeResults) -> None:
    results = make_results()
    text = printed(results)
    for variant in (LORA, OSRM):
        for task in [*(info.name for info in results.tasks), AVERAGE]:
            assert f"{results.score(variant, 'individual', task).mean:.3f}" in text
            for merge in results.merges():
                score = results.score(variant, merge, task).mean
                assert f"{score:.3f} {results.percent(variant, merge, task):>3.0f}%" in text
            for leak in ("leaked_before", "leaked_after", "leaked_own_ratio"):
                assert f"{results.diagnostic(variant, leak, task).mean:.3g}" in text
    # The heading of the run-time merge, broken into short lines.
    assert re.search(r"orthogonal_ *\n.* mc_dropout *\n.* \(8 samples\) *\n", text)
    assert "_runtime" not in text
    assert "× 0.4" in text
    assert "One seed" in text
    assert "±" not in text


@pytest.mark.parametrize(("width", "seeds"), [(80, (0,)), (80, (0, 1, 2)), (100, (0, 1, 2))])
def test_table_fits(make_results: MakeResults, width: int, seeds: tuple[int, ...]) -> None:
    text = printed(make_results(seeds=seeds), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text  # nothing was cut
    assert "medsubject" in text


def test_table_spread(make_results: MakeResults) -> None:
    results = make_results(seeds=(0, 1, 2))
    text = printed(results)
    spread = results.score(OSRM, "ties", AVERAGE).spread
    assert f"±{spread:.3f}" in text
    assert "standard deviation over 3 seeds" in " ".join(text.split())


def test_table_marks_the_best_merge(make_results: MakeResults) -> None:
    results = make_results(inits=("lora",))
    console = Console(width=80, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(results_table(results))
    best = max(results.score(LORA, merge, AVERAGE).mean for merge in results.merges())
    bold = re.findall(r"\x1b\[1m\s*([\d.]+)", capture.get())
    assert f"{best:.3f}" in bold
    # The individual score is the reference, never the best merge.
    assert f"{results.score(LORA, 'individual', AVERAGE).mean:.3f}" not in bold


def test_table_takes_names_literally(make_results: MakeResults) -> None:
    text = printed(make_results(rename={"sms": "[bold]x[/bold]"}), 120)
    assert "[bold]x[/bold]" in text


def test_labels_of_the_dropout_merges(make_results: MakeResults) -> None:
    both = make_results()
    assert merge_label(both, "ties") == "ties"
    assert merge_label(both, "orthogonal_mc_dropout") == "orthogonal_mc_dropout (static)"
    runtime = "orthogonal_mc_dropout_runtime"
    assert merge_label(both, runtime) == "orthogonal_mc_dropout (8 samples)"
    assert merge_label(both, "ties_aligned") == "ties (aligned heads)"
    both.arms = []
    assert merge_label(both, runtime) == "orthogonal_mc_dropout (run time)"
    static = make_results(merges=("ties", "orthogonal_mc_dropout"))
    assert merge_label(static, "orthogonal_mc_dropout") == "orthogonal_mc_dropout"


def test_table_sums_up_every_arm_by_its_best_merge(make_results: MakeResults) -> None:
    results = make_results()
    text = printed(results)
    summary = text[text.index("best merge on validation") :]
    for arm in (LORA, OSRM):
        merge = max(
            results.merges(),
            key=lambda merge: results.score(arm, merge, AVERAGE, "validation").mean,
        )
        assert results.best_merge(arm) == merge
        line = next(line for line in summary.splitlines() if line.startswith(f"{arm} "))
        curve = {c: point.mean for c, point in results.curve(arm, merge).items()}
        for value in (
            results.score(arm, merge, AVERAGE).mean,
            results.untuned(arm, merge, AVERAGE).mean,
            area_under(curve),
        ):
            assert f"{value:.3f}" in line
        assert f"{results.percent(arm, merge, AVERAGE):.0f}%" in line


def test_many_merges_get_a_line_each(make_results: MakeResults) -> None:
    results = make_results(inits=("lora", "osrm", "official", "contrastive", "more"))
    results.scores += [
        dataclasses.replace(row, merge=f"{row.merge}{i}")
        for i in range(3)
        for row in results.scores
        if row.merge == "ties"
    ]
    text = printed(results)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert re.search(r"^ties2 +0\.\d{3}", text, re.MULTILINE)
    assert "medsubject" not in text


def test_table_shows_every_arm(make_results: MakeResults) -> None:
    results = make_results()
    results.scores += [
        dataclasses.replace(row, arm="frozen+k8") for row in results.scores if row.arm != "lora"
    ]
    assert "frozen+k8" in printed(results)


# The page


@pytest.mark.parametrize("seeds", [1, 3])
def test_page_is_self_contained_and_valid(pages: dict[int, str], seeds: int) -> None:
    html = pages[seeds]
    for outside in (
        "http://",
        "https://",
        "src=",
        "@import",
        "url(h",
        "<link",
        "<script",
        "<image",
    ):
        assert outside not in html
    page = Page(html)
    assert page.tags.count("svg") == 5  # bars, curves, one matrix per init, leaked energy
    assert len(page.ids) == len(set(page.ids))
    assert set(page.labels) <= set(page.ids)
    inside = {link[1:] for link in page.links if link.startswith("#")}
    inside |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert inside <= set(page.ids)
    assert {link for link in page.links if not link.startswith("#")} == {
        "results.csv",
        "results.json",
    }


def test_page_tables_hold_the_numbers(make_results: MakeResults, pages: dict[int, str]) -> None:
    results = make_results(seeds=(0, 1, 2))
    rows = Page(pages[3]).rows
    headline = next(row for row in rows if row[0] == "ties")
    for cell, variant in zip(headline[1:], (LORA, OSRM), strict=True):
        summary = results.score(variant, "ties", AVERAGE)
        percent = results.percent(variant, "ties", AVERAGE)
        assert cell.startswith(f"{summary.mean:.3f} {percent:.0f}%±{summary.spread:.3f}")
    lora, osrm = (row for row in rows if row[0] == "trec accuracy")
    for row, variant in ((lora, LORA), (osrm, OSRM)):
        assert len(row) == 6
        assert row[1].startswith(f"{results.score(variant, 'individual', 'trec').mean:.3f}±")
        best = [cell for cell in row if cell.endswith("(best merge)")]
        highest = max(results.score(variant, merge, "trec").mean for merge in results.merges())
        assert len(best) == 1
        assert best[0].startswith(f"{highest:.3f}")
    assert ["adapter.targets", "query, value"] in rows
    assert ["torch", "2.13.0"] in rows


def test_page_escapes_names(make_results: MakeResults, tmp_path: Path) -> None:
    results = make_results(rename={"trec": "<script>alert(1)</script>", "sms": '"$x_1$" & [b]'})
    results = dataclasses.replace(
        results, name="<b>run</b>", settings={"<i>k</i>": "<u>v</u>"}, versions={"<p>": "<q>"}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = written(results, tmp_path)
    page = Page(html)
    assert not {"script", "b", "i", "u", "q"} & set(page.tags)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert ["<i>k</i>", "<u>v</u>"] in page.rows
    assert ["<p>", "<q>"] in page.rows


def test_same_results_same_bytes(
    make_results: MakeResults, pages: dict[int, str], tmp_path: Path
) -> None:
    make_results().save(tmp_path)
    assert written(Results.load(tmp_path), tmp_path / "again") == pages[1]


def test_honest_notes(pages: dict[int, str]) -> None:
    one, three = pages[1], pages[3]
    assert "One seed. A difference seen once is not evidence" in one
    assert "trec 400" in one
    # sqrt(0.8 * 0.2 / 400)
    assert "standard error of 0.020" in one
    assert "n/a: the metric is undefined" not in one
    assert "3 seeds: 0, 1, 2." in three
    assert "is not evidence" not in three


def test_undefined_scores_are_said_so(make_results: MakeResults, tmp_path: Path) -> None:
    results = with_constant_prediction(make_results())
    text = printed(results)
    assert re.search(r"stsb +0\.\d{3} +n/a +n/a", text)
    assert re.search(r"average +0\.\d{3} +n/a +n/a", text)
    assert "nan" not in text
    html = written(results, tmp_path)
    assert "n/a: the metric is undefined" in html
    assert "Highest test average" not in html  # there is none to name
    assert "nan" not in re.sub(r"<[^>]*>", "", html).lower()


def test_missing_runtime_merge(make_results: MakeResults, tmp_path: Path) -> None:
    results = make_results(merges=("task_arithmetic", "ties"))
    assert "orthogonal" not in printed(results)
    html = written(results, tmp_path)
    assert "orthogonal" not in html
    assert Page(html).tags.count("svg") == 5


def test_a_merge_that_only_one_variant_has(make_results: MakeResults, tmp_path: Path) -> None:
    results = make_results()
    results.scores = [row for row in results.scores if (row.arm, row.merge) != ("lora", "ties")]
    averages = [
        line for line in printed(results).splitlines() if line.startswith(("lora ", "osrm "))
    ]
    assert [line.count("n/a") for line in averages] == [2, 0, 0, 0]  # averages, then best merges
    headline = next(row for row in Page(written(results, tmp_path)).rows if row[0] == "ties")
    assert headline[1] == "n/a n/a"


def test_joint_training_is_no_merge(make_results: MakeResults, tmp_path: Path) -> None:
    results = make_results(merges=("ties",))
    results.scores += [
        dataclasses.replace(row, arm="all", merge="joint", score=row.score + 1)
        for row in results.scores
        if (row.arm, row.merge) == ("osrm", "ties")
    ]
    html = written(results, tmp_path)
    assert "Highest test average" in html
    best = max(results.score(arm, "ties", AVERAGE).mean for arm in (LORA, OSRM))
    assert f"{best:.3f}" in html.partition("Highest test average")[2].partition("</p>")[0]
    cells = [cell for row in Page(html).rows for cell in row if "(best merge)" in cell]
    assert cells
    assert not any(cell.startswith("1.") for cell in cells), "joint scores are 1 too high"


def test_individual_scores_alone(make_results: MakeResults, tmp_path: Path) -> None:
    results = make_results(merges=())
    assert "individual" in printed(results)
    assert "Highest test average" not in written(results, tmp_path)


def test_page_tells_differences_and_correlations(make_results: MakeResults, tmp_path: Path) -> None:
    results = make_results(seeds=(0, 1), merges=("ties",))
    random = np.random.default_rng(0)
    for arm in results.arms:
        rows = {}
        for task in results.tasks:
            labels = random.normal(0, 1, 30)
            noise = random.normal(0, 0.5 if arm.name == "osrm" else 5.0, 30)
            rows[task.name] = Predicted(labels := np.arange(30) / 7, labels + noise, np.arange(30))
        file = f"{arm.name}{arm.seed}.npz"
        save_predictions(tmp_path / file, {"chosen": rows})
        merges = [dataclasses.replace(info, predictions=file) for info in arm.merges]
        object.__setattr__(arm, "predictions", file)
        object.__setattr__(arm, "merges", merges)
    results.tasks = [
        dataclasses.replace(task, metric="pearson", kind="regression") for task in results.tasks
    ]
    html = written(results, tmp_path)
    (row,) = (row for row in Page(html).rows if row[0] == "osrm/ties")
    assert row[1] == "lora/ties"
    assert row[3].startswith("+0.")
    assert row[5] == "< 0.001"
    assert "Rows of one group" in html
    assert "Spearman" not in html, "the headline metrics have no scores here"
    page = Page(written(make_results(), tmp_path / "plain"))
    assert ["osrm/ties"] not in [row[:1] for row in page.rows]
    assert [row[1] for row in page.rows if row[0] == "leaked / own, update"][-1] == "16"
