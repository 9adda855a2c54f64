"""The command line. `aerogel --help` must answer at once, so nothing here imports torch."""

from __future__ import annotations


def main() -> None:
    """Run the `aerogel` command."""
    try:
        from aerogel.cli.app import app
    except KeyboardInterrupt:  # before any command could answer
        raise SystemExit(130) from None

    app(prog_name="aerogel")
