"""esr.py: its formulas by hand, its identities end to end, and every failure a user can cause.

Run: python -m pytest tests/test_esr.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT

import common
import esr
from common import Stop

QUICK = {
    "student": "tiny/student",
    "teacher": "tiny/teacher",
    "problems": "tiny/train.jsonl",
    "sampler": "hf",
    "device": "cpu",
    "max_new_tokens": 8,
    "prompts_per_step": 6,
    "steps": 1,
    "learning_rate": 1e-3,
}


def run(tmp_path, name="run", **changes):
    return esr.main(esr.Args(**QUICK | {"run_dir": str(tmp_path / name)} | changes))


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


def weights(run_dir, step):
    from safetensors.torch import load_file

    return load_file(run_dir / f"checkpoints/step_{step:06d}/adapter_model.safetensors")


def gradient(run_dir):
    """After one update Adam's first moment is 0.1 times the gradient, as clipped."""
    state = torch.load(run_dir / "checkpoints/step_000001/trainer.pt", weights_only=False)
    return [10 * moments["exp_avg"] for moments in state["optimizer"]["state"].values()]


def largest_difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


# ---- formulas
def test_token_weights_by_hand():
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1]]).bool()
    got = esr.token_weights(mask, num_tokens=5)
    torch.testing.assert_close(got, mask.float() / 5)
    scores = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.7])  # row 0: 2 tokens, row 1: 3 tokens
    kept = esr.token_weights(mask, num_tokens=2, scores=scores, k=1)
    assert kept.tolist() == [[0, 0, 0.5, 0], [0, 0, 0, 0.5]]
    every = esr.token_weights(mask, num_tokens=5, scores=scores, k=3)
    torch.testing.assert_close(every, got)  # a row shorter than k keeps all it has


def test_selection_scores_by_hand():
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    rkl, h_s, h_t = 0.3681, 0.3251, 0.6931
    expected = {
        "top_rkl": rkl, "top_student_entropy": h_s, "top_teacher_entropy": h_t,
        "rkl_x_hs": rkl * h_s, "ht_x_hs": h_t * h_s, "rkl_x_ht_x_hs": rkl * h_t * h_s,
    }  # fmt: skip
    for select, value in expected.items():
        got = esr.selection_score(p, q, select=select).item()
        assert got == pytest.approx(value, abs=1e-4), select


def test_sampled_reverse_kl_has_the_gradient_of_the_reverse_kl_on_average():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=g).double().requires_grad_()
    teacher = torch.randn(6, generator=g).double().log_softmax(-1)
    log_p = logits.log_softmax(-1)
    common.reverse_kl(log_p[None], teacher[None]).sum().backward()
    exact, logits.grad = logits.grad.clone(), None
    ids = torch.arange(6)
    each = esr.sampled_reverse_kl(
        logits.log_softmax(-1).expand(6, 6), teacher.expand(6, 6), ids, ids
    )
    (log_p.detach().exp() * each).sum().backward()
    torch.testing.assert_close(logits.grad, exact)
    mean = (log_p.exp() * each).sum()
    torch.testing.assert_close(mean, common.reverse_kl(log_p[None], teacher[None])[0])


# ---- identities, end to end
def test_teacher_as_student_has_no_loss(tmp_path):
    (row,) = metrics(run(tmp_path, student="tiny/teacher"))
    assert abs(row["loss"]) < 1e-6
    assert row["tokens/supervised"] > 0


def test_rollouts_stop_at_n_without_an_invented_eos(tmp_path):
    (row,) = metrics(run(tmp_path))
    assert row["tokens/sampled"] == row["tokens/supervised"] == 6 * 8
    assert row["rollout/stop_frac"] == 0
    rows = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").open()]
    assert all(not r["completion"].endswith("<|im_end|>") for r in rows)


def test_a_long_n_is_plain_opd(tmp_path):
    """Where every rollout ends by itself, N and a longer N are the same run."""
    longest = {"prompts_per_step": 2, "seed": 3}
    a = metrics(run(tmp_path, "a", max_new_tokens=150, **longest))[0]
    b = metrics(run(tmp_path, "b", max_new_tokens=180, **longest))[0]
    assert a["rollout/stop_frac"] == 1
    same = ("loss", "kl/mean", "grad_norm", "tokens/supervised")
    assert [a[k] for k in same] == pytest.approx([b[k] for k in same], rel=1e-5)


def test_memory_flags_never_change_the_objective(tmp_path):
    def measure(**flags):
        got = run(tmp_path, str(flags), max_new_tokens=42, **flags)
        row = metrics(got)[0]
        assert row["rollout/stop_frac"] > 0  # unequal lengths, else nothing is tested
        return [row[k] for k in ("loss", "kl/mean")], gradient(got)

    losses, first = measure(micro_batch=6)
    assert max(g.abs().max() for g in first) > 1e-2
    for flags in ({"micro_batch": 1}, {"micro_batch": 4}, {"gradient_checkpointing": True}):
        again, other = measure(**flags)
        assert again == pytest.approx(losses, rel=2e-5), flags
        assert largest_difference(first, other) < 1e-5, flags


def test_padded_rows_of_a_head_change_nothing(tmp_path):
    """Qwen2.5 ships 151,936 or 152,064 rows for the same tokenizer."""
    import transformers

    padded = transformers.AutoModelForCausalLM.from_pretrained("tiny/teacher")
    torch.manual_seed(0)
    padded.resize_token_embeddings(padded.config.vocab_size + 64)
    padded.save_pretrained(tmp_path / "padded")
    transformers.AutoTokenizer.from_pretrained("tiny/teacher").save_pretrained(tmp_path / "padded")
    a = metrics(run(tmp_path, "a"))[0]
    b = metrics(run(tmp_path, "b", teacher=str(tmp_path / "padded")))[0]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_the_teacher_gets_no_gradient_and_keeps_its_weights(tmp_path, monkeypatch):
    loaded, load = [], common.load_model

    def recorded(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(common, "load_model", recorded)
    run(tmp_path)
    teacher = loaded[0]
    assert all(p.grad is None for p in teacher.parameters())
    fresh = load("tiny/teacher", dtype="float32", device="cpu")
    for a, b in zip(teacher.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_selecting_every_token_is_the_prefix(tmp_path):
    prefix = metrics(run(tmp_path, "prefix", max_new_tokens=20))[0]
    every = metrics(run(tmp_path, "every", max_new_tokens=20, select="rkl_x_hs", select_k=20))[0]
    few = metrics(run(tmp_path, "few", max_new_tokens=20, select="top_rkl", select_k=3))[0]
    same = ("loss", "grad_norm", "tokens/supervised")
    assert [prefix[k] for k in same] == pytest.approx([every[k] for k in same], rel=1e-5)
    assert few["tokens/supervised"] == 6 * 3
    assert few["loss"] > prefix["loss"]  # the tokens of the largest KL


def test_full_fine_tuning_trains_and_saves_a_model(tmp_path):
    import transformers

    got = run(tmp_path, lora_rank=0, select="top_rkl", select_k=4)
    saved = transformers.AutoModelForCausalLM.from_pretrained(got / "checkpoints/step_000001")
    old = transformers.AutoModelForCausalLM.from_pretrained("tiny/student")
    moved = [
        not torch.equal(a, b) for a, b in zip(saved.parameters(), old.parameters(), strict=True)
    ]
    assert all(moved)


def test_resume_continues_the_same_stream_bit_for_bit(tmp_path):
    import shutil

    whole = run(tmp_path, steps=4, save_every=2)
    before, final = metrics(whole), weights(whole, 4)
    shutil.rmtree(whole / "checkpoints/step_000004")  # as if it had been killed after step 3
    resumed = run(tmp_path, steps=4, save_every=2, run_dir="", resume=str(whole))
    after, again = metrics(resumed), weights(resumed, 4)
    assert [r["step"] for r in after] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm", "tokens/sampled", "rollout/logprob_gap"):
        assert [r[key] for r in after] == [r[key] for r in before]
    assert all(torch.equal(final[k], again[k]) for k in final)


@pytest.mark.parametrize(("prompts", "sampler"), [(5, "hf"), (1, "hf"), (5, "vllm")])
def test_two_ranks_give_the_gradient_of_one_process(tmp_path, prompts, sampler):
    """gloo on 2 CPU ranks: an odd number of problems, a rank that has none, an engine a rank."""
    if sampler == "vllm" and not find_spec("vllm"):
        pytest.skip("vLLM is not installed")
    flags = QUICK | {"prompts_per_step": prompts, "max_new_tokens": 20, "sampler": sampler}
    one = esr.main(esr.Args(**flags, run_dir=str(tmp_path / "one")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "esr.py"]
    command += [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
    done = subprocess.run(
        [*command, f"--run-dir={tmp_path / 'two'}"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (a,), (b,) = metrics(one), metrics(tmp_path / "two")
    for key in ("loss", "kl/mean", "grad_norm", "tokens/sampled", "rollout/len_mean"):
        assert a[key] == pytest.approx(b[key], rel=1e-5), key
    assert max(g.abs().max() for g in gradient(one)) > 1e-2
    assert largest_difference(gradient(one), gradient(tmp_path / "two")) < 1e-6


@pytest.mark.parametrize(("mode", "rank"), [("shared", 32), ("sampled", 32), ("shared", 0)])
def test_a_teacher_with_another_tokenizer(tmp_path, mode, rank, capsys):
    other = {"teacher": "tiny/teacher_other", "cross_tokenizer": mode, "lora_rank": rank}
    got = run(tmp_path, max_new_tokens=40, **other)
    (row,) = metrics(got)
    assert 0.3 < row["rollout/aligned_frac"] < 1
    assert row["tokens/supervised"] < row["tokens/sampled"]
    assert row["grad_norm"] > 0
    assert "tokenizers differ: the" in capsys.readouterr().out


def test_a_run_directory_holds_what_the_readme_says(tmp_path, capsys):
    got = run(
        tmp_path, benchmark="tiny/test.jsonl", eval_n=1, eval_max_new_tokens=8,
        steps=2, save_every=1,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "---- student prompt" in out
    assert "<|im_start|>user" in out
    assert "---- teacher prompt" in out
    assert f"run: {got}" in out
    config = json.loads((got / "config.json").read_text())
    assert config["args"]["max_new_tokens"] == 8
    for name in ("esr", "common", "kl", "sampler", "align", "eval"):
        assert (got / f"code/{name}.py").read_text() == (ROOT / f"{name}.py").read_text()
    assert [json.loads(line)["step"] for line in (got / "eval.jsonl").open()] == [0, 1, 2]
    assert sorted(p.name for p in (got / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    keys = "loss kl/mean grad_norm lr tokens/supervised tokens/sampled rollout/len_mean "
    keys += (
        "rollout/stop_frac rollout/logprob_gap time/rollout_s time/sync_s time/train_s mem/peak_gb"
    )
    assert not set(keys.split()) - set(metrics(got)[0])


# ---- failures a user can cause: one sentence, exit code 2, nothing left behind
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0 must be at least 1"),
        ({"select": "top_rkl", "select_k": 9}, "between 1 and the rollout length"),
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"temperature": -1.0}, "--temperature -1.0 must be at least 0"),
        ({"eval_n": 0}, "--eval-n 0 must be at least 1"),
        ({"top_p": 0.0}, "must lie above 0 and be at most 1"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        (
            {
                "teacher": "tiny/teacher_other",
                "cross_tokenizer": "sampled",
                "select": "top_rkl",
                "select_k": 2,
            },
            "use --cross-tokenizer shared",
        ),
        ({"student": "nowhere/model"}, "nowhere/model"),
        ({"teacher": "nowhere/model"}, "nowhere/model"),
        ({"problems": "nowhere.jsonl"}, "cannot read the dataset"),
        ({"benchmark": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"max_new_tokens": 100_000}, "lower --max-new-tokens"),
        ({"device": "cuda"}, "no CUDA GPU"),
        ({"resume": "nowhere"}, "give the directory of a run"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one case needs a machine without a GPU")
def test_bad_input(tmp_path, changes, sentence, capsys):
    with pytest.raises(Stop) as stop:
        run(tmp_path, **changes)
    assert sentence in stop.value.sentence
    assert stop.value.code == 2
    assert stop.value.sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unknown_flag_exits_2():
    done = subprocess.run([sys.executable, "esr.py", "--no-such-flag", "1"], capture_output=True)
    assert done.returncode == 2


def test_a_diverging_run_stops_and_keeps_its_checkpoint(tmp_path):
    with pytest.raises(Stop) as stop:
        run(tmp_path, learning_rate=1e30, steps=3, save_every=1)
    assert "stopped before its update" in stop.value.sentence
    assert (tmp_path / "run/checkpoints/step_000001/adapter_model.safetensors").exists()
    assert len(metrics(tmp_path / "run")) == 1


def test_ctrl_c_finishes_the_step_saves_and_the_run_resumes(tmp_path):
    flags = QUICK | {"steps": 60, "save_every": 60, "run_dir": str(tmp_path / "run")}
    command = [sys.executable, "esr.py"]
    command += [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "run/metrics.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 2) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out[-2000:]
    steps = len(metrics(tmp_path / "run"))
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert saved.name == f"step_{steps:06d}"
    assert steps < 60
    resumed = esr.main(esr.Args(**flags | {"run_dir": "", "resume": str(tmp_path / "run")}))
    assert [row["step"] for row in metrics(resumed)] == list(range(1, 61))
