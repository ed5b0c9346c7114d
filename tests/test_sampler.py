"""Both samplers: seeds, knobs, log-probs; real vLLM (CPU build) where it is installed."""

from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT

import common
import sampler as sampler_module
from common import Stop
from sampler import Sampler, SeededDraw, merged_weights

STUDENT = str(ROOT / "tiny" / "student")
needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")


def make(backend, lora_rank=4, adapters=None):
    torch.manual_seed(0)
    student = common.load_student(
        STUDENT, lora_rank=lora_rank, lora_alpha=8, dtype="float32", device="cpu",
        checkpointing=False,
    )  # fmt: skip
    tokenizer = common.load_tokenizer(STUDENT)
    made = Sampler(
        STUDENT, student, tokenizer, backend=backend, max_len=128, memory_fraction=0.4, seed=0,
        adapters=adapters,
    )  # fmt: skip
    prompts = [
        common.chat_prompt_ids(tokenizer, text)
        for text in ("Start with 7. Add 5.", "2", "What is the result?")
    ]
    return student, made, prompts


def change(student, scale=0.05):
    """What a training step does: LoRA's B leaves zero, or every weight moves."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if p.requires_grad and "lora_A" not in name:
                p.add_(scale * torch.randn(p.shape, generator=g))


def gap(student, rollouts):
    """Mean |sampler - trainer| log-prob of the sampled tokens, nats."""
    batch = common.collate(rollouts, "cpu")
    with torch.no_grad():
        hidden = common.completion_hidden(student, batch)
    ids = batch.input_ids[batch.completion_mask]
    own = common.token_logprobs(hidden, common.head_of(student), ids)
    sampled = torch.tensor([p for r in rollouts for p in r.logprobs])
    return (own - sampled).abs().mean().item()


KNOBS = {"max_new_tokens": 12, "temperature": 0.7}


def test_hf_rollouts_do_not_depend_on_their_neighbours():
    _, hf, prompts = make("hf")
    together = hf.sample(prompts, [1, 2, 3], **KNOBS)
    alone = [hf.sample([p], [s], **KNOBS)[0] for p, s in zip(prompts, [1, 2, 3], strict=True)]
    assert [r.completion_ids for r in together] == [r.completion_ids for r in alone]
    assert hf.sample(prompts, [4, 5, 6], **KNOBS) != together


def test_hf_log_probs_ends_and_lengths():
    student, hf, prompts = make("hf")
    change(student)
    short = hf.sample(prompts, [1, 2, 3], max_new_tokens=3, temperature=1.0)
    long = hf.sample(prompts * 4, list(range(12)), max_new_tokens=110, temperature=1.0)
    assert gap(student, short + long) < 1e-4
    assert [(r.finish_reason, len(r.completion_ids)) for r in short] == [("length", 3)] * 3
    assert "stop" in {r.finish_reason for r in long}
    for r in long:
        assert len(r.logprobs) == len(r.completion_ids) <= 110
        assert (r.completion_ids[-1] in hf.eos_ids) == (r.finish_reason == "stop")
        assert not set(r.completion_ids[:-1]) & set(hf.eos_ids)


@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_each_rollout_may_have_its_own_cap(backend):
    if backend == "vllm" and not find_spec("vllm"):
        pytest.skip("vLLM is not installed")
    _, sampler, prompts = make(backend)
    sampler.sync()
    whole = sampler.sample(prompts, [1, 2, 3], max_new_tokens=12, temperature=1.0)
    own = sampler.sample(prompts, [1, 2, 3], max_new_tokens=[12, 1, 2], temperature=1.0)
    assert [r.completion_ids for r in own] == [
        r.completion_ids[:cap] for r, cap in zip(whole, [12, 1, 2], strict=True)
    ]
    assert [(r.finish_reason, len(r.logprobs)) for r in own[1:]] == [("length", 1), ("length", 2)]


def test_draws_follow_the_distribution_and_the_knobs():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    scores = logits.expand(20_000, 4)

    def draw(**knobs):
        knobs = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | knobs
        out = SeededDraw(list(range(20_000)), device="cpu", **knobs)(torch.zeros(20_000, 1), scores)
        return torch.bincount(out.argmax(-1), minlength=4) / 20_000

    torch.testing.assert_close(draw(), logits.softmax(-1), rtol=0, atol=0.015)
    hot = draw(temperature=2.0)
    torch.testing.assert_close(hot, (logits / 2).softmax(-1), rtol=0, atol=0.015)
    assert draw(temperature=0.0).tolist() == [1, 0, 0, 0]
    assert draw(top_k=2)[2:].sum() == 0
    assert draw(top_p=0.5).tolist() == [1, 0, 0, 0]


def test_model_defaults_do_not_leak_into_generate():
    student, hf, prompts = make("hf")
    plain = hf.sample(prompts, [1, 2, 3], **KNOBS)
    base = common.base_model(student)
    base.generation_config.repetition_penalty = 5.0
    base.generation_config.top_k = 1
    base.generation_config.min_new_tokens = 12
    assert hf.sample(prompts, [1, 2, 3], **KNOBS) == plain
    assert base.generation_config.repetition_penalty == 5.0  # and are put back


def test_request_seed_is_stable_and_distinct():
    seeds = {common.request_seed(0, step, n) for step in range(50) for n in range(50)}
    assert len(seeds) == 2500
    assert common.request_seed(0, 1, 2) == common.request_seed(0, 1, 2)
    assert max(seeds) < 2**31


def test_merged_weights_are_copies_and_equal_the_adapter():
    student, _, _ = make("hf")
    change(student)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    for _ in range(20):
        merged = dict(merged_weights(student))
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    plain = common.load_model(STUDENT, dtype="float32", device="cpu")
    missing, unexpected = plain.load_state_dict(merged, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}  # tied to the embedding
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-4)


def test_missing_vllm(monkeypatch, capsys):
    monkeypatch.setattr(sampler_module, "find_spec", lambda _: None)
    with pytest.raises(Stop) as stop:
        make("vllm")
    assert "vLLM is not installed" in stop.value.sentence
    _, made, _ = make("auto")
    assert made.backend == "hf"
    assert "vLLM is not installed" in capsys.readouterr().out


@needs_vllm
@pytest.mark.parametrize(("lora_rank", "adapters"), [(4, True), (4, False), (0, False)])
def test_vllm_follows_the_student_and_never_touches_it(lora_rank, adapters):
    student, made, prompts = make("vllm", lora_rank, adapters)
    with made.awake():
        made.sync()
        first = made.sample(prompts, [1, 2, 3], **KNOBS)
        assert gap(student, first) < 1e-3
        assert made.sample(prompts, [1, 2, 3], **KNOBS) == first  # seeds, not engine state
        assert {len(r.completion_ids) for r in first} <= set(range(1, 13))
        change(student)
        stale = made.sample(prompts, [1, 2, 3], **KNOBS)
        assert gap(student, stale) > 0.01  # the logged gap shows a sampler left behind
        before = {k: v.clone() for k, v in student.state_dict().items()}
        for _ in range(20):
            made.sync()
        fresh = made.sample(prompts, [1, 2, 3], **KNOBS)
        assert gap(student, fresh) < 1e-3
    after = student.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    greedy = made.sample(prompts, [1, 2, 3], max_new_tokens=12, temperature=0.0)
    made.backend = "hf"
    assert [r.completion_ids for r in greedy] == [
        r.completion_ids
        for r in made.sample(prompts, [1, 2, 3], max_new_tokens=12, temperature=0.0)
    ]


@needs_vllm
def test_an_adapter_is_read_once_a_sync_and_not_at_every_token(monkeypatch):
    from vllm.lora.worker_manager import WorkerLoRAManager

    calls, load = [], WorkerLoRAManager._load_adapter

    def counted(self, *args):
        calls.append(args)
        return load(self, *args)

    monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", counted)
    _, made, prompts = make("vllm", adapters=True)
    for expected in (1, 2):
        made.sync()
        made.sample(prompts, [1, 2, 3], **KNOBS)
        assert len(calls) == expected


def test_on_a_gpu_the_engine_wakes_syncs_samples_and_sleeps_even_after_an_error():
    _, made, _ = make("hf")
    order = []

    class Engine:
        def __getattr__(self, name):
            return lambda *_, **kwargs: order.append((name, *kwargs.values())) or True

    made.backend, made.on_gpu, made.llm, made.adapters = "vllm", True, Engine(), False
    made.student.config.tie_word_embeddings = False
    with made.awake():
        made.sync()
    names = [name for name, *_ in order]
    assert names == ["wake_up", "collective_rpc", "reset_prefix_cache", "sleep"]
    assert order[-1] == ("sleep", 1)  # level 2 would bring back the base weights
    with pytest.raises(ZeroDivisionError), made.awake():
        raise ZeroDivisionError
    assert order[-1] == ("sleep", 1)


@needs_vllm
def test_a_dead_engine_stops_with_a_sentence(monkeypatch):
    _, made, prompts = make("vllm")
    from vllm.v1.engine.exceptions import EngineDeadError

    def dead(*_, **__):
        raise EngineDeadError

    monkeypatch.setattr(made.llm, "generate", dead)
    with pytest.raises(Stop) as stop:
        made.sample(prompts, [1, 2, 3], **KNOBS)
    assert "the vLLM engine died" in stop.value.sentence
    assert "--resume" in stop.value.sentence
