"""transformers-cfg from PyPI: masks in `generate`, all particles in one static batch."""

from __future__ import annotations

import importlib.metadata
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, GPT2TokenizerFast
from transformers_cfg.generation.logits_process import GrammarConstrainedLogitsProcessor
from transformers_cfg.grammar_utils import IncrementalGrammarConstraint

from benchmark.json_task import EBNF, TEMPERATURE, TOP_P
from benchmark.worker import Peer, Timing, serve
from benchmark.workloads import DTYPE, Workload


class TransformersCfg(Peer):
    def __init__(self, model_path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, DTYPE)).eval()
        # It tells tokenizers apart by their class, loads them again by their path, and this class reads this model's.
        with tempfile.TemporaryDirectory() as folder:
            GPT2TokenizerFast.from_pretrained(model_path).save_pretrained(folder)
            self.tokenizer = GPT2TokenizerFast.from_pretrained(folder)
            self.grammar = IncrementalGrammarConstraint(EBNF, "root", self.tokenizer)

    def clear(self) -> None:
        self.grammar.reset()

    def run(self, workload: Workload) -> Timing:
        torch.manual_seed(workload.seed)
        started = time.perf_counter()
        prompts = torch.tensor([workload.prompt_ids] * workload.n_particles)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                top_k=0,
                max_new_tokens=workload.n_steps,
                max_time=workload.limit_s,
                pad_token_id=self.tokenizer.eos_token_id,
                logits_processor=[GrammarConstrainedLogitsProcessor(self.grammar)],
            )
        texts = self.tokenizer.batch_decode(out[:, prompts.shape[1] :], skip_special_tokens=True)
        total_s = time.perf_counter() - started
        return Timing(total_s, total_s, self.count(texts), texts=texts)

    def count(self, texts: list[str]) -> int:
        return sum(len(self.tokenizer.encode(text)) for text in texts)

    def version(self) -> str:
        return importlib.metadata.version("transformers-cfg")


if __name__ == "__main__":
    serve(TransformersCfg)
