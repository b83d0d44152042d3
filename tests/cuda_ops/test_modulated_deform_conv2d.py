"""DCNv2 against a convolution, against the formula written out, and in every dtype."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from cuda_ops.ops import modulated_deform_conv2d


def arguments(groups: int, deformable: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(groups + 10 * deformable)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    image = normal(2, 4, 6, 7)
    offset, mask = normal(2, 2 * deformable * 9, 6, 7), normal(2, deformable * 9, 6, 7).sigmoid()
    return image, offset, mask, normal(6, 4 // groups, 3, 3), normal(6)


def written_out(
    image: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Equation 1 of arXiv:1811.11168, stride 1, padding 1, one scalar at a time."""
    batch, channels, height, width = image.shape
    deformable = mask.shape[1] // 9
    groups = channels // weight.shape[1]
    output = bias[None, :, None, None].repeat(batch, 1, height, width)
    for n in range(batch):
        for y in range(height):
            for x in range(width):
                sampled = torch.zeros(channels, 9, dtype=image.dtype)
                for c in range(channels):
                    g = c // (channels // deformable)
                    for tap in range(9):
                        at = g * 9 + tap
                        py = y + tap // 3 - 1 + offset[n, 2 * at, y, x].item()
                        px = x + tap % 3 - 1 + offset[n, 2 * at + 1, y, x].item()
                        for row in range(height):
                            for column in range(width):
                                share = max(0, 1 - abs(py - row)) * max(0, 1 - abs(px - column))
                                if share:
                                    sampled[c, tap] += share * image[n, c, row, column]
                        sampled[c, tap] *= mask[n, at, y, x]
                for o in range(weight.shape[0]):
                    first = o // (weight.shape[0] // groups) * weight.shape[1]
                    used = sampled[first : first + weight.shape[1]]
                    output[n, o, y, x] += (used * weight[o].flatten(1)).sum()
    return output


@pytest.mark.parametrize(("groups", "deformable"), [(1, 1), (2, 2)])
def test_agrees_with_the_formula(groups: int, deformable: int) -> None:
    image, offset, mask, weight, bias = arguments(groups, deformable, torch.float64)
    image, offset, mask = (x[:1, :, :4, :4] for x in (image, offset, mask))
    output = modulated_deform_conv2d(image, offset, mask, weight, bias, padding=1)
    torch.testing.assert_close(output, written_out(image, offset, mask, weight, bias))


@pytest.mark.parametrize("groups", [1, 2])
def test_without_offsets_it_is_a_convolution(groups: int) -> None:
    image, offset, mask, weight, bias = arguments(groups, 2, torch.float64)
    output = modulated_deform_conv2d(
        image, 0 * offset[..., ::2, ::2][..., :3, :4], torch.ones_like(mask[..., :3, :4]), weight,
        bias, stride=2, padding=1,
    )  # fmt: skip
    expected = conv2d(image, weight, bias, stride=2, padding=1, groups=groups)
    torch.testing.assert_close(output, expected)


def test_numerical_gradients() -> None:
    inputs = [x.requires_grad_() for x in arguments(2, 2, torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *x: modulated_deform_conv2d(*x, padding=2, dilation=2), inputs, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_round_once(dtype: torch.dtype) -> None:
    inputs = [x.requires_grad_() for x in arguments(1, 2, dtype)]
    output = modulated_deform_conv2d(*inputs, padding=1)
    assert output.dtype == dtype
    grads = torch.autograd.grad(output.double().sum(), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = modulated_deform_conv2d(*exact, padding=1)
    truth = torch.autograd.grad(expected.sum(), exact)
    for result, right in zip((output, *grads), (expected, *truth), strict=True):
        error = (result.double() - right).norm() / right.norm()
        assert error < 0.5 * torch.finfo(dtype).eps + 2e-6


def test_autocast_keeps_the_dtype_of_input() -> None:
    image, *others = arguments(1, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = modulated_deform_conv2d(image.bfloat16(), *others, padding=1)
    assert output.dtype == torch.bfloat16
    expected = modulated_deform_conv2d(image.bfloat16().float(), *others, padding=1)
    assert torch.equal(output, expected.bfloat16())


def test_mask_that_does_not_fit_is_refused() -> None:
    image, offset, mask, weight, bias = arguments(1, 2, torch.float32)
    with pytest.raises(ValueError, match=r"mask has shape \[2, 17, 6, 7\], expected \[N, G \* 9"):
        modulated_deform_conv2d(image, offset, mask[:, 1:], weight, bias, padding=1)
