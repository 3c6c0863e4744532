"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, both ways."""
