"""The image files that a command line means: files, folders and patterns."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

IMAGES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".jp2", ".avif",
)  # fmt: skip
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class ImageFiles:
    """Files below a folder, by names that are theirs alone: their paths relative to it."""

    folder: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, name: str) -> Path:
        return self.folder / name


def find_images(arguments: Sequence[str], recursive: bool = False) -> ImageFiles:
    """Each file once, in natural order (frame2 before frame10) of their paths.

    arguments: files of any name; folders, of which those with an image's suffix are taken, of
    subfolders too if `recursive`; patterns with * ? [] and ** as in a shell, for what it left
    alone. Raises `UserError` for what is not there, and for a folder or pattern without images.
    """
    found = {os.path.abspath(path) for one in arguments for path in _found(one, recursive)}
    if not found:
        raise UserError("IMAGES: got none, expected image files, folders or patterns")
    folder = os.path.commonpath([os.path.dirname(path) for path in found])
    names = sorted((os.path.relpath(path, folder) for path in found), key=natural)
    return ImageFiles(Path(folder), tuple(names))


def _found(argument: str, recursive: bool) -> list[str]:
    """What one argument means."""
    if os.path.isdir(argument):
        _refuse_shards(argument)
        return list(_in_folder(argument, recursive)) or _no_images(argument)
    if os.path.exists(argument):
        _refuse_video(argument)
        if not os.path.isfile(argument):
            raise UserError(f"{argument!r} is neither a file nor a folder")
        return [argument]
    if not glob.has_magic(argument):
        raise UserError(f"image {argument!r} does not exist")
    matches = glob.glob(argument, recursive=True)
    if not matches:
        raise UserError(f"nothing matches {argument!r}")
    paths: list[str] = []
    for match in matches:
        paths += _in_folder(match, recursive) if os.path.isdir(match) else _images([match])
    if not paths:
        raise UserError(f"{argument!r}: none of its {len(matches)} matches is an image")
    return paths


def _in_folder(folder: str, recursive: bool) -> Iterator[str]:
    if not recursive:
        yield from _images(os.path.join(folder, name) for name in os.listdir(folder))
        return
    for parent, _, files in os.walk(folder):
        yield from _images(os.path.join(parent, name) for name in files)


def _images(paths: Iterable[str]) -> Iterator[str]:
    """Files that by their names are images; hidden ones are not, such as macOS's "._a.jpg"."""
    for path in paths:
        hidden = os.path.basename(path).startswith(".")
        if path.lower().endswith(IMAGES) and not hidden and os.path.isfile(path):
            yield path


def _no_images(folder: str) -> list[str]:
    below = sum(1 for _ in _in_folder(folder, recursive=True))
    remedy = f"; --recursive takes the {below} of its subfolders" if below else ""
    raise UserError(
        f"folder {folder!r}: got no image, expected files ending in {', '.join(IMAGES)}{remedy}"
    )


def _refuse_shards(folder: str) -> None:
    if os.path.isfile(os.path.join(folder, "manifest.json")):
        raise UserError(
            f"{folder!r} is a shard folder, expected image files; python -m pipeline evaluate "
            f"CHECKPOINT --data {folder} --output FILE writes its detections, and visualize draws "
            f"them"
        )


def _refuse_video(path: str) -> None:
    if path.lower().endswith(VIDEOS):
        raise UserError(
            f"{path!r} is a video, expected images; ffmpeg -i {path} frames/%06d.jpg makes them, "
            f"once there is a folder frames"
        )


def natural(path: str) -> list[tuple[list[str | int], str]]:
    """Sorts numbers in names by value, and case only where nothing else differs."""
    key: list[tuple[list[str | int], str]] = []
    for part in path.split(os.sep):
        pieces = re.split("([0-9]+)", part.casefold())
        key.append(([int(p) if i % 2 else p for i, p in enumerate(pieces)], part))
    return key
