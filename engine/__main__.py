"""`python -m etude`: the same as the `etude` command; what launchers start on every rank."""

from etude.cli import main

if __name__ == "__main__":
    main()
