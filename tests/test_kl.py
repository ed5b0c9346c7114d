"""kl.py against the dense computation in float64 with torch's own autograd.

Run: python -m pytest tests/test_kl.py
"""

import pytest
import torch

import kl
from kl import Head, chunked_divergence, entropy, forward_kl, reverse_kl

N, V_S, V_T, V, D_S, D_T = 11, 41, 37, 35, 5, 7


def clipped_forward_kl(student_logprobs, teacher_logprobs):
    terms = teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)
    return terms.clamp(max=0.05).sum(-1)


def inputs(dtype=torch.float32, bias=False, softcap=None):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    student = Head(draw(V_S, D_S), draw(V_S) if bias else None, softcap)
    teacher = Head(draw(V_T, D_T), draw(V_T) if bias else None, softcap)
    return draw(N, D_S), student, draw(N, D_T), teacher


def dense_logprobs(hidden, head, vocab_size, temperature):
    logits = hidden.double() @ head.weight.double().T
    logits = logits if head.bias is None else logits + head.bias.double()
    logits = logits[:, :vocab_size]
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, clipped_forward_kl])
@pytest.mark.parametrize(("bias", "softcap", "temperature"), [(False, None, 1.0), (True, 2.0, 1.3)])
@pytest.mark.parametrize("chunk_size", [3, 256])
@pytest.mark.parametrize("cpu_block", [2 * V_S, 2**20])
def test_values_and_gradients_equal_the_dense_ones(
    divergence, bias, softcap, temperature, chunk_size, cpu_block, monkeypatch
):
    monkeypatch.setattr(kl, "CPU_BLOCK", cpu_block)
    hidden, head, teacher_hidden, teacher_head = inputs(bias=bias, softcap=softcap)
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1))
    leaves = [t.requires_grad_() for t in (hidden, head.weight, head.bias) if t is not None]
    values = chunked_divergence(
        divergence, hidden, head, teacher_hidden, teacher_head,
        weights=weights, vocab_size=V, temperature=temperature, chunk_size=chunk_size,
    )  # fmt: skip
    (3.0 * (weights * values).sum()).backward()  # a caller may scale the loss
    copies = [t.detach().double().requires_grad_() for t in leaves]
    copied = Head(copies[1], copies[2] if bias else None, softcap)
    expected = divergence(
        dense_logprobs(copies[0], copied, V, temperature),
        dense_logprobs(teacher_hidden, teacher_head, V, temperature),
    )
    (3.0 * (weights.double() * expected).sum()).backward()
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    for leaf, copy in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf.grad.double(), copy.grad, rtol=1e-4, atol=1e-5)


def test_frozen_head_takes_any_weights_after_the_fact_and_gets_no_gradient():
    hidden, head, teacher_hidden, teacher_head = inputs()
    hidden.requires_grad_()
    teacher_hidden.requires_grad_()
    values = chunked_divergence(
        reverse_kl, hidden, head, teacher_hidden, teacher_head, vocab_size=V, chunk_size=4
    )
    (values**2).sum().backward()  # the weight of a token may even depend on its value
    copy = hidden.detach().double().requires_grad_()
    teacher = dense_logprobs(teacher_hidden.detach(), teacher_head, V, 1)
    dense = reverse_kl(dense_logprobs(copy, head, V, 1), teacher)
    (dense**2).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), copy.grad, rtol=1e-4, atol=1e-5)
    assert teacher_hidden.grad is None
    assert head.weight.grad is None


def test_trainable_head_refuses_missing_or_other_weights():
    hidden, head, teacher_hidden, teacher_head = inputs()
    head.weight.requires_grad_()
    args = (reverse_kl, hidden, head, teacher_hidden, teacher_head)
    with pytest.raises(ValueError, match="pass weights="):
        chunked_divergence(*args, vocab_size=V)
    values = chunked_divergence(*args, vocab_size=V, weights=torch.ones(N))
    with pytest.raises(ValueError, match="weigh tokens"):
        (values * torch.arange(N)).sum().backward()


def test_direction_of_both_divergences():
    student, teacher = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert forward_kl(student, teacher).item() == pytest.approx(0.5108, abs=1e-4)
    assert reverse_kl(student, teacher).item() == pytest.approx(0.3681, abs=1e-4)
    assert entropy(student).item() == pytest.approx(0.3251, abs=1e-4)


def test_tuples_rows_and_empty_input():
    hidden, head, teacher_hidden, teacher_head = inputs()
    hidden.requires_grad_()
    ids = torch.arange(N)

    def divergence(s, t, i):
        assert len(s) == len(t) == len(i) <= 4
        return reverse_kl(s, t), entropy(t), s.gather(1, i[:, None])[:, 0]

    kept = chunked_divergence(
        divergence, hidden, head, teacher_hidden, teacher_head,
        rows=(ids,), vocab_size=V, chunk_size=4,
    )  # fmt: skip
    student = dense_logprobs(hidden, head, V, 1)
    teacher = dense_logprobs(teacher_hidden, teacher_head, V, 1)
    expected = reverse_kl(student, teacher), entropy(teacher)
    assert [v.requires_grad for v in kept] == [True, False, False]
    for value, wanted in zip(kept[:2], expected, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept[2].double(), student[ids, ids].detach(), rtol=1e-4, atol=1e-5)
    empty = chunked_divergence(
        reverse_kl, hidden[:0], head, teacher_hidden[:0], teacher_head, vocab_size=V
    )
    empty.sum().backward()
    assert empty.shape == (0,)
    pair = chunked_divergence(
        lambda s, t: (reverse_kl(s, t), entropy(s)),
        hidden[:0],
        head,
        teacher_hidden[:0],
        teacher_head,
        vocab_size=V,
    )
    assert [len(p) for p in pair] == [0, 0]


def test_row_counts_must_agree():
    hidden, head, teacher_hidden, teacher_head = inputs()
    with pytest.raises(ValueError, match="rows"):
        chunked_divergence(reverse_kl, hidden[1:], head, teacher_hidden, teacher_head, vocab_size=V)


def test_token_logprobs():
    hidden, head, _, _ = inputs(bias=True, softcap=3.0)
    ids = torch.arange(N) + 20
    expected = dense_logprobs(hidden, head, V_S, 1)[torch.arange(N), ids]
    torch.testing.assert_close(
        kl.token_logprobs(hidden, head, ids, chunk_size=4).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_bf16_operands_keep_float32_precision():
    """bf16 logits miss both bounds: per-token errors near 1e-2, gradients off by 5 %."""
    g = torch.Generator().manual_seed(0)
    n, v, d = 64, 20_000, 96  # more than two 8,192-column slices, a ragged last one
    hidden, teacher_hidden = (torch.randn(n, d, generator=g) for _ in range(2))
    weight = torch.randn(v, d, generator=g) * 0.4  # logits of about +-4, as in a real model
    near = weight + 0.02 * torch.randn(v, d, generator=g)  # a teacher close to its student
    teacher_hidden = hidden + 0.05 * teacher_hidden
    hidden, weight, teacher_hidden, near = (
        t.bfloat16() for t in (hidden, weight, teacher_hidden, near)
    )
    hidden.requires_grad_()
    values = chunked_divergence(forward_kl, hidden, Head(weight), teacher_hidden, Head(near))
    values.sum().backward()
    copy = hidden.detach().double().requires_grad_()
    exact = forward_kl(
        (copy @ weight.double().T).log_softmax(-1),
        (teacher_hidden.double() @ near.double().T).log_softmax(-1),
    )
    exact.sum().backward()
    assert (values.double() - exact).abs().max() < 1e-4
    assert (values >= 0).all()
    cosine = torch.cosine_similarity(hidden.grad.double(), copy.grad, dim=1)
    assert cosine.min() > 0.9999  # the gradient itself is returned in bf16
