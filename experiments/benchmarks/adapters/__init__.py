"""Low-rank adapters of many tasks on one Llama, beside PEFT."""
