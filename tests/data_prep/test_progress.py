"""What a command shows while it works: bars before a terminal, and nothing to a file."""

import re

import pytest

from data_prep.convert import convert


def bars(shown):
    """(title, images done, images in all) of every state of a bar."""
    found = re.findall(r"(\w+): +\d+%\|[^|]*\| (\d+)/(\d+) \[[^]]*image", shown)
    return [(title, int(done), int(total)) for title, done, total in found]


@pytest.mark.parametrize("workers", [1, 2])
def test_convert_says_what_it_reads_and_how_far_it_is(small, terminal, command, workers):
    small(5)
    words = [
        *("convert", "--images", small.images, "--annotations", small.annotations),
        *("--samples-per-shard", 2, "--workers", workers),
    ]
    shown = terminal(*words, "--output", small.output)
    states = bars(shown)
    assert states[0] == ("convert", 0, 5)
    assert states[-1] == ("convert", 5, 5)
    reading = shown.index(f"reading the annotation file {small.annotations}")
    looking = shown.index(f"looking for 5 images in {small.images}")
    assert reading < looking < shown.index("convert:")
    assert command(*words, "--output", small.output.with_name("again")).stderr == ""


@pytest.mark.parametrize("name", ["export", "verify", "stats"])
def test_readers_of_shards_show_how_far_they_are(small, terminal, command, name):
    small(5)
    convert(*small.arguments, samples_per_shard=2)
    words = [name, small.output]
    if name == "export":
        words += ["--output", small.output.with_name("out.json")]
    states = bars(terminal(*words))
    assert states[0] == (name, 0, 5)
    assert states[-1] == (name, 5, 5)
    small.output.with_name("out.json").unlink(missing_ok=True)
    assert command(*words).stderr == ""
