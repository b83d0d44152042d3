"""COCO-format data to WebDataset shards and back.

What lives here: reading and checking annotation files, writing and reading shards with their
manifest, and drawing the demo data set. What it may import: the standard library, numpy, Pillow,
tqdm, tyro, fsspec, (plots only) matplotlib and (on_ray.py only) ray; nothing from the other
folders, which meet this one only in the shard format (docs/data.md).
"""
