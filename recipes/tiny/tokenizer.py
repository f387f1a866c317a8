"""The tokenizer of autoglm-tiny: byte-level BPE, 1536 entries, digits and Chinese characters one by one.

`python -m recipes.tiny.tokenizer DIR` trains it on the training split's text and saves processor files to DIR.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import NemotronAsrStreamingFeatureExtractor, PreTrainedTokenizerFast, ViTImageProcessorPil

from autoglm_lab.models.autoglm import AutoGlmProcessor, special_tokens
from autoglm_lab.models.autoglm.chat_format import ANSWER_TAGS
from recipes.tiny import conversations
from recipes.tiny.phrases import CODE_NAMES, COLOURS, PHRASES, SHAPES, SYSTEM_PROMPTS, TOPICS

VOCAB_SIZE = 1536


def corpus(seed: int, count: int) -> Iterator[str]:
    """Texts of training dialogues, and each training template a few times so that rare ones count."""
    rng = random.Random(seed)
    for _ in range(count):
        for maker in (conversations.text, conversations.image, conversations.dtmf, conversations.recall_short):
            for turn in maker(rng, "train").turns:
                yield from (turn.text, turn.answer, turn.thought)
    words = [
        word for table in (COLOURS, SHAPES) for names in table.values() for kinds in names.values() for word in kinds
    ]
    words += [*CODE_NAMES["en"], *CODE_NAMES["zh"], *TOPICS["en"], *TOPICS["zh"], *SYSTEM_PROMPTS]
    for _ in range(5):
        yield from words
        for languages in PHRASES.values():
            for splits in languages.values():
                yield from splits["train"]


def train_tokenizer(seed: int = 0, count: int = 1500) -> PreTrainedTokenizerFast:
    """A new tokenizer; any UTF-8 text encodes, since all 256 bytes are in its alphabet."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            # Characters stay apart, or whole clauses would become tokens and a new phrasing would look foreign.
            pre_tokenizers.Split(Regex(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus(seed, count), trainer)
    # The trainer marks all of them special; the answer's tags must survive decoding.
    plain = json.loads(core.to_str())
    for entry in plain["added_tokens"]:
        entry["special"] = entry["content"] not in ANSWER_TAGS
    core = Tokenizer.from_str(json.dumps(plain))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> AutoGlmProcessor:
    """The processor around a tokenizer: 224x224 images, 80 log-mels of 16 kHz sound."""
    return AutoGlmProcessor(ViTImageProcessorPil(), NemotronAsrStreamingFeatureExtractor(feature_size=80), tokenizer)


if __name__ == "__main__":
    make_processor(train_tokenizer()).save_pretrained(Path(sys.argv[1]))
