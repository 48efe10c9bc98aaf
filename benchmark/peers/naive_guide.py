"""This package's `guide` over a plain function: a stretch is `generate` from the prompt on, one text after another."""

from __future__ import annotations

import time

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import genlm_backend
from benchmark.json_task import LARK, LOOKAHEAD, MAX_CORRECTIONS, TEMPERATURE, TOP_P
from benchmark.worker import Peer, Timing, serve
from benchmark.workloads import DTYPE, Workload
from genlm_backend.backtracking import guide, load_parser


class NaiveGuide(Peer):
    def __init__(self, model_path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, DTYPE)).eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
        self.parser = load_parser(LARK)

    def clear(self) -> None:
        pass  # nothing is kept from one call to the next

    def run(self, workload: Workload) -> Timing:
        torch.manual_seed(workload.seed)
        prompt = self.tokenizer.decode(workload.prompt_ids)
        started, results = time.perf_counter(), []
        for _ in range(workload.n_particles):
            if workload.limit_s is not None and time.perf_counter() - started > workload.limit_s:
                break  # a text that was begun is finished
            results.append(
                guide(
                    self.continued,
                    self.parser,
                    prompt,
                    max_grammar_corrections=MAX_CORRECTIONS,
                    stop_at="```",
                    save_html=False,
                )
            )
        total_s = time.perf_counter() - started
        texts = [result.response for result in results]
        corrections = sum(result.num_grammar_corrections for result in results)
        n_tokens = sum(len(self.tokenizer.encode(text)) for text in texts)
        return Timing(total_s, total_s, n_tokens, counts={"corrections": corrections}, texts=texts)

    def continued(self, prompt: str) -> str:
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                top_k=0,
                max_new_tokens=LOOKAHEAD,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def version(self) -> str:
        return genlm_backend.__version__


if __name__ == "__main__":
    serve(NaiveGuide)
