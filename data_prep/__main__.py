"""Command line: python -m data_prep synthesize|convert|export|split|verify|stats --help."""

# Worker processes import this file again, under another name, and need nothing of it.
if __name__ == "__main__":
    import sys

    from data_prep.cli import main

    sys.exit(main(sys.argv[1:]))
