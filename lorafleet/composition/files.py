"""The files of an adapter's folder, as PEFT names them, and how large they may be."""

CONFIG_FILE = "adapter_config.json"
CONFIG_BYTES = 1024 * 1024
WEIGHTS_FILE = "adapter_model.safetensors"
HEADER_BYTES = 16 * 1024 * 1024
"""Of the safetensors header: 100,000 tensors and more."""
