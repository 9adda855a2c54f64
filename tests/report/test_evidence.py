"""Evidence is measured, judged, kept and shown."""

import math
from dataclasses import replace

import pytest

from aerogel.manifest import load_systems
from aerogel.report.evidence import (
    Claim,
    Evidence,
    Result,
    find_checkout,
    load_evidence,
    load_experiment,
    render_page,
    reproduce,
    save_evidence,
    write_page,
)

EXPERIMENT = """
from aerogel.report.evidence import Claim, Result, mean

SEEDS = (3, 4)


def run(seed):
    return Result("toy", seed, {"ours": seed + 1.0, "base": 1.0}, 0.5, ("a note",))


def claims(results):
    return [Claim("ours against base", mean(results, "ours"), mean(results, "base"), 2.0)]
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "toy.py").write_text(EXPERIMENT)
    return tmp_path


@pytest.fixture
def system():
    return replace(load_systems()[0], slug="toy", experiment="experiments/toy.py")


def test_reproduce_runs_every_seed_and_judges(checkout, system):
    seen = []
    evidence = reproduce(system, checkout=checkout, on_result=seen.append)
    assert evidence.seeds == (3, 4)
    assert seen == list(evidence.results)
    assert evidence.claims[0].margin == 3.5
    assert evidence.passed
    assert evidence.seconds != 1.0  # CPU time: what the toy says of itself does not count
    assert evidence.mean("ours") == 4.5
    assert reproduce(system, checkout=checkout, seeds=[0]).passed is False


def test_evidence_survives_save_and_load(checkout, system):
    evidence = reproduce(system, checkout=checkout)
    assert load_evidence(save_evidence(evidence, checkout)) == evidence


def test_the_page_shows_figures_verdicts_and_what_is_missing(checkout, system):
    other = replace(system, slug="unmeasured")
    save_evidence(reproduce(system, checkout=checkout), checkout)
    page = render_page([system, other], checkout / "docs" / "evidence")
    assert "| ours against base | 4.50 | 1.00 | +3.50 | +2.00 | pass |" in page
    assert "| ours | 4.50 | 4.00 | 5.00 |" in page
    assert "a note" in page
    assert "Not measured yet." in page


@pytest.mark.parametrize(
    ("claim", "passed"),
    [
        (Claim("", 84.0, 83.6, 0.3), True),
        (Claim("", 84.0, 83.6, 0.5), False),
        (Claim("", 84.0, 85.0, -1.5), True),
        (Claim("", 1.0, 3.0, 1.5, higher_is_better=False), True),
        (Claim("", math.nan, 3.0, -9.0), False),
    ],
)
def test_a_claim_passes_by_its_margin(claim, passed):
    assert claim.passed is passed


def test_no_claims_prove_nothing():
    assert not Evidence("toy", (Result("toy", 0, {}, 0.0),), ()).passed


def test_missing_or_faceless_experiments_are_named(checkout, system):
    with pytest.raises(ValueError, match="not found"):
        load_experiment(replace(system, experiment="experiments/none.py"), checkout)
    (checkout / "experiments" / "toy.py").write_text("SEEDS = ()")
    with pytest.raises(ValueError, match="run, claims"):
        load_experiment(system, checkout)
    with pytest.raises(ValueError, match="no checkout"):
        find_checkout(checkout.parent / "elsewhere")


def test_experiments_may_have_dataclasses(checkout, system):
    path = checkout / "experiments" / "toy.py"
    made = "from dataclasses import dataclass\n\n@dataclass\nclass Recipe:\n    steps: int = 3\n"
    path.write_text(f"from __future__ import annotations\n{made}{EXPERIMENT}")
    assert load_experiment(system, checkout).Recipe().steps == 3


def test_an_experiment_needs_seeds(checkout, system):
    with pytest.raises(ValueError, match="seeds"):
        reproduce(system, checkout=checkout, seeds=[])


def test_damaged_evidence_is_refused(tmp_path):
    path = tmp_path / "toy.json"
    for text in ("{", "{}", '{"slug": "x", "claims": [{}], "results": [], "machine": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not an evidence file"):
            load_evidence(path)


# Claims of papers that do not hold here, by system; the evidence page says FAIL and why. A claim
# that begins to hold must leave this list.
NOT_REPRODUCED = {
    # Seen -0.08, -0.21 and -0.24 points over five seeds of 200 steps; at 75 % dense loses by 0.5.
    "sparse-ift": {
        "ResNet-8 RigL 0.5 against ResNet-8 dense",
        "ResNet-8 RigL 0.5 against ResNet-8 static 0.5",
        "ResNet-8 RigL 0.75 against ResNet-8 static 0.75",
    },
    # Seen +0.75 points for both where 1 was asked, over eight seeds; +1.27 and +0.40 over three.
    "gpusq-vit": {
        "4 bits with the teacher against 4 bits rounded",
        "3 bits with the teacher against 3 bits labels alone",
    },
    # Seen +0.15 points on an Intel CPU and +1.33 on an AMD one, with the same seeds: rounding alone
    # moves the narrow network by more than the half point that was asked.
    "fast-sparse-convnets": {
        "80% zeros against a narrower dense network of equal 1x1 multiplications",
        "seeds of 3 within 2 points of dense and 0.5 above narrow, against two thirds",
    },
    # One small layer; two whole rows say more of a digit than its like tokens, however they are
    # found (more epochs, unscaled logits, shared keys and faster centroids leave the order as it
    # is). The paper measures long text and large pictures; 300 steps on bytes do not show it.
    "routing-transformer": {
        "digits: accuracy of routing heads, against blocks of 16",
        "text: nats on a repeated passage, routing heads 0.1 below local heads alone",
    },
    # Seen -0.42 points over three seeds where -0.3 was asked.
    "lottery-ticket": {"ticket of round 6 against dense"},
    # Eight epochs: all three readers of digits are far from done.
    "scatterbrain": {"digits: 16 features and a window of 16, against the better of either alone"},
    # One training seed, 1,200 steps: 0.035 bits above where 0.02 below was asked.
    "combiner": {"text: fixed blocks and summaries, 0.02 below the blocks alone"},
    # In blocks of 16 the gates' own target, largest weights, keeps less than mean pooling.
    "seerattention": {"byte model, kept: gate over mean pooling"},
    # Seen 3.5 times on sequences of 65 tokens, whose codes are padded to whole vectors of 16; the
    # longer ones of the same experiment, 4096 tokens, are above the four times asked.
    "zipvl": {"Cache, times smaller than float16"},
    "dsnot": {"Wanda + DSnoT against Wanda, 60% zeros: language model"},
    # Dense attention learns the digits better in this recipe; 60 steps do not undo dense training.
    "s2-attention": {
        "digits: heterogeneous shards against dense",
        "language, continued: heterogeneous shards against dense on the plain",
    },
    # Alpha 0.95 keeps unimportant weights so small that none comes back in steps 10 to 60; 0.5 a
    # step do at the end. With 0.99 changes fall from 2.0 to 0.3.
    "iss-p": {"changes of sides at 90%, last 50 steps before the cut against half of 10-60"},
    "sparse-model-soups": {"soup of one mask against a soup of networks pruned separately"},
}


def failing(evidence: Evidence) -> set[str]:
    return {claim.text for claim in evidence.claims if not claim.passed}


def test_kept_evidence_passes_and_the_page_is_made_from_it(tmp_path):
    checkout = find_checkout()
    folder = checkout / "docs" / "evidence"
    for path in folder.glob("*.json"):
        assert failing(load_evidence(path)) == NOT_REPRODUCED.get(path.stem, set()), path
    page = render_page(load_systems(), folder)
    assert (checkout / "docs" / "evidence.md").read_text() == page


def test_the_page_is_written_whole(checkout):
    path = write_page(checkout)
    assert path.read_text().startswith("# Evidence")
    assert [p.name for p in path.parent.iterdir()] == ["evidence.md"]


@pytest.mark.slow
@pytest.mark.parametrize("system", load_systems(), ids=lambda system: system.slug)
def test_experiments_pass(system):
    assert failing(reproduce(system)) == NOT_REPRODUCED.get(system.slug, set())
