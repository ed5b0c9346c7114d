"""Alignment of two tokenizers: on hand-made cases, on tiny/, and on real ones where ../shared is.

Run: python -m pytest tests/test_align.py -s     (-s prints the aligned fraction of every pair)
"""

import functools
import itertools
import json

import pytest
import torch
import transformers
from conftest import ROOT

from align import align_tokens, match_vocabularies, teacher_rollouts, token_bytes
from common import Rollout, Stop

SHARED = ROOT.parent / "shared" / "data"
REAL = ["qwen2_5", "qwen3", "qwen3_5", "deepseek_v3", "smollm2", "gpt2"]
ODD = [
    "he\u0301llo na\u00efve \u212b",
    "\U0001f916 robots \u6f22\u5b57",
    "  two  spaces\n\n\tend",
    "",
]


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ([b"ab", b"c", b"d"], [b"a", b"b", b"c", b"d"], [(1, 2), (2, 3)]),
        ([b"12", b"3"], [b"1", b"23"], []),
        ([b"x", b"12", b"3", b"y"], [b"x", b"1", b"23", b"y"], [(0, 0), (3, 3)]),
        ([b"\xe6", b"\xbc\xa2"], [b"\xe6\xbc\xa2"], []),  # one character, cut differently
        ([b"\xe6", b"\xbc\xa2", b"!"], [b"\xe6\xbc", b"\xa2", b"!"], [(2, 2)]),
        ([b"a", b"b"], [b"a", b"B"], [(0, 0)]),  # texts part: nothing after is trusted
        ([b"a", b"b", b"c"], [b"a", b"X", b"c"], [(0, 0)]),
        ([], [b"a"], []),
    ],
)
def test_align_tokens(student, teacher, pairs):
    assert align_tokens(student, teacher) == pairs


def rewrite(text, student, teacher, vocabulary, ended=True):
    ids = student(text, add_special_tokens=False).input_ids + [student.eos_token_id] * ended
    rollout = Rollout([0], ids, "stop" if ended else "length", [0.0] * len(ids))
    (view,) = teacher_rollouts([rollout], [[0]], vocabulary, teacher)
    return rollout, view


def supervised_ids(rollout):
    return [i for i, s in zip(rollout.completion_ids, rollout.supervised, strict=True) if s]


def check_pair(student, teacher, texts):
    """No aligned pair spells different text; returns the aligned fraction."""
    vocabulary = match_vocabularies(student, teacher)
    ours, theirs = token_bytes(student), token_bytes(teacher)
    sampled = aligned = 0
    for text in texts:
        rollout, view = rewrite(text, student, teacher, vocabulary)
        pairs = list(zip(supervised_ids(rollout), supervised_ids(view), strict=True))
        for i, j in pairs:
            same_end = (i, j) == (student.eos_token_id, teacher.eos_token_id)
            assert same_end or ours[i] == theirs[j], (text, ours[i], theirs[j])
        sampled, aligned = sampled + len(rollout.completion_ids), aligned + len(pairs)
    if vocabulary.aligned:
        rows = zip(vocabulary.student_ids.tolist(), vocabulary.teacher_ids.tolist(), strict=True)
        assert all(ours[i] == theirs[j] for i, j in list(rows)[:-1])
    return aligned / sampled


@functools.cache
def load(path):
    return transformers.AutoTokenizer.from_pretrained(path)


def tiny(name):
    return load(ROOT / "tiny" / name)


def test_tiny_pairs():
    rows = [json.loads(line) for line in (ROOT / "tiny" / "test.jsonl").open()]
    texts = [row["solution"] for row in rows[:50]] + ODD
    assert match_vocabularies(tiny("student"), tiny("teacher")).aligned is False
    assert check_pair(tiny("student"), tiny("teacher"), texts) == 1.0
    fraction = check_pair(tiny("student"), tiny("teacher_other"), texts)
    print(f"student <- teacher_other: {fraction:.3f} aligned")
    assert 0.3 < fraction < 1.0  # merged numbers cannot align, operators can


def test_cut_character_special_token_and_end_of_turn():
    student, teacher = tiny("student"), tiny("teacher_other")
    vocabulary = match_vocabularies(student, teacher)
    ids = student("a \u6f22", add_special_tokens=False).input_ids
    assert len(student("\u6f22", add_special_tokens=False).input_ids) == 3  # one id per byte
    cut = Rollout([0], ids[:-1], "length", [0.0] * (len(ids) - 1))
    (view,) = teacher_rollouts([cut], [[0]], vocabulary, teacher)
    assert teacher.decode(view.completion_ids) == "a "
    assert not any(cut.supervised[-2:])
    ended, view = rewrite("2 + 2", student, teacher, vocabulary)
    assert ended.supervised[-1]
    assert view.supervised[-1]
    assert view.completion_ids[-1] == teacher.eos_token_id
    open_end, view = rewrite("2 + 2", student, teacher, vocabulary, ended=False)
    assert teacher.eos_token_id not in view.completion_ids  # cut is not ended
    assert len(open_end.completion_ids) == len(open_end.supervised)
    middle = Rollout([0], [ids[0], student.pad_token_id, ids[0]], "length", [0.0] * 3)
    (view,) = teacher_rollouts([middle], [[0]], vocabulary, teacher)
    assert middle.supervised[1:] == [False, False]  # nothing is trusted after a special token


def test_same_ids_stop_at_an_id_the_teacher_lacks():
    student = tiny("student")
    vocabulary = match_vocabularies(student, student)
    size = vocabulary.size
    rollout = Rollout([0], [5, 6, size, 7], "length", [0.0] * 4)
    (view,) = teacher_rollouts([rollout], [[0, 1]], vocabulary, student)
    assert rollout.supervised == [True, True, False, False]
    assert view.completion_ids == [5, 6]


def test_nothing_in_common():
    class Fake:
        eos_token_id, chat_template, added_tokens_decoder = 0, None, {}

        def __init__(self, words):
            self.words = words
            self.backend_tokenizer = self

        def to_str(self):
            return json.dumps({"decoder": {"type": "ByteFallback"}})

        def get_vocab(self):
            return {w: i for i, w in enumerate(self.words)}

        def get_added_vocab(self):
            return {}

    with pytest.raises(Stop) as stop:
        match_vocabularies(Fake([f"a{n}" for n in range(99)]), Fake([f"b{n}" for n in range(99)]))
    assert "share 0 strings" in stop.value.sentence
    assert stop.value.code == 2


@pytest.mark.skipif(not SHARED.exists(), reason="real tokenizers are in ../shared only")
@pytest.mark.parametrize("pair", list(itertools.permutations(REAL, 2)), ids="<-".join)
def test_real_tokenizers_never_misalign(pair):
    student, teacher = (load(SHARED / "tokenizers" / name) for name in pair)
    texts = list(ODD)
    for file in ("math500", "gsm8k_test"):
        with open(SHARED / "math" / f"{file}.jsonl") as f:
            texts += [json.loads(line)["solution"] for line, _ in zip(f, range(25), strict=False)]
    fraction = check_pair(student, teacher, texts)
    print(f"{pair[0]} <- {pair[1]}: {fraction:.4f} aligned")
    assert fraction > 0.6
    assert (fraction == 1.0) == ({*pair} == {"qwen2_5", "qwen3"})


def test_alignment_survives_random_ids():
    """Any id sequence a model may sample, broken UTF-8 included."""
    student, teacher = tiny("student"), tiny("teacher_other")
    vocabulary = match_vocabularies(student, teacher)
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(len(student), (12,), generator=g).tolist()
        rollout = Rollout([0], ids, "length", [0.0] * 12)
        (view,) = teacher_rollouts([rollout], [[0]], vocabulary, teacher)
        for i, j in zip(supervised_ids(rollout), supervised_ids(view), strict=True):
            same_end = (i, j) == (student.eos_token_id, teacher.eos_token_id)
            assert same_end or vocabulary.student_bytes[i] == vocabulary.teacher_bytes[j]
