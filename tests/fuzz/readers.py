"""What reads files that others made: for each reader, valid files and how a damaged one is read.

A reader returns where it accepts a file and raises ValueError or OSError where it does not.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from data_prep.checks import decode_image as decode_in_data_prep
from data_prep.checks import read_image_header
from data_prep.coco import read_coco
from data_prep.convert import convert
from data_prep.manifest import read_manifest
from data_prep.shards import encode_member, read_sample
from data_prep.synthesize import synthesize
from data_prep.verify import verify
from jobs.grid_file import find_grid
from model.detr import build_model
from model.weights import load_official, read_state_dict
from pipeline.checkpoint_store import Progress, check, load_model, load_progress, write
from pipeline.config import RunConfig
from pipeline.data.augment import for_evaluation, transform
from pipeline.data.batch import collate, decode
from pipeline.data.images import decode_image
from pipeline.data.labels import build_labels
from pipeline.data.shards import ShardSet, _parse
from pipeline.errors import UserError
from pipeline.initialise import read_weights
from pipeline.recipes import recipe
from tests.fuzz.mutate import (
    bombs,
    changed_tree,
    damaged,
    json_file,
    rezipped,
    same_size,
)

Made = bytes | dict[str, Any]  # a file's bytes; the tensors of a checkpoint


@dataclass(frozen=True)
class Reader:
    """`make(random)` draws an input, `read(input)` reads it; `share` of all inputs are for it."""

    name: str
    share: float
    make: Callable[[Random], Any]
    read: Callable[[Any], None]


def readers(folder: Path, marker: Path) -> list[Reader]:
    """All of them; valid files, and those that are read, are made below `folder`. Bombs among the
    inputs make `marker` where what they hold is executed."""
    valid = folder / "valid"
    synthesize(valid / "coco", 6, 3, 0, 1)
    annotations = valid / "coco" / "annotations" / "instances_train.json"
    convert(valid / "coco" / "train", annotations, valid / "shards")
    return [
        *of_annotations(folder, annotations, valid / "coco" / "train"),
        *of_shards(folder, valid / "shards"),
        *of_checkpoints(folder, marker),
        *of_configs(folder),
        *of_images(),
    ]


def of_annotations(folder: Path, annotations: Path, images: Path) -> list[Reader]:
    tree, file, out = json.loads(annotations.read_text()), folder / "a.json", folder / "converted"
    others = [json.dumps(part).encode() for part in (tree["images"], tree["categories"], [], {})]

    def read(data: bytes) -> None:
        file.write_bytes(data)
        coco = read_coco(file)
        for i in range(len(coco.images)):
            coco.annotation_count(i), coco.is_suspect(i), coco.sample_json(i)
        coco.sample_lengths()

    def whole(data: bytes) -> None:
        file.write_bytes(data)
        shutil.rmtree(out, ignore_errors=True)
        convert(images, file, out)
        verify(out)
        read_all(ShardSet(out))

    def make(random: Random) -> bytes:
        return json_file(random, tree, others)

    return [Reader("annotations", 0.20, make, read), Reader("convert", 0.02, make, whole)]


def of_shards(folder: Path, shards: Path) -> list[Reader]:
    names = [path.name for path in shards.glob("*.tar")]
    tars = {name: (shards / name).read_bytes() for name in names}
    manifest = json.loads((shards / "manifest.json").read_bytes())
    opened = ShardSet(shards)
    pieces = [
        tars[names[0]][start : start + length]
        for start, length in zip(opened.offset.tolist(), opened.length.tolist(), strict=True)
    ]
    sample = opened.read(0)
    record = {"image": sample.image, "annotations": sample.annotations}
    work = folder / "shards"
    shutil.copytree(shards, work)

    def read_with_manifest(data: bytes) -> None:
        (work / "manifest.json").write_bytes(data)
        (work / names[0]).write_bytes(tars[names[0]])
        both(lambda: read_manifest(work), by_user_errors(lambda: read_all(ShardSet(work))))

    def read_with_tar(data: bytes) -> None:
        (work / "manifest.json").write_text(json.dumps(manifest))
        (work / names[0]).write_bytes(data)
        both(lambda: verify(work, decode=True), by_user_errors(lambda: read_all(ShardSet(work))))

    def read_piece(data: bytes) -> None:
        both(lambda: read_sample(data), lambda: _parse(data, 128, 96))

    def read_record(data: bytes) -> None:
        piece = encode_member("000000000001.jpg", sample.image_bytes)
        piece += encode_member("000000000001.json", data)
        size = opened.size[0].tolist()
        both(lambda: read_sample(piece), lambda: train_on(_parse(piece, *size), opened, 0))

    def tar_piece(random: Random) -> bytes:
        if random.random() < 0.2:
            return odd_member(random, pieces[0])
        return damaged(random, random.choice(pieces), pieces)

    return [
        Reader("manifest", 0.12, lambda r: json_file(r, manifest, [b"[]"]), read_with_manifest),
        Reader("shard", 0.06, lambda r: same_size(r, tars[names[0]], pieces), read_with_tar),
        Reader("sample of a shard", 0.10, tar_piece, read_piece),
        Reader("record of a sample", 0.06, lambda r: json_file(r, record, [b"{}"]), read_record),
    ]


def odd_member(random: Random, piece: bytes) -> bytes:
    """A header that says what no shard says: a link, a device, a size below 0, a sparse map."""
    info = tarfile.TarInfo.frombuf(piece[:512], "utf-8", "replace")
    info.type = random.choice(
        (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
         tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.XGLTYPE,
         tarfile.SOLARIS_XHDTYPE, b"Z")
    )  # fmt: skip
    info.linkname = "/etc/passwd"
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if random.random() < 0.5:  # a size in base 256, which can be below 0
        header[124:136] = random.choice((b"\xff" * 12, b"\xff" * 10 + b"\xfe\x00", b"\x80" * 12))
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + piece[512:]


def read_all(shards: ShardSet) -> None:
    for i in range(len(shards)):
        train_on(shards.read(i), shards, i)


def train_on(sample: Any, shards: ShardSet, index: int) -> None:
    """As the loader does."""
    labels = build_labels(shards.categories, "contiguous")
    size = tuple(shards.size[index].tolist())[::-1]
    geometry = for_evaluation(size, recipe("demo").augment)
    example = transform(decode(sample, labels.column_of(), geometry), geometry)
    collate([example], [sample.image])


def by_user_errors(read: Callable[[], Any]) -> Callable[[], Any]:
    """For what must say `UserError`, because in pipeline and jobs any other ValueError is a bug."""

    def checked() -> None:
        try:
            read()
        except ValueError as error:
            if not isinstance(error, UserError):
                raise RuntimeError(f"{type(error).__name__}, no UserError: {error}") from error
            raise

    return checked


def both(*reads: Callable[[], Any]) -> None:
    """Has every one read; the first refusal is raised when all have."""
    refusals = []
    for read in reads:
        try:
            read()
        except (ValueError, OSError) as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def of_checkpoints(folder: Path, marker: Path) -> list[Reader]:
    config = recipe("demo")
    model = {
        "model": {"heads.classes.weight": torch.rand(4, 8), "neck.bias": torch.rand(8)},
        "config": config.to_json(),
        "labels": {"category_of": (1, 2, 3, 4), "names": ("a", "b", "c", "d")},
        "progress": asdict(Progress(5, 1)),
    }
    run = folder / "run"
    path = write(run, Progress(5, 1, 0, 0.5, 5), model, {"moments": torch.zeros(4)})
    (run / "best.json").write_text('{"checkpoint": "step-00000005"}')
    whole, file = (path / "model.pt").read_bytes(), folder / "model.pt"
    old = io.BytesIO()
    torch.save({"model": {"a": torch.ones(3)}}, old, _use_new_zipfile_serialization=False)
    pickles = bombs(marker)

    def make(random: Random) -> bytes:
        kind = random.randrange(6)
        if kind == 0:
            return random.choice(pickles)
        if kind == 1:
            bomb = random.choice(pickles)
            return rezipped(whole, lambda n, content: bomb if n.endswith("data.pkl") else content)
        if kind == 2:  # damage that no sum finds
            chosen = random.randrange(12)
            names = iter(range(10_000))
            return rezipped(
                whole,
                lambda n, content: (
                    damaged(random, content, pickles)
                    if n.endswith("data.pkl") or next(names) == chosen
                    else content
                ),
            )
        if kind == 3:
            return damaged(random, old.getvalue(), pickles)
        if kind == 4:
            odd = changed_tree(random, {k: v for k, v in model.items() if k != "model"})
            if isinstance(odd, dict):
                odd.setdefault("model", {"a": torch.ones(2)})
            target = io.BytesIO()
            torch.save(odd, target)
            return target.getvalue()
        return damaged(random, whole, pickles)

    def read(data: bytes) -> None:
        file.write_bytes(data)
        both(
            lambda: RunConfig.from_json(load_model(file)["config"]),
            by_user_errors(lambda: read_weights(file)),
            by_user_errors(lambda: load_model(file)),
            lambda: read_state_dict(file),
        )

    kept = {name: (run / name).read_bytes() for name in ("best.json",)}
    kept |= {
        f"checkpoints/step-00000005/{name}": (path / name).read_bytes()
        for name in ("progress.json", "manifest.json")
    }

    def beside(random: Random) -> tuple[str, bytes]:
        name = random.choice(sorted(kept))
        return name, json_file(random, json.loads(kept[name]), [b"{}"])

    def read_run(made: tuple[str, bytes]) -> None:
        (run / made[0]).write_bytes(made[1])
        try:
            both(
                by_user_errors(lambda: load_model(run)),
                by_user_errors(lambda: load_progress(path)),
                lambda: check(path),
            )
        finally:
            (run / made[0]).write_bytes(kept[made[0]])

    return [
        Reader("checkpoint", 0.12, make, read),
        Reader("files beside a checkpoint", 0.06, beside, read_run),
        of_published(),
    ]


def of_published() -> Reader:
    """A state dict in the published names, each of whose entries may be of another kind."""
    config = replace(
        recipe("deformable_detr_r50").model, encoder_layers=1, decoder_layers=1, hidden_dim=32,
        num_heads=2, feedforward_dim=32, num_queries=3,
    )  # fmt: skip
    model = build_model(config)
    state = {
        # Published attentions have query, key and value in one.
        name: torch.zeros(96, *value.shape[1:]) if "in_proj_" in name else value
        for key, value in model.state_dict().items()
        for name in model.official_names(key)
    }
    names = sorted(state)

    def make(random: Random) -> dict[str, Any]:
        changed = dict(state)
        for _ in range(random.randint(1, 3)):
            name = random.choice(names)
            changed.pop(name, None)
            kind = random.randrange(5)
            if kind == 1:
                changed[random.choice(("", name + "x", "\n", "model"))] = torch.zeros(1)
            elif kind == 2:
                changed[name] = torch.zeros(random.choice(((), (0,), (1,), (2, 3, 4))))
            elif kind == 3:
                changed[name] = state[name].to(random.choice((torch.int64, torch.complex64)))
            elif kind == 4:
                changed[name] = state[random.choice(names)]
        return changed

    return Reader("published weights", 0.01, make, lambda state: load_official(model, state))


def of_configs(folder: Path) -> list[Reader]:
    trees = [json.loads(recipe(name).to_json()) for name in ("demo", "detr_r50")]
    grid = folder / "grid.yaml"
    text = (
        b"name: own\nbaseline: demo\nset: {schedule.epochs: 2}\naxes:\n  model.num_points: [1, 4]\n"
        b"  optimizer.lr: [1e-3, 2e-3]\ncells:\n  wide: {model.hidden_dim: 128}\n"
        b"  other: {recipe: detr_r50_demo, augment.short_sides: [64, 96], tta: false}\n"
    )
    odd = [
        b"!!python/object/apply:os.system [id]", b"&a [*a]", b"2024-99-99", b"? [1]\n: 2\n",
        b"[" * 3000, b"<<: *a", b"1e999", b".nan", b"0x" + b"f" * 4000, b"1:" * 500, b"!!set {a}",
        b"&a {x: 1}\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: [*c, *c, *c]",
        b"".join(b"l%d: &l%d [%s]\n" % (i, i, b", ".join([b"*l%d" % (i - 1)] * 9 if i else [b"1"]))
                 for i in range(12)),
        b"!!binary x", b"\t", b"---\n---\n", b"%YAML 9.9\n", b"!!timestamp x", b"!!int x",
    ]  # fmt: skip

    tree = yaml.safe_load(text)

    def grid_text(random: Random) -> bytes:
        if random.random() < 0.4:  # JSON is YAML, too
            return json_file(random, tree, odd)
        lines = text.splitlines(keepends=True)
        if random.random() < 0.5:
            at = random.randrange(len(lines))
            key = lines[at].split(b":")[0]
            lines[at] = random.choice((key + b": ", b"", lines[at])) + random.choice(odd) + b"\n"
            return b"".join(lines)
        return damaged(random, text, odd)

    def read_grid(data: bytes) -> None:
        grid.write_bytes(data)
        by_user_errors(lambda: find_grid(str(grid)))()

    return [
        Reader(
            "config",
            0.10,
            lambda random: json_file(random, random.choice(trees), [b"{}"]),
            lambda data: void(RunConfig.from_json(data.decode("utf-8", "replace"))),
        ),
        Reader("grid", 0.03, grid_text, read_grid),
    ]


def void(value: Any) -> None:
    """The value is of no interest, only whether there is one."""


def of_images() -> list[Reader]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    files = [encoded(pixels, kind, mode) for kind, mode in (
        ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"),
        ("PNG", "I;16"), ("PNG", "LA"), ("WEBP", "RGB"), ("BMP", "RGB"), ("TIFF", "RGB"),
        ("GIF", "P"),
    )]  # fmt: skip

    def make(random: Random) -> bytes:
        return damaged(random, random.choice(files), files)

    def judge(data: bytes) -> None:
        both(lambda: void(read_image_header(data)), lambda: decode_in_data_prep(data))

    return [
        Reader("image, judged by data_prep", 0.07, make, judge),
        Reader("image, decoded for training", 0.07, make, lambda data: void(decode_image(data))),
    ]


def encoded(pixels: np.ndarray, kind: str, mode: str) -> bytes:
    target = io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    image.save(target, kind)
    return target.getvalue()
