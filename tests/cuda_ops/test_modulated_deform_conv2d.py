"""DCNv2 against a convolution, against the formula written out, and in every dtype."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torchvision.ops import deform_conv2d

from cuda_ops import reference
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


GEOMETRIES = (
    {"stride": 1, "padding": 1, "dilation": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"stride": 3, "padding": 0, "dilation": 1},
)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("groups", "deformable"), [(1, 1), (2, 1), (1, 4), (4, 2), (8, 8)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_agrees_with_torchvision(
    geometry: dict, groups: int, deformable: int, kernel: tuple[int, int], with_bias: bool
) -> None:
    """Every other offset is a whole number: on a pixel, where derivatives jump, both take the same
    side. (It is 3: no sample lies at -1, for which see the next test but one.)"""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    image, weight = normal(2, 16, 9, 11), normal(8, 16 // groups, *kernel)
    out = conv2d(image, weight, None, **geometry, groups=groups).shape[2:]
    taps = deformable * kernel[0] * kernel[1]
    offset, mask = normal(2, 2 * taps, *out), normal(2, taps, *out)
    offset[..., ::2] = 3
    inputs = [image, offset, mask, weight, *([normal(8)] if with_bias else [])]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output = modulated_deform_conv2d(*leaves, **geometry)
        bias = leaves[4] if with_bias else None
        exact = deform_conv2d(*leaves[:2], leaves[3], bias, **geometry, mask=leaves[2])
        grad = normal(*output.shape).to(dtype)
        results = [output, *torch.autograd.grad(output, leaves, grad)]
        truth = [exact, *torch.autograd.grad(exact, leaves, grad)]
        for result, right in zip(results, truth, strict=True):
            assert result.shape == right.shape
            assert (result - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("size", [(5, 7), (25, 42), (64, 33)])
def test_zero_offsets_stay_on_their_pixels(size: tuple[int, int]) -> None:
    """As they are when training begins: the offset's derivative is the one to the right, below."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 16, *size, generator=generator)
    out = size[0] - 2, size[1] - 2
    offset, mask = torch.zeros(1, 18, *out), torch.ones(1, 9, *out)
    weight = torch.randn(4, 16, 3, 3, generator=generator)
    grads = []
    for operator in (modulated_deform_conv2d, by_torchvision):
        leaf = offset.clone().requires_grad_()
        output = operator(image, leaf, mask, weight)
        grads.append(torch.autograd.grad(output.square().sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


def by_torchvision(image: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    return deform_conv2d(image, offset, weight, mask=mask)


def test_a_sample_a_whole_pixel_outside_has_no_derivative() -> None:
    """As in the published DCNv2 code; torchvision's has one at exactly -1."""
    image, weight = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
    offset = torch.zeros(1, 2, 2, 2)
    offset[0, 1, 0] = torch.tensor([-1.0, 1.0])  # x of the first row: -1 and 2
    offset.requires_grad_()
    output = modulated_deform_conv2d(image, offset, torch.ones(1, 1, 2, 2), weight)
    assert output[0, 0].tolist() == [[0, 0], [1, 1]]
    grad = torch.autograd.grad(output.sum(), offset)[0]
    assert grad[0, :, 0].tolist() == [[0, 0], [0, 0]]


def test_definition_agrees_with_the_formula() -> None:
    image, offset, mask, weight, bias = arguments(2, 2, torch.float64)
    inputs = [image[:1, :, :4, :4], offset[:1, :, :4, :4], mask[:1, :, :4, :4], weight, bias]
    output = reference.modulated_deform_conv2d(*inputs, padding=1)
    torch.testing.assert_close(output, written_out(*inputs))


def test_without_torchvision() -> None:
    program = """
import sys
sys.modules["torchvision"] = None
import torch
from cuda_ops.ops import modulated_deform_conv2d
x = torch.ones(1, 1, 2, 2), torch.zeros(1, 2, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
print(modulated_deform_conv2d(*x).sum().item())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout == "4.0\n", done.stderr


def test_gradients_are_the_same_bits_for_any_number_of_threads() -> None:
    leaves = [x.requires_grad_() for x in arguments(2, 2, torch.float32)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            output = modulated_deform_conv2d(*leaves, padding=1)
            results.append(torch.autograd.grad(output.square().sum(), leaves[:3]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_batch_equals_single_images_and_an_empty_one_works() -> None:
    inputs = arguments(2, 2, torch.float64)
    output = modulated_deform_conv2d(*inputs, padding=1)
    for n in range(2):
        single = [*(x[n : n + 1] for x in inputs[:3]), *inputs[3:]]
        torch.testing.assert_close(output[n : n + 1], modulated_deform_conv2d(*single, padding=1))
    empty = [x.requires_grad_() for x in (*(x[:0] for x in inputs[:3]), *inputs[3:])]
    output = modulated_deform_conv2d(*empty, padding=1)
    assert output.shape == (0, 6, 6, 7)
    grads = torch.autograd.grad(output.sum(), empty)
    assert [grad.shape for grad in grads] == [x.shape for x in empty]
    assert not any(grad.any() for grad in grads)


def test_any_strides() -> None:
    inputs = arguments(2, 2, torch.float32)
    expected = modulated_deform_conv2d(*inputs, padding=1)
    turned = [
        x.flip(-1).flip(-1)
        if x.dim() == 1
        else x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        for x in inputs
    ]
    last = [x.contiguous(memory_format=torch.channels_last) for x in inputs[:3]]
    one_mask = inputs[2][:, :1, :1, :1].expand(-1, 18, 6, 7)
    assert torch.equal(modulated_deform_conv2d(*turned, padding=1), expected)
    assert torch.equal(modulated_deform_conv2d(*last, *inputs[3:], padding=1), expected)
    outputs = [
        modulated_deform_conv2d(*inputs[:2], mask, *inputs[3:], padding=1)
        for mask in (one_mask, one_mask.contiguous())
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("argument", range(5), ids=["input", "offset", "mask", "weight", "bias"])
def test_special_numbers_do_not_crash(argument: int) -> None:
    for number in (float("nan"), float("inf"), -float("inf"), 1e30, -3e9):
        inputs = list(arguments(2, 2, torch.float32))
        inputs[argument][0] = number
        leaves = [x.requires_grad_() for x in inputs]
        output = modulated_deform_conv2d(*leaves, padding=1)
        torch.autograd.grad(output.sum(), leaves)
        if argument < 3:
            assert output[1].isfinite().all()  # the other image
        if argument == 1:
            assert output[0].isfinite().all()  # a sample without a place is zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_meta_tensors_give_shapes(dtype: torch.dtype, autocast: bool) -> None:
    inputs = [x.to("meta") for x in arguments(2, 2, dtype)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = modulated_deform_conv2d(*inputs, stride=1, padding=1)
    assert (output.device.type, output.dtype) == ("meta", dtype)
    assert output.shape == (2, 6, 6, 7)


def test_autocast_keeps_the_dtype_of_input() -> None:
    image, *others = arguments(1, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = modulated_deform_conv2d(image.bfloat16(), *others, padding=1)
    assert output.dtype == torch.bfloat16
    expected = modulated_deform_conv2d(image.bfloat16().float(), *others, padding=1)
    assert torch.equal(output, expected.bfloat16())


@pytest.mark.parametrize(
    ("index", "change", "options", "message"),
    [
        (0, lambda x: x[0], {}, r"\[4, 6, 7\] .*expected \[N, C, H, W\]"),
        (0, lambda x: x[:, :3], {}, r"weight has shape \[6, 4, 3, 3\], .* C = 3"),
        (0, lambda x: x.int(), {}, "input has dtype torch.int32, expected float64"),
        (0, lambda x: x.double(), {}, r"offset has dtype torch.float32, expected .*float64"),
        (0, lambda x: x[..., :0], {}, "expected no size but N to be zero"),
        (1, lambda x: x[:, 1:], {}, r"offset has shape \[2, 35, 6, 7\], expected \[2, 36, 6, 7\]"),
        (1, lambda x: x[:1], {}, r"offset has shape \[1, 36, 6, 7\], expected \[2, 36, 6, 7\]"),
        (1, lambda x: x, {"stride": 2}, r"offset .* expected \[2, 36, 3, 4\]"),
        (2, lambda x: x[:, 1:], {}, r"mask has shape \[2, 17, 6, 7\], expected \[N, G \* 9"),
        (2, lambda x: x[0], {}, r"mask has shape \[18, 6, 7\], expected"),
        (2, lambda x: x.to("meta"), {}, "mask is on meta, expected cpu as input is"),
        (3, lambda x: x[:, :3], {}, r"weight has shape \[6, 3, 3, 3\]"),
        (3, lambda x: x[:5, :2], {}, r"weight has shape \[5, 2, 3, 3\].* dividing C_out"),
        (3, lambda x: x[:, :, :0], {}, "expected no size but N to be zero"),
        (3, lambda x: x.long(), {}, "weight has dtype torch.int64, expected one of"),
        (4, lambda x: x[1:], {}, r"bias has shape \[5\], expected \[6\]"),
        (4, lambda x: x, {"stride": 0}, r"stride, .* are \(0, 0\), .* at least 1, 0 and 1"),
        (4, lambda x: x, {"padding": -1}, "at least 1, 0 and 1"),
        (4, lambda x: x, {"dilation": 0}, "at least 1, 0 and 1"),
        (4, lambda x: x, {"dilation": 9}, r"kernel of 3 x 3 .* dilation \(9, 9\) fits"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_with_got_and_expected(
    index: int, change: Callable[[Tensor], Tensor], options: dict, message: str
) -> None:
    inputs = list(arguments(1, 2, torch.float32))
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=message):
        modulated_deform_conv2d(*inputs, **({"padding": 1} | options))
