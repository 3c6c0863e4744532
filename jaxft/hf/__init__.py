"""Hugging Face's side: folders, the Hub, tensors, tokenizers; knows no model, only named arrays."""
