"""From the loader to the step: order kept, one step ahead, on a GPU by a stream of its own."""

import pickle
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from pipeline import train
from pipeline.checkpoint_store import Progress
from pipeline.config import DataConfig
from pipeline.data import loader
from pipeline.data.augment import Example
from pipeline.data.batch import collate
from pipeline.data.loader import ahead, on_device
from pipeline.dataset import open_dataset
from pipeline.meter import Meter
from pipeline.recipes import recipe


def a_step(seed: int):
    """Two micro-batches with random pixels and 0 to 3 boxes an image."""
    random = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(2):
        examples = [
            Example(
                torch.randint(0, 256, (3, 40 + 8 * i, 60), dtype=torch.uint8, generator=random),
                torch.rand(i, 4, generator=random),
                torch.arange(i),
            )
            for i in (0, 3)
        ]
        batches.append(collate(examples, [{"id": i, "height": 9, "width": 9} for i in (5, 6)]))
    return batches


def same(one, other) -> bool:
    return (
        all(
            torch.equal(a.cpu(), b.cpu())
            for a, b in zip(one.tensors(), other.tensors(), strict=True)
        )
        and one.image_ids == other.image_ids
        and torch.equal(one.sizes, other.sizes)
    )


def test_the_next_item_is_taken_before_the_present_is_handed_out():
    taken = []

    def source():
        for i in range(4):
            taken.append(i)
            yield i

    seen = []
    for item in ahead(source()):
        seen.append((item, len(taken)))
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(ahead([])) == []
    assert list(ahead([7])) == [7]


def test_an_error_of_the_loader_comes_through():
    def source():
        yield a_step(0)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(on_device(source(), torch.device("cpu")))


def test_a_batch_survives_the_way_between_processes():
    for batch in a_step(1):
        again = pickle.loads(pickle.dumps(batch))
        assert same(batch, again)
        assert [len(t["labels"]) for t in again.targets] == [0, 3]
        assert again.images.stride() == batch.images.stride()


def test_the_wait_for_data_is_seconds_a_step(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)

    def slow():
        for i in range(4):
            time.sleep(0.02)
            yield i

    start = time.perf_counter()
    meter = Meter(batch_size=8, device=torch.device("cpu"))
    for _ in meter.timed(slow()):
        meter.add([{"loss": torch.tensor(value)} for value in (1.0, 3.0)])
    values = meter.flush()
    assert values["loss"] == 2
    assert 0.02 <= values["data_wait"] <= (time.perf_counter() - start) / 4
    assert values["images_per_second"] <= 8 / 0.02


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_trainer_asks_for_pinned_memory_and_a_stream_where_there_is_a_gpu(
    drawn, monkeypatch, kind
):
    """What it asks for, which needs no GPU: of torch's loader, and of `on_device`."""
    asked = []

    def loader_of(*arguments, pin_memory, **options):
        asked.append(pin_memory)
        return DataLoader(*arguments, **options)

    def moved(steps, device):
        for step in steps:
            yield device, step

    monkeypatch.setattr(loader, "DataLoader", loader_of)
    monkeypatch.setattr(train, "on_device", moved)
    config = recipe("demo")
    shards = [str(drawn.shards / split) for split in ("train", "val")]
    config = replace(
        config,
        data=DataConfig(*shards),
        engine=replace(config.engine, loader_workers=0),
        optimizer=replace(config.optimizer, batch_size=4),
    )
    run = SimpleNamespace(
        config=config, dataset=open_dataset(config), device=torch.device(kind), rank=0, world=1,
        end_of_epoch=lambda epochs: 10 * epochs,
    )  # fmt: skip
    device, step = next(train.remaining_steps(run, Progress()))
    assert device == run.device
    assert [len(batch.image_ids) for batch in step] == [4]
    assert asked == [kind == "cuda"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sees_the_same_batches_while_it_computes():
    device = torch.device("cuda")
    source = ([batch.pin_memory() for batch in a_step(seed)] for seed in range(20))
    matrix = torch.randn(4000, 4000, device=device)
    for seed, step in enumerate(on_device(source, device)):
        for _ in range(5):
            matrix = (matrix @ matrix).clamp(-1, 1)  # keeps the GPU busy over the copies
        for batch, expected in zip(step, a_step(seed), strict=True):
            assert batch.images.is_cuda
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            total = batch.images.long().sum()  # computed after the work above
            assert same(batch, expected)
            assert total.item() == expected.images.long().sum()
