"""pw_opsd.py and its baselines: formulas against numpy and by hand, identities, bad input.

Run: python -m pytest tests/test_pw_opsd.py
"""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_esr import gradient, largest_difference, metrics, weights

import baselines
import common
import eval as evaluation
import pw_opsd
from common import Problem, Stop

QUICK = {
    "student": "tiny/student",
    "problems": "tiny/train.jsonl",
    "sampler": "hf",
    "device": "cpu",
    "max_new_tokens": 24,
    "prompts_per_step": 6,
    "steps": 1,
    "learning_rate": 1e-3,
}
G = np.random.default_rng(0)
N, V = 7, 40


def same_gradient(a, b, tolerance=1e-3):
    """Two runs' first updates, relative to the largest entry: the losses' sizes differ widely."""
    a, b = gradient(a), gradient(b)
    return largest_difference(a, b) < tolerance * max(g.abs().max() for g in a) > 0


def run(tmp_path, name="run", **changes):
    return pw_opsd.main(pw_opsd.Args(**QUICK | {"run_dir": str(tmp_path / name)} | changes))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture
def pair():
    """Random float64 log-probs of both sides and sampled ids, in numpy and in torch."""
    p, q = (log_softmax(3 * G.standard_normal((N, V))) for _ in range(2))
    ids = G.integers(V, size=N)
    return p, q, ids, *map(torch.from_numpy, (p, q, ids))


# ---- golden values: independent numpy code, float64
@pytest.mark.parametrize("schedule", list(pw_opsd.SCHEDULES.values()))
def test_position_weights(schedule):
    w_min, tau, s = schedule
    lengths = [5, 1, 0, 9]
    got = pw_opsd.position_weights(torch.tensor(lengths).double(), *schedule)
    assert got.shape == (4, 9)
    for row, length in enumerate(lengths):
        for i in range(1, 10):
            f = (i - 0.5) / length if length else 0
            w = w_min + (1 - w_min) / (1 + math.exp(-(f - tau) / s)) if i <= length else 0.0
            assert got[row, i - 1].item() == pytest.approx(w, abs=1e-6), (row, i)


def test_mean_weights_are_the_commented_ones():
    means = {"moderate": 0.771, "mild": 0.883, "sharp": 0.730, "aggressive": 0.525}
    for name, mean in means.items():
        w = pw_opsd.position_weights(torch.tensor([100_000]), *pw_opsd.SCHEDULES[name])
        assert w.mean().item() == pytest.approx(mean, abs=1e-3), name
    w = pw_opsd.position_weights(torch.tensor([100_000]), 0.25, 0.3, 0.1)[0]
    at = {0.0: 0.286, 0.3: 0.625, 0.5: 0.911, 1.0: 0.999}  # methods.md 3.1
    for f, value in at.items():
        assert w[min(99_999, int(f * 100_000))].item() == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("clip", [0.05, 1e-6, math.inf])
def test_clipped_forward_kl(pair, clip):
    p, q, _, tp, tq, _ = pair
    expected = np.minimum(np.exp(q) * (q - p), clip).sum(1)
    tp.requires_grad_()
    got = pw_opsd.clipped_forward_kl(tp, tq, clip)
    np.testing.assert_allclose(got.detach(), expected, atol=1e-6)
    got.sum().backward()
    kept = np.exp(q) * (q - p) <= clip  # a clamped entry has no gradient
    np.testing.assert_allclose(tp.grad, np.where(kept, -np.exp(q), 0), atol=1e-12)


def test_clipped_forward_kl_by_hand():
    """q = (.9, .1), p = (.5, .5): terms .529, -.161; the first is clamped, the second stays."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert pw_opsd.clipped_forward_kl(p, q, 0.05).item() == pytest.approx(0.05 - 0.16094, abs=1e-4)
    assert pw_opsd.clipped_forward_kl(p, q, math.inf).item() == pytest.approx(0.36806, abs=1e-4)


def test_a_clamped_choice_of_the_teacher_is_pushed_down():
    """q = (.9, .1), p = (.2, .8): what the docstring warns of, and what no clip does instead."""
    teacher = torch.tensor([[0.9, 0.1]]).log()
    down = {}
    for clip in (0.05, math.inf):
        logits = torch.tensor([[0.2, 0.8]]).log().requires_grad_()
        pw_opsd.clipped_forward_kl(logits.log_softmax(-1), teacher, clip).sum().backward()
        down[clip] = logits.grad[0, 0].item()
    assert down[0.05] == pytest.approx(0.2 * 0.1)  # p(v) times the unclamped teacher mass
    assert down[math.inf] == pytest.approx(0.2 - 0.9)
    against = torch.tensor([[0.001, 0.999]]).log()  # so the minimum is not at student = teacher
    assert pw_opsd.clipped_forward_kl(against, teacher, 0.05) < -0.15
    assert pw_opsd.clipped_forward_kl(teacher, teacher, 0.05) == 0


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("threshold", [0.8, 1.7, math.inf])
def test_eopd_loss(pair, old, threshold):
    p, q, ids, tp, tq, tids = pair
    log_p, log_q = p[np.arange(N), ids], q[np.arange(N), ids]
    old_logprobs = log_p - G.normal(size=N) if old else log_p
    ratio, advantage = np.exp(log_p - old_logprobs), log_q - log_p
    expected = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    entropy = -(np.exp(q) * q).sum(1)
    for n in range(N):
        if entropy[n] > threshold:
            top = np.argsort(-q[n])[:16]
            q_top = np.exp(q[n][top]) / np.exp(q[n][top]).sum()
            expected[n] += (q_top * (np.log(q_top) - p[n][top])).sum()
    given = torch.from_numpy(old_logprobs) if old else None
    got = pw_opsd.eopd_loss(tp, tq, tids, old_logprobs=given, threshold=threshold)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert 0 < sum(entropy > 1.7) < N  # both sides of that gate are met


def test_eopd_without_its_gate_has_the_policy_gradient(pair):
    """threshold = inf, r = 1: the gradient is -A grad log p(y), with its full-size ratio."""
    _, _, _, tp, tq, ids = pair
    logits = tp.clone().requires_grad_()
    pw_opsd.eopd_loss(logits.log_softmax(-1), tq, ids, threshold=math.inf).sum().backward()
    again = tp.clone().requires_grad_()
    log_p = again.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    advantage = (tq.gather(1, ids[:, None])[:, 0] - log_p).detach()
    (-advantage * log_p).sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)


def test_reopold_loss(pair):
    p, q, ids, tp, tq, tids = pair
    reward = (q - p)[np.arange(N), ids]
    floor = math.log(0.1) / 0.9
    assert floor == pytest.approx(-2.558, abs=1e-3)
    assert (reward < floor).any()
    assert (reward > floor).any()
    expected = -np.maximum(reward, floor) * p[np.arange(N), ids]
    tp.requires_grad_()
    got = pw_opsd.reopold_loss(tp, tq, tids)
    np.testing.assert_allclose(got.detach(), expected, atol=1e-6)
    got.sum().backward()  # the reward is a constant
    assert tp.grad[np.arange(N), ids].numpy() == pytest.approx(-np.maximum(reward, floor))


def test_reopold_mask_by_hand():
    reward, entropy = torch.tensor([-3.0, -2.5, 1.0, 0.0]), torch.tensor([0.1, 0.9, 0.5, 0.7])
    first = baselines.reopold_mask(reward, entropy, entropy, second_phase=False)
    assert first.tolist() == [False, True, True, True]
    step = torch.arange(100) / 150  # the whole step's: 80th percentile 0.528
    second = baselines.reopold_mask(reward, entropy, step, second_phase=True)
    assert second.tolist() == [False, True, False, True]


def test_token_weights_by_hand():
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    flat = {"num_tokens": 5, "num_rows": 2, "schedule": (1.0, 0.0, 1.0)}
    token = pw_opsd.token_weights(mask, reduction="token", **flat)
    torch.testing.assert_close(token, mask.float() / 5)
    sequence = pw_opsd.token_weights(mask, reduction="sequence", **flat)
    torch.testing.assert_close(sequence, mask / torch.tensor([[4.0], [6.0], [1.0]]))
    moderate = pw_opsd.token_weights(
        mask, num_tokens=5, num_rows=2, reduction="sequence", schedule=(0.25, 0.3, 0.1)
    )
    w = pw_opsd.position_weights(torch.tensor([2, 3]), 0.25, 0.3, 0.1)
    torch.testing.assert_close(moderate[0, 1:3], w[0, :2] / 4)
    torch.testing.assert_close(moderate[1, 1:], w[1] / 6)


def test_prompts_are_the_released_ones():
    problem = Problem("0", "What is {solution}?", "4", "Braces: \\boxed{4} {problem}")
    assert pw_opsd.student_prompt(problem) == (
        "Problem: What is {solution}?\n\nPlease reason step by step, and put your final answer "
        "within \\boxed{}."
    )
    text = pw_opsd.teacher_prompt(problem)
    assert text.startswith(
        "Problem: What is {solution}?\n\nHere is a reference solution to this problem:\n"
        "=== Reference Solution Begin ===\nBraces: \\boxed{4} {problem}\n"
        "=== Reference Solution End ===\n\n\nAfter reading"
    )
    assert text.endswith("something doesn't work out:\n\n" + pw_opsd.BOXED.strip())


def test_the_loss_of_a_step_is_the_formula_on_plain_logits(tmp_path, monkeypatch):
    """Dense, unpadded, in float64, with transformers alone: prompts, shift, T, clip and weights."""
    import transformers

    seen, draw = [], pw_opsd.make_rollouts
    monkeypatch.setattr(
        pw_opsd, "make_rollouts", lambda *a, **k: [seen.append((r := draw(*a, **k), k)), r][1]
    )
    (row,) = metrics(run(tmp_path, prompts_per_step=3, max_new_tokens=42, clip=0.3))
    ((rollouts, knobs),) = seen
    assert {k: knobs[k] for k in ("temperature", "top_p", "top_k")} == {
        "temperature": 1.1, "top_p": 0.95, "top_k": 20,
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained("tiny/student").double()
    tokenizer = common.load_tokenizer("tiny/student")
    problems = common.problems_for_step(common.load_problems("tiny/train.jsonl"), 0, 3, 0)
    loss, kls = 0.0, []
    for problem, r in zip(problems, rollouts, strict=True):
        sides = []
        for text, thinking in (
            (pw_opsd.student_prompt(problem), False),
            (pw_opsd.teacher_prompt(problem), True),
        ):
            turn = [{"role": "user", "content": text}]
            ask = {"add_generation_prompt": True, "enable_thinking": thinking, "tokenize": False}
            start = tokenizer(tokenizer.apply_chat_template(turn, **ask)).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([start + r.completion_ids])).logits[0].numpy()
            sides.append(log_softmax(logits[len(start) - 1 : -1] / 1.1))
        p, q = sides
        terms = np.exp(q) * (q - p)
        length = len(r.completion_ids)
        f = (np.arange(length) + 0.5) / length
        w = 0.25 + 0.75 / (1 + np.exp(-(f - 0.3) / 0.1))
        loss += (w * np.minimum(terms, 0.3).sum(1)).mean() / 3
        kls += list(terms.sum(1))
    assert row["loss"] == pytest.approx(loss, rel=1e-4)
    assert row["kl/mean"] == pytest.approx(np.mean(kls), rel=1e-4)
    assert 0 < row["rule_frac"] < 1


# ---- identities, end to end
def test_w_min_1_with_token_mean_is_opsd(tmp_path):
    cell = {"schedule": (1.0, 0.3, 0.1), "reduction": "token"}
    a, b = run(tmp_path, "a", **cell), run(tmp_path, "b", method="opsd")
    c = run(tmp_path, "c", weights="uniform", reduction="token")
    for other in (b, c):
        assert metrics(a)[0]["loss"] == pytest.approx(metrics(other)[0]["loss"], rel=1e-5)
        assert same_gradient(a, other)
    d = run(tmp_path, "d")  # the method itself is something else
    assert abs(metrics(d)[0]["loss"] - metrics(a)[0]["loss"]) > 1e-4


def test_no_clip_is_the_forward_kl(tmp_path):
    (row,) = metrics(run(tmp_path, method="opsd", clip=math.inf))
    assert row["loss"] == pytest.approx(row["kl/mean"], rel=1e-5)
    assert row["rule_frac"] == 0
    (clipped,) = metrics(run(tmp_path, "b", method="opsd"))
    assert clipped["kl/mean"] == pytest.approx(row["kl/mean"], rel=1e-5)  # unclipped there too
    assert clipped["loss"] == pytest.approx(clipped["kl/trained"], rel=1e-5)
    assert clipped["loss"] < 0.5 * row["loss"]
    assert clipped["rule_frac"] > 0.05


def test_the_teacher_is_the_untrained_student_with_the_solution(tmp_path):
    """A run whose teacher is a second copy of the base is the same run, after updates too."""
    a = run(tmp_path, "a", steps=3)
    b = run(tmp_path, "b", steps=3, teacher="tiny/student")
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
        assert x["kl/mean"] > 0.1  # the solution in its prompt does tell the teacher something
    w, v = weights(a, 3), weights(b, 3)
    assert max((w[k] - v[k]).abs().max() for k in w) < 1e-4


def test_full_fine_tuning_with_a_second_copy(tmp_path):
    got = run(tmp_path, lora_rank=0, teacher="tiny/student")
    assert metrics(got)[0]["grad_norm"] > 0
    assert (got / "checkpoints/step_000001/model.safetensors").exists()


@pytest.mark.parametrize("method", ["pw_opsd", "eopd", "reopold"])
def test_memory_flags_never_change_the_objective(tmp_path, method):
    """reopold at steps=1 is in phase II: its quantile must be the step's, not a micro-batch's."""

    def measure(**flags):
        got = run(tmp_path, str(flags), method=method, max_new_tokens=42, **flags)
        row = metrics(got)[0]
        assert row["rollout/stop_frac"] > 0
        return [row[k] for k in ("loss", "kl/mean", "tokens/supervised")], got

    first, whole = measure(micro_batch=6)
    for flags in ({"micro_batch": 1}, {"micro_batch": 4}, {"gradient_checkpointing": True}):
        again, other = measure(**flags)
        assert again == pytest.approx(first, rel=2e-5), flags
        assert same_gradient(whole, other), flags


def test_reopold_trains_a_fifth_of_the_tokens_in_its_second_phase(tmp_path):
    rows = metrics(run(tmp_path, method="reopold", steps=2))
    shares = [row["tokens/supervised"] / row["tokens/sampled"] for row in rows]
    plain = metrics(run(tmp_path, "plain", method="opsd"))[0]
    assert rows[0]["kl/mean"] == pytest.approx(plain["kl/mean"], rel=1e-5)  # of every token
    assert shares[0] > 0.9
    assert shares[1] == pytest.approx(0.2, abs=0.01)


def test_reopold_without_a_token_has_no_gradient(tmp_path, monkeypatch):
    nothing = lambda reward, *_, **__: torch.zeros_like(reward, dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(baselines, "reopold_mask", nothing)
    (row,) = metrics(run(tmp_path, method="reopold"))
    assert row["loss"] == row["grad_norm"] == row["tokens/supervised"] == 0


def test_two_ranks_give_the_gradient_of_one_process(tmp_path):
    for method in ("pw_opsd", "reopold"):
        flags = QUICK | {"method": method, "prompts_per_step": 9, "max_new_tokens": 42, "seed": 1}
        one = pw_opsd.main(pw_opsd.Args(**flags, run_dir=str(tmp_path / f"one_{method}")))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        command += ["pw_opsd.py", f"--run-dir={tmp_path / method}"]
        command += [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-2000:]
        (a,), (b,) = metrics(one), metrics(tmp_path / method)
        for key in ("loss", "kl/mean", "kl/trained", "rule_frac", "tokens/supervised"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (method, key)
        assert same_gradient(one, tmp_path / method), method


def test_the_learning_rate_falls_linearly_and_resume_goes_on(tmp_path):
    flags = {"steps": 4, "decay_steps": 8, "save_every": 2}
    whole = run(tmp_path, **flags)
    rows = metrics(whole)
    assert [r["lr"] for r in rows] == pytest.approx([1e-3, 8.75e-4, 7.5e-4, 6.25e-4])
    final = weights(whole, 4)
    for file in (whole / "checkpoints/step_000004").iterdir():
        file.unlink()
    (whole / "checkpoints/step_000004").rmdir()
    resumed = run(tmp_path, **flags | {"run_dir": "", "resume": str(whole)})
    assert [r["loss"] for r in metrics(resumed)] == [r["loss"] for r in rows]
    again = weights(resumed, 4)
    assert all(torch.equal(final[k], again[k]) for k in final)


def test_eval_py_has_the_scripts_prompts():
    import esr

    assert evaluation.PROMPTS["esr"] == esr.PROMPT
    assert evaluation.PROMPTS["pw_opsd"] == pw_opsd.EVAL_PROMPT


def test_evaluation_has_its_own_prompt_and_sampling(tmp_path, monkeypatch):
    test = tmp_path / "one.jsonl"
    test.write_text(json.dumps({"problem": "Start with 5. Add 3.", "answer": "8"}) + "\n")
    exam = {"benchmark": str(test), "eval_n": 2, "eval_max_new_tokens": 8}
    seen = []
    ask = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: seen.append(k) or ask(*a, **k))
    run(tmp_path, **exam)
    assert seen[0]["thinking"] is True
    assert (seen[0]["temperature"], seen[0]["top_p"]) == (1.0, 0.95)
    assert seen[0]["prompt"].startswith("{problem}\n\nPlease")


# ---- solutions that are too long
def test_solutions_are_cut_problems_never_and_both_are_counted():
    tokenizer = common.load_tokenizer("tiny/student")
    fits = Problem("a", "1 + 1", "2", "2")
    bare = Problem("d", "1 + 1", "2", "2")
    long = Problem("b", "1 + 1", "2", "first " + "7 " * 300)
    huge = Problem("c", "9 " * 400, "2", "2")
    room = 220
    render = pw_opsd.teacher_prompt
    kept, cut, left_out = common.fit_solutions(
        [fits, long, huge], render, tokenizer, room, thinking=True
    )
    assert (cut, left_out) == (1, 1)
    assert kept[0] is fits
    assert kept[1].prompt == long.prompt
    assert long.solution.startswith(kept[1].solution)
    length = len(common.chat_prompt_ids(tokenizer, render(kept[1]), thinking=True))
    assert room - 3 <= length <= room  # cut no further than needed
    with pytest.raises(Stop) as stop:
        common.fit_solutions([huge], render, tokenizer, room, thinking=True)
    assert "no problem fits into 220 tokens" in stop.value.sentence
    empty = common.chat_prompt_ids(tokenizer, render(Problem("e", "1 + 1", "2", "")), thinking=True)
    with pytest.raises(Stop):  # room for the prompt, but for nothing of the solution
        common.fit_solutions([bare], render, tokenizer, len(empty), thinking=True)


def test_a_prompt_never_loses_a_part_without_a_word():
    with pytest.raises(ValueError, match="nothing to put into the prompt"):
        pw_opsd.teacher_prompt(Problem("0", "1 + 1", "2", None))


def test_a_long_solution_is_cut_in_a_run_and_said(tmp_path, capsys):
    data = tmp_path / "long.jsonl"
    rows = [{"problem": "Start with 5. Add 3.", "answer": "8", "solution": "5 + 3 = 8 " * n}
            for n in (1, 200)]  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path, problems=str(data), max_length=300)
    assert "276 tokens of prompt: 1 solutions cut, 0 problems left out" in capsys.readouterr().out


# ---- failures a user can cause
def dataset(tmp_path, *solutions):
    path = tmp_path / "data.jsonl"
    rows = [{"problem": "1 + 1?", "answer": "2"} | ({} if s is None else {"solution": s})
            for s in solutions]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schedule": (1.5, 0.3, 0.1)}, "w_min 1.5 must lie in [0, 1]"),
        ({"schedule": (-0.1, 0.3, 0.1)}, "w_min -0.1 must lie in [0, 1]"),
        ({"schedule": (0.25, 0.3, 0.0)}, "s 0.0 above 0"),
        ({"clip": 0.0}, "--clip 0.0 must be above 0"),
        ({"clip": math.nan}, "--clip nan must be above 0"),
        ({"method": "opsd", "weights": "position"}, "--weights does nothing with this --method"),
        ({"method": "eopd", "clip": 0.2}, "--clip does nothing with this --method"),
        ({"weights": "uniform", "schedule": "mild"}, "--schedule does nothing"),
        ({"lora_rank": 0}, "hold a second copy in memory with --teacher tiny/student"),
        ({"teacher": "tiny/teacher_other"}, "must have the student's own tokenizer"),
        ({"steps": 9, "decay_steps": 8}, "raise --decay-steps"),
        ({"temperature": 0.0}, "--temperature must be above 0"),
        ({"eval_top_p": 0.0}, "--eval-top-p 0.0 must lie above 0"),
        ({"top_k": -1}, "--top-k -1 must be at least 0"),
        ({"max_length": 60}, "no problem fits into 36 tokens"),
        ({"schedule": "fast"}, "use moderate, mild, sharp, aggressive or w_min tau s"),
        ({"teacher": "nowhere/model"}, "nowhere/model"),
    ],
)
def test_bad_input(tmp_path, changes, sentence, capsys):
    with pytest.raises(Stop) as stop:
        run(tmp_path, **changes)
    assert sentence in stop.value.sentence
    assert stop.value.code == 2
    assert stop.value.sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("solutions", "sentence"),
    [
        ((None, None), "has no solution column"),
        (("", " "), "has no solution column (or only empty ones)"),
        (("fine", "", "fine"), "1 problems have no solution, first '1'"),
    ],
)
def test_missing_solutions(tmp_path, solutions, sentence):
    with pytest.raises(Stop) as stop:
        run(tmp_path, problems=dataset(tmp_path, *solutions))
    assert sentence in stop.value.sentence


def test_an_open_think_block_is_closed_where_thinking_is_off():
    tokenizer = common.load_tokenizer("tiny/student")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    off = tokenizer.decode(common.chat_prompt_ids(tokenizer, "1 + 1", thinking=False))
    on = tokenizer.decode(common.chat_prompt_ids(tokenizer, "1 + 1", thinking=True))
    assert off == on + "</think>\n\n"
    assert on.endswith("<think>\n")
