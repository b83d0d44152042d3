"""`python -m pipeline train|evaluate|predict|visualize|export|replay|benchmark-step|…`."""

import sys

from pipeline.cli import Command, main
from pipeline.commands.benchmark import run_benchmark_data, run_benchmark_step
from pipeline.commands.benchmark_predict import run_benchmark_predict
from pipeline.commands.describe import run_describe, run_recipes
from pipeline.commands.evaluate import run_evaluate
from pipeline.commands.export import run_export
from pipeline.commands.predict import run_predict
from pipeline.commands.replay import run_replay
from pipeline.commands.train import run_train
from pipeline.commands.universal import run_universal
from pipeline.commands.visualize import run_visualize

COMMANDS = {
    "train": Command(run_train, "train a recipe, or resume the run in --output"),
    "evaluate": Command(run_evaluate, "COCO numbers of a checkpoint, and where its errors are"),
    "predict": Command(run_predict, "objects in image files: COCO JSON, CSV and pictures"),
    "visualize": Command(run_visualize, "what a checkpoint looks at, in pictures"),
    "export": Command(run_export, "a checkpoint as ONNX, a torch archive, for transformers, …"),
    "universal": Command(run_universal, "a checkpoint for programs of DeepSpeed's own"),
    "replay": Command(run_replay, "take a step of a run again"),
    "benchmark-step": Command(run_benchmark_step, "time a training step, beside others"),
    "benchmark-data": Command(run_benchmark_data, "time decoding to batching, beside others"),
    "benchmark-predict": Command(run_benchmark_predict, "time prediction, beside others"),
    "describe": Command(run_describe, "parameters, multiply-adds and memory of recipes"),
    "recipes": Command(run_recipes, "list the named experiments"),
}

if __name__ == "__main__":
    sys.exit(main("python -m pipeline", (__doc__ or "").strip(), COMMANDS, sys.argv[1:]))
