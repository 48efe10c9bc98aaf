"""Programs as the READMEs of backtracking-llm 0.3.1 and backtrack_sampler 3.2.1 show them: only their imports change.

Names of models point to a small folder, prompts and lengths are short; nothing else is changed.
"""

from __future__ import annotations

import json
import re

import pytest

pytestmark = pytest.mark.thorough

# backtracking-llm, "Library Usage in Python"
GENERATE = """
import logging
from backtracking_llm.generation import Generator
from backtracking_llm.decision import Repetition

logging.basicConfig(level=logging.INFO)

generator = Generator.from_pretrained('MODEL')

repetition_operator = Repetition(max_repetitions=2)

prompt = 'AI is constantly learning, learning, learning'

completion = generator.generate(
    prompt,
    operator=repetition_operator,
    max_new_tokens=50,
    backtrack_every_n=1
)

print(f"\\nPrompt: {prompt}")
print(f"Completion: {completion}")
"""

# backtracking-llm, its chat, its session and an operator of a user's
CHAT = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from backtracking_llm.chat import ChatPipeline
from backtracking_llm.decision import Operator, ProbabilityThreshold
from backtracking_llm.generation import GenerationSession, Generator


class NoCommas:
    def __call__(self, logits, probabilities, position, token):
        return 1 if ',' in token else 0

    def backtrack(self, n_tokens):
        pass


assert isinstance(NoCommas(), Operator)
model = AutoModelForCausalLM.from_pretrained('MODEL')
tokenizer = AutoTokenizer.from_pretrained('MODEL')
generator = Generator(model, tokenizer)
history = []
for question in ('Who are you?', 'And I?'):
    answer, history = ChatPipeline(generator).run_turn(
        question, history, operator=NoCommas(), max_new_tokens=10)
    assert ',' not in answer
print(len(history), 'messages')

session = GenerationSession(model, tokenizer, 'the river', ProbabilityThreshold(0.01), max_new_tokens=20)
while not session.done and session.generated_token_count < 10:
    result = session.step()
    if result.backtrack_count > 0 and session.generated_token_count > 5:
        session.backtrack(result.backtrack_count)
        break
print(session.get_decoded_text())
"""

# backtrack_sampler, "transformers"
SAMPLE = """
import torch
import time
from transformers import AutoTokenizer, AutoModelForCausalLM
from backtrack_sampler import BacktrackSampler, AntiSlopStrategy
from backtrack_sampler.provider.transformers_provider import TransformersProvider

model_name = "MODEL"
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name)
device = torch.device('cpu')

slops = ["**Warning", "I cannot", "I can't", "can not provide"]
messages = [
    {"role": "user", "content": "How wide is the river?"}
]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
provider = TransformersProvider(model, tokenizer, device)
strategy = AntiSlopStrategy(provider, slops)
sampler = BacktrackSampler(provider, strategy)

ts = time.time()

token_stream = sampler.generate(
    prompt=prompt,
    max_new_tokens=64,
    temperature=1
)

for token in token_stream:
    print(tokenizer.decode(token, skip_special_tokens=True), end="", flush=True)

print(f"\\nDuration: {time.time()-ts} seconds")
"""

# backtrack_sampler, "Chain strategy", on the provider of the program above, with a strategy of a user's
CHAIN = """
import torch
from transformers import AutoTokenizer, AutoModelForCausalLM
from backtrack_sampler import BacktrackSampler, ChainStrategy, ReplaceStrategy
from backtrack_sampler.provider.transformers_provider import TransformersProvider
from backtrack_sampler.strategy.base_strategy import BaseStrategy


class NoRepeat(BaseStrategy):
    def __init__(self, provider):
        self.provider = provider
        self.reset()

    def get_keep_index(self) -> int:
        return self.keep_index

    def on_logits(self, logits, continuation_tokens):
        if self.banned is not None:
            logits[:, self.banned] = float("-inf")
        return logits

    def on_probs(self, probs, continuation_tokens):
        return probs

    def on_next_token(self, continuation_tokens, probs):
        self.keep_index = len(continuation_tokens) - 1

    def backtrack(self, continuation_tokens):
        self.banned = None
        if continuation_tokens[-2:-1] == continuation_tokens[-1:]:
            self.banned = continuation_tokens.pop()
        return continuation_tokens

    def reset(self):
        self.keep_index = 0
        self.banned = None


tokenizer = AutoTokenizer.from_pretrained("MODEL")
model = AutoModelForCausalLM.from_pretrained("MODEL")
provider = TransformersProvider(model, tokenizer, torch.device('cpu'))
strategy1 = ReplaceStrategy(
    provider,
    find=[" So", "So", "e", "</think>"],
    replace=" But let me rephrase the request.",
    max_replacements=2,
)
strategy2 = ReplaceStrategy(
    provider,
    find=[" But", "But", "\\nBut"],
    replace="\\nOkay, so in conclusion",
    skip_tokens=30,
)
sampler = BacktrackSampler(provider, ChainStrategy([strategy1, NoRepeat(provider), strategy2]))
tokens = list(sampler.generate(prompt="the river", max_new_tokens=40))
assert all(a != b for a, b in zip(tokens, tokens[1:]))
print(len(tokens), provider.decode(tokens))
"""

PROGRAMS = {"generate": GENERATE, "chat": CHAT, "sample": SAMPLE, "chain": CHAIN}
_IMPORT = re.compile(r"^from backtrack(?:ing_llm|_sampler)[\w.]* import ", re.MULTILINE)


def migrated(program: str) -> str:
    """With its imports changed, as docs/backtracking/migration.md says."""
    return _IMPORT.sub("from genlm_backend.backtracking import ", program)


@pytest.fixture
def folder(tiny_llama, tiny_tokenizer_512, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer_512.save_pretrained(tmp_path / "tiny")
    settings = tmp_path / "tiny" / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    return tmp_path / "tiny"


def test_only_import_lines_are_changed():
    for program in PROGRAMS.values():
        before, after = program.splitlines(), migrated(program).splitlines()
        changed = [line for line, other in zip(before, after, strict=True) if line != other]
        assert changed and all(line.startswith("from backtrack") for line in changed)
        assert "backtracking_llm" not in "\n".join(after) and "backtrack_sampler" not in "\n".join(after)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("generate", "Completion: "),
        ("chat", "4 messages"),
        ("sample", "Duration: "),
        ("chain", ""),
    ],
)
def test_a_program_runs_with_only_its_imports_changed(name, says, folder, capsys):
    names: dict = {"__name__": "__main__"}
    exec(compile(migrated(PROGRAMS[name]).replace("MODEL", str(folder)), name, "exec"), names)
    said = capsys.readouterr().out
    assert says in said
    if name == "chain":
        n_tokens, text = said.split(maxsplit=1)
        assert 0 < int(n_tokens) <= 40 and text.strip()
    for owner in ("generator", "provider", "session"):
        if owner in names:
            names[owner].llm.close()
