"""The report says what the summary says, loads nothing, and survives parts that did not run."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from simulation import wording
from simulation.record import RunRecordError, load_run
from simulation.report import print_summary, write_report

Json = dict[str, Any]
MakeRun = Callable[[str, Json, Json], Path]
VOID = {"meta", "link", "br", "hr", "img", "input"}
MERGE = ("rank", "kept_energy", "mean_cosine", "norm_ratio", "discrepancy")
STAGES = ("base", "local", "merged", "aligned")


class Page(HTMLParser):
    """Tags, attributes and the numbers of each table row; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[tuple[dict[str, str | None], list[float]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append((dict(attrs), []))
        if tag == "data" and "tr" in self._open:
            self.rows[-1][1].append(float(dict(attrs)["value"] or "nan"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def numbers(self, key: str, value: str) -> list[list[float]]:
        return [numbers for attributes, numbers in self.rows if attributes.get(key) == value]


def words(page: Page) -> str:
    return " ".join(page.text.split())


@pytest.fixture
def report(make_run: MakeRun, config: Json) -> Callable[[Json], Page]:
    def write(summary: Json) -> Page:
        path = write_report(make_run("run", summary, config))
        assert path.name == "report.html"
        return Page(path.read_text(encoding="utf-8"))

    return write


@pytest.fixture(scope="module")
def text(make_run: MakeRun, example_summary: Json, example_config: Json) -> str:
    """The report of the complete run."""
    path = write_report(make_run("run", example_summary, example_config))
    return path.read_text(encoding="utf-8")


@pytest.fixture
def read(make_run: MakeRun, config: Json) -> Callable[[Json], str]:
    """The paragraph that tells the outcome of a run."""
    return lambda summary: wording.reading(load_run(make_run("run", summary, config))).replace(
        "\N{NO-BREAK SPACE}", " "
    )


def test_page_is_self_contained(text: str) -> None:
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_ids_are_unique_and_references_resolve(text: str) -> None:
    page = Page(text)
    ids = Counter(a["id"] for _, a in page.tags if "id" in a)
    assert max(ids.values()) == 1
    used = {(a.get("xlink:href") or "")[1:] for _, a in page.tags if a.get("xlink:href")}
    used |= {c for _, a in page.tags for c in re.findall(r"url\(#([^)]+)\)", str(a))}
    assert used
    assert used <= set(ids)


def test_every_figure_is_there_and_has_alternative_text(text: str) -> None:
    page = Page(text)
    labels = [a["aria-label"] or "" for a in page.all("svg")]
    assert len(labels) == len(page.all("figure")) == 10
    assert all(len(label) > 20 for label in labels)
    for start in ("bits per character", "Privacy loss", "Supervised", "Direct", "Held-out",
                  "Traffic", "FedAvg"):  # fmt: skip
        assert any(label.startswith(start) for label in labels), start


def test_figures_follow_the_theme_of_the_page(text: str) -> None:
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", text))
    style = text[: text.index("</style>")]
    light, _, dark = style.partition("prefers-color-scheme: dark")
    for name in used:
        assert f"--{name}:" in light
        assert f"--{name}:" in dark
    assert not re.search(r"#0a0b", text)


def test_tables_hold_the_numbers_of_the_summary(text: str, summary: Json) -> None:
    page = Page(text)
    for name, hospital in summary["hospitals"].items():
        scores, spent = page.numbers("data-hospital", name)
        assert scores == [hospital[m][s] for m in ("perplexity", "bits_per_char") for s in STAGES]
        counts = [hospital[k] for k in ("patients", "notes", "rejected_records", "epsilon")]
        assert spent == [*counts, summary["privacy"]["epsilon_budget"], hospital["delta"]]
    for record in summary["rounds"]:
        (numbers,) = page.numbers("data-round", str(record["round"]))
        assert numbers == [record[k] for k in ("seconds", "bytes_up", "bytes_down")]
        (numbers,) = page.numbers("data-merge", str(record["round"]))
        assert numbers == [record[k] for k in MERGE]
    for stage, score in summary["alignment"]["instructions"].items():
        (numbers,) = page.numbers("data-stage", stage)
        assert numbers == list(score.values())


def test_reading_tells_the_outcome(read: Callable[[Json], str], summary: Json, text: str) -> None:
    told = read(summary)
    assert "At every one of the 3 hospitals the merged adapter predicts held-out notes" in told
    assert "23.4 → 14.4 at north" in told
    assert "ε = 7.95 of a budget of 8 (δ = 1e-5), at north; no hospital exceeded its budget" in told
    assert "1 answer was left out" in told
    assert told in words(Page(text))


def test_reading_names_the_hospital_that_got_worse(
    read: Callable[[Json], str], summary: Json
) -> None:
    summary["hospitals"]["valley"]["perplexity"]["merged"] = 31.0
    told = read(summary)
    assert "At 2 of 3 hospitals" in told
    assert "It does not at valley." in told


def test_overspending_is_shown(report: Callable[[Json], Page], summary: Json) -> None:
    summary["hospitals"]["harbor"]["epsilon"] = 8.31
    text = words(report(summary))
    assert "the budget was exceeded at harbor" in text
    assert "Budget exceeded at harbor" in text


def _no_alignment(summary: Json) -> None:
    summary["alignment"] = {}
    for hospital in summary["hospitals"].values():
        hospital["perplexity"].pop("aligned")
        hospital["bits_per_char"].pop("aligned")


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (1.0004, "On average it left perplexity on held-out notes as it was."),
        (1.002, "It raised perplexity on held-out notes by 0.2 % on average."),
        (0.998, "It lowered perplexity on held-out notes by 0.2 % on average."),
    ],
)
def test_what_alignment_did_to_the_notes_is_said_as_it_is(
    report: Callable[[Json], Page], summary: Json, factor: float, said: str
) -> None:
    for hospital in summary["hospitals"].values():
        hospital["perplexity"]["aligned"] = factor * hospital["perplexity"]["merged"]
    assert said in words(report(summary))


def _no_figures_of_merges(summary: Json) -> None:
    for record in summary["rounds"]:  # a run of one hospital has no cosine, mixed ranks no FedAvg
        record |= dict.fromkeys(MERGE)


def _no_privacy(summary: Json) -> None:
    summary["privacy"] = {"enabled": False}
    for hospital in summary["hospitals"].values():
        hospital["epsilon"] = None


def _not_alone(summary: Json) -> None:
    for hospital in summary["hospitals"].values():
        hospital["perplexity"]["local"] = hospital["bits_per_char"]["local"] = None


def _one_round(summary: Json) -> None:
    summary["rounds"] = summary["rounds"][:1]
    for hospital in summary["hospitals"].values():
        hospital["by_round"] = hospital["by_round"][:1]


def _no_rounds(summary: Json) -> None:
    summary["rounds"] = []
    for hospital in summary["hospitals"].values():
        hospital["by_round"] = []


def _one_hospital(summary: Json) -> None:
    summary["hospitals"] = {"north": summary["hospitals"]["north"]}


def _many_hospitals(summary: Json) -> None:
    one = summary["hospitals"]["north"]
    summary["hospitals"] = {f"department {n}": copy.deepcopy(one) for n in range(12)}


def _diverged(summary: Json) -> None:
    summary["hospitals"]["north"]["perplexity"]["merged"] = math.inf
    summary["hospitals"]["north"]["by_round"][-1]["perplexity"] = math.inf


def _everything_off(summary: Json) -> None:
    for change in (_no_alignment, _no_privacy, _not_alone, _no_rounds, _one_hospital):
        change(summary)


@pytest.mark.parametrize(
    ("change", "figures"),
    [
        (_no_alignment, 7),
        (_no_privacy, 9),
        (_no_figures_of_merges, 9),
        (_not_alone, 10),
        (_one_round, 10),
        (_no_rounds, 6),
        (_one_hospital, 10),
        (_many_hospitals, 10),
        (_diverged, 10),
        (_everything_off, 2),
    ],
)
def test_renders_without_the_parts_that_did_not_run(
    report: Callable[[Json], Page],
    summary: Json,
    change: Callable[[Json], None],
    figures: int,
) -> None:
    change(summary)
    assert len(report(summary).all("svg")) == figures


def test_privacy_off_is_plain(report: Callable[[Json], Page], summary: Json) -> None:
    _no_privacy(summary)
    text = words(report(summary))
    assert "This run had no privacy" in text
    assert "What this promises" not in text
    assert "of 8" not in text


def test_promise_states_unit_and_accountant(report: Callable[[Json], Page], summary: Json) -> None:
    summary["privacy"]["unit"] = "note"
    text = words(report(summary))
    assert "add or remove one note" in text
    assert summary["privacy"]["accountant"] in text
    assert "For a patient with k notes it is k·ε at a δ that grows" in text


def test_names_are_escaped(report: Callable[[Json], Page], summary: Json) -> None:
    names = ["<script>alert(1)</script>", 'a"b&c', "$x_1^2$", "心臓 病院"]
    one = summary["hospitals"]["north"]
    summary["hospitals"] |= {name: copy.deepcopy(one) for name in names}
    summary["notices"] = [f"seen at {name}" for name in names]
    summary["rounds"][0]["left_out"] = dict.fromkeys(names, "</td><b>late")
    page = report(summary)
    assert not page.all("script")
    assert not page.all("b")
    for name in names:
        assert len(page.numbers("data-hospital", name)) == 2
        assert f"seen at {name}" in page.text


def test_simulated_numbers_are_marked_only_where_they_are(
    report: Callable[[Json], Page], summary: Json
) -> None:
    for hospital in summary["hospitals"].values():
        hospital["simulation_only"] = ["patients"]
    page = report(summary)
    marks = [a for a in page.all("abbr") if a.get("class") == "sim"]
    assert len(marks) == 2  # the column and its note
    assert "Known here only because every hospital is simulated" in words(page)


def test_same_run_same_page(make_run: MakeRun, summary: Json, config: Json, text: str) -> None:
    again = write_report(make_run("run", summary, config))
    assert again.read_text(encoding="utf-8") == text


def test_unusable_folder_is_refused_in_one_line(
    make_run: MakeRun, summary: Json, config: Json, tmp_path: Path
) -> None:
    with pytest.raises(RunRecordError, match=r"summary\.json is missing"):
        write_report(tmp_path)
    broken = make_run("broken", summary, config)
    (broken / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunRecordError, match="is not JSON"):
        write_report(broken)
    del summary["privacy"]["delta"]
    with pytest.raises(RunRecordError, match="privacy is enabled but delta is missing") as error:
        load_run(make_run("no-delta", summary, config))
    assert "\n" not in str(error.value)


@given(st.floats(0, 1e4))
def test_privacy_loss_is_never_rounded_down(spent: float) -> None:
    assert spent - 1e-8 <= float(wording.epsilon(spent)) <= spent + 0.01 + 1e-8


@given(st.integers(0, 10**12))
def test_sizes_are_within_rounding(count: int) -> None:
    shown, unit = wording.size(count).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    assert float(shown) * scale == pytest.approx(count, abs=0.051 * scale)


def test_terminal_table_says_what_was_reached_and_spent(summary: Json) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    print_summary(json.loads(json.dumps(summary)), console)
    lines = console.export_text().splitlines()
    (north,) = (line for line in lines if "north" in line)
    assert north.split() == ["north", "23.4", "15.9", "14.4", "14.6", "7.95", "of", "8"]
    _everything_off(summary)
    print_summary(summary, console)
    (north,) = (line for line in console.export_text().splitlines() if "north" in line)
    assert north.split() == ["north", "23.4", "14.4", "no", "privacy"]


def test_what_a_round_carries_is_said_once_for_each_hospital(
    report: Callable[[Json], Page], summary: Json
) -> None:
    for sent, one in zip((1000, 3000, 2000), summary["rounds"], strict=True):
        one |= {"uploads": dict.fromkeys(one["hospitals"], sent), "download": 10 * sent}
    page = report(summary)
    assert [a["data-bytes"] for _, a in page.tags if "data-bytes" in a] == list(
        summary["hospitals"]
    )
    shown = words(page)
    assert "north32.0 kB20.0 kB" in shown  # three rounds
    assert "valley21.5 kB15.0 kB" in shown  # left out of the second
