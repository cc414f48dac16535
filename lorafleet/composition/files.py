"""The files of an adapter's folder, as PEFT names them."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
