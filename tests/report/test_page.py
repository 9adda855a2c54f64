"""The page is one file with every number, escapes every text, and is drawn whatever is missing."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import samples

from aerogel.report import Results, figures, render, wording
from aerogel.report.schema import Curve, Latency, Layer, Metric

EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script> & \"'"


class Reader(HTMLParser):
    """Collects elements, text outside scripts, and the plots."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.plots = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = "plots" if ("id", "plots") in attrs else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "plots":
            self.plots += data
        elif self._inside not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def everything_evil(value: Any) -> Any:
    """The same results with every free text replaced by one that wants out."""
    if isinstance(value, dict):
        fixed = ("engine", "weights", "unit", "created")
        return {k: v if k in fixed else everything_evil(v) for k, v in value.items()}
    if isinstance(value, list):
        return [everything_evil(item) for item in value]
    return EVIL if isinstance(value, str) else value


def test_every_number_is_on_the_page() -> None:
    text = Reader(render(samples.results())).text
    for expected in (
        "92.87 %", "93.12 %", "−0.25 points", "90.0 %", "7.04× smaller", "12.9 MB → 1.84 MB",
        "6.93× faster", "2.83× faster", "fastest dense, openvino", "aerogel compress --model",
        "name: mobilenet_v1", "Example CPU", "2.13.0", "no C++ compiler is installed",
        "features.13.pointwise.convolution", "2 min 41 s", "313,958 of 3,139,584 weights kept",
    ):  # fmt: skip
        assert expected in text, expected


def test_a_dict_and_the_model_give_the_same_page() -> None:
    assert render(samples.results()) == render(Results.model_validate(samples.results()))


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    page = render(samples.results())
    reader = Reader(page)
    assert not {"link", "img", "iframe", "object", "embed"} & set(reader.tags)
    assert not [a for a in reader.attributes if a[0] in ("src", "srcset", "action", "data")]
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(", page[: page.index("</style>")])


def test_every_text_is_escaped() -> None:
    evil = Reader(render(everything_evil(samples.results())))
    plain = Reader(render(samples.results()))
    assert evil.tags.count("script") == plain.tags.count("script") == 3
    assert "img" not in evil.tags
    assert EVIL in evil.text
    plots = json.loads(evil.plots)
    labels = plots[0]["layout"]["yaxis"]["ticktext"]
    assert all("<" not in label for label in labels)


def test_plots_have_words_and_tables_for_those_who_cannot_see_them() -> None:
    page = render(samples.results())
    reader = Reader(page)
    plots = json.loads(reader.plots)
    labels = [value for name, value in reader.attributes if name == "aria-label"]
    for plot in plots:
        assert plot["summary"] in labels
        assert f'id="{plot["key"]}"' in page
    assert reader.tags.count("table") >= 7  # four latencies, quality, sizes, layers
    assert "lang" in [name for name, _ in reader.attributes]


def test_results_with_nothing_but_a_title_are_a_page() -> None:
    page = render({"title": "cut short"})
    assert "cut short" in Reader(page).text
    assert len(page) < 50_000  # the plotting library is not carried for no plots
    assert json.loads(Reader(page).plots) == []


@pytest.mark.parametrize("part", [
    "quality", "size", "latency", "layers", "curves", "stages", "hardware", "versions", "subject",
    "notes", "recipe", "command", "created",
])  # fmt: skip
def test_any_part_may_be_missing(part) -> None:
    results = samples.results()
    del results[part]
    assert "mobilenet_v1" in render(results)


def test_a_slower_network_is_called_slower() -> None:
    results = samples.results()
    for setting in results["latency"]:
        ours = setting["rows"][-1]
        ours["median"], ours["samples"] = 100 * ours["median"], [100 * s for s in ours["samples"]]
    text = Reader(render(results)).text
    assert "14.4× slower" in text
    assert "faster" not in text.split("How fast it runs")[0]


def test_no_aerogel_time_means_no_claim() -> None:
    results = samples.results()
    for setting in results["latency"]:
        setting["rows"] = [r for r in setting["rows"] if r["engine"] != "aerogel"]
    assert "vs eager" not in Reader(render(results)).text


def test_what_is_not_of_the_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="title"):
        render({})


def test_ratios_come_from_the_rounds_own_ratios() -> None:
    """The machine was twice as slow in the last rounds; each round says twice as fast."""
    results = samples.results()
    rows = results["latency"][0]["rows"]
    eager, ours = rows[0], rows[-1]
    eager["samples"], ours["samples"] = [2.0, 2.0, 4.0], [1.0, 1.0, 2.0]
    assert "2.00× faster" in Reader(render(results)).text


def test_many_layers_are_cut_to_the_slowest_in_order() -> None:
    rows = [Layer(name=f"l{i}", sparsity=0.5, seconds_dense=float(i % 7)) for i in range(100)]
    figure = figures.layer_time(rows)
    names = [text.strip() for text in figure.layout["yaxis"]["ticktext"]]
    assert len(names) == figures.MAX_LAYERS
    assert names == sorted(names, key=lambda n: int(n[1:]))
    text = Reader(render({"title": "t", "layers": [r.model_dump() for r in rows]})).text
    assert "All 100 layers" in text


def test_layers_are_named_within_their_common_parent() -> None:
    names = ["net.body.0.query", "net.body.0.key", "net.body.10.query"]
    assert wording.within_parent(names) == ["0.query", "0.key", "10.query"]
    assert wording.within_parent(["net.head", "net.body.0"]) == ["head", "body.0"]
    assert wording.within_parent(["net.head"]) == ["head"]
    assert wording.within_parent([]) == []


def test_plots_of_nothing_are_no_plots() -> None:
    missing = {"label": "x", "engine": "x", "missing": "gone"}
    assert figures.latency(Latency(threads=1, rows=[missing]), 0) is None
    assert figures.quality([Metric(name="loss", dense=1, sparse=2, unit="plain")]) is None
    assert figures.layer_time([Layer(name="l")]) is None
    assert figures.curves([Curve(name="loss", steps=[1], values=[None])]) == []


def test_rendering_does_not_change_its_input() -> None:
    results = samples.results()
    before = copy.deepcopy(results)
    render(results)
    assert results == before


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: wording.seconds(2.05e-3), "2.05 ms"),
        (lambda: wording.seconds(161), "2 min 41 s"),
        (lambda: wording.seconds(None), "–"),
        (lambda: wording.size(1_840_000), "1.84 MB"),
        (lambda: wording.size(999), "999 B"),
        (lambda: wording.points(-0.0025), "−0.25 points"),
        (lambda: wording.speed(0.5), "2.00× slower"),
        (lambda: wording.speed(1.01), "equally fast"),
        (lambda: wording.smaller(7.04), "7.04× smaller"),
        (lambda: wording.clipped("a" * 20 + "b" * 20, 11), "aaaaa…bbbbb"),
    ],
)
def test_numbers_read_well(call, text) -> None:
    assert call() == text
