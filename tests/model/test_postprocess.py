import pytest
import torch

from model.postprocess import postprocess


def test_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2.0], [1.0, -1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]])
    (found,) = postprocess(
        {"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]]), top=3
    )
    torch.testing.assert_close(found["scores"], torch.tensor([2.0, 1.0, 0.0]).sigmoid())
    assert found["labels"].tolist() == [1, 0, 0]
    expected = torch.tensor([[80.0, 30, 120, 70], [0, 0, 100, 100], [80, 30, 120, 70]])
    torch.testing.assert_close(found["boxes"], expected)


def test_each_image_has_its_own_size() -> None:
    outputs = {
        "pred_logits": torch.zeros(2, 4, 3),
        "pred_boxes": torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(2, 4, 4),
    }
    found = postprocess(outputs, torch.tensor([[10.0, 20.0], [7.0, 5.0]]))
    assert len(found[0]["scores"]) == 12  # fewer than 100 pairs: all of them
    assert found[0]["boxes"][0].tolist() == [0, 0, 20, 10]
    assert found[1]["boxes"][0].tolist() == [0, 0, 5, 7]


def test_the_top_hundred_of_all_pairs() -> None:
    torch.manual_seed(0)
    outputs = {"pred_logits": torch.randn(1, 50, 7), "pred_boxes": torch.rand(1, 50, 4)}
    (found,) = postprocess(outputs, torch.tensor([[1, 1]]))
    everything = outputs["pred_logits"].sigmoid().flatten().sort(descending=True).values
    assert torch.equal(found["scores"], everything[:100])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_scores_are_not_rounded_again(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 5, 3).to(dtype)
    (found,) = postprocess(
        {"pred_logits": logits, "pred_boxes": torch.rand(1, 5, 4)}, torch.tensor([[9, 9]])
    )
    assert found["scores"].dtype == torch.float32
    assert found["scores"][0] == logits.float().sigmoid().max()


def test_sizes_of_another_shape_are_refused() -> None:
    outputs = {"pred_logits": torch.zeros(2, 4, 3), "pred_boxes": torch.zeros(2, 4, 4)}
    with pytest.raises(ValueError, match=r"sizes: got shape \(1, 2\), expected \(2, 2\)"):
        postprocess(outputs, torch.tensor([[1, 1]]))
