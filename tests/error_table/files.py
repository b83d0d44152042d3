"""Mistakes with command lines, paths, annotation files and shards."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.error_table.place import Mistake, without_privileges

ANNOTATIONS = Path("coco/annotations/instances_train.json")
CONVERT = (
    "python -m data_prep convert --images coco/train --annotations a.json --output out --workers 1"
)
TRAIN = "python -m pipeline train demo --output new --data.train shards/train --data.val shards/val"
MANIFEST = Path("shards/val/manifest.json")
SHARD = Path("shards/val/shard-000000.tar")
FULL_NAME = "x" * 300


def text(path: str, content: str | bytes) -> Callable[[], None]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda: void(Path(path).write_bytes(data))


def void(_: Any) -> None:
    """A step of a preparation returns nothing."""


def tree(change: Callable[[Any], Any]) -> Callable[[], None]:
    """a.json: the annotations, changed."""

    def write() -> None:
        content = json.loads(ANNOTATIONS.read_text())
        content = change(content) or content
        Path("a.json").write_text(json.dumps(content))

    return write


def manifest(change: Callable[[Any], Any], path: Path = MANIFEST) -> Callable[[], None]:
    def write() -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write


def coded(code: Callable[[bytes], bytes]) -> Callable[[], None]:
    return lambda: void(Path("a.json").write_bytes(code(ANNOTATIONS.read_bytes())))


def corrupt_images() -> None:
    Path("a.json").write_bytes(ANNOTATIONS.read_bytes())
    for image in Path("coco/train").iterdir():
        image.write_bytes(b"<html>404 Not Found</html>")


def unreadable() -> None:
    Path("a.json").write_bytes(ANNOTATIONS.read_bytes())
    Path("a.json").chmod(0)
    without_privileges()


def locked() -> None:
    Path("a.json").write_bytes(ANNOTATIONS.read_bytes())
    Path("locked").mkdir(mode=0o500)
    without_privileges()


def overwritten(start: int = 0) -> None:
    data = bytearray(SHARD.read_bytes())
    data[start : start + 512] = b"x" * 512
    SHARD.write_bytes(data)


def other_categories() -> None:
    """The val split once more, of whose categories one has another name."""
    from data_prep.convert import convert

    content = json.loads(Path("coco/annotations/instances_val.json").read_text())
    content["categories"][0]["name"] = "zebra"
    Path("b.json").write_text(json.dumps(content))
    convert("coco/val", "b.json", "shards/other")


def no_annotations() -> None:
    from data_prep.convert import convert

    content = json.loads(Path("coco/annotations/instances_val.json").read_text())
    content["annotations"] = []
    Path("b.json").write_text(json.dumps(content))
    convert("coco/val", "b.json", "shards/empty")


def no_pauses() -> None:
    import pipeline.data.cache

    pipeline.data.cache.FIRST_WAIT = 0.001


COMMAND_LINES = [
    Mistake("a command misspelled", "python -m pipeline trian",
            ("unknown command 'trian'", "train"), "Take one of those listed."),
    Mistake("a command of jobs misspelled", "python -m jobs sumbit demo",
            ("unknown command 'sumbit'", "submit"), "Take one of those listed."),
    Mistake("a command of data_prep misspelled", "python -m data_prep convrt",
            ("unknown command 'convrt'", "did you mean convert"), "Take the one proposed."),
    Mistake("a command of cuda_ops misspelled", "python -m cuda_ops bild",
            ("'bild'", "build", "--help"), "Take one of those listed."),
    Mistake("an option misspelled", f"{TRAIN} --optimizer.lrr 1e-4",
            ("--optimizer.lrr", "did you mean --optimizer.lr"), "Take the one proposed."),
    Mistake("an option without its section", f"{TRAIN} --lr 1e-4",
            ("--lr", "did you mean --optimizer.lr?"), "Take the one proposed."),
    Mistake("a value behind a switch", f"{TRAIN} --model.two-stage True",
            ("True", "--model.no-two-stage"), "Leave the value out."),
    Mistake("an option misspelled in data_prep", "python -m data_prep stats shards/val --outptu x",
            ("--outptu", "--output"), "Take the one proposed."),
    Mistake("a word where a number belongs", f"{TRAIN} --optimizer.lr fast",
            ("--optimizer.lr", "fast"), "Give a number, such as 2e-4."),
    Mistake("a number out of its range", f"{TRAIN} --optimizer.lr -1",
            ("optimizer.lr", "got -1", "expected 0 or more"), "Give one in the range."),
    Mistake("an unknown choice", f"{TRAIN} --engine.precision fp8",
            ("--engine.precision", "fp8", "bf16"), "Take one of the choices."),
    Mistake("options that exclude each other",
            "python -m pipeline train deformable_detr_r50 --output new --model.num-levels 2",
            ("num_levels", "got 2", "expected 1, or 3"), "Change one of them."),
    Mistake("a recipe misspelled", "python -m pipeline train dmo --output new",
            ("unknown recipe 'dmo'", "did you mean 'demo'"), "Take the one proposed."),
    Mistake("no recipe", "python -m pipeline train --output new",
            ("expected a recipe first", "demo"), "Put the recipe before the options."),
    Mistake("no data", "python -m pipeline train demo --output new",
            ("--data.train DIR", "--data.val DIR"), "Give both folders."),
    Mistake("a required option left out", "python -m pipeline visualize run",
            ("Missing", "--data"), "Give it."),
    Mistake("a required option of data_prep left out",
            "python -m data_prep convert --images coco/train",
            ("Missing", "--annotations", "--output"), "Give them."),
    Mistake("an unknown device",
            "python -m pipeline visualize run --data shards/val --device gpu --output new",
            ("'gpu'", "auto, cpu or cuda"), "Take one of the three."),
]  # fmt: skip

PATHS = [
    Mistake("a shard folder that is not there", TRAIN.replace("shards/train", "nowhere"),
            ("'nowhere' does not exist", "data_prep convert"), "Check the path, or make it."),
    Mistake("a file in place of a shard folder", TRAIN.replace("shards/train", "run/best.json"),
            ("run/best.json", "is a file", "expected the folder"),
            "Give the folder with manifest.json."),
    Mistake("a folder that holds no shards", TRAIN.replace("shards/train", "coco/train"),
            ("not a shard folder", "no manifest.json", "data_prep convert"), "Convert it first."),
    Mistake("a checkpoint that is not there", "python -m pipeline visualize none --data shards/val",
            ("'none' does not exist",), "Check the path."),
    Mistake("a run folder without a checkpoint",
            "python -m pipeline visualize run --data shards/val --output new",
            ("holds no intact checkpoint",), "Train on, or give another run.",
            lambda: Path("run/checkpoints/step-00000002/manifest.json").unlink()),
    Mistake("an output that is a file", TRAIN.replace("new", "run/best.json"),
            ("run/best.json is a file", "expected a folder"), "Choose a folder.",
            kept=("run",)),
    Mistake("an output folder that holds other things", TRAIN.replace("new", "coco"),
            ("coco holds something else", "choose a new"), "Choose a new or empty folder.",
            kept=("coco/annotations",)),
    Mistake("an annotation file that may not be read", CONVERT,
            ("a.json", "Permission denied"), "chmod, or another user.", unreadable),
    Mistake("an output that may not be written", CONVERT.replace("out ", "locked/out "),
            ("locked", "Permission denied", "permissions"), "chmod, or another place.", locked),
    Mistake("a full disk", "python -m pipeline describe demo --output full.md",
            ("No space left", "free some"), "Free some, or use another disk.",
            lambda: os.symlink("/dev/full", "full.md")),
    Mistake("a name that is too long", CONVERT.replace("--output out", f"--output {FULL_NAME}"),
            ("File name too long", "shorter"), "Choose a shorter name.", tree(lambda c: None)),
    Mistake("a name with a line break", CONVERT.replace("a.json", "'a\nb.json'"),
            ("cannot read annotation file", "No such file"), "Quote the names of files."),
    Mistake("an output below a file", CONVERT.replace("out ", "a.json/out "),
            ("Not a directory", "another place"), "Choose another place.", tree(lambda c: None)),
    Mistake("an image folder that is not there", CONVERT.replace("coco/train", "coco/trian"),
            ("image folder coco/trian does not exist",), "Check the path.", tree(lambda c: None)),
    Mistake("the image folder of another split", CONVERT.replace("coco/train", "coco/annotations"),
            ("none of the 24 images", "is --images the right folder?"),
            "Give the folder that the file names start from.", tree(lambda c: None)),
    Mistake("a folder of images that are all in subfolders",
            "python -m pipeline predict run coco --output new",
            ("folder 'coco': got no image", "--recursive takes the 32"), "Do as it says."),
    Mistake("figures into a file",
            "python -m pipeline visualize run --data shards/val --output run/best.json",
            ("got the file run/best.json", "expected a folder"), "Choose a folder.",
            kept=("run",)),
    Mistake("a table into a file of another kind",
            "python -m pipeline describe demo --output costs.xls",
            ("costs.xls", ".md", ".json"), "End it in .md or .json."),
]  # fmt: skip

JSON = [
    Mistake("an annotation file that is not there", CONVERT,
            ("a.json", "No such file"), "Check the path."),
    Mistake("an empty file", CONVERT, ("a.json is not valid JSON", "char 0"),
            "Download or export it again.", text("a.json", "")),
    Mistake("a file cut short", CONVERT, ("a.json is not valid JSON", "line 1"),
            "Download or export it again.", coded(lambda b: b[:5000])),
    Mistake("a page of a web server", CONVERT, ("a.json is not valid JSON",),
            "Download it again.", text("a.json", "<html>")),
    Mistake("a result file (a list) for annotations", CONVERT,
            ("not in COCO format", "the top level must be an object"),
            "Give the file with images, annotations and categories.", text("a.json", "[]")),
    Mistake("no categories in it", CONVERT, ("not in COCO format", "no categories"),
            "Add the list of categories.", tree(lambda c: void(c.pop("categories")))),
    Mistake("images that are no list", CONVERT, ("images must be a list",),
            "Make it a list of objects.", tree(lambda c: c | {"images": {}})),
    Mistake("no images in it", CONVERT, ("lists no images",),
            "Was it exported whole?", tree(lambda c: c | {"images": []})),
    Mistake("an image id in quotes", CONVERT, ("integer id", '"id": "1"'),
            "Make ids numbers.", tree(lambda c: c["images"][0].update(id="1"))),
    Mistake("an image without file name", CONVERT, ("need a file_name",),
            "Give each image its file_name.",
            tree(lambda c: void(c["images"][0].pop("file_name")))),
    Mistake("an id beyond 64 bits", CONVERT, ("below 2^63",),
            "Number the images anew.", tree(lambda c: c["images"][0].update(id=2**70))),
    Mistake("a number of thousands of digits", CONVERT, ("not in COCO format", "digits"),
            "Find it and mend it.",
            coded(lambda b: b.replace(b'"id": 1', b'"id": ' + b"1" * 5000, 1))),
    Mistake("two categories with one id", CONVERT, ("two categories with id",),
            "Number them anew.",
            tree(lambda c: c["categories"][1].update(id=c["categories"][0]["id"]))),
    Mistake("lists in lists without end", CONVERT, ("nested too deeply",),
            "Was it written by a program with a bug?",
            text("a.json", '{"images": ' + "[" * 100_000)),
    Mistake("a gzipped file", CONVERT, ("a.json is not JSON", "gzipped", "gunzip"),
            "gunzip it.", coded(gzip.compress)),
    Mistake("a file in UTF-16", CONVERT, ("a.json is not JSON", "UTF-16", "iconv"),
            "iconv -f utf-16 -t utf-8", coded(lambda b: b.decode().encode("utf-16"))),
    Mistake("an annotation of an unknown category, with --strict", f"{CONVERT} --strict",
            ("--strict", "unknown category", "not in categories"),
            "Mend it, or leave --strict out.",
            tree(lambda c: c["annotations"][0].update(category_id=77))),
    Mistake("a box of NaN, with --strict", f"{CONVERT} --strict",
            ("--strict", "non-finite number", "nan"), "Mend it, or leave --strict out.",
            tree(lambda c: c["annotations"][0].update(bbox=[float("nan"), 0, 5, 5]))),
    Mistake("two annotations with one id, with --strict", f"{CONVERT} --strict",
            ("--strict", "duplicate annotation id"), "Mend it, or leave --strict out.",
            tree(lambda c: c["annotations"][1].update(id=c["annotations"][0]["id"]))),
    Mistake("images none of which can be read", CONVERT,
            ("none of the 24 images", "is usable"), "Download the images again.", corrupt_images),
    Mistake("an output with shards of other data", CONVERT.replace("out ", "shards/val "),
            ("shards/val", "other"), "Choose another --output.", tree(lambda c: None),
            kept=("shards/val",)),
]  # fmt: skip

TRAIN_DATA = TRAIN.replace("new", "run2")
VISUALIZE = "python -m pipeline visualize run --data shards/val --output new"
SHARDS = [
    Mistake("a manifest cut short", TRAIN, ("manifest.json", "not a shard manifest", "convert"),
            "Copy the folder again.",
            lambda: void(MANIFEST.write_bytes(MANIFEST.read_bytes()[:300]))),
    Mistake("a manifest of a newer version", TRAIN, ("got format", "99", "expected"),
            "Update the checkout, or convert anew.", manifest(lambda m: m.update(version=99))),
    Mistake("a manifest that was edited", TRAIN, ("is damaged", "no sample at bytes"),
            "Copy the folder again.",
            manifest(lambda m: m["samples"]["offset"].__setitem__(0, -512))),
    Mistake("a manifest whose shards lie elsewhere", TRAIN,
            ("../../etc/passwd", "expected a file name"), "Do not use it.",
            manifest(lambda m: m["shards"][0].update(name="../../etc/passwd"))),
    Mistake("a shard that is missing", TRAIN, ("shard-000000.tar", "no such file", "copy it again"),
            "Copy it again.", SHARD.unlink),
    Mistake("a shard copied in part", TRAIN, ("shard-000000.tar", "bytes as its manifest says"),
            "Copy it again.", lambda: os.truncate(SHARD, 5000)),
    Mistake("a shard whose bytes changed", VISUALIZE,
            ("no sample at byte", "copy it again or convert"), "Copy it again.", overwritten),
    Mistake("the same, found by verify", "python -m data_prep verify shards/val --workers 1",
            ("shards/val is damaged", "SHA-256"), "Copy it again.", overwritten),
    Mistake("a picture in a shard whose bytes changed", VISUALIZE,
            ("image 9000", "cannot be decoded", "expected a whole file"), "Copy the shard again.",
            lambda: overwritten(514)),
    Mistake("train and val with different categories", TRAIN.replace("shards/val", "shards/other"),
            ("different categories", "same list"), "Convert both with one list.", other_categories),
    Mistake("data without a single annotation", TRAIN.replace("shards/val", "shards/empty"),
            ("without a single annotation", "the right annotation file"),
            "Convert with the annotations of the split.", no_annotations),
    Mistake("fewer images than a batch", f"{TRAIN} --optimizer.batch-size 64",
            ("24 images", "fewer than one global batch of 64", "--optimizer.batch-size"),
            "Lower the batch size."),
    Mistake("a password in a URL of data",
            TRAIN.replace("shards/train", "https://me:secret@host/train"),
            ("https://***@host/train", "got a user or password", "AWS_ACCESS_KEY_ID"),
            "Give it to the store's driver."),
    Mistake("a file:// URL with the name of a machine",
            TRAIN.replace("shards/train", "file://server/train"),
            ("file://server/train", "got host 'server'", "expected none", "file:///PATH"),
            "Mount it, and give its path here."),
    Mistake("a URL without its driver", TRAIN.replace("shards/train", "s3://bucket/train"),
            ("s3://bucket/train", "s3fs"), "pip install s3fs (gs://: gcsfs).", no_pauses),
    Mistake("a URL where nobody answers", TRAIN.replace("shards/train", "http://127.0.0.1:9/train"),
            ("http://127.0.0.1:9/train", "cannot be read", "check the URL and the network"),
            "Check the URL and the network.", no_pauses),
    Mistake("an export over a file that exists",
            "python -m data_prep export shards/val --output run/best.json",
            ("run/best.json", "exist"), "Choose another name.", kept=("run",)),
    Mistake("statistics of what is no shard folder", "python -m data_prep stats coco",
            ("coco is not a folder of shards", "run convert"), "Convert first."),
]  # fmt: skip
