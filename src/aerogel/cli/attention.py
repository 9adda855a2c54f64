"""`aerogel attention`: sparse attention in a language model, calibrated and evaluated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from aerogel.cli import terminal

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

_MODEL = typer.Argument(help="smollm2, the folder of a transformers model, or its hub name.")
_DATA = typer.Option(help="brown, python, or a UTF-8 file.")
_OPTION = typer.Option("--option", help="Option of the method, as NAME=VALUE; may be repeated.")


@app.command()
def calibrate(
    model: Annotated[str, _MODEL],
    method: Annotated[str, typer.Option(help="A selector's name.")],
    out: Annotated[Path, typer.Option(help="The selector file to write.")],
    data: Annotated[str, _DATA] = "brown",
    windows: Annotated[int, typer.Option(min=1, help="Pieces of text.")] = 8,
    length: Annotated[str, typer.Option(help="Tokens of a piece, such as 2k.")] = "1k",
    option: Annotated[list[str] | None, _OPTION] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Let a method measure or learn on text what it needs for one model, and keep it in a file.

    `aerogel attention evaluate MODEL --methods FILE` and `aerogel.attention.attach(model, FILE)`
    use it.

    Example: `aerogel attention calibrate smollm2 --method minference --out patterns.safetensors`
    """
    with terminal.guarded("Nothing was written."):
        from aerogel.attention import save_selector
        from aerogel.attention.calibration import calibrate as run
        from aerogel.insight.attention_methods import parse_options

        size = _lengths("length", length)[0]
        options = parse_options(option or [])
        if not out.parent.is_dir():
            raise ValueError(f"out = {str(out)!r}: there is no folder {str(out.parent)!r}")
        _register_calibrations()
        console = terminal.Terminal()
        subject, ids = _opened(console, model, data, windows * size, threads)
        pieces = ids[: windows * size].view(windows, size)
        with console.task(f"calibrating {method}", "steps") as task:
            selector = run(subject.model, method, pieces, on_progress=task.update, **options)
        save_selector(selector, subject.model, out)
        if as_json:
            terminal.print_json({"path": str(out), "slug": selector.slug, "bytes": _size(out)})
            return
        terminal.stdout().print(f"{method} for {model}: {out} ({_size(out):,} bytes)")


@app.command()
def evaluate(
    model: Annotated[str, _MODEL],
    methods: Annotated[
        str,
        typer.Option(help="dense, selectors (NAME or NAME:OPTION=VALUE) or files, with commas."),
    ] = "dense,minference",
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt, with commas.")] = "1k,4k",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/attention"),
    data: Annotated[str, _DATA] = "brown",
    sequences: Annotated[int, typer.Option(min=0, help="Of text scored, 0 for none.")] = 4,
    probes: Annotated[int, typer.Option(min=0, help="Of each kind, 0 for none.")] = 5,
    rounds: Annotated[int, typer.Option(min=0, help="Of timing, 0 for none.")] = 3,
    seed: Annotated[int, typer.Option(help="Of texts and probes.")] = 0,
    chunk: Annotated[
        str | None, typer.Option(help="Tokens of a timed prompt at a time, such as 8k.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Compare ways to attend: quality, retrieval, time, memory and density over lengths.

    Writes `attention.md`, `attention.html` (plots) and `rows.json`. A run that was stopped goes on
    when the command is repeated; with more methods or lengths it does what is new.

    Examples:

    - `aerogel attention evaluate smollm2 --methods dense,minference --lengths 1k,4k`
    - `aerogel attention evaluate smollm2 --methods minference --lengths 128k --chunk 8k --sequences
      0 --probes 0 --rounds 1` : a long prompt alone, in pieces
    """
    with terminal.guarded("The same command goes on from here."):
        from aerogel.atomic import write_atomic
        from aerogel.insight import attention_page, attention_study
        from aerogel.insight.attention_methods import Method

        study = attention_study.Study(
            tuple(Method.parse(name) for name in terminal.listed([methods])),
            tuple(_lengths("lengths", lengths)),
            sequences,
            probes,
            rounds,
            seed,
            None if chunk is None else _lengths("chunk", chunk)[0],
        )
        console = terminal.Terminal()
        longest = max(study.lengths)
        subject, ids = _opened(console, model, data, _TEXTS * longest, threads, enough=longest + 1)
        with console.task("attention", "parts") as task:
            rows = attention_study.run(study, subject, ids, out, on_job=task.update)
        title = f"Attention of {model} on {data}"
        table = attention_page.markdown(rows, title)
        write_atomic(out / "attention.md", table)
        write_atomic(out / "attention.html", attention_page.page(rows, title))
        if as_json:
            typer.echo((out / "rows.json").read_text())
            return
        from rich.markdown import Markdown

        terminal.stdout().print(Markdown(table))
        console.say(f"plots: {out / 'attention.html'}")


_TEXTS = 4  # times the longest prompt is text to draw from, if there is so much


def _opened(
    console: terminal.Terminal,
    model: str,
    data: str,
    tokens: int,
    threads: int | None,
    *,
    enough: int | None = None,
) -> tuple[Any, Any]:
    """The model, and so many tokens of text (or `enough`, if there are no more)."""
    import torch

    from aerogel.insight.language_source import (
        encode_at_least,
        load_text,
        open_language_model,
    )

    if threads is not None:
        torch.set_num_threads(threads)
    with console.task("loading", "bytes") as task:

        def arrived(what: str, done: int, total: int) -> None:
            task.update(done, total, what)

        text = load_text(data, on_progress=arrived)
        subject = open_language_model(model, on_progress=arrived)
    ids = encode_at_least(subject.encode, text, tokens, enough=enough)
    return subject, ids[:tokens]


def _register_calibrations() -> None:
    """Import the rooms whose methods register a calibration."""
    import importlib
    import importlib.util

    for room in ("attention", "finetune", "search"):
        if importlib.util.find_spec(f"aerogel.{room}") is not None:
            importlib.import_module(f"aerogel.{room}")


def _lengths(flag: str, text: str) -> list[int]:
    found = []
    for part in terminal.listed([text]):
        match = re.fullmatch(r"(\d+)(k?)", part.lower())
        if match is None or int(match[1]) < 1:
            raise ValueError(f"{flag} = {text!r}: expected numbers of tokens, such as 512,4k")
        found.append(int(match[1]) * (1024 if match[2] else 1))
    if not found:
        raise ValueError(f"{flag} = {text!r}: expected at least one number of tokens")
    return found


def _size(path: Path) -> int:
    return path.stat().st_size
