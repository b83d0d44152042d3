"""Prediction over many files: read and drawn by threads, while the model has the batch before."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from pipeline.image_files import ImageFiles
from pipeline.predict import Detector
from pipeline.predict_images import Prepared
from pipeline.prediction_files import PredictionFiles, picture_names, save_picture

A = TypeVar("A")
B = TypeVar("B")


def predict_files(
    detector: Detector,
    files: ImageFiles,
    output: PredictionFiles,
    pictures: Path | None,
    threshold: float,
    most: int,
    batch_size: int,
) -> None:
    """Writes the detections of all files in their order, and pictures of them into a folder.

    What cannot be read as an image is told on stderr, and left out. What is damaged and can be read
    all the same is told, and looked at. batch_size: 0 for that of the run's evaluations.
    """
    size = batch_size or detector.config.engine.evaluation_batch
    names = picture_names(files) if pictures else {}

    def read(name: str) -> Prepared | str:
        try:
            return detector.prepare(files.path(name))
        except (ValueError, OSError) as error:
            return str(error)

    threads = min(8, os.cpu_count() or 1)
    drawn: deque[Future[None]] = deque()
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(files), unit=" images", disable=None, smoothing=0.1) as bar,
    ):
        images = zip(files.names, in_background(pool, read, files.names, 2 * size), strict=True)
        while part := list(islice(images, size)):
            good = {name: image for name, image in part if isinstance(image, Prepared)}
            found = detector.detect(list(good.values()), threshold, most) if good else []
            for name, objects in zip(good, found, strict=True):
                output.add(name, objects)
                if pictures:
                    there = pictures / names[name]
                    given = (files.path(name), there, objects, detector.labels)
                    drawn.append(pool.submit(save_picture, *given))
            for name, image in part:
                if isinstance(image, str):
                    output.leave_out(name, image)
                    bar.write(f"left out {files.path(name)}: {image}", file=sys.stderr)
                elif image.damage:
                    told = "is damaged, and what is found in it may be wrong"
                    bar.write(f"{files.path(name)} {told}: {image.damage}", file=sys.stderr)
            while len(drawn) > 2 * size:
                drawn.popleft().result()
            bar.update(len(part))
        for picture in drawn:
            picture.result()


def in_background(
    pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A], ahead: int
) -> Iterator[B]:
    """`map`, with no more than `ahead` results that nobody has taken yet."""
    waiting: deque[Future[B]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
