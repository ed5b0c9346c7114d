"""Student and teacher with different tokenizers: shared vocabulary and aligned tokens.

The student's text is tokenised again by the teacher's tokenizer; tokens that cover exactly the same
bytes are supervised, and the divergence there runs over the vocabulary entries that stand for the
same bytes on both sides [2605.27028 Sec. 4.1]. Two tokenizers whose ids agree need none of it.
"""

import dataclasses
import json
import re
from typing import Any

import torch
from torch import Tensor

from common import Rollout, Stop, turn_end_id
from kl import Head, every_logprob


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Entries that student and teacher share. `aligned`: token ids differ, so texts are aligned."""

    size: int  # V
    aligned: bool
    student_ids: Tensor | int  # rows of the student's head: (V,) long, or the first V
    teacher_ids: Tensor | int
    student_bytes: list[bytes | None] = dataclasses.field(default_factory=list, repr=False)
    teacher_bytes: list[bytes | None] = dataclasses.field(default_factory=list, repr=False)


def match_vocabularies(student_tokenizer: Any, teacher_tokenizer: Any) -> Vocabulary:
    """How two tokenizers meet: by id when every shared id is the same string, else by bytes.

    Rows of a head beyond both tokenizers are padding and are cut (Qwen2.5: 151,665 of 151,936).
    Stops when the two share next to nothing.
    """
    student_vocab, teacher_vocab = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    size = min(max(student_vocab.values()), max(teacher_vocab.values())) + 1
    by_id = {i: token for token, i in student_vocab.items()}
    if all(by_id.get(i, token) == token for token, i in teacher_vocab.items() if i < size):
        return Vocabulary(size, False, size, size)
    student_bytes, teacher_bytes = token_bytes(student_tokenizer), token_bytes(teacher_tokenizer)
    teacher_id = {b: i for i, b in reversed(list(enumerate(teacher_bytes))) if b}
    pairs = {b: (i, teacher_id[b]) for i, b in enumerate(student_bytes) if b and b in teacher_id}
    if len(pairs) < max(16, size // 100):
        raise Stop(
            f"student and teacher vocabularies share {len(pairs)} strings of {len(student_vocab)} "
            f"and {len(teacher_vocab)}: nothing to distil along; choose a closer teacher."
        )
    # The two end-of-turn tokens mean the same, whatever they are called.
    ends = (turn_end_id(student_tokenizer), turn_end_id(teacher_tokenizer))
    ids = torch.tensor([*sorted(pairs.values()), ends])  # (V, 2)
    return Vocabulary(len(ids), True, ids[:, 0], ids[:, 1], student_bytes, teacher_bytes)


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The exact bytes each id stands for in running text; None for special and unused ids.

    Knows byte-level BPE (GPT-2's byte alphabet) and sentencepiece-style BPE (U+2581 for a space,
    <0xE2> for a byte). Stops on any other kind.
    """
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    added = tokenizer.get_added_vocab()
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    vocab = tokenizer.get_vocab()
    table: list[bytes | None] = [None] * (max(vocab.values()) + 1)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]  # GPT-2 shows these as U+0100 and up
    alphabet = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    for token, i in vocab.items():
        if token in added:
            spelled = token.replace("\u2581", " ") if "ByteFallback" in decoder else token
            table[i] = None if i in special else spelled.encode()
        elif "ByteLevel" in decoder:
            table[i] = bytes(alphabet[c] for c in token)
        elif "ByteFallback" in decoder:
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            table[i] = bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()
        else:
            raise Stop("cannot read this tokenizer's bytes: only byte-level and sentencepiece BPE.")
    return table


def align_tokens(student: list[bytes], teacher: list[bytes]) -> list[tuple[int, int]]:
    """Pairs (i, j) of tokens that cover exactly the same bytes of the same text.

    A greedy walk with two pointers [2605.27028 Sec. 4.1]; it ends where the two texts first differ
    (a teacher that normalises Unicode), so a pair is never wrong, at worst missing.
    """
    student_text, teacher_text = b"".join(student), b"".join(teacher)
    same = min(len(student_text), len(teacher_text))
    if student_text[:same] != teacher_text[:same]:
        letters = enumerate(zip(student_text, teacher_text, strict=False))
        same = next(n for n, (a, b) in letters if a != b)
    pairs, i, j, start_i, start_j = [], 0, 0, 0, 0
    while i < len(student) and j < len(teacher):
        end_i, end_j = start_i + len(student[i]), start_j + len(teacher[j])
        if max(end_i, end_j) > same:
            break
        if start_i == start_j and end_i == end_j:
            pairs.append((i, j))
        if end_i <= end_j:
            i, start_i = i + 1, end_i
        if end_j <= end_i:
            j, start_j = j + 1, end_j
    return pairs


def teacher_rollouts(
    rollouts: list[Rollout], prompts: list[list[int]], vocabulary: Vocabulary, tokenizer: Any
) -> list[Rollout]:
    """The same completions as the teacher reads them: its own prompt, its own `tokenizer`'s tokens.

    Sets `supervised` on both sides, so that row k of one batch predicts the same bytes as row k of
    the other. Text after a special token, or after bytes that are no UTF-8, is not supervised.
    """
    teacher = []
    for rollout, prompt_ids in zip(rollouts, prompts, strict=True):
        ids, pairs = rollout.completion_ids, []
        if vocabulary.aligned:
            ids, pairs = _read_as_teacher(rollout, vocabulary, tokenizer)
        else:  # the teacher cannot read on past an id that it lacks
            known = (n for n, i in enumerate(ids) if i >= vocabulary.size)
            ids = ids[: next(known, len(ids))]
            pairs = [(n, n) for n in range(len(ids))]
        ours, theirs = {i for i, _ in pairs}, {j for _, j in pairs}
        rollout.supervised = [n in ours for n in range(len(rollout.completion_ids))]
        supervised = [n in theirs for n in range(len(ids))]
        teacher.append(Rollout(prompt_ids, ids, rollout.finish_reason, [], supervised))
    return teacher


def _read_as_teacher(
    rollout: Rollout, vocabulary: Vocabulary, tokenizer: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    pieces = [vocabulary.student_bytes[i] for i in rollout.completion_ids]
    pieces = pieces[: next((n for n, b in enumerate(pieces) if b is None), len(pieces))]
    data = b"".join(pieces)
    try:
        text, whole = data.decode(), True
    except UnicodeDecodeError as error:  # a rollout may be cut inside a character
        text, whole = data[: error.start].decode(), False
    ids = tokenizer(text, add_special_tokens=False).input_ids
    read = [vocabulary.teacher_bytes[i] or b"" for i in ids]
    if read and read[0][:1] == b" " and text[:1] != " ":
        read[0] = read[0][1:]  # sentencepiece puts a space before the first word
    pairs = align_tokens(pieces, read)
    ended = rollout.completion_ids[len(pieces) :] == [int(vocabulary.student_ids[-1])]
    if ended and whole and b"".join(read) == data:  # both end their turn here
        pairs.append((len(pieces), len(ids)))
        ids = [*ids, int(vocabulary.teacher_ids[-1])]
    return ids, pairs


@torch.no_grad()
def print_alignment(
    vocabulary: Vocabulary,
    rollouts: list[Rollout],
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head],
) -> None:
    """What the alignment keeps: entries, probability mass on them, and tokens.

    `student` and `teacher` are hidden states (N, D) of aligned tokens and the full head.
    """
    masses = []
    for (hidden, head), ids in zip(
        (student, teacher), (vocabulary.student_ids, vocabulary.teacher_ids), strict=True
    ):
        logprobs = every_logprob(hidden[:64].detach(), head)  # (64, V)
        masses.append(logprobs[:, ids.to(logprobs.device)].exp().sum(-1).mean().item())
    flags = [kept for rollout in rollouts for kept in rollout.supervised]
    print(
        f"tokenizers differ: the {vocabulary.size:,} entries that both have hold {masses[0]:.1%} "
        f"of the student's and {masses[1]:.1%} of the teacher's probability; "
        f"{sum(flags) / len(flags):.1%} of the first {len(flags)} sampled tokens are aligned."
    )
