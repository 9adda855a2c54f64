"""Evidence: what each system's experiment measured, kept as JSON and shown in docs/evidence.md.

An experiment is a script ``experiments/<slug>.py`` with one face: ``run(seed) -> Result`` trains
and measures once, ``claims(results) -> list[Claim]`` judges the seeds together, and ``SEEDS`` says
which ones by default. `reproduce` runs it, `save_evidence` keeps what came out, and `write_page`
makes the page from what is kept, so that no figure in it was typed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from aerogel.atomic import write_atomic
from aerogel.manifest import System, load_systems
from aerogel.runtime.tuning_cache import cpu_name

EVIDENCE_FOLDER = Path("docs") / "evidence"
PAGE = Path("docs") / "evidence.md"

SCHEMA_VERSION = 1

OnResult = Callable[["Result"], None]


@dataclass(frozen=True)
class Result:
    """One run of an experiment, for one seed.

    Attributes:
        slug: the system.
        seed: of this run.
        metrics: what was measured, by name.
        seconds: CPU time of the run, children's included, which neither pauses nor other work on
            the machine lengthen. `reproduce` writes it over what the experiment says.
        notes: anything a reader must know about the run.
    """

    slug: str
    seed: int
    metrics: dict[str, float]
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One comparison with a threshold: it passes if ours beats the baseline by at least that.

    Attributes:
        text: what is compared, in words.
        ours: mean over seeds of the system's figure.
        baseline: mean over seeds of what it is compared with.
        threshold: least margin, negative if ours may be that much worse.
        paper: the paper's own figures for the like of it, in words; empty if it has none.
        unit: of the figures.
        higher_is_better: whether the margin is ours - baseline, or the reverse.
    """

    text: str
    ours: float
    baseline: float
    threshold: float
    paper: str = ""
    unit: str = ""
    higher_is_better: bool = True

    @property
    def margin(self) -> float:
        """By how much ours is better."""
        gain = self.ours - self.baseline
        return gain if self.higher_is_better else -gain

    @property
    def passed(self) -> bool:
        """Whether the margin reaches the threshold (a nan never does)."""
        return self.margin >= self.threshold


@dataclass(frozen=True)
class Evidence:
    """All that is known from running one system's experiment over its seeds.

    Attributes:
        slug: the system.
        results: one per seed.
        claims: judged over all of them.
        machine: where it ran, and with which versions.
    """

    slug: str
    results: tuple[Result, ...]
    claims: tuple[Claim, ...]
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every claim holds."""
        return bool(self.claims) and all(claim.passed for claim in self.claims)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that ran."""
        return tuple(result.seed for result in self.results)

    @property
    def seconds(self) -> float:
        """CPU time of all runs together."""
        return sum(result.seconds for result in self.results)

    def mean(self, metric: str) -> float:
        """Mean of one metric over the seeds."""
        return mean(self.results, metric)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the verdicts are written too, for whoever reads the file."""
        claims = [
            {**asdict(claim), "margin": claim.margin, "passed": claim.passed}
            for claim in self.claims
        ]
        return {
            "schema": SCHEMA_VERSION,
            "slug": self.slug,
            "passed": self.passed,
            "seeds": list(self.seeds),
            "seconds": self.seconds,
            "claims": claims,
            "results": [asdict(result) for result in self.results],
            "machine": self.machine,
        }


def mean(results: Iterable[Result], metric: str) -> float:
    """Mean of one metric over some results."""
    return statistics.fmean(result.metrics[metric] for result in results)


def find_checkout(start: Path | None = None) -> Path:
    """The folder of the source checkout: the nearest one upwards that holds ``experiments/``.

    Args:
        start: where to look from; the working directory by default, then this file.

    Raises:
        ValueError: there is none (an installed package has no experiments).
    """
    starts = [start] if start is not None else [Path.cwd(), Path(__file__).resolve()]
    for origin in starts:
        for folder in (origin, *origin.parents):
            if (folder / "experiments").is_dir() and (folder / "pyproject.toml").is_file():
                return folder
    raise ValueError(
        f"no checkout of aerogel found above {' or '.join(map(str, starts))}: experiments come "
        f"with the sources, not with the installed package"
    )


def load_experiment(system: System, checkout: Path) -> ModuleType:
    """Import a system's experiment script.

    Raises:
        ValueError: there is no such script, or it lacks the face of an experiment.
    """
    path = checkout / system.experiment
    if not path.is_file():
        raise ValueError(f"experiment of {system.slug!r} not found: {path}")
    spec = importlib.util.spec_from_file_location(f"experiments.{system.module_name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if (folder := str(path.parent)) not in sys.path:
        sys.path.append(folder)  # experiments share modules that lie beside them
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    missing = [name for name in ("run", "claims", "SEEDS") if not hasattr(module, name)]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: an experiment has run, claims, SEEDS")
    return module


def reproduce(
    system: System,
    *,
    checkout: Path | None = None,
    seeds: Sequence[int] | None = None,
    on_result: OnResult | None = None,
) -> Evidence:
    """Run a system's experiment.

    Args:
        system: row of the manifest.
        checkout: source folder; found upwards of the working directory by default.
        seeds: the experiment's own by default.
        on_result: called after each seed.

    Returns:
        What was found, judged.

    Raises:
        ValueError: no experiment, or no seed.
    """
    experiment = load_experiment(system, checkout or find_checkout())
    chosen = tuple(experiment.SEEDS if seeds is None else seeds)
    if not chosen:
        raise ValueError("seeds is empty")
    results = []
    for seed in chosen:
        begin = _cpu_seconds()
        result = experiment.run(seed)
        results.append(replace(result, seconds=_cpu_seconds() - begin))
        if on_result is not None:
            on_result(results[-1])
    return Evidence(system.slug, tuple(results), tuple(experiment.claims(results)), machine())


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def as_script(
    run: Callable[[int], Result],
    claims: Callable[[Sequence[Result]], Sequence[Claim]],
    seeds: Sequence[int],
    threads: int | None = None,
) -> None:
    """What ``python experiments/<slug>.py`` does: print every seed's result and every verdict.

    Args:
        run: of the experiment.
        claims: of the experiment.
        seeds: of the experiment.
        threads: of torch; as they are by default.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    results = [run(seed) for seed in seeds]
    for result in results:
        print(result)
    for claim in claims(results):
        print(f"{claim.text}: {claim.margin:+.2f} ({'pass' if claim.passed else 'FAIL'})")


def machine() -> dict[str, str]:
    """Where this process runs, as far as results depend on it."""
    return {
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def save_evidence(evidence: Evidence, checkout: Path) -> Path:
    """Write ``docs/evidence/<slug>.json`` and return its path."""
    path = checkout / EVIDENCE_FOLDER / f"{evidence.slug}.json"
    _write(path, json.dumps(evidence.to_dict(), indent=2) + "\n")
    return path


def load_evidence(path: Path) -> Evidence:
    """Read what `save_evidence` wrote.

    Raises:
        ValueError: not such a file.
    """
    try:
        data = json.loads(path.read_text())
        claims = [
            {key: value for key, value in claim.items() if key not in ("margin", "passed")}
            for claim in data["claims"]
        ]
        return Evidence(
            data["slug"],
            tuple(Result(**{**r, "notes": tuple(r["notes"])}) for r in data["results"]),
            tuple(Claim(**claim) for claim in claims),
            data["machine"],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an evidence file: {error!r}") from None


def load_kept(systems: Iterable[System], checkout: Path) -> list[Evidence]:
    """What `save_evidence` wrote of these systems, where it did.

    Raises:
        ValueError: a file is not evidence.
    """
    paths = [checkout / EVIDENCE_FOLDER / f"{system.slug}.json" for system in systems]
    return [load_evidence(path) for path in paths if path.is_file()]


def write_page(checkout: Path) -> Path:
    """Make docs/evidence.md from the evidence that is kept, in the order of the manifest."""
    path = checkout / PAGE
    _write(path, render_page(load_systems(), checkout / EVIDENCE_FOLDER))
    return path


def render_page(systems: Sequence[System], folder: Path) -> str:
    """The page as Markdown; a system without evidence is listed as not measured."""
    parts = [
        "# Evidence",
        "",
        "Generated by `aerogel reproduce --save` from `docs/evidence/*.json`; do not edit. Figures "
        "are means over the seeds named. *Margin* is ours minus the baseline (reversed where lower "
        "is better); a claim passes if its margin reaches the threshold.",
        "",
    ]
    for system in systems:
        path = folder / f"{system.slug}.json"
        parts += _section(system, load_evidence(path) if path.is_file() else None)
    return "\n".join(parts)


def _section(system: System, evidence: Evidence | None) -> list[str]:
    head = [f"## {system.slug}", "", f"[{system.title}]({system.paper_url}) ({system.year}).", ""]
    head += [f"Claim: {system.claim}.", "", f"Command: `aerogel reproduce {system.slug}`", ""]
    if evidence is None:
        return [*head, "Not measured yet.", ""]
    return [*head, *_claims_table(evidence), "", *_metrics_table(evidence), "", *_foot(evidence)]


def _claims_table(evidence: Evidence) -> list[str]:
    rows = ["| compared | ours | baseline | margin | threshold | verdict | paper |"]
    rows += ["| --- | ---: | ---: | ---: | ---: | --- | --- |"]
    for claim in evidence.claims:
        unit = f" ({claim.unit})" if claim.unit else ""
        verdict = "pass" if claim.passed else "**FAIL**"
        rows.append(
            f"| {claim.text}{unit} | {claim.ours:.2f} | {claim.baseline:.2f} | "
            f"{claim.margin:+.2f} | {claim.threshold:+.2f} | {verdict} | {claim.paper or '-'} |"
        )
    return rows


def _metrics_table(evidence: Evidence) -> list[str]:
    seeds = evidence.seeds
    rows = [f"| measured | mean | {' | '.join(f'seed {seed}' for seed in seeds)} |"]
    rows.append("| --- | ---: |" + " ---: |" * len(seeds))
    for metric in evidence.results[0].metrics:
        values = [result.metrics[metric] for result in evidence.results]
        cells = " | ".join(f"{value:.2f}" for value in values)
        rows.append(f"| {metric} | {statistics.fmean(values):.2f} | {cells} |")
    return rows


def _foot(evidence: Evidence) -> list[str]:
    place = evidence.machine
    notes = dict.fromkeys(note for result in evidence.results for note in result.notes)
    lines = [f"- {note}" for note in notes]
    lines.append(
        f"- Measured in {evidence.seconds:.0f} s on "
        f"{place.get('cpu', 'an unknown CPU')}, {place.get('threads', '?')} threads, "
        f"torch {place.get('torch', '?')}."
    )
    return [*lines, ""]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text, mode=0o644)
