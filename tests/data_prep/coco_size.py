"""How long does a conversion of COCO's size take beside `tar`, and in how much memory?

    python tests/data_prep/coco_size.py FOLDER                  # the size of train2017
    python tests/data_prep/coco_size.py FOLDER --images 15000 --own-files

draws a few photograph-like JPEGs, links them under the names of as many images as asked for (or,
with --own-files, copies them), writes an annotation file of COCO's density into FOLDER, and then
runs `tar` and `data_prep convert` in turn. Every product is removed after its round; FOLDER keeps
the input, so that a second run starts at once. Links share their data: a reader finds it in the
page cache, whichever program it is. With --cold the input is put out of that cache before each
run, as that of a new data set is, which with 19 GB seldom fits.

Ends with status 1 where convert takes more memory or time than --most-gib and --most-ratio allow,
or where its result depends on the number of workers, for which a last conversion has one more.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

IMAGES, ANNOTATIONS = 118_287, 860_001  # train2017
PICTURES = 64  # different JPEGs
SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))
CATEGORIES = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
# The two annotations of train2017 whose boxes have no height, as they are (also quoted in
# github.com/cocodataset/cocoapi/issues/355 and github.com/visionml/pytracking/issues/18).
FAULTY = (
    {
        "segmentation": [[296.65, 388.33, 296.65, 388.33, 297.68, 388.33, 297.68, 388.33]],
        "area": 0.0,
        "iscrowd": 0,
        "image_id": 200365,
        "bbox": [296.65, 388.33, 1.03, 0.0],
        "category_id": 58,
        "id": 918,
    },
    {
        "segmentation": [[9.98, 188.56, 15.52, 188.56, 15.52, 188.56, 11.09, 188.56]],
        "area": 0.0,
        "iscrowd": 0,
        "image_id": 550395,
        "bbox": [9.98, 188.56, 5.54, 0.0],
        "category_id": 1,
        "id": 2206849,
    },
)


def pictures(kilobytes: int) -> list[tuple[bytes, int, int]]:
    """(JPEG, width, height): soft shapes with grain, of about `kilobytes` KiB each."""
    made = []
    for i in range(PICTURES):
        rng = np.random.default_rng(i)
        width, height = SIZES[i % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
        grain = rng.normal(0, 14, (height, width, 1))
        picture = Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8))
        encoded = (encode(picture, quality) for quality in range(98, 20, -4))
        made.append((next(e for e in encoded if len(e) < kilobytes * 1024), width, height))
    return made


def encode(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def generate(folder: Path, count: int, kilobytes: int, own_files: bool) -> None:
    """Write `folder/images/*.jpg` and `folder/instances.json`; equal arguments, equal files."""
    folder.mkdir(parents=True)
    (folder / "images").mkdir()
    (folder / "pool").mkdir()
    pool = pictures(kilobytes)
    for i, (data, _, _) in enumerate(pool):
        (folder / "pool" / f"{i}.jpg").write_bytes(data)
    rng = np.random.default_rng(0)
    images = []
    ids = sorted({200365, 550395, *range(1, 6 * count, 5)})[-count:]
    for number in ids:
        chosen = number % PICTURES
        data, width, height = pool[chosen]
        name = f"{number:012d}.jpg"
        if own_files:
            (folder / "images" / name).write_bytes(data)
        else:
            os.link(folder / "pool" / f"{chosen}.jpg", folder / "images" / name)
        images.append(
            {
                "license": 3,
                "file_name": name,
                "coco_url": f"http://images.cocodataset.org/train2017/{name}",
                "height": height,
                "width": width,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": f"http://farm9.staticflickr.com/8186/{number}_153b3b1f6c_z.jpg",
                "id": number,
            }
        )
    with (folder / "instances.json").open("w") as file:
        info = {"description": "random polygons at COCO's size", "version": "1.0", "year": 2017}
        licences = [{"url": "http://example.org", "id": 3, "name": "none"}]
        file.write(f'{{"info": {json.dumps(info)}, "licenses": {json.dumps(licences)}, ')
        file.write(f'"images": {json.dumps(images)}, "annotations": [')
        file.write(",".join(json.dumps(row) for row in FAULTY if row["image_id"] in ids))
        for number in range(1, count * ANNOTATIONS // IMAGES + 1 - len(FAULTY)):
            row = annotation(rng, images[int(rng.integers(count))], 3_000_000 + number)
            file.write(f", {json.dumps(row)}")
        categories = [{"supercategory": "thing", "id": i, "name": f"c{i}"} for i in CATEGORIES]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def annotation(rng: np.random.Generator, image: dict, number: int) -> dict:
    """A star-shaped polygon with as many corners as COCO's have: about 25 on average."""
    width, height = image["width"], image["height"]
    corners = 4 + int(rng.exponential(21))
    radius = np.minimum(rng.exponential(0.12, 2) + 0.01, 0.45) * (width, height)
    centre = radius + rng.random(2) * ((width, height) - 2 * radius)
    angle = np.sort(rng.random(corners)) * 2 * np.pi
    circle = np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(0.6, 1, (corners, 1))
    points = np.round(centre + radius * circle, 2)
    (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
    return {
        "segmentation": [points.ravel().tolist()],
        "area": round(float(np.prod(radius)) * 2, 4),
        "iscrowd": 0,
        "image_id": image["id"],
        "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
        "category_id": int(rng.choice(CATEGORIES)),
        "id": number,
    }


@dataclass(frozen=True)
class Measured:
    """Wall-clock seconds, CPU seconds of all processes, their peak memory in GiB (PSS)."""

    seconds: float
    cpu: float
    peak: float


def measured(command: list[str]) -> Measured:
    """Run a command to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak, seconds = 0, 0.0
    while not seconds:
        try:
            family = [process.pid, *(child.pid for child in process.children(recursive=True))]
            peak = max(peak, sum(map(proportional_set_size, family)))
        except (psutil.Error, OSError):  # one of them ended meanwhile
            pass
        with contextlib.suppress(psutil.TimeoutExpired):  # ends with the process, not after it
            process.wait(timeout=0.5)
            seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"status {process.returncode}: {' '.join(command)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(seconds, cpu, peak / 2**30)


def proportional_set_size(process: int) -> int:
    """Bytes of a process, memory that it shares counted in parts; its mapped files too."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(process)


def evict(folder: Path) -> None:
    """Put the input out of the page cache; what is not yet on the disk first goes there."""
    os.sync()
    for path in (folder / "instances.json", *(folder / "images").iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def complaints(peak: float, ratio: float, results: set[bytes], options: argparse.Namespace) -> str:
    """A line for each limit that is passed. peak: GiB; ratio: of seconds; results: the manifests,
    which have the SHA-256 of every shard."""
    lines = []
    if peak > options.most_gib:
        lines.append(f"peak memory: got {peak:.2f} GiB, expected {options.most_gib:.2f} or less")
    if ratio > options.most_ratio:
        lines.append(f"convert / tar: got {ratio:.2f}, expected {options.most_ratio:.2f} or less")
    if len(results) > 1:
        lines.append(f"convert again: got {len(results)} different results, expected the same")
    return "\n".join(lines)


def rounded(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in sorted(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--kilobytes", type=int, default=160, help="of an image, about")
    parser.add_argument("--own-files", action="store_true", help="copies instead of links")
    parser.add_argument("--cold", action="store_true", help="input not in the page cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--most-gib", type=float, default=3.0, help="peak memory of convert")
    parser.add_argument("--most-ratio", type=float, default=1.5, help="median of convert / tar")
    options = parser.parse_args()
    folder: Path = options.folder
    if not folder.exists():
        generate(folder, options.images, options.kilobytes, options.own_files)
    source, shards, copy = folder / "instances.json", folder / "shards", folder / "copy.tar"
    files = sum(path.stat().st_size for path in (folder / "images").iterdir())
    text = source.stat().st_size
    print(f"{options.images} images, {files / 1e9:.2f} GB; annotations {text / 1e6:.0f} MB")

    times: dict[str, list[float]] = {"tar": [], "convert": []}
    peak, results = 0.0, set()
    inputs = ("-C", str(folder), "images", source.name)
    tar = ["tar", "--hard-dereference", "-cf", str(copy), *inputs]
    convert = [
        *(sys.executable, "-m", "data_prep", "convert", "--images", str(folder / "images")),
        *("--annotations", str(source), "--output", str(shards)),
        *("--workers", str(options.workers)),
    ]
    for i in range(options.rounds):
        for name, command in (("tar", tar), ("convert", convert)):
            if options.cold:
                evict(folder)
            result = measured(command)
            times[name].append(result.seconds)
            print(
                f"round {i + 1}: {name} {result.seconds:.1f} s, {result.cpu:.1f} s of CPU, peak "
                f"{result.peak:.2f} GiB",
                flush=True,
            )
            if name == "convert":
                peak = max(peak, result.peak)
                results.add((shards / "manifest.json").read_bytes())
            copy.unlink(missing_ok=True)
            shutil.rmtree(shards, ignore_errors=True)
    measured([*convert[:-1], str(options.workers + 1)])
    results.add((shards / "manifest.json").read_bytes())
    shutil.rmtree(shards)
    for name, values in times.items():
        print(f"{name}: median {statistics.median(values):.1f} s of {rounded(values)}")
    ratios = [b / a for a, b in zip(times["tar"], times["convert"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"convert / tar: median {ratio:.2f} of {rounded(ratios)}")
    if said := complaints(peak, ratio, results, options):
        raise SystemExit(said)


if __name__ == "__main__":
    main()
