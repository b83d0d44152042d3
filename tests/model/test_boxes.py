import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from model.boxes import cxcywh_to_xyxy, generalized_iou, inverse_sigmoid, xyxy_to_cxcywh

coordinate = st.floats(0, 1, allow_subnormal=False)
box = st.tuples(coordinate, coordinate, coordinate, coordinate)


def test_conversion_by_hand() -> None:
    centred = torch.tensor([[0.5, 0.4, 0.2, 0.6]])
    corners = torch.tensor([[0.4, 0.1, 0.6, 0.7]])
    torch.testing.assert_close(cxcywh_to_xyxy(centred), corners)
    torch.testing.assert_close(xyxy_to_cxcywh(corners), centred)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7 - 2 / 9),  # union 7, hull 9
        ((0, 0, 1, 1), (2, 0, 3, 1), 0 - 1 / 3),  # apart: union 2, hull 3
        ((0, 0, 4, 4), (1, 1, 2, 2), 1 / 16),  # inside: hull is the union
        ((1, 1, 1, 1), (0, 0, 2, 2), 0.0),  # a point inside a box
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),  # two equal points: no union, no hull
    ],
)
def test_generalized_iou_by_hand(first: tuple, second: tuple, expected: float) -> None:
    a, b = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    assert generalized_iou(a, b).item() == pytest.approx(expected, abs=1e-12)


@given(box, box)
def test_generalized_iou_agrees_with_torchvision(first: tuple, second: tuple) -> None:
    a = cxcywh_to_xyxy(torch.tensor([first], dtype=torch.float64))
    b = cxcywh_to_xyxy(torch.tensor([second], dtype=torch.float64))
    ours = generalized_iou(a, b)
    assert -1 <= ours.item() <= 1 + 1e-12
    torch.testing.assert_close(ours, generalized_iou(b, a))
    areas = [(x[0, 2:] - x[0, :2]).prod() for x in (a, b)]
    if min(areas) > 1e-9:
        expected = torchvision.ops.generalized_box_iou(a, b)[0]
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_generalized_iou_broadcasts() -> None:
    torch.manual_seed(0)
    first, second = cxcywh_to_xyxy(torch.rand(5, 4)), cxcywh_to_xyxy(torch.rand(3, 4))
    pairwise = generalized_iou(first[:, None], second)
    torch.testing.assert_close(pairwise, torchvision.ops.generalized_box_iou(first, second))


def test_boxes_without_area_have_finite_gradients() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.6]], requires_grad=True)
    generalized_iou(boxes, boxes.detach()).sum().backward()
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()


@given(st.floats(-11, 11))
def test_inverse_sigmoid_inverts(logit: float) -> None:
    x = torch.tensor(logit, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x.sigmoid()), x, rtol=1e-9, atol=1e-9)


def test_inverse_sigmoid_is_held_at_the_ends() -> None:
    ends = inverse_sigmoid(torch.tensor([0.0, 1.0, -3.0, 7.0], dtype=torch.float64))
    limit = torch.log(torch.tensor(1e5, dtype=torch.float64))
    torch.testing.assert_close(ends, torch.stack((-limit, limit, -limit, limit)))
