"""Loss and task metrics of given parameters on a split."""

import jax
import numpy as np
import seqio

from finetune import data
from finetune.decode import make_greedy_decode
from finetune.loss import make_loss_fn


class Evaluator:
    """Evaluates a model with a Task's own vocabulary, postprocessor and metrics."""

    def __init__(self, model, task_name: str, max_length: int, batch_size: int):
        """Jits the loss and the decoder, each for one batch shape."""
        self._task = seqio.get_mixture_or_task(task_name)
        self._batch_size = batch_size
        self._loss = jax.jit(make_loss_fn(model))
        self._decode = make_greedy_decode(model, max_length)

    def loss(self, params, features: data.Arrays) -> float:
        """Mean cross entropy per target token, dropout off."""
        total = num_tokens = 0.0
        for batch in data.padded_batches(features, self._batch_size):
            mean, aux = self._loss(params, batch)
            total += float(mean) * float(aux["num_tokens"])
            num_tokens += float(aux["num_tokens"])
        return total / num_tokens

    def predict(self, params, features: data.Arrays) -> list[str]:
        """The greedy prediction for each example, as text."""
        vocabulary = self._task.output_features["targets"].vocabulary
        tokens = [
            np.asarray(self._decode(params, batch["encoder_input_tokens"]))
            for batch in data.padded_batches(features, self._batch_size)
        ]
        tokens = np.concatenate(tokens)[: len(features["encoder_input_tokens"])]
        return [vocabulary.decode(row) for row in tokens.tolist()]

    def metrics(self, params, split: data.Split) -> dict[str, float]:
        """The loss, and every metric the Task defines."""
        predictions = [
            self._task.postprocess_fn(text, example=None, is_target=False)
            for text in self.predict(params, split.features)
        ]
        results = {"loss": self.loss(params, split.features)}
        for metric_fn in self._task.metric_fns:
            results.update(metric_fn(split.accepted, predictions))
        return {name: float(value) for name, value in results.items()}
