"""Fine-tune a small T5.1.1 with and without SAM; the parts of `examples/finetune_t5.py`."""
