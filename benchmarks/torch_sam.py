"""PyTorch's SAM as people run it, as a ratio to PyTorch's own plain step, on the same T5.

  pip install torch transformers && python benchmarks/torch_sam.py --json FILE
  python benchmarks/torch_sam.py --device cuda --bfloat16 --size base --batch 128 \\
    --inputs 512 --targets 62                                     # on a GPU

The widespread PyTorch SAMs are an optimizer of two steps around a second backward pass on the whole
batch; this is one of that form, written anew, on the T5.1.1 of the Transformers library. Compare
the ratio with that of `step_cost.py`, never the seconds: it is another implementation of T5.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5ForConditionalGeneration

RHO = 0.15
WAYS = ("plain", "SAM in two steps", "SAM in two steps, ascent on 1/4")
SIZES = {  # the models of step_cost.py
    "1M": {"d_model": 128, "num_heads": 2, "d_ff": 256, "num_layers": 2, "vocab_size": 1024},
    "10M": {"d_model": 256, "num_heads": 4, "d_ff": 1024, "num_layers": 3, "vocab_size": 4096},
    "small": {"d_model": 512, "num_heads": 6, "d_ff": 1024, "num_layers": 8, "vocab_size": 32128},
    "base": {"d_model": 768, "num_heads": 12, "d_ff": 2048, "num_layers": 12, "vocab_size": 32128},
}


class TwoStepSAM:
    """Foret et al. 2021: `ascend` goes to w + rho * g / ||g||, `descend` steps from w."""

    def __init__(self, parameters, base):
        """Keep the parameters in hand and the optimizer that takes the descent step."""
        self.parameters, self.base = list(parameters), base

    @torch.no_grad()
    def ascend(self) -> None:
        """Move to the adversarial point, remembering w."""
        norm = torch.stack([w.grad.norm() for w in self.parameters]).norm()
        scale = RHO / (norm + 1e-12)
        self.kept = [w.clone() for w in self.parameters]
        for w in self.parameters:
            w.add_(w.grad * scale)
        self.base.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        """Go back to w and take the base optimizer's step with the gradient in hand."""
        for w, kept in zip(self.parameters, self.kept, strict=True):
            w.copy_(kept)
        self.base.step()
        self.base.zero_grad()


def make_model(size: str) -> T5ForConditionalGeneration:
    """A T5.1.1 with random weights."""
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            **SIZES[size],
            d_kv=64,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def make_step(way: str, options: argparse.Namespace):
    """A function that takes one training step."""
    size, b, device = options.size, options.batch, torch.device(options.device)
    model = make_model(size).to(device)
    base = torch.optim.Adafactor(model.parameters(), lr=1e-3)
    sam = TwoStepSAM(model.parameters(), base)
    vocabulary = SIZES[size]["vocab_size"]
    source = torch.randint(1, vocabulary, (b, options.inputs), device=device)
    target = torch.randint(1, vocabulary, (b, options.targets), device=device)

    def backward(examples: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bfloat16):
            loss = model(input_ids=source[:examples], labels=target[:examples]).loss
        loss.backward()

    def step() -> None:
        if way == "plain":
            backward(b)
            base.step()
            base.zero_grad()
        else:
            backward(b if way == WAYS[1] else b // 4)
            sam.ascend()
            backward(b)
            sam.descend()
        if device.type == "cuda":
            torch.cuda.synchronize()  # a step is over when the device is done

    return step, sum(w.numel() for w in model.parameters())


def flops(step) -> int:
    """Multiply-adds' FLOPs of a step, by PyTorch's count."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="10M")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--inputs", type=int, default=48)
    parser.add_argument("--targets", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu", help="cuda, on a GPU")
    parser.add_argument("--bfloat16", action="store_true", help="compute in it, by autocast")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    made = {way: make_step(way, options) for way in WAYS}
    steps = {way: step for way, (step, _) in made.items()}
    counted = {way: flops(step) for way, step in steps.items()}  # a warm-up too
    seconds = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[way].append(time.perf_counter() - start)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    result = {
        "size": options.size,
        "parameters": made["plain"][1],
        "batch": {
            "examples": options.batch,
            "inputs": options.inputs,
            "targets": options.targets,
        },
        "rounds": options.rounds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "compute": "bfloat16" if options.bfloat16 else "float32",
        "threads": torch.get_num_threads(),
        "plain": {"seconds": medians["plain"], "flops": counted["plain"]},
        "ratios_to_plain": {
            way: {
                "flops": counted[way] / counted["plain"],
                "wall_clock": medians[way] / medians["plain"],
            }
            for way in WAYS
        },
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
