"""Log-probs in chunks: the same numbers and gradients, and never the matrix of tokens by vocabulary."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longshore.learner.token_head import token_logprobs

TOKENS, VOCABULARY, WIDTH = 300, 1000, 16


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return made


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    temperature = torch.rand(TOKENS) + 0.5
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,)), temperature


def plain(hidden, weight, targets, temperature):
    """In float64, all at once."""
    logits = hidden.double() @ weight.double().t() / temperature.double()[:, None]
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    return log_probs.gather(1, targets[:, None]).squeeze(1), -(probs * log_probs).sum(-1), probs.square().sum(-1)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def relative(one, other):
    return float(((one - other).norm() / other.norm()).detach())


@pytest.mark.parametrize("rows", [1, 7, 299, 300, 10_000])
def test_chunks_give_the_plain_log_probs_entropies_and_gradients(rows):
    given = inputs()
    coefficients = torch.randn(TOKENS)
    logp, entropy, collision = token_logprobs(*given, max_bytes=rows * VOCABULARY * 4)
    expected, *others = plain(*given)
    assert relative(logp.double(), expected) < 1e-6
    for one, other in zip((entropy, collision), others, strict=True):
        assert relative(one.double(), other) < 1e-5
        assert not one.requires_grad
    made = gradients((logp * coefficients).sum(), *given[:2])
    for one, other in zip(made, gradients((expected * coefficients).sum(), *given[:2]), strict=True):
        assert relative(one, other) < 1e-5


@pytest.mark.parametrize("rows", [10, 100])
def test_no_tensor_is_larger_than_the_bound_forward_or_backward(rows):
    given = inputs()
    largest = Largest()
    with largest:
        logp, _, _ = token_logprobs(*given, max_bytes=rows * VOCABULARY * 4)
        logp.sum().backward()
    # The gradient of the weights is as large as they are.
    assert largest.elements <= max(rows * VOCABULARY, VOCABULARY * WIDTH)
    assert given[1].grad is not None


def test_logits_that_fit_are_not_made_twice():
    given = inputs()
    calls = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if made is not None and isinstance(made, torch.Tensor) and made.shape[-1:] == (VOCABULARY,):
                calls.append(func)
            return made

    with Products():
        logp, _, _ = token_logprobs(*given, max_bytes=TOKENS * VOCABULARY * 4)
        logp.sum().backward()
    assert calls.count(torch.ops.aten.mm.default) == 1


def test_halves_are_added_up_in_float32():
    given = inputs(torch.bfloat16)
    logp, entropy, collision = token_logprobs(*given, max_bytes=50 * VOCABULARY * 4)
    assert {logp.dtype, entropy.dtype, collision.dtype} == {torch.float32}
    expected, _, _ = plain(*given)
    made = gradients(logp.sum(), *given[:2])
    assert [tensor.dtype for tensor in made] == [torch.bfloat16, torch.bfloat16]
    for one, other in zip(made, gradients(expected.sum(), *given[:2]), strict=True):
        assert relative(one.double(), other.double()) < 1e-2


def test_a_frozen_output_embedding_gets_no_gradient():
    hidden, weight, *rest = inputs()
    logp, _, _ = token_logprobs(hidden, weight.detach(), *rest, max_bytes=50 * VOCABULARY * 4)
    logp.sum().backward()
    assert hidden.grad is not None
