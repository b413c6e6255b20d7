"""T5's span corruption on words: pre-training without labels.

    "sharpness"   ->   inputs "sharp<X>ess", targets "<X>n<Y>"

As T5 has it, 15% of a sequence (at least one character) are hidden in spans of three on average: in
words this short, one span. The words are those of the pronunciation task's training split, all of
them, spelling only.
"""

import numpy as np
from finetune.data import Arrays
from finetune.task import SEQUENCE_LENGTH, pronunciations, split_of

NOISE_DENSITY = 0.15
EOS, FIRST, SECOND, OFFSET = 1, 262, 261, 3
"""The end token, the two sentinels (from the vocabulary's end, as T5's), and bytes' offset."""


def words() -> list[str]:
    """The training words."""
    return sorted(word for word in pronunciations() if split_of(word) == "train")


def corrupted(word: str, start: int) -> tuple[list[int], list[int]]:
    """Input and target tokens of a word whose hidden span begins at `start`."""
    tokens = [OFFSET + byte for byte in word.encode()]
    end = start + hidden(word)
    return (
        [*tokens[:start], FIRST, *tokens[end:], EOS],
        [FIRST, *tokens[start:end], SECOND, EOS],
    )


def hidden(word: str) -> int:
    """How many characters of a word are hidden."""
    return max(1, round(NOISE_DENSITY * len(word)))


def batch_at(corpus: list[str], seed: int, step: int, batch_size: int) -> Arrays:
    """The batch of a step: words and spans drawn by (seed, step) alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    pairs = []
    for index in generator.integers(len(corpus), size=batch_size):
        word = corpus[index]
        pairs.append(corrupted(word, int(generator.integers(len(word) - hidden(word) + 1))))
    inputs = _padded([pair[0] for pair in pairs], SEQUENCE_LENGTH["inputs"])
    targets = _padded([pair[1] for pair in pairs], SEQUENCE_LENGTH["targets"])
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets != 0).astype(np.float32),
    }


def _padded(rows: list[list[int]], length: int) -> np.ndarray:
    return np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
