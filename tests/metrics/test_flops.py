"""FLOPs of simple layers against their closed forms, and that counting changes no number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from rime_pl.metrics.flops import CountedFlops, product_flops_per_second

ROWS, WIDTH, OUT = 5, 64, 48


def test_a_linear_layer_is_one_product_forward_and_two_backward() -> None:
    layer, x = nn.Linear(WIDTH, OUT), torch.randn(ROWS, WIDTH, requires_grad=True)
    with CountedFlops() as counted:
        loss = layer(x).sum()
    product = 2 * ROWS * WIDTH * OUT
    assert counted.flops == product
    with CountedFlops() as counted:
        loss.backward()
    assert counted.flops == 2 * product


def test_recomputation_counts() -> None:
    layer = nn.Sequential(nn.Linear(WIDTH, OUT), nn.Tanh())  # what nobody reads is not recomputed
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with CountedFlops() as counted:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert counted.flops == 4 * 2 * ROWS * WIDTH * OUT


def test_attention_on_a_cpu_with_shared_keys_counts_each_query_head() -> None:
    heads, length, width = 4, 7, 16
    query = torch.randn(2, heads, length, width)
    key = torch.randn(2, 2, length, width)
    with CountedFlops() as counted:
        F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert counted.flops == 2 * 2 * (2 * heads * length * length * width)


def test_a_product_with_a_4bit_weight_counts_like_one_with_a_plain_weight() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(WIDTH, OUT, bias=False, compute_dtype=torch.float32)
    layer.weight = bitsandbytes.nn.Params4bit(torch.randn(OUT, WIDTH), requires_grad=False)
    layer.to("cpu")
    assert layer.weight.numel() < OUT * WIDTH, "it must be packed"
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with CountedFlops() as counted:
        layer(x).sum().backward()
    assert counted.flops == 2 * (2 * ROWS * WIDTH * OUT)  # forward, and the gradient of x


def test_the_measured_product_leaves_the_random_numbers_of_the_run() -> None:
    before = torch.get_rng_state()
    assert product_flops_per_second(torch.device("cpu"), torch.float32, seconds=0) > 1e8
    assert torch.equal(torch.get_rng_state(), before)
