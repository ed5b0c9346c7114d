"""Rollouts from the student as it is now: vLLM in this process, or transformers' generate.

Token ids in, token ids out; a seed per rollout; the sampled tokens' log-probs come back, so that
the trainer can show that what it trains on is what its own weights would have written.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from common import Rollout, Stop, base_model, last_line, turn_end_id


def repack_tied_head(model: nn.Module) -> None:
    """Let vLLM's CPU build see a reloaded head: where it is tied to the embedding, 0.32 keeps the
    packed copy that it made of the old one."""
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def eos_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every id that ends a turn: the template's, the tokenizer's EOS, the generation config's.

    They differ for base models with a chat template (Qwen2.5-Math: <|im_end|> and <|endoftext|>).
    """
    listed = base_model(model).generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return sorted({turn_end_id(tokenizer), tokenizer.eos_token_id, *listed} - {None})


class Sampler:
    """The only place that knows vLLM; `hf` is transformers' generate on the student itself.

    After every update call `sync`, else rollouts come from the older student: the logged
    rollout/logprob_gap shows it. With vLLM on a GPU, LoRA goes in as an adapter (hot swap); on CPU,
    where vLLM's LoRA kernels are five times slower, and for full fine-tuning, whole weights do,
    LoRA folded into copies so that the trained weights never drift.
    """

    def __init__(
        self, name: str, student: nn.Module, tokenizer: Any, *, backend: str, max_len: int,
        memory_fraction: float, seed: int, adapters: bool | None = None,
    ) -> None:  # fmt: skip
        if backend == "auto":
            backend = "vllm" if find_spec("vllm") else "hf"
            if backend == "hf":
                print("vLLM is not installed: sampling with transformers' generate (--sampler hf).")
        if backend == "vllm" and not find_spec("vllm"):
            raise Stop(
                "--sampler vllm: vLLM is not installed; see the README, or use --sampler hf."
            )
        self.student, self.backend, self.max_len = student, backend, max_len
        self.eos_ids = eos_ids(student, tokenizer)
        self.pad_id = tokenizer.pad_token_id
        self.on_gpu = next(student.parameters()).is_cuda
        is_lora = isinstance(student, peft.PeftModel)
        self.adapters = is_lora and (self.on_gpu if adapters is None else adapters)
        if backend == "vllm":
            self._start_vllm(name, memory_fraction, seed)

    def _start_vllm(self, name: str, memory_fraction: float, seed: int) -> None:
        self.lora = None
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engine in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # training shares the cores
        import vllm

        ranks = int(os.environ.get("WORLD_SIZE", 1))  # under torchrun: an engine for each rank
        options: dict[str, Any] = {}
        if self.adapters:
            rank = self.student.peft_config["default"].r
            sizes = (8, 16, 32, 64, 128, 256, 512)  # those that vLLM has kernels for
            options = {"enable_lora": True, "max_loras": 1}
            options["max_lora_rank"] = next((n for n in sizes if n >= rank), rank)
        if self.on_gpu:
            options |= {"enable_sleep_mode": True, "gpu_memory_utilization": memory_fraction}
        else:  # a prefill in parts would rewind a seeded generator, which CPU generators cannot
            budget = max(self.max_len, 8192)
            options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": budget}
            options |= {"enforce_eager": True}
        try:
            self.llm = vllm.LLM(
                name,
                dtype=self.student.compute_dtype,
                max_model_len=self.max_len,
                skip_tokenizer_init=True,  # token ids in, token ids out
                distributed_executor_backend="external_launcher" if ranks > 1 else "uni",
                seed=seed,
                **options,
            )
        except Exception as error:  # vLLM raises many kinds; each means no engine
            raise Stop(f"vLLM did not start ({last_line(error)}); try --sampler hf.") from error
        self.adapter_dir = tempfile.TemporaryDirectory(prefix="opd_adapter_")
        if self.on_gpu:
            self.llm.sleep(level=1)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Give vLLM its GPU memory for the block; training has it outside."""
        if self.backend == "hf" or not self.on_gpu:
            yield
            return
        torch.cuda.empty_cache()
        self.llm.wake_up()
        try:
            yield
        finally:  # level 1 keeps the weights; after level 2 the base's would come back
            self.llm.sleep(level=1)

    def sync(self) -> None:
        """Put the student's present weights into the sampler; must be called awake."""
        if self.backend == "hf":
            return  # it samples from the student itself
        if self.adapters:
            from vllm.lora.request import LoRARequest

            where = self.adapter_dir.name
            self.student.save_pretrained(where, save_embedding_layers=False)
            self.lora = LoRARequest("student", 1, where)
            # In place once, here: a request that says load_inplace reads the disk at every token.
            inplace = LoRARequest("student", 1, where, load_inplace=True)
            self.llm.llm_engine.add_lora(inplace)
        else:
            weights = merged_weights(self.student)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if not self.on_gpu and base_model(self.student).config.tie_word_embeddings:
                self.llm.apply_model(repack_tied_head)
        if not self.llm.reset_prefix_cache():  # cached keys belong to the older weights
            raise Stop("vLLM refused to reset its prefix cache; rollouts would be stale.")

    def sample(
        self, prompts: list[list[int]], seeds: list[int], *, max_new_tokens: int | list[int],
        temperature: float, top_p: float = 1.0, top_k: int = 0,
    ) -> list[Rollout]:  # fmt: skip
        """One rollout per (prompt, seed), with one cap for all or one for each.

        temperature 0 is greedy; top_k 0 is off.
        """
        one = isinstance(max_new_tokens, int)
        caps = [max_new_tokens] * len(prompts) if one else max_new_tokens
        knobs = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        if self.backend == "vllm":
            return self._sample_vllm(prompts, seeds, caps, knobs)
        rollouts: list[Rollout] = []
        rows = max(1, 2**17 // self.max_len)  # bounds the KV cache
        for i in range(0, len(prompts), rows):
            part = slice(i, i + rows)
            rollouts += self._sample_hf(prompts[part], seeds[part], caps[part], knobs)
        return rollouts

    def _sample_vllm(
        self, prompts: list[list[int]], seeds: list[int], caps: list[int], knobs: dict
    ) -> list[Rollout]:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                seed=seed,
                max_tokens=cap,
                logprobs=0,
                detokenize=False,
                stop_token_ids=self.eos_ids,
                **knobs,
            )
            for seed, cap in zip(seeds, caps, strict=True)
        ]
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        try:
            outputs = self.llm.generate(inputs, parameters, use_tqdm=False, lora_request=self.lora)
        except Exception as error:  # in process, a dead engine can raise anything
            raise Stop(
                f"the vLLM engine died ({last_line(error)}); go on from the last checkpoint with "
                "--resume, if it was memory with a smaller --memory-fraction."
            ) from error
        rollouts = []
        for ids, output in zip(prompts, outputs, strict=True):
            best = output.outputs[0]
            logprobs = [p[i].logprob for i, p in zip(best.token_ids, best.logprobs, strict=True)]
            rollouts.append(Rollout(ids, list(best.token_ids), best.finish_reason, logprobs))
        return rollouts

    @torch.no_grad()
    def _sample_hf(
        self, prompts: list[list[int]], seeds: list[int], caps: list[int], knobs: dict
    ) -> list[Rollout]:
        device = next(self.student.parameters()).device
        longest = max(map(len, prompts))
        input_ids = torch.tensor([[self.pad_id] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        model, draw = base_model(self.student), SeededDraw(seeds, device=device, **knobs)
        model_defaults, training = model.generation_config, model.training
        # A model's own defaults (Qwen: top_k 20, repetition penalty 1.05) must not leak in.
        model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=self.eos_ids, pad_token_id=self.pad_id
        )
        model.eval()
        try:
            with torch.autocast(device.type, model.compute_dtype, enabled=device.type == "cuda"):
                output = model.generate(
                    input_ids=input_ids.to(device), attention_mask=mask.to(device),
                    max_new_tokens=max(caps), logits_processor=[draw],
                )  # fmt: skip
        finally:
            model.generation_config = model_defaults
            model.train(training)
        rollouts = []
        logprobs = torch.stack(draw.logprobs, 1).tolist()
        for row, ids in enumerate(output[:, longest:].tolist()):
            ids = ids[: caps[row]]
            ended = next((n for n, i in enumerate(ids) if i in self.eos_ids), None)
            length = len(ids) if ended is None else ended + 1
            reason = "length" if ended is None else "stop"
            rollouts.append(Rollout(prompts[row], ids[:length], reason, logprobs[row][:length]))
        return rollouts


class SeededDraw(transformers.LogitsProcessor):
    """Draws each row's next token with that row's own generator, then leaves only it possible.

    Gumbel-max: argmax(logits / T + Gumbel noise) is a sample of softmax(logits / T), so a row's
    rollout does not depend on its neighbours. Keeps the drawn tokens' T = 1 log-probs.
    """

    def __init__(
        self, seeds: list[int], *, device: Any, temperature: float, top_p: float, top_k: int
    ) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.top_p, self.top_k, self.device = temperature, top_p, top_k, device
        self.logprobs: list[Tensor] = []  # one (B,) per generated position

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()  # (B, V)
        kept = scores / (self.temperature or 1.0)
        if self.top_k:
            kept = transformers.TopKLogitsWarper(self.top_k)(input_ids, kept)
        if self.top_p < 1:
            kept = transformers.TopPLogitsWarper(self.top_p)(input_ids, kept)
        if self.temperature:
            uniform = [torch.rand(scores.shape[1], generator=g) for g in self.generators]
            kept = kept - torch.stack(uniform).to(self.device).clamp_min(1e-20).log().neg().log()
        chosen = kept.argmax(-1, keepdim=True)  # (B, 1)
        self.logprobs.append(scores.log_softmax(-1).gather(1, chosen)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the base model with LoRA folded into copies; `model` is not touched."""
    base = base_model(model)
    for name, parameter in base.named_parameters():
        weight = parameter.detach()
        if name.endswith(".base_layer.weight"):
            layer = base.get_submodule(name.removesuffix(".base_layer.weight"))
            weight = (weight + layer.get_delta_weight("default").detach()).to(weight.dtype)
        if ".lora_" not in name:
            yield name.replace(".base_layer", ""), weight
