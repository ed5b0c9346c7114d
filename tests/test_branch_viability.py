"""analysis/branch_viability.py: its statistics against scikit-learn, its phases on the tiny world.

Run: python -m pytest tests/test_branch_viability.py
"""

import contextlib
import json
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.metrics import average_precision_score, roc_auc_score

sys.path.insert(0, str(ROOT / "analysis"))
import branch_viability as bv

import common
from common import Stop


# ---- statistics
@pytest.mark.parametrize("levels", [3, 10, 10_000])
def test_auroc_and_auprc_are_scikit_learns_with_ties(levels):
    rng = np.random.default_rng(levels)
    for n in (2, 7, 60, 400):
        score, positive = rng.integers(levels, size=n).astype(float), rng.random(n) < 0.3
        positive[:2] = [True, False]
        assert bv.auroc(positive, score) == pytest.approx(roc_auc_score(positive, score))
        expected = average_precision_score(positive, score)
        assert bv.auprc(positive, score) == pytest.approx(expected)
    assert np.isnan(bv.auroc(np.array([True, True]), np.array([1.0, 2.0])))


def test_residuals_by_hand():
    got = bv.residuals(np.array([1.0, 3.0, 10.0, 5.0]), np.array(["a", "a", "b", "a"]))
    assert got.tolist() == [-2.0, 0.0, 0.0, 2.0]


def test_bootstrap_is_a_plain_one_over_problems():
    """Against code written another way: scikit-learn, a Python loop, each copy its own problem."""
    rng = np.random.default_rng(3)
    cluster = np.repeat(np.arange(12), rng.integers(1, 9, size=12))
    positive, score = rng.random(len(cluster)) < 0.5, rng.integers(5, size=len(cluster)) * 1.0
    got = bv.cluster_bootstrap(positive, score, cluster, 300, seed=7)
    draws, again = [], np.random.default_rng(7)
    for _ in range(300):
        values, labels = [], []
        for name in again.integers(12, size=12):
            mine = score[cluster == name]
            values += list(mine - mine.mean())
            labels += list(positive[cluster == name])
        draws.append([roc_auc_score(labels, values), average_precision_score(labels, values)])
    low, high = np.percentile(np.array(draws), [2.5, 97.5], axis=0)
    assert got["auroc_interval"] == pytest.approx([low[0], high[0]])
    assert got["auprc_interval"] == pytest.approx([low[1], high[1]])
    assert got["undefined"] == 0
    one = bv.cluster_bootstrap(np.array([True, False]), np.zeros(2), np.array([0, 1]), 200, seed=0)
    assert 60 < one["undefined"] < 140  # half the draws have one class only


def planted(rng, *, shuffled):
    """40 problems of 8 candidates: early ones fail unless `shuffled`; a problem's level differs."""
    rows = []
    for problem in range(40):
        where = np.sort(rng.random(8))
        fails = where + 0.1 * rng.standard_normal(8) < 0.4
        for t, bad in zip(where, rng.permutation(fails) if shuffled else fails, strict=True):
            viability = [0.0, 0.25] if bad else [1.0, 0.75]
            rows.append({
                "cut": 0, "problem": problem, "t": int(1000 * t), "relative": t, "position": 1 - t,
                "label": bv.label(viability, 0.5, 0.5, 0.25), "viability": viability,
                "truncated_entropy": rng.random() + problem, "predictive_entropy": rng.random(),
                "mutual_information": rng.random(), "precision": rng.random(),
            })  # fmt: skip
    return rows


def test_a_planted_world_is_recognised_and_a_shuffled_one_is_not(tmp_path):
    args = bv.Args(model="", benchmark="", out="")
    rng = np.random.default_rng(0)
    table = bv.report(args, planted(rng, shuffled=False), tmp_path)
    assert table["position"]["auroc"] > 0.9
    assert table["position"]["auroc_interval"][0] > 0.85
    low, high = table["truncated_entropy"]["auroc_interval"]
    assert low < 0.5 < high
    low, high = bv.report(args, planted(rng, shuffled=True), tmp_path)["position"]["auroc_interval"]
    assert low < 0.5 < high
    assert high - low < 0.3  # an interval that could have missed
    for name in ("table.json", "histogram.png", "failure.png"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("viability", "kind"),
    [
        ([0.5, 0.75, 0.0], "diversity"),
        ([0.25, 0.0, 0.25], "real_uncertain"),
        ([0.5, 0.0, 0.25], "real_uncertain"),  # mean 0.25, every child at most 0.5
        ([0.5, 0.25, 0.25], "gray"),  # mean above 0.25
        ([1.0, 0.0, 0.0], "gray"),
    ],
)
def test_labels(viability, kind):
    assert bv.label(viability, 0.5, 0.5, 0.25) == kind


# ---- phases
def test_truncated_entropy_by_hand():
    p = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    valid = torch.tensor([False, True, True, True])
    nats, ids, probs = bv.truncated_entropy(p, valid, 2, 2)
    assert nats.item() == pytest.approx(-(0.6 * np.log(0.6) + 0.4 * np.log(0.4)))
    assert ids.tolist() == [[2, 3]]
    assert probs[0].tolist() == pytest.approx([0.3, 0.2])  # of the full vocabulary


def test_candidates_keep_their_distance_and_the_highest_entropies():
    nats, fine = [0.1, 0.9, 0.8, 0.5, 0.7, 0.95], [True] * 6
    assert bv.choose(nats, [2] * 6, fine, 2, 9) == [1, 3, 5]
    assert bv.choose(nats, [2] * 6, fine, 1, 2) == [1, 5]
    assert bv.choose(nats, [2, 1, 2, 2, 2, 2], [True] * 5 + [False], 1, 2) == [2, 4]


def rows_of(tmp_path, phase, *content):
    rows = bv.Rows(tmp_path, phase)
    for row in content:
        rows.add(row)
    return rows


def test_candidates_end_at_the_thought_and_are_visible_text(tmp_path):
    tokenizer = common.load_tokenizer("tiny/student")
    end = tokenizer.convert_tokens_to_ids("</think>")
    blank, call = tokenizer("\n").input_ids[0], tokenizer.convert_tokens_to_ids("<tool_call>")
    digits = tokenizer("4567").input_ids
    args = bv.Args(model="tiny/student", benchmark="", out="", spacing=1, device="cpu")
    models = bv.Models(args)
    spine = [digits[0], blank, call, digits[1], end, digits[2]]
    a = rows_of(tmp_path, "A", {"id": "x", "spine": spine})
    two, one = [digits[:2], [0.5, 0.05]], [digits[:2], [0.9, 0.04]]
    each = [two, two, two, one, two, two]
    b = rows_of(tmp_path, "B", {
        "id": "x", "entropy": [1.0] * 6,
        "child_ids": [c[0] for c in each], "child_probs": [c[1] for c in each],
    })  # fmt: skip
    c = bv.Rows(tmp_path, "C")
    bv.candidates(args, models, a, b, c)
    # 1 is blank, 2 a special token, 3 has one plausible child, 4 and 5 are not before </think>
    assert [found["t"] for found in c.rows["x"]["candidates"]] == [0]
    assert c.rows["x"]["length"] == 6
    assert not models.valid[tokenizer.eos_token_id]


def test_teacher_entropies_are_a_plain_forward_pass_with_the_answer_in_the_prompt(tmp_path):
    args = bv.Args(model="tiny/student", benchmark="", out="", device="cpu", entropy_top_k=5)
    models, problem = bv.Models(args), common.Problem("x", "Start with 5. Add 3.", "8")
    spine = models.tokenizer("5 + 3 = 8\n").input_ids
    a, b = rows_of(tmp_path, "A", {"id": "x", "spine": spine}), bv.Rows(tmp_path, "B")
    bv.teacher_entropies(args, models, [problem], a, b)
    text = common.fill(bv.TEACHER_PROMPT, problem=problem.prompt, answer="8")
    assert "final answer: 8\n" in text
    assert text.endswith("\\boxed{8}.")
    prompt = common.chat_prompt_ids(models.tokenizer, text, thinking=True)
    with torch.no_grad():
        logits = models.model(torch.tensor([prompt + spine])).logits[0, len(prompt) - 1 : -1]
    logits[:, ~models.valid] = -torch.inf
    top = logits.topk(5).values.softmax(-1)
    expected = -(top * top.log()).sum(-1)
    assert b.rows["x"]["entropy"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_rows_to_judge_by_hand(tmp_path):
    args = bv.Args(model="", benchmark="", out="")
    found = [{"t": 2, "truncated_entropy": 0.7, "children": [1, 2]},
             {"t": 6, "truncated_entropy": 0.1, "children": [3, 4]}]  # fmt: skip
    c = rows_of(tmp_path, "C", {"id": "x", "length": 8, "candidates": found},
                {"id": "wrong", "length": 8, "candidates": found})  # fmt: skip
    scores = {"predictive_entropy": [0.5, 0.6], "mutual_information": [0.1, 0.2]}
    d = rows_of(tmp_path, "D", {"id": "x", "precision": [-3.0, 20.0]} | scores)
    viability = {"viability": [[0.0, 0.0], [1.0, 0.75]], "cut": [3, 0]}
    e = rows_of(tmp_path, "E", {"id": "x"} | viability)
    first, second = bv.labelled(args, [common.Problem("x", "", "")], c, d, e)
    assert first == {
        "problem": "x", "t": 2, "relative": 0.25, "label": "real_uncertain",
        "viability": [0.0, 0.0], "cut": 3, "position": 0.75, "truncated_entropy": 0.7,
        "precision": pytest.approx(-np.log(1e-6)), "predictive_entropy": 0.5,
        "mutual_information": 0.1,
    }  # fmt: skip
    assert second["label"] == "diversity"
    assert second["precision"] == pytest.approx(-np.log(20))


def test_each_branch_has_its_own_room(tmp_path, monkeypatch):
    """A late branch of a long spine must not shorten an early one."""
    seen = []
    models = bv.Models(arguments(tmp_path, max_new_tokens=50, sampler="hf"))
    sampler = types.SimpleNamespace(
        awake=contextlib.nullcontext, sample=lambda *_, **k: seen.append(k["max_new_tokens"])
    )
    monkeypatch.setattr(bv.Models, "sampler", sampler)
    monkeypatch.setattr(bv.Models, "max_len", 100)
    models.sample([[1] * 10, [1] * 80], [0, 0], [50, 40], {})
    assert seen == [[50, 20]]


def test_dropout_scores_by_hand():
    p = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]], [[0.4, 0.6]]], dtype=torch.float64)
    got = bv.dropout_scores(iter(p.log()))
    mean, h = p.mean(0)[0], -(p * p.log()).sum(-1)[:, 0]
    predictive = -(mean * mean.log()).sum()
    var = p[:, 0].var(0, unbiased=True).sum()
    alpha = ((mean * (1 - mean)).sum() - var) / var
    assert got["predictive_entropy"].item() == pytest.approx(predictive.item())
    assert got["mutual_information"].item() == pytest.approx((predictive - h.mean()).item())
    assert got["precision"].item() == pytest.approx(alpha.item())
    apart = torch.tensor([[[1 - 1e-9, 1e-9]], [[1e-9, 1 - 1e-9]]]).double().log()
    assert bv.dropout_scores(iter(apart))["precision"].item() < 0  # raw, as the appendix says


def test_hooks_scale_and_are_removed_even_after_an_error():
    layer, x = torch.nn.Identity(), torch.ones(200, 500)
    with bv.mc_dropout([layer], 0.25, torch.Generator().manual_seed(0)):
        noisy = layer(x)
    assert sorted(noisy.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert noisy.mean().item() == pytest.approx(1, abs=0.01)
    with pytest.raises(RuntimeError), bv.mc_dropout([layer], 0.25, torch.Generator()):
        raise RuntimeError
    assert torch.equal(layer(x), x)


# ---- end to end on the tiny world
def arguments(out, **changes):
    quick = {"model": "tiny/student", "benchmark": "tiny/test.jsonl", "count": 6, "spacing": 2}
    quick |= {"max_new_tokens": 96, "candidates": 3, "rollouts": 2, "dropout_samples": 3}
    quick |= {"sampler": "hf", "device": "cpu", "batch": 4, "resamples": 20, "dropout_layers": 1}
    return bv.Args(**quick | {"out": str(out)} | changes)


def rows(out, phase):
    return [json.loads(line) for line in (out / f"{phase}.jsonl").open()]


def test_all_phases_and_going_on_after_a_stop(tmp_path, monkeypatch):
    whole = bv.main(arguments(tmp_path / "whole"))
    assert whole["candidates"] > 0
    tokenizer = common.load_tokenizer("tiny/student")
    for a in rows(tmp_path / "whole", "A"):
        for c in rows(tmp_path / "whole", "C"):
            for found in c["candidates"] if a["id"] == c["id"] else []:
                assert 2 <= len(found["children"]) <= 3
                assert tokenizer.decode([a["spine"][found["t"]]]).strip()
    for e in rows(tmp_path / "whole", "E"):
        assert all(v in (0, 0.5, 1) for child in e["viability"] for v in child)

    calls, finish = [], bv.continuations

    def killed(*args):  # after two phases and a half
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(bv, "continuations", killed)
    with pytest.raises(KeyboardInterrupt):
        bv.main(arguments(tmp_path / "again"))
    with open(tmp_path / "again/D.jsonl", "a") as file:
        file.write('{"id": "cut in the mid')
    monkeypatch.setattr(bv, "continuations", finish)
    monkeypatch.setattr(bv, "teacher_entropies", lambda *_: None)  # all done: nothing to repeat
    assert bv.main(arguments(tmp_path / "again")) == whole
    for phase in "ABCDE":
        assert rows(tmp_path / "again", phase) == rows(tmp_path / "whole", phase)


def test_children_are_forced_under_the_students_template(tmp_path, monkeypatch):
    seen, draw = [], bv.Models.sample

    def recorded(self, prompts, *rest):
        seen.append(prompts)
        return draw(self, prompts, *rest)

    monkeypatch.setattr(bv.Models, "sample", recorded)
    bv.main(arguments(tmp_path / "out", count=2))
    tokenizer, spine = common.load_tokenizer("tiny/student"), rows(tmp_path / "out", "A")[0]
    (first,) = [c for c in rows(tmp_path / "out", "C") if c["id"] == spine["id"]]
    t, child = first["candidates"][0]["t"], first["candidates"][0]["children"][0]
    start = seen[0][0]  # phase A's prompt of the first problem
    assert "privileged" not in tokenizer.decode(start)
    assert any([*start, *spine["spine"][:t], child] in prompts for prompts in seen[1:])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"temperature": 0.0}, "must be above 0: greedy has no spread"),
        ({"top_p": 0.0}, "--top-p 0.0 must lie above 0"),
        ({"dropout_samples": 1}, "--dropout-samples must be at least 2"),
        ({"dropout": 1.0}, "--dropout must lie between 0 and 1"),
        ({"entropy_top_k": 2}, "--entropy-top-k be at least --children"),
        ({"max_model_len": 20}, "the model's length is 20"),
        ({"benchmark": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_bad_input(tmp_path, changes, sentence):
    with pytest.raises(Stop) as stop:
        bv.main(arguments(tmp_path / "out", **changes))
    assert sentence in stop.value.sentence
    assert not (tmp_path / "out").exists()


def test_another_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"args": vars(arguments(tmp_path))}))
    with pytest.raises(Stop) as stop:
        bv.main(arguments(tmp_path, dropout=0.2, temperature=1.0, count=9, theta_hi=0.7))
    sentence = stop.value.sentence  # count and the thetas may change: E and before stay as they are
    assert (
        "begun with other temperature, dropout;" in sentence or "dropout, temperature" in sentence
    )
