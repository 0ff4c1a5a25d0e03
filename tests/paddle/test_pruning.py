"""What ``paddle.grad`` leaves out, found in the graph without holding on to it."""

from __future__ import annotations

import sys

import paddle

from flatwater.paddle.pruning import leads_to, node_of, targets_of_paddle_grad


def leaf() -> paddle.Tensor:
    tensor = paddle.ones([3])
    tensor.stop_gradient = False
    return tensor


def test_a_node_is_referred_to_by_whoever_asked_for_it_only() -> None:
    for tensor in (leaf(), leaf() * 2.0):
        node = node_of(tensor)
        alone = sys.getrefcount(node)
        again = node_of(tensor)
        assert again is node
        assert sys.getrefcount(node) == alone + 1


def test_a_gradient_leads_to_what_its_tensor_was_computed_from() -> None:
    x, other = leaf(), leaf()
    middle = x * 2.0
    end = middle + 1.0
    targets = {node_of(x).node_ptr()}
    assert leads_to(node_of(x), targets)
    assert leads_to(node_of(middle), targets)
    assert leads_to(node_of(end), targets)
    assert not leads_to(node_of(other), targets)
    assert not leads_to(node_of(x), {node_of(middle).node_ptr()})
    assert not leads_to(None, targets)


def test_nothing_is_asked_for_outside_paddle_grad() -> None:
    assert targets_of_paddle_grad() is None
