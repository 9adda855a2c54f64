"""The command line. `aerogel --help` must answer at once, so nothing here imports torch."""

from __future__ import annotations


def main() -> None:
    """Run the `aerogel` command."""
    from aerogel.cli.app import app

    app(prog_name="aerogel")
