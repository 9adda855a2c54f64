"""`python -m aerogel` is the `aerogel` command."""

from aerogel.cli import main

if __name__ == "__main__":
    main()
