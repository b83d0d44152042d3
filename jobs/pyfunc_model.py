"""The code of a registered model: MLflow runs a copy of this file wherever the model is loaded.

That process must be able to import this repository, with its operators built.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc

COLUMNS = {
    "image": "long", "label": "string", "score": "double",
    "x": "double", "y": "double", "w": "double", "h": "double",
}  # fmt: skip


# MLflow takes annotations of a model's inputs for a request to check them, and advises them by a
# warning for which it sets a filter of its own; one that is recorded is not shown.
with warnings.catch_warnings(record=True):

    class DetectorModel(mlflow.pyfunc.PythonModel):
        def load_context(self, context: Any) -> None:
            try:
                from pipeline.predict import Detector
            except ModuleNotFoundError as error:
                if error.name != "pipeline":
                    raise
                raise ImportError(
                    "the model needs the repository that trained it: expected its root on "
                    "PYTHONPATH, with the operators built (python -m cuda_ops build)"
                ) from None
            self.detector = Detector.load(Path(context.artifacts["checkpoint"]))

        def predict(self, context, model_input):  # type: ignore[no-untyped-def]
            """Detections of all images as a data frame, those of an image by falling score: index
            of the image, label, score, and the box (x, y of its upper left corner, w, h) in pixels
            of the image as shown.

            model_input: a list, or a data frame with a column "image", of paths of image files,
            encoded images as bytes, Pillow images, or uint8 arrays [H, W, 3] in RGB; or one path.
            Raises `ValueError` for others.
            """
            import pandas as pd  # type: ignore[import-untyped]

            images = [model_input] if isinstance(model_input, (str, bytes)) else model_input
            if isinstance(images, pd.DataFrame):
                images = images["image"]
            found = enumerate(self.detector.predict(list(images)))
            rows = [(index, *row) for index, objects in found for row in _rows(objects)]
            return pd.DataFrame(rows, columns=list(COLUMNS))

    def _rows(objects: Any) -> Iterator[tuple[str, float, float, float, float, float]]:
        boxes, scores = objects.boxes.tolist(), objects.scores.tolist()
        for label, score, (x0, y0, x1, y1) in zip(objects.labels, scores, boxes, strict=True):
            yield label, score, x0, y0, x1 - x0, y1 - y0


mlflow.models.set_model(DetectorModel())
