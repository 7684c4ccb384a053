from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from framework.nn.attention import attention, choose_attention, mask_to_bias


def prefix_bias(lengths: list[int], num_keys: int) -> torch.Tensor:
    mask = torch.arange(num_keys) < torch.tensor(lengths)[:, None]
    return mask_to_bias(mask)[:, None, None, :]


@pytest.mark.parametrize("num_keys", [7, 300])  # below and above the switch from the explicit to the fused form
@pytest.mark.parametrize("masked", [False, True])
def test_both_forms_equal_the_definition_with_gradients(num_keys: int, masked: bool) -> None:
    query, key, value = (torch.randn(2, 3, num_keys, 8, dtype=torch.float32, requires_grad=True) for _ in range(3))
    bias = prefix_bias([num_keys // 2, num_keys], num_keys) if masked else None
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / 8**0.5
    expected = torch.softmax(scores if bias is None else scores + bias, -1) @ value
    found = attention(query, key, value, bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((found * weights).sum(), (query, key, value))
    wanted = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_masked_key_has_no_weight_at_all(needs_grad: bool) -> None:
    query, key, value = (torch.randn(1, 2, 5, 4, requires_grad=needs_grad) for _ in range(3))
    bias = prefix_bias([3], 5)
    before = attention(query, key, value, bias)
    with torch.no_grad():
        key[:, :, 3:] = 1e6
        value[:, :, 3:] = -1e6
    assert torch.equal(before, attention(query, key, value, bias))


def test_choice_depends_on_device_dtype_size_and_gradients() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_attention(cpu, torch.bfloat16, 32, needs_grad=True) == "explicit"
    assert choose_attention(cpu, torch.bfloat16, 1024, needs_grad=True) == "fused"
    assert choose_attention(cpu, torch.float32, 512, needs_grad=True) == "fused"
    assert choose_attention(cpu, torch.float64, 8, needs_grad=True) == "fused"
    assert choose_attention(cpu, torch.bfloat16, 32, needs_grad=False) == "fused"
    assert choose_attention(cuda, torch.bfloat16, 32, needs_grad=True) == "fused"


def test_fused_form_is_torch_attention() -> None:
    query, key, value = (torch.randn(2, 2, 6, 4) for _ in range(3))
    assert torch.equal(attention(query, key, value), F.scaled_dot_product_attention(query, key, value))
