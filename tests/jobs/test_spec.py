"""What a job is told."""

from dataclasses import replace
from pathlib import Path

from jobs.spec import JobSpec, from_the_root
from pipeline.recipes import recipe


def test_local_paths_are_told_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = recipe("demo")
    config = replace(
        config,
        data=replace(config.data, train="shards/train", val="s3://bucket/val"),
        init=replace(config.init, backbone="../resnet50.pth"),
    )
    told = from_the_root(config)
    assert told.data.train == str(tmp_path / "shards" / "train")
    assert told.data.val == "s3://bucket/val"
    assert told.init.backbone == str(Path(tmp_path).parent / "resnet50.pth")
    assert told.init.weights == ""
    spec = JobSpec(told.to_json(), folder=str(tmp_path))
    assert JobSpec.from_json(spec.to_json()).run_config() == told
