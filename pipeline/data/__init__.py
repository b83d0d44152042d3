"""From shards to batches: reading, class columns, epoch order, augmentation, batching.

Lives here: what a training process does with the shard format of docs/data.md.
May import: numpy, PIL, simplejpeg, torch and ``pipeline.config``; not ``data_prep``.
"""
