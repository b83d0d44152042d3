"""One training process group: recipes, data, engine, training, evaluation, checkpoints.

Lives here: everything that one group of processes needs to train, evaluate and draw a detector,
started alone (``python -m pipeline train``), by torchrun, or by a Ray job.
May import: ``cuda_ops``, ``model``; ``deepspeed`` in ``engine.py`` only; never ``ray``, ``mlflow``
or ``jobs``. It meets ``data_prep`` in the shard format alone.
"""
