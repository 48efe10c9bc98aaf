"""A byte-level BPE tokenizer with as many ids as the small random models have logits."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2, as in the small models' configurations
_CORPUS = (
    "Montreal is a city on an island in the river, and the river is wide where the city is.",
    "the quick brown fox jumps over the lazy dog, then the dog sleeps and the fox runs away",
    "def add(x, y):\n    return x + y\n\nfor i in range(10):\n    print(add(i, 1), end=' ')\n",
    "In the year 1642, on the 17th of May, some fifty people landed there; today it has 1,762,949 of them.",
    "Écoute la rivière: elle coule à côté de l'île, où les élèves français étudient déjà.",
    "Sequential Monte Carlo keeps many particles, weighs them, and resamples those whose weight has become small.",
    '{"name": "Marie", "born": 1867, "fields": ["physics", "chemistry"], "alive": false, "prize": null}',
    "Water freezes at 0 degrees and boils at 100; iron melts at 1538, and nothing is colder than minus 273.15.",
    "any model gives the probability of every next token, and every token has a probability under any model",
)


def build_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A tokenizer with all 256 bytes, three special tokens and merges up to `vocab_size` ids; the same each time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
