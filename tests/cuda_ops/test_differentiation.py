"""What autograd may ask of the attention operators beside a plain gradient: right, or refused."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from cuda_ops.cases import Case, make_inputs
from cuda_ops.ops import (
    fused_deformable_attention,
    modulated_deform_conv2d,
    multi_scale_deformable_attention,
)

SHAPES = ((4, 5), (2, 3))


def fused(*x: Tensor) -> Tensor:
    return fused_deformable_attention(x[0], SHAPES, *x[1:])


def plain(*x: Tensor) -> Tensor:
    return multi_scale_deformable_attention(x[0], SHAPES, *x[1:])


def convolve(*x: Tensor) -> Tensor:
    return modulated_deform_conv2d(*x, padding=1)


def tensors(operator: Callable[..., Tensor], numbers: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    if operator is convolve:
        return [uniform(2, 4, 5, 6), uniform(2, 18, 5, 6), uniform(2, 9, 5, 6),
                uniform(3, 4, 3, 3), uniform(3)]  # fmt: skip
    case = Case("small", N=2, shapes=SHAPES, M=2, D=3, Q=4, K=2, R=numbers)
    inputs = [x.detach() for x in make_inputs(case, torch.float64, "cpu", generator, 2.0).leaves()]
    if operator is plain:
        return [inputs[0], uniform(2, 4, 2, 2, 2, 2), uniform(2, 4, 2, 2, 2)]
    return inputs


OPERATORS = pytest.mark.parametrize("operator", [fused, plain, convolve])


@OPERATORS
def test_any_subset_of_gradients(operator: Callable[..., Tensor]) -> None:
    inputs = tensors(operator)
    leaves = [x.clone().requires_grad_() for x in inputs]
    everything = torch.autograd.grad(operator(*leaves).square().sum(), leaves)
    for wanted in product([False, True], repeat=len(inputs)):
        if not any(wanted):
            assert not operator(*inputs).requires_grad
            continue
        some = [x.clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        operator(*some).square().sum().backward()
        for x, want, expected in zip(some, wanted, everything, strict=True):
            assert (x.grad is not None) == want
            if want:
                torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-14)


@OPERATORS
def test_second_derivatives_are_refused(operator: Callable[..., Tensor]) -> None:
    leaves = [x.requires_grad_() for x in tensors(operator)]
    first = torch.autograd.grad(operator(*leaves).square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=r"differentiated once.*cuda_ops\.reference"):
        torch.autograd.grad(first.square().sum(), leaves)


@OPERATORS
def test_forward_mode_is_refused(operator: Callable[..., Tensor]) -> None:
    inputs = tensors(operator)
    for i, x in enumerate(inputs[:3]):
        with forward_ad.dual_level():
            dual = [*inputs[:i], forward_ad.make_dual(x, torch.ones_like(x)), *inputs[i + 1 :]]
            with pytest.raises(NotImplementedError, match="forward-mode"):
                operator(*dual)
            assert operator(*inputs).isfinite().all()  # dual numbers elsewhere are no matter
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: operator(x, *inputs[1:]), (inputs[0],), (inputs[0],))


@OPERATORS
def test_functional_gradients_are_refused_by_torch(operator: Callable[..., Tensor]) -> None:
    inputs = tensors(operator)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: operator(x, *inputs[1:]).sum())(inputs[0])


@OPERATORS
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_equals_a_loop(operator: Callable[..., Tensor]) -> None:
    value, *others = tensors(operator)
    values = torch.stack([value, 2 * value, -value])
    together = torch.vmap(lambda x: operator(x, *others))(values)
    torch.testing.assert_close(together, torch.stack([operator(x, *others) for x in values]))


@pytest.mark.parametrize("operator", [fused, plain])
def test_jacobian_by_batched_gradients(operator: Callable[..., Tensor]) -> None:
    inputs = tensors(operator)
    one_by_one, batched = (
        torch.autograd.functional.jacobian(
            lambda x: operator(inputs[0], x, *inputs[2:]).sum(0)[:2], inputs[1], vectorize=batch
        )
        for batch in (False, True)
    )
    torch.testing.assert_close(one_by_one, batched)


@OPERATORS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(operator: Callable[..., Tensor], reentrant: bool) -> None:
    leaves = [x.requires_grad_() for x in tensors(operator)]
    operator(*leaves).square().sum().backward()
    expected = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    checkpoint(operator, *leaves, use_reentrant=reentrant).square().sum().backward()
    for x, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(x.grad, grad, rtol=0, atol=0)


@OPERATORS
def test_inference_mode(operator: Callable[..., Tensor]) -> None:
    inputs = tensors(operator)
    expected = operator(*inputs)
    with torch.inference_mode():
        output = operator(*inputs)
        assert output.is_inference()
        assert torch.equal(output, expected)
        assert torch.equal(operator(*(x.clone() for x in inputs)), expected)


@pytest.mark.parametrize("numbers", [2, 4])
def test_inputs_changed_in_place_before_backward_are_noticed(numbers: int) -> None:
    leaves = tensors(fused, numbers)
    value = leaves[0].requires_grad_() * 1
    output = fused(value, *leaves[1:])
    with torch.no_grad():
        value.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
