"""One file for each command of `python -m pipeline`: its options, and what it runs."""
