import pytest
import torch
import torch.nn.functional as F

from matformer.layers.norm import rms_norm
from matformer.layers.rotary import rotary_tables, rotate


@pytest.mark.parametrize("shape", [(7, 16), (2, 5, 4, 8), (0, 8)])
def test_rms_norm_and_its_gradients_are_torchs(shape: tuple[int, ...]) -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draws, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], generator=draws, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(shape, generator=draws, dtype=torch.float64)
    ours = rms_norm(x, weight, epsilon=1e-5)
    theirs = F.rms_norm(x, (shape[-1],), weight, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(theirs, (x, weight), grad), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def test_rms_norm_keeps_bfloat16() -> None:
    x, weight = torch.ones(2, 4, dtype=torch.bfloat16), torch.full((4,), 2.0, dtype=torch.bfloat16)
    assert rms_norm(x, weight, epsilon=0.0).dtype == torch.bfloat16


def test_rotation_is_a_complex_product_and_so_is_its_gradient() -> None:
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 3, 8, generator=draws, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(x.shape, generator=draws, dtype=torch.float64)
    cos, sin = rotary_tables(torch.arange(10).view(2, 5, 1), pairs=(4,), bases=(100.0,))
    turn = torch.complex(cos, sin)[:, :, None]

    def expected(value: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(value[..., :4], value[..., 4:]) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    torch.testing.assert_close(rotate(x, (cos, sin)), expected(x), rtol=1e-12, atol=1e-12)
    (mine,) = torch.autograd.grad(rotate(x, (cos, sin)), x, grad)
    (other,) = torch.autograd.grad(expected(x), x, grad)
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
