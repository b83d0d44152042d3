"""`manifest.json`: what a folder of shards holds, and where in them each sample is.

It is written last and at once, so a folder that has one is complete.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from data_prep.shards import END
from data_prep.storage import Folder, LocalFolder, Location, folder_at

FORMAT, VERSION = "coco-webdataset", 1
NAME = "manifest.json"
LISTS = ("images", "annotations")  # top-level keys whose content is in the shards
COLUMNS = ("shard", "offset", "length", "width", "height", "id", "annotations")


@dataclass(frozen=True)
class Manifest:
    """The fields of manifest.json; see docs/data.md for each.

    `keys` are the top-level keys of the annotation file, `header` the values of all but LISTS.
    `samples` maps each of COLUMNS to a list of integers, one a sample, in shard order.
    """

    digest: str
    header: dict[str, Any]
    keys: list[str]
    categories: list[dict[str, Any]]
    num_images: int
    num_annotations: int
    quarantined: list[dict[str, Any]]
    orphan_annotations: list[dict[str, Any]]
    source: dict[str, str]
    shards: list[dict[str, Any]]
    samples: dict[str, list[int]]


def data_digest(header: dict[str, Any], shard_digests: list[str]) -> str:
    """The identity of the data: hex SHA-256 over header and shard digests, in order."""
    content = [FORMAT, VERSION, header, shard_digests]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write `folder/manifest.json`, all at once."""
    content = {"format": FORMAT, "version": VERSION} | vars(manifest)
    folder.write(NAME, json.dumps(content).encode())


def read_manifest(shards: Location) -> Manifest:
    """Read and check the manifest in a folder; the shards themselves are not looked at.

    Raises:
        ValueError: the folder is no complete folder of shards of this version.
    """
    folder = folder_at(shards)
    path = f"{folder}/{NAME}"
    if isinstance(folder, LocalFolder) and folder.names() is None:
        raise ValueError(f"shard folder {folder} does not exist; make it with data_prep convert")
    try:
        content = json.loads(folder.read(NAME))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is not a folder of shards: it has no {NAME} (unfinished conversions have "
            "none; run convert again)"
        ) from None
    except ConnectionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'{path} is not a manifest of shards: its format is not "{FORMAT}"')
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r:.40}, expected {VERSION}; convert again"
        )
    fields = {name: content.get(name) for name in Manifest.__dataclass_fields__}
    # Shards from before there was `keys` came from files that had both lists.
    if "keys" not in content and isinstance(fields["header"], dict):
        fields["keys"] = [*fields["header"], *LISTS]
    absent = [name for name, value in fields.items() if value is None]
    if absent:
        raise ValueError(f"{path} is damaged: it has no {', '.join(absent)}")
    manifest = Manifest(**fields)  # type: ignore[arg-type]
    why = _inconsistency(manifest)
    if why:
        raise ValueError(f"{path} is damaged: {why}")
    return manifest


def _inconsistency(manifest: Manifest) -> str | None:
    """Why a manifest cannot be right, judged by itself."""
    samples, shards = manifest.samples, manifest.shards
    if type(manifest.num_images) is not int or type(manifest.num_annotations) is not int:
        return "num_images and num_annotations must be whole numbers"
    if not isinstance(samples, dict) or set(samples) != set(COLUMNS):
        return f"samples must have the columns {', '.join(COLUMNS)}"
    for name, column in samples.items():
        if not isinstance(column, list) or len(column) != manifest.num_images:
            return f"column {name} must have {manifest.num_images} entries"
        if not all(type(value) is int for value in column):
            return f"column {name} must hold integers"
    if not isinstance(shards, list) or not all(
        isinstance(shard, dict)
        and isinstance(shard.get("name"), str)
        and isinstance(shard.get("sha256"), str)
        and type(shard.get("samples")) is int
        and type(shard.get("bytes")) is int
        for shard in shards
    ):
        return "shards must have name, samples, bytes and sha256"
    if any("/" in shard["name"] or shard["name"].startswith(".") for shard in shards):
        return "a shard's name must be a plain file name"
    expected = [i for i, shard in enumerate(shards) for _ in range(shard["samples"])]
    if samples["shard"] != expected:
        return "the column shard does not match the shards' numbers of samples"
    ends = [0] * len(shards)
    for i, offset, length in zip(
        samples["shard"], samples["offset"], samples["length"], strict=True
    ):
        if offset != ends[i] or length <= 0:
            return f"{shards[i]['name']} has no sample at bytes {offset}+{length}"
        ends[i] += length
    for shard, end in zip(shards, ends, strict=True):
        if end + len(END) != shard["bytes"]:
            return f"the samples of {shard['name']} do not fill its {shard['bytes']} bytes"
    if len(set(samples["id"])) < len(samples["id"]):
        return "two samples have one id"
    if sum(samples["annotations"]) != manifest.num_annotations:
        return f"annotations do not sum to {manifest.num_annotations}"
    if not isinstance(manifest.header, dict) or manifest.header.get("categories") is None:
        return "header must have categories"
    keys = manifest.keys
    if not isinstance(keys, list) or [k for k in keys if k not in LISTS] != [*manifest.header]:
        return "keys must be those of the header, images and annotations"
    if manifest.categories != manifest.header["categories"]:
        return "categories differ from those in the header"
    if data_digest(manifest.header, [shard["sha256"] for shard in shards]) != manifest.digest:
        return "the digest does not match header and shards"
    return None
