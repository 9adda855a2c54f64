"""Studies of attention: full budgets change nothing, runs go on, failures stop no other method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aerogel import attention, models
from aerogel.attention import AttentionContext, Plan, Selector, SpanPlan
from aerogel.insight import attention_methods, attention_page, attention_study
from aerogel.insight.attention_cost import counted, generate_timed, peak_memory
from aerogel.insight.attention_methods import Method, attending
from aerogel.insight.attention_study import Row, Study
from aerogel.insight.language_source import LanguageModel, encode_at_least, load_text

TEXT = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(0))


class Window(Selector):
    """A window of tokens, and nothing beyond prompts of `longest` tokens."""

    slug = "study-window"

    def __init__(self, size: int = 1 << 20, longest: int = 1 << 20) -> None:
        super().__init__()
        self.size, self.longest = size, longest

    def options(self) -> dict[str, Any]:
        return {"size": self.size, "longest": self.longest}

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        if ctx.shape.k_len > self.longest:
            raise ValueError(f"longest={self.longest}: too short")
        return SpanPlan.uniform(0, self.size)

    plan_decode = plan_prefill


@pytest.fixture(autouse=True)
def window(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {**attention.SELECTORS, Window.slug: attention.selector.Entry(Window, Window.needs)}
    for room in (attention.selector, attention_methods, attention.calibration):
        monkeypatch.setattr(room, "SELECTORS", listed)


@pytest.fixture(scope="module")
def subject() -> LanguageModel:
    torch.manual_seed(0)
    model = models.create_model(
        "tiny_lm", hidden_size=32, intermediate_size=32, num_hidden_layers=2
    )
    return LanguageModel("tiny", model.eval(), lambda text: list(text.encode()))


def study(*methods: str, **changes: Any) -> Study:
    settings = {"lengths": (160,), "sequences": 1, "probes": 1, "rounds": 1, **changes}
    return Study(tuple(Method.parse(text) for text in methods), **settings)


def test_full_budget_equals_dense_and_less_reads_less(subject, tmp_path):
    rows = attention_study.run(
        study("dense", "study-window", "study-window:size=8"), subject, TEXT, tmp_path
    )
    dense, full, small = rows
    assert [row.missing for row in rows] == ["", "", ""]
    for name in ("plain", "repeat", "needle_nats", "pairs_nats"):
        assert getattr(full, name) == pytest.approx(getattr(dense, name), abs=1e-5)
        assert getattr(small, name) != pytest.approx(getattr(dense, name), abs=3e-5)
    pairs = sum(min(8, i + 1) for i in range(160)) / (160 * 161 / 2)
    assert (dense.density, full.density) == (1.0, 1.0)
    assert small.density == pytest.approx(pairs)
    assert small.decode_density == pytest.approx(8 / 161.5, abs=1e-3)
    assert small.cache_bytes == dense.cache_bytes == 2 * 2 * 2 * 160 * 8 * 4
    assert min(row.prefill_seconds for row in rows) > 0


def test_a_second_run_does_only_what_is_new(subject, tmp_path, monkeypatch):
    first = attention_study.run(study("dense", rounds=0), subject, TEXT, tmp_path)

    def work(*_: Any) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(attention_study, "_passages", work)
    monkeypatch.setattr(attention_study, "_probes", work)
    assert attention_study.run(study("dense", rounds=0), subject, TEXT, tmp_path) == first
    with pytest.raises(AssertionError, match="done again"):
        attention_study.run(study("dense", rounds=0, seed=1), subject, TEXT, tmp_path)
    assert json.loads((tmp_path / "rows.json").read_text())[0]["method"] == "dense"


def test_a_damaged_part_is_done_again(subject, tmp_path):
    first = attention_study.run(study("dense", rounds=0), subject, TEXT, tmp_path)
    for part in (tmp_path / "parts").iterdir():
        part.write_text("{")
    assert attention_study.run(study("dense", rounds=0), subject, TEXT, tmp_path) == first


def test_a_method_that_fails_says_so_and_stops_no_other(subject, tmp_path):
    settings = study("dense", "study-window:longest=120", lengths=(90, 160), probes=0)
    rows = attention_study.run(settings, subject, TEXT, tmp_path)
    assert [bool(row.missing) for row in rows] == [False, False, False, True]
    assert "longest=120" in rows[3].missing
    assert rows[3].prefill_seconds is None
    assert rows[2].prefill_seconds is not None
    assert "longest=120" in attention_page.markdown(rows, "title")


def test_the_model_is_left_as_it_was(subject, tmp_path):
    ids = TEXT[None, :40]
    before = subject.model(ids).logits
    with attending(subject.model, Method("study-window", {"size": 2})):
        assert not torch.equal(subject.model(ids).logits, before)
    assert torch.equal(subject.model(ids).logits, before)


def test_counting_leaves_the_selector_as_it_was(subject):
    selector = Window(4)
    attention.attach(subject.model, selector)
    try:
        with counted(selector) as found:
            generate_timed(subject.model, TEXT[:32], tokens=2)
        generate_timed(subject.model, TEXT[:32], tokens=1)
    finally:
        attention.detach(subject.model)
    assert (len(found.prefill), len(found.decode)) == (2, 4)
    assert "plan_prefill" not in selector.__dict__


def test_peak_memory_sees_what_was_freed_again():
    with peak_memory() as peak:
        torch.ones(50 << 18).sum()
    found = peak()
    assert found is None or 45 << 20 < found < 120 << 20


def test_pages_hold_every_method():
    rows = [Row("dense", 64, plain=1.0, density=1.0), Row("<b>", 128, plain=2.0, density=0.5)]
    page = attention_page.page(rows, "study")
    assert "dense" in page
    assert "&lt;b&gt;" in page
    assert attention_page.markdown(rows, "study").count("| <b> |") == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "expected dense"),
        ("study-window:size", "name=value"),
        ("study-window:siz=3", "no option siz"),
        ("dense:a=1", "only named selectors"),
    ],
)
def test_bad_methods_are_named(text, said):
    with pytest.raises(ValueError, match=said):
        Method.parse(text)


def test_bad_studies_are_named(subject, tmp_path):
    with pytest.raises(ValueError, match="two alike"):
        study("dense", "dense")
    with pytest.raises(ValueError, match="lengths"):
        study("dense", lengths=(8,))
    with pytest.raises(ValueError, match="600 tokens"):
        attention_study.run(study("dense", lengths=(600,)), subject, TEXT, tmp_path)


def test_texts_by_name_and_by_file(tmp_path: Path):
    (tmp_path / "a.txt").write_text("über")
    assert load_text(str(tmp_path / "a.txt")) == "über"
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        load_text(str(tmp_path / "b.txt"))
    with pytest.raises(ValueError, match="expected brown"):
        load_text("nothing")
    ids = encode_at_least(lambda t: list(t.encode()), "x" * 100, 30, chunk=20)
    assert len(ids) == 40
    with pytest.raises(ValueError, match="100 tokens"):
        encode_at_least(lambda t: list(t.encode()), "x" * 100, 200)
