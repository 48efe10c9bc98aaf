"""grammar-guide from PyPI, successor of speculative-grammar-backtracking: one text after another, as it has no more."""

from __future__ import annotations

import importlib.metadata
import time

import grammar_guide
import guidance
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

from benchmark.json_task import LARK, LOOKAHEAD, MAX_CORRECTIONS, TEMPERATURE, TOP_P
from benchmark.worker import Peer, Timing, serve
from benchmark.workloads import DTYPE, Workload


class GrammarGuide(Peer):
    def __init__(self, model_path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_path, torch_dtype=getattr(torch, DTYPE)).eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
        # guidance asks the hub for GPT-2's tokenizer unless this is there
        self.tokenizer.byte_decoder = {character: byte for byte, character in bytes_to_unicode().items()}
        # guidance has a model of its own to choose candidates, and reads no bfloat16
        chooser = AutoModelForCausalLM.from_pretrained(model_path, torch_dtype=torch.float32).eval()
        self.chooser = guidance.models.Transformers(chooser, self.tokenizer, echo=False)
        self.parser = grammar_guide.load_parser(LARK)

    def clear(self) -> None:
        pass  # nothing is kept from one call to the next

    def run(self, workload: Workload) -> Timing:
        torch.manual_seed(workload.seed)
        prompt = self.tokenizer.decode(workload.prompt_ids)
        started, texts, n_failed = time.perf_counter(), [], 0
        for _ in range(workload.n_particles):
            if workload.limit_s is not None and time.perf_counter() - started > workload.limit_s:
                break  # a text that was begun is finished
            try:
                texts.append(self.write(prompt))
            except Exception as error:  # a text that it cannot write is none; the others count
                print(f"{type(error).__name__}: {error}")
                texts.append("")
                n_failed += 1
        total_s = time.perf_counter() - started
        n_tokens = sum(len(self.tokenizer.encode(text)) for text in texts)
        return Timing(total_s, total_s, n_tokens, counts={"raised": n_failed}, texts=texts)

    def write(self, prompt: str) -> str:
        return grammar_guide.guide(
            self.model,
            tokenizer=self.tokenizer,
            parser=self.parser,
            prompt=prompt,
            target_model=self.chooser,
            stop_at=["```", "}"],
            max_grammar_corrections=MAX_CORRECTIONS,
            token_lookahead=LOOKAHEAD,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            save_html=False,
            verbose=False,
        ).response

    def version(self) -> str:
        return importlib.metadata.version("grammar-guide")


if __name__ == "__main__":
    serve(GrammarGuide)
