"""Exact divergences over the full vocabulary, per token, in chunks. Needs torch and nothing else.

(N, V) logits of 16k tokens and 150k entries are 10 GB in float32, and an autograd pass over them
holds several such tensors. Here a few (chunk, V) blocks exist at a time, each chunk's gradient is
formed while it is at hand, and nothing is computed twice. Values come back per token, so that a
method may weigh, clip, gate or mask them as it likes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Divergence = Callable[..., Tensor]  # (n, V) student_logprobs, (n, V) teacher_logprobs -> (n,) nats


class Head(NamedTuple):
    """What turns hidden states into logits: softcap * tanh((h W^T + b) / softcap)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None  # Gemma 2's final_logit_softcapping


def forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v q(v) [log q(v) - log p(v)]: (n, V), (n, V) -> (n,) nats."""
    return (teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)).sum(-1)


def reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v p(v) [log p(v) - log q(v)]: (n, V), (n, V) -> (n,) nats."""
    return (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1)


def entropy(logprobs: Tensor) -> Tensor:
    """H = -sum_v p(v) log p(v): (n, V) -> (n,) nats."""
    return -(logprobs.exp() * logprobs).sum(-1)


def chunked_divergence(
    divergence: Divergence,
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    *,
    weights: Tensor | None = None,
    rows: tuple[Tensor, ...] = (),
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_size: int = 256,
) -> Any:
    """Per-token divergence over the full vocabulary, never holding (N, V) logits at once.

    Shapes: student_hidden (N, D_s), teacher_hidden (N, D_t) -> (N,) float32 nats, differentiable in
    the student and unreduced: sum it with any weights. Row i of both must predict the same token.
    `divergence(student_logprobs, teacher_logprobs, *rows)` sees (n, V) blocks and the matching
    slices of each (N,) tensor in `rows`; it may return a tuple, whose further members come back as
    detached (N,) tensors. Its rows must be independent.
    Each chunk's gradient is computed in the forward pass, so backward is one multiplication and
    nothing is recomputed. A head that trains needs `weights` (N,), the ones the caller then
    multiplies with: its gradient mixes rows and cannot be rescaled row by row afterwards.
    Memory on CPU: two (chunk_size, V) float32 blocks, 156 MB each at 256 x 151,936, and (N, D_s).
    A GPU differentiates a whole chunk at once, and so holds some six blocks more (not measured).
    Raises ValueError when row counts differ or a training head lacks weights. Heads of unequal
    vocabularies need vocab_size=, unless the divergence only reads single entries of each side.
    """
    student_head, teacher_head = (_first(vocab_size, h) for h in (student_head, teacher_head))
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            f"{len(student_hidden)} student rows, {len(teacher_hidden)} teacher rows: masks differ"
        )
    trains = any(t is not None and t.requires_grad for t in student_head[:2])
    if trains and torch.is_grad_enabled() and weights is None:
        raise ValueError("a trainable head needs the per-token weights: pass weights=")
    outputs = _ChunkedDivergence.apply(
        divergence, student_hidden, student_head.weight, student_head.bias, student_head.softcap,
        teacher_hidden.detach(), teacher_head, weights, rows, temperature, chunk_size,
        torch.is_grad_enabled(),
    )  # fmt: skip
    return outputs if len(outputs) > 1 else outputs[0]


def _differentiate(
    divergence, logits, softcap, teacher_logits, teacher_softcap, rows, temperature, want_gradient
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `divergence` returns for these rows; `logits` becomes dD_i / dlogits in place."""
    teacher_logprobs = _logprobs(teacher_logits, teacher_softcap, temperature)
    with torch.set_grad_enabled(want_gradient):
        leaf = logits.detach().requires_grad_(want_gradient)
        output = divergence(_logprobs(leaf, softcap, temperature), teacher_logprobs, *rows)
        output = output if isinstance(output, tuple) else (output,)
        if want_gradient:
            logits.copy_(torch.autograd.grad(output[0].sum(), leaf)[0])
    return tuple(o.detach() for o in output)


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, divergence, student_hidden, weight, bias, softcap, teacher_hidden, teacher_head,
        weights, rows, temperature, chunk_size, grad_enabled,
    ):  # fmt: skip
        needs = [grad_enabled and need for need in ctx.needs_input_grad]
        want_hidden, want_weight, want_bias = needs[1:4]
        num, device = len(student_hidden), student_hidden.device
        chunk_size = min(chunk_size, max(num, 1))
        student_logits = torch.empty(chunk_size, len(weight), device=device)
        teacher_logits = torch.empty(chunk_size, len(teacher_head.weight), device=device)
        # Matrix products want many rows; on CPU the passes over the vocabulary want few, so that
        # a block and its temporaries stay in cache. A GPU takes the whole chunk at once.
        block = chunk_size if device.type == "cuda" else max(1, CPU_BLOCK // len(weight))
        grad_hidden = torch.empty_like(student_hidden, dtype=torch.float32) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if want_bias else None
        outputs = []
        for start in range(0, num, chunk_size):
            chunk = slice(start, min(start + chunk_size, num))
            n = chunk.stop - start
            hidden, logits = student_hidden[chunk], student_logits[:n]  # (n, D), (n, V)
            _matmul(hidden, weight.T, out=logits, bias=bias)
            _matmul(
                teacher_hidden[chunk], teacher_head.weight.T, out=teacher_logits[:n],
                bias=teacher_head.bias,
            )  # fmt: skip
            for first in range(0, n, block):
                part = slice(first, min(first + block, n))
                output = _differentiate(
                    divergence, logits[part], softcap, teacher_logits[part], teacher_head.softcap,
                    [r[chunk][part] for r in rows], temperature, any(needs),
                )  # fmt: skip
                # Into tensors made once: a small one kept per block pins the heap around it, and
                # glibc then takes new memory for each block (+340 MB at 256 x 151,936).
                outputs = outputs or [o.new_empty(num) for o in output]
                for whole, o in zip(outputs, output, strict=True):
                    whole[chunk][part] = o
            if want_hidden:
                _matmul(logits, weight, out=grad_hidden[chunk])
            if want_weight or want_bias:
                logits *= weights[chunk, None]
            if want_weight:
                _matmul(logits.T, hidden, out=grad_weight, add=True)
            if want_bias:
                grad_bias += logits.sum(0)
        if num == 0:  # as many results as the divergence returns
            empty = student_logits[:0], softcap, teacher_logits[:0], teacher_head.softcap
            outputs = _differentiate(divergence, *empty, rows, temperature, False)
        ctx.save_for_backward(grad_hidden, grad_bias, weights)
        ctx.grad_weight = grad_weight  # not saved: backward scales it in place and hands it over
        ctx.dtypes = student_hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_output, *_):
        grad_hidden, grad_bias, weights = ctx.saved_tensors
        grad_weight, ctx.grad_weight = ctx.grad_weight, None
        if ctx.needs_input_grad[2] and grad_weight is None:
            raise RuntimeError("the head's gradient was handed over: one backward per forward")
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if grad_weight is not None or grad_bias is not None:
            scale = (grad_output @ weights) / (weights @ weights).clamp_min(1e-30)
            if not torch.allclose(grad_output, scale * weights, rtol=1e-4, atol=1e-12):
                raise ValueError("the loss must weigh tokens as the weights= passed to the forward")
            grad_weight = None if grad_weight is None else grad_weight.mul_(scale).to(weight_dtype)
            grad_bias = None if grad_bias is None else (grad_bias * scale).to(bias_dtype)
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_output[:, None]).to(hidden_dtype)
        return None, grad_hidden, grad_weight, grad_bias, *[None] * 8


CPU_BLOCK = 2**19  # elements of one CPU block: 2 MB of float32, about a core's share of cache


def _first(size: int | None, head: Head) -> Head:
    # A slice costs its backward a second gradient of the head's size: only where there is a tail.
    if size is None or size == len(head.weight):
        return head
    return Head(head.weight[:size], None if head.bias is None else head.bias[:size], head.softcap)


def _logprobs(logits: Tensor, softcap: float | None, temperature: float) -> Tensor:
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature if temperature != 1 else logits, -1)


def _matmul(
    a: Tensor, b: Tensor, *, out: Tensor | None = None, bias: Tensor | None = None, add=False
) -> Tensor:
    """a @ b (+ bias), or out += a @ b, in float32. bf16 operands keep a float32 result: rounding
    logits to bf16 makes a 6 % gradient error. CPUs have no such product, so they convert 8,192
    vocabulary entries at a time: columns of b for logits, rows of b for the gradient."""
    if out is None:
        out = torch.empty(a.shape[0], b.shape[1], device=a.device)
    dtype = b.dtype if b.dtype != torch.float32 else a.dtype
    if not a.is_cuda and dtype != torch.float32 and a.shape[1] > b.shape[1]:  # (n, V) @ (V, D)
        for i in range(0, a.shape[1], 8192):
            part = a[:, i : i + 8192].float(), b[i : i + 8192].float()
            torch.addmm(out, *part, beta=int(add or i > 0), out=out)
    elif not a.is_cuda and dtype != torch.float32:
        a = a.float()
        for i in range(0, b.shape[1], 8192):
            part = out[:, i : i + 8192]
            torch.addmm(part, a, b[:, i : i + 8192].float(), beta=int(add), out=part)
    else:
        kind = {} if dtype == torch.float32 else {"out_dtype": torch.float32}
        product = (a.to(dtype), b.to(dtype))
        torch.addmm(out, *product, out=out, **kind) if add else torch.mm(*product, out=out, **kind)
    return out if bias is None else out.add_(bias)


def every_logprob(hidden: Tensor, head: Head) -> Tensor:
    """(n, D) -> (n, V) float32 log-probs at T = 1. Only for a few rows: nothing is chunked."""
    return _logprobs(_matmul(hidden, head.weight.T, bias=head.bias), head.softcap, 1.0)


@torch.no_grad()
def token_logprobs(hidden: Tensor, head: Head, token_ids: Tensor, chunk_size: int = 256) -> Tensor:
    """(N,) log-probs of token_ids (N,) at T = 1, without gradient."""
    parts = [
        every_logprob(h, head).gather(1, ids[:, None])[:, 0]
        for h, ids in zip(hidden.split(chunk_size), token_ids.split(chunk_size), strict=True)
    ]
    return torch.cat(parts)
