"""A checkpoint as an MLflow model: `mlflow.pyfunc.load_model` needs no run folder for it."""

import importlib.metadata
import warnings
from pathlib import Path
from typing import Any

# What jobs/pyfunc_model.py imports, beside this repository.
REQUIREMENTS = (
    "mlflow", "torch", "torchvision", "numpy", "pandas", "pillow", "pycocotools", "scipy",
)  # fmt: skip
CHECKPOINT = "checkpoint"


def write_model(folder: Path, checkpoint: Path, tags: dict[str, str]) -> None:
    """Writes the model into the new `folder`: model.pt of a checkpoint, the code that loads it (no
    pickle), its signature and what it requires."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema

    from jobs import pyfunc_model

    columns = pyfunc_model.COLUMNS.items()
    # Inputs of three kinds, one of them arrays that differ in shape, have no MLflow type.
    outputs = Schema([ColSpec(DataType[kind], name) for name, kind in columns])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about examples of inputs, for want of which types
        mlflow.pyfunc.save_model(
            folder,
            python_model=pyfunc_model.__file__,
            artifacts={CHECKPOINT: str(checkpoint)},
            signature=ModelSignature(outputs=outputs),
            pip_requirements=[f"{x}=={importlib.metadata.version(x)}" for x in REQUIREMENTS],
            metadata=dict[str, Any](tags),
        )
