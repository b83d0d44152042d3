"""Memory of the loader over epochs: `python tests/pipeline/check_memory.py [RECORDS] [WORKERS]`.

Writes shards of RECORDS tiny pictures, reads them through as training does, and prints what this
process and each worker hold after every tenth of an epoch. Fails where more than 400 MB of a worker
are resident, of which most are shared with the process it is forked from, or where that grows after
the first epoch.
"""

import io
import json
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipeline.data.labels import build_labels  # noqa: E402
from pipeline.data.loader import training_steps  # noqa: E402
from pipeline.data.order import first_step  # noqa: E402
from pipeline.data.shards import ShardSet  # noqa: E402
from pipeline.recipes import recipe  # noqa: E402

EPOCHS, BATCH, PER_SHARD = 3, 32, 1000
MOST_MEGABYTES, MOST_GROWTH = 400, 0.03


def write_shards(folder: Path, records: int) -> None:
    """In the format of docs/data.md, seven boxes a picture as COCO has."""
    random = np.random.default_rng(0)
    files = []
    for _ in range(64):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    boxes = [{"bbox": [i, i, 9, 9], "category_id": 1, "id": i} for i in range(7)]
    columns = {k: [] for k in ("shard", "offset", "length", "width", "height", "id", "annotations")}
    shards = []
    for start in range(0, records, PER_SHARD):
        path = folder / f"shard-{len(shards):06d}.tar"
        with tarfile.open(path, "w") as tar:
            for index in range(start, min(start + PER_SHARD, records)):
                image = {"id": index, "file_name": f"{index}.jpg", "width": 40, "height": 32}
                record = json.dumps({"image": image, "annotations": boxes}).encode()
                offset = tar.offset
                for kind, content in (("jpg", files[index % 64]), ("json", record)):
                    member = tarfile.TarInfo(f"{index:012d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                values = (len(shards), offset, tar.offset - offset, 40, 32, index, 7)
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
        samples = min(PER_SHARD, records - start)
        shards.append({"name": path.name, "samples": samples, "bytes": path.stat().st_size,
                       "sha256": ""})  # fmt: skip
    manifest = {
        "format": "coco-webdataset", "version": 1, "digest": "0", "header": {},
        "categories": [{"id": 1, "name": "thing"}], "shards": shards, "samples": columns,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


def megabytes(process: psutil.Process) -> tuple[float, float, float]:
    """Resident, its proportional share, and what no other process has."""
    memory = process.memory_full_info()
    return memory.rss / 1e6, memory.pss / 1e6, memory.uss / 1e6


def main(records: int, workers: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_shards(Path(folder), records)
        print(f"{records} records written in {time.perf_counter() - start:.0f} s")
        return watch(ShardSet(folder), workers)


def watch(shards: ShardSet, workers: int) -> int:
    config = recipe("demo")
    config = replace(
        config,
        optimizer=replace(config.optimizer, batch_size=BATCH),
        engine=replace(config.engine, loader_workers=workers, group_by_shape=True),
    )
    labels = build_labels(shards.categories, "contiguous")
    total = first_step(len(shards), BATCH, EPOCHS)
    me = psutil.Process()
    print("MB: resident/share/alone of this process and of each worker")
    marks = [round((i + 1) * total / (10 * EPOCHS)) for i in range(10 * EPOCHS)]
    start, rows = time.perf_counter(), []
    for done, _ in enumerate(training_steps(shards, labels, config, range(total), 0, 1, False), 1):
        if done not in marks:
            continue
        # The sharing of memory needs a helper process at times; the workers are the largest.
        children = sorted((megabytes(child) for child in me.children()), reverse=True)[:workers]
        rows.append([megabytes(me), *children])
        shown = ["/".join(f"{value:.1f}" for value in values) for values in rows[-1]]
        print(f"{done * BATCH / len(shards):5.2f}    " + "    ".join(shown), flush=True)
    seconds = time.perf_counter() - start
    print(f"{EPOCHS} epochs in {seconds:.0f} s, {total * BATCH / seconds:.0f} images/s")
    figures = np.array(rows)  # [marks, processes, 3]
    growth = (figures[-1, :, 0] / figures[9, :, 0] - 1).max()
    resident, share, alone = figures[:, 1:].max(axis=(0, 1))
    print(f"largest worker: {resident:.1f} MB resident, a share of {share:.1f}, alone {alone:.1f}")
    print(f"growth of what is resident after epoch 1: {growth:+.2%}")
    return int(resident > MOST_MEGABYTES or growth > MOST_GROWTH)


if __name__ == "__main__":
    given = [int(value) for value in sys.argv[1:3]]
    sys.exit(main(*(given + [100_000, 2][len(given) :])))
