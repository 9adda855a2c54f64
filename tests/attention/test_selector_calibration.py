"""Calibration: one call, whatever a method does with the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny

from aerogel.attention import (
    CALIBRATIONS,
    MInferenceSelector,
    Selector,
    add_calibration,
    attach,
    calibrate,
    detach,
    load_selector,
    save_selector,
)
from aerogel.attention.calibration import check_options
from aerogel.finetune import attention_gate  # noqa: F401

WINDOWS = torch.randint(2, 63, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A calibration under the name "mine", and what it was called with."""
    calls: dict[str, Any] = {}
    monkeypatch.delitem(CALIBRATIONS, "mine", raising=False)

    @add_calibration("mine")
    def calibrate_mine(model, windows, *, on_progress=None, share=0.5):
        calls.update(training=model.training, windows=windows, share=share)
        on_progress(1, 1)
        return Selector()

    yield calls
    del CALIBRATIONS["mine"]


def test_the_function_sees_text_options_and_a_model_in_evaluation_mode(registered):
    model = tiny("Llama").train()
    seen: list[tuple[int, int]] = []
    calibrate(model, "mine", WINDOWS, on_progress=lambda *x: seen.append(x), share=0.25)
    assert registered["training"] is False
    assert model.training
    assert torch.equal(registered["windows"], WINDOWS)
    assert registered["share"] == 0.25
    assert seen == [(1, 1)]


def test_bad_calls_are_named(registered):
    model = tiny("Llama")
    with pytest.raises(ValueError, match="no option shar; expected some of share"):
        calibrate(model, "mine", WINDOWS, shar=1)
    with pytest.raises(ValueError, match="windows has shape"):
        calibrate(model, "mine", WINDOWS[:0])
    with pytest.raises(ValueError, match="selector='none'"):
        calibrate(model, "none", WINDOWS)
    with pytest.raises(ValueError, match="has a calibration already"):
        add_calibration("mine")(Selector)
    with pytest.raises(ValueError, match="no option lastq"):
        calibrate(model, "minference", WINDOWS, lastq=4)


def test_options_reach_what_a_calibration_hands_them_to():
    make = CALIBRATIONS["seerattention"]
    check_options("seerattention", {"steps": 1, "gate_dim": 8, "k_pool": ("max",)}, make)
    check_options("seerattention", {"mode": "decode", "budget": 64, "grouping": "mean"}, make)
    with pytest.raises(ValueError, match=r"no option gate; expected some of .*gate_dim"):
        check_options("seerattention", {"gate": 8}, make)


def test_patterns_of_minference_survive_their_file(tmp_path):
    model = tiny("Llama")
    options = {"last_q": 8, "force_first": 2, "force_local": 4}
    candidates = [["vertical_and_slash", 4, 8], ["stream_llm", 2, 8]]
    found = calibrate(model, "minference", WINDOWS, candidates=candidates, **options)
    assert isinstance(found, MInferenceSelector)
    save_selector(found, model, tmp_path / "s.safetensors")
    loaded = load_selector(tmp_path / "s.safetensors", model)
    assert loaded.options() == found.options()
    assert found.config is not None
    attach(model, loaded)
    try:
        assert torch.isfinite(model(WINDOWS).logits).all()
    finally:
        detach(model)
